"""Weight-only int8: the numbers, what is loaded, what is computed with it, what is refused, and its quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miinb import models
from miinb.demo import fetch
from miinb.engine import weights as weights_module
from miinb.engine.decoder import Decoder, Operators
from miinb.engine.perplexity import perplexity
from miinb.engine.policies import POLICIES
from miinb.engine.quantize import Quantizer, fit_int4, grouped, round_int4
from miinb.engine.readers import Region
from miinb.engine.spec import DecoderSpec, linear_shape
from miinb.engine.weights import load_weights, tensors, weights_bytes
from miinb.errors import BrokenCheckpoint, InvalidValue
from miinb.kernels.cpu import CpuKernels
from miinb.kernels.formats import GROUP, dequantize
from miinb.kernels.linear import PackedLinear
from tests.engine.conftest import real_text
from tests.engine.test_loading import answer, edit, load, stand_in_tokenizer

Tiny = Callable[[str], tuple[Any, Path]]


def quantize(weight: Tensor, bits: int = 8, **options: Any) -> tuple[Tensor, Tensor, Quantizer]:
    quantizer = Quantizer(bits, **options)
    numbers, scale = quantizer.empty(*weight.shape, weight.device)
    quantizer.quantize(weight, numbers, scale)
    return numbers, scale, quantizer


@pytest.mark.parametrize("columns", [7, 64, 100, 192])
def test_rounding_is_to_the_nearest(columns: int) -> None:
    weight = torch.randn(5000 // columns, columns, generator=torch.Generator().manual_seed(columns))
    numbers, scale, quantizer = quantize(weight)
    assert scale.shape == (len(weight), -(-columns // GROUP))
    assert numbers.abs().max() == 127
    back = dequantize(numbers, scale)
    step = scale.repeat_interleave(GROUP, 1)[:, :columns]
    assert ((back - weight).abs() <= 0.5001 * step).all()
    assert quantizer.rounding == pytest.approx(float((back - weight).norm() / weight.norm()), rel=1e-3)
    again, scales, _ = quantize(back)
    assert torch.equal(again, numbers)
    assert torch.allclose(scales, scale)


@pytest.mark.parametrize("columns", [7, 64, 100, 192])
def test_int8_of_a_gpu_is_that_of_a_cpu_but_for_its_scales(columns: int) -> None:
    weight = torch.randn(30, columns, generator=torch.Generator().manual_seed(columns))
    words, scale, quantizer = quantize(weight, words=True)
    plain, exact, _ = quantize(weight)
    assert (words.dtype, scale.dtype) == (torch.int32, torch.bfloat16)
    assert torch.allclose(scale.float(), exact, rtol=2**-8)
    back = dequantize(words, scale)[:, :columns]
    step = scale.float().repeat_interleave(GROUP, 1)[:, :columns]
    assert ((back - weight).abs() <= torch.where(back.abs() > 126.5 * step, 1.0, 0.5001) * step).all()
    assert quantizer.rounding == pytest.approx(float((back - weight).norm() / weight.norm()), rel=1e-3)
    assert (back - dequantize(plain, exact)).abs().max() <= 1.01 * step.max()


@pytest.mark.parametrize("columns", [7, 64, 100, 192])
def test_int4_loses_little_of_a_group(columns: int) -> None:
    weight = torch.randn(50, columns, generator=torch.Generator().manual_seed(columns)) + 0.3
    words, scale, quantizer = quantize(weight, 4)
    assert scale.shape == (50, -(-columns // GROUP), 2)
    back = dequantize(words, scale)[:, :columns]
    assert quantizer.rounding == pytest.approx(float((back - weight).norm() / weight.norm()), rel=1e-3)
    assert quantizer.rounding < 0.1
    groups = grouped(weight)
    plain = torch.stack(((groups.amax(-1) - groups.amin(-1)) / 15, groups.amin(-1)), -1).bfloat16()
    step, low = plain.float()[..., None].unbind(-2)
    whole = (round_int4(groups, plain) * step + low).flatten(1)[:, :columns]
    assert (back - weight).norm() <= (whole - weight).norm(), "the whole range is only one of those tried"


def test_int4_of_equal_weights_is_exact_and_what_is_not_finite_is_seen() -> None:
    weight = torch.full((4, 128), 0.5)
    weight[0] = 0
    weight[1, 3], weight[2, 70] = float("nan"), float("inf")
    words, scale, _ = quantize(weight, 4)
    finite = scale.isfinite().all(-1)
    assert finite.tolist() == [[True, True], [False, True], [True, False], [True, True]]
    assert torch.equal(dequantize(words, scale)[[0, 3]], weight[[0, 3]])


def test_what_counts_more_loses_less() -> None:
    groups = torch.randn(200, 1, GROUP, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(1, GROUP)
    importance[0, :8] = 100.0

    def lost(pair: Tensor) -> Tensor:
        step, low = pair.float()[..., None].unbind(-2)
        return (((round_int4(groups, pair) * step + low - groups).square()) * importance).sum()

    assert lost(fit_int4(groups, importance)) < lost(fit_int4(groups))


def test_zeros_stay_and_what_is_not_finite_is_seen() -> None:
    weight = torch.ones(4, 128)
    weight[0] = 0
    weight[1, 3], weight[2, 70] = float("nan"), float("inf")
    numbers, scale, _ = quantize(weight)
    assert not numbers[0].any()
    assert scale.isfinite().tolist() == [[True, True], [False, True], [True, False], [True, True]]
    back = dequantize(numbers, scale)
    assert torch.equal(back[0], weight[0])
    assert not back[1, :64].isfinite().any()
    assert back[3].allclose(weight[3])


def decoder(folder: Path, dtype: str, ops: Operators | None = None, **options: Any) -> Decoder:
    info = models.inspect(folder)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    weights = load_weights(info, policy, spec, dtype=dtype, device=torch.device("cpu"), **options)
    return Decoder(spec, weights, ops=ops or operators())


def operators() -> Operators:
    kernels = CpuKernels(torch.float32)
    return Operators(**{name: getattr(kernels, name) for name in Operators._fields})


def widen(value: Any, spec: DecoderSpec) -> Any:
    """Weights with every quantized matrix in fp32 again."""
    for name in value.__dataclass_fields__:
        part = getattr(value, name)
        if isinstance(part, PackedLinear) and part.scale is not None:
            columns = linear_shape(spec, name)[1]
            setattr(value, name, PackedLinear(dequantize(part.weight, part.scale)[:, :columns].contiguous(), part.bias))
        elif isinstance(part, list):
            for item in part:
                widen(item, spec)
    return value


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 in words, though the tensors are on a CPU."""
    made = weights_module.quantizers
    monkeypatch.setattr(weights_module, "quantizers", lambda dtype, device: made(dtype, torch.device("cuda")))


@pytest.mark.parametrize(("dtype", "words"), [("int8", False), ("int8", True), ("int4", True)])
@pytest.mark.parametrize(
    "name", ["llama", "llama-tied-mqa", "llama-odd", "qwen3", "gpt2", "gpt2-untied", "gptj", "gpt_neox", "opt", "bloom"]
)
def test_every_family_computes_with_what_was_rounded(
    tiny: Tiny, name: str, dtype: str, words: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny(name)[1]
    if words:
        as_on_a_gpu(monkeypatch)
    ours, plain, exact = decoder(folder, dtype), decoder(folder, dtype), decoder(folder, "fp32")
    embed, scale = plain.weights.embed, plain.weights.embed_int8_scale
    assert scale is not None
    spec = plain.spec
    embed = dequantize(embed, scale)[:, : spec.embed_size or spec.hidden_size].contiguous()
    plain.weights.embed, plain.weights.embed_int8_scale = embed, None
    plain.weights = widen(plain.weights, spec)
    ids = torch.arange(3, 60).tolist()
    right = perplexity(plain, ids)
    assert perplexity(ours, ids) == pytest.approx(right, rel=1e-4)
    assert perplexity(exact, ids) == pytest.approx(right, rel=0.2 if dtype == "int8" else 0.8)
    assert (0 if dtype == "int8" else 0.03) < ours.weights.rounding < (0.02 if dtype == "int8" else 0.12)
    kinds = {
        tensor.dtype for tensor in tensors(ours.weights) if tensor.dim() >= 2 and tensor is not ours.weights.positions
    }
    # numbers and their scales
    assert kinds == ({torch.int32, torch.bfloat16} if words else {torch.int8, torch.float32})
    assert weights_bytes(ours.weights) < 0.45 * weights_bytes(exact.weights)
    wide = sum(tensor.nbytes for tensor in tensors(ours.weights) if tensor.dtype == torch.float32 and words)
    size = weights_bytes(ours.weights) - wide // 2  # what is not quantized has two bytes on a GPU
    assert models.inspect(folder).weights_bytes(dtype, on_gpu=words) == size


@pytest.mark.parametrize("name", ["llama", "llama-tied-mqa", "gpt2", "gptj", "opt-350m", "gemma2"])
@pytest.mark.parametrize("tables", [True, False])
def test_the_size_of_int4_is_known_before(tiny: Tiny, name: str, tables: bool) -> None:
    folder = tiny(name)[1]
    weights = decoder(folder, "int4", quantize_head=tables).weights
    assert models.inspect(folder).weights_bytes("int4", quantize_head=tables) == weights_bytes(weights)
    assert weights.embed.dtype == (torch.int8 if tables else torch.float32)


def test_a_tied_head_shares_the_embedding(tiny: Tiny) -> None:
    weights = decoder(tiny("llama-tied-mqa")[1], "int8").weights
    assert weights.head.weight.data_ptr() == weights.embed.data_ptr()
    assert weights.embed.dtype == torch.int8


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantized_deployment(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    executor, _ = load(folder, tmp_path, dtype=dtype, max_batch=4)
    plan = executor.info.plan
    assert (executor.info.engine, executor.info.dtype, plan.dtype) == ("optimized", dtype, dtype)
    lines = {line.what: f"{line.choice} {line.reason}" for line in plan.lines}
    assert "%" in lines[dtype]
    assert "passed" in lines["parity"]
    assert "every step" in lines["kernels"]
    assert len(answer(executor, [5, 6, 7], 20)) == 20


def test_what_int8_cannot_have_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    with pytest.raises(InvalidValue, match="optimized engine"):
        load(folder, tmp_path, dtype="int8", engine="baseline")
    unknown = edit(folder, tmp_path / "more", lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    with pytest.raises(InvalidValue, match=r"extra\.weight"):
        load(unknown, tmp_path, dtype="int8")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    with pytest.raises(BrokenCheckpoint, match=r"layers\.1\.mlp\.up_proj"):
        load(edit(folder, tmp_path / "nan", spoil), tmp_path, dtype="int8")


@pytest.mark.slow
@pytest.mark.models
def test_perplexity_of_a_real_model() -> None:
    """SmolLM2 on Python's own documentation: int8 may cost half a percent."""
    folder = fetch.smollm2(quiet=True)
    ids = real_text(folder)
    exact, rounded = (perplexity(decoder(folder, dtype), ids) for dtype in ("fp32", "int8"))
    assert 2 < exact < 40
    assert rounded < 1.005 * exact


@pytest.mark.parametrize("rows", [slice(0, 9), slice(3, 5)])
def test_a_region_is_read_in_slices(rows: slice) -> None:
    region = Region((9, 6), rows, slice(0, 6))
    found = list(region.slices(12))
    assert [last - first for first, last, _ in found[:-1]] == [2] * (len(found) - 1)
    assert [part.rows.start for _, _, part in found] == list(range(rows.start, rows.stop, 2))
    assert found[-1][2].rows.stop == rows.stop
    assert len(list(Region((9, 6), rows, slice(0, 6), transposed=True).slices(12))) == 1
