"""Quantized weights: the numbers, what is loaded, what is computed with it, what is refused, and its quality."""

from __future__ import annotations

import contextlib
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
from miinb.engine.finite import check_finite
from miinb.engine.perplexity import perplexity
from miinb.engine.policies import POLICIES
from miinb.engine.quantize import Quantizer, fit_int4, grouped, round_int4
from miinb.engine.readers import Region
from miinb.engine.spec import DecoderSpec, linear_shape
from miinb.engine.weights import load_weights, tensors, weights_bytes
from miinb.errors import BrokenCheckpoint, InvalidValue
from miinb.kernels.cpu import CpuKernels
from miinb.kernels.formats import FP8, FP8_MAX, GROUP, dequantize, unpack_fp8
from miinb.kernels.linear import PackedLinear
from tests.engine.conftest import real_text
from tests.engine.test_loading import answer, edit, load, stand_in_tokenizer

Tiny = Callable[[str], tuple[Any, Path]]


def quantize(weight: Tensor, kind: Any = "int8", **options: Any) -> tuple[Tensor, Tensor, Quantizer]:
    quantizer = Quantizer(kind, **options)
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
    words, scale, quantizer = quantize(weight, "int4")
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
    words, scale, _ = quantize(weight, "int4")
    finite = scale.isfinite().all(-1)
    assert finite.tolist() == [[True, True], [False, True], [True, False], [True, True]]
    assert torch.equal(dequantize(words, scale)[[0, 3]], weight[[0, 3]])


@pytest.mark.parametrize("columns", [7, 64, 100, 192])
def test_fp8_is_rounded_to_the_nearest_and_a_rows_largest_is_fp8s_largest(columns: int) -> None:
    weight = torch.randn(5000 // columns, columns, generator=torch.Generator().manual_seed(columns))
    weight *= torch.logspace(-3, 3, len(weight))[:, None]  # rows have scales of their own
    numbers, scale, quantizer = quantize(weight, "fp8")
    assert (numbers.dtype, scale.dtype, scale.shape) == (FP8, torch.float32, (len(weight),))
    assert numbers.shape[1] == -(-columns // 16) * 16
    assert not unpack_fp8(numbers).float()[:, columns:].any()
    assert (numbers.float().abs().amax(1) == FP8_MAX).all()
    back = dequantize(numbers, scale)[:, :columns]
    half = (weight.abs() / 16).clamp(min=2**-10 * scale[:, None])  # of the step between neighbors
    assert ((back - weight).abs() <= 1.0001 * half).all()
    assert quantizer.rounding == pytest.approx(float((back - weight).norm() / weight.norm()), rel=1e-3)
    assert 0.015 < quantizer.rounding < 0.035
    again, scales, _ = quantize(back, "fp8")
    assert torch.equal(again.float(), numbers.float())
    assert torch.allclose(scales, scale)


def test_fp8_of_zeros_is_zero_and_what_is_not_finite_is_seen() -> None:
    weight = torch.ones(4, 100)
    weight[0] = 0
    weight[1, 3], weight[2, 70] = float("nan"), float("inf")
    numbers, scale, _ = quantize(weight, "fp8")
    assert scale.isfinite().tolist() == [True, False, False, True]
    assert torch.equal(dequantize(numbers, scale)[[0, 3], :100], weight[[0, 3]])


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


def wide_bytes(weights: Any) -> int:
    """Bytes of what is in fp32 here, and has two bytes a number on a GPU: all but the scales of fp8."""
    scales = {
        id(packed.scale)
        for layer in [weights, *weights.layers]
        for packed in (getattr(layer, name) for name in layer.__dataclass_fields__)
        if isinstance(packed, PackedLinear)
    }
    return sum(x.nbytes for x in tensors(weights) if x.dtype == torch.float32 and id(x) not in scales)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 in words, though the tensors are on a CPU."""
    made = weights_module.quantizers
    monkeypatch.setattr(weights_module, "quantizers", lambda dtype, device: made(dtype, torch.device("cuda")))


@pytest.mark.parametrize(
    ("dtype", "words"), [("int8", False), ("int8", True), ("int4", True), ("fp8", False), ("fp8", True)]
)
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
    embed, scale = plain.weights.embed, plain.weights.embed_scale
    assert scale is not None
    spec = plain.spec
    embed = dequantize(embed, scale)[:, : spec.embed_size or spec.hidden_size].contiguous()
    plain.weights.embed, plain.weights.embed_scale = embed, None
    plain.weights = widen(plain.weights, spec)
    ids = torch.arange(3, 60).tolist()
    right = perplexity(plain, ids)
    assert perplexity(ours, ids) == pytest.approx(right, rel=1e-4)
    near, least, most = {"int8": (0.2, 0, 0.02), "int4": (0.8, 0.03, 0.12), "fp8": (0.4, 0.01, 0.03)}[dtype]
    assert perplexity(exact, ids) == pytest.approx(right, rel=near)
    assert least < ours.weights.rounding < most
    norms = [layer.attn_norm for layer in ours.weights.layers]  # of a parallel block both of a layer's
    plain_ones = {id(tensor) for norm in norms for tensor in (norm.weight, norm.bias)} | {id(ours.weights.positions)}
    kinds = {tensor.dtype for tensor in tensors(ours.weights) if tensor.dim() >= 2 and id(tensor) not in plain_ones}
    # numbers and their scales
    wanted = {torch.int32, torch.bfloat16} if words else {torch.int8, torch.float32}
    assert kinds == (wanted | {FP8} if dtype == "fp8" else wanted)
    assert weights_bytes(ours.weights) < 0.45 * weights_bytes(exact.weights)
    size = weights_bytes(ours.weights) - (wide_bytes(ours.weights) // 2 if words else 0)
    assert models.inspect(folder).weights_bytes(dtype, on_gpu=words) == size


@pytest.mark.parametrize("dtype", ["int4", "fp8"])
@pytest.mark.parametrize("name", ["llama", "llama-tied-mqa", "gpt2", "gptj", "opt-350m", "gemma2"])
@pytest.mark.parametrize("tables", [True, False])
def test_a_quantized_size_is_known_before(tiny: Tiny, name: str, tables: bool, dtype: str) -> None:
    folder = tiny(name)[1]
    weights = decoder(folder, dtype, quantize_head=tables).weights
    assert models.inspect(folder).weights_bytes(dtype, quantize_head=tables) == weights_bytes(weights)
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


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_neox"])
def test_two_ranks_have_the_rows_of_one_in_fp8(tiny: Tiny, name: str) -> None:
    """A rank's rows are those of the whole; a rank's columns have scales of their own."""
    info = models.inspect(tiny(name)[1])
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)

    def load_all(dtype: str, **options: int) -> Any:
        return load_weights(info, policy, spec, dtype=dtype, device=torch.device("cpu"), **options)

    exact, whole = load_all("fp32").layers[1], load_all("fp8").layers[1]
    ranks = [load_all("fp8", rank=rank, ranks=2).layers[1] for rank in range(2)]
    for part, dim in (("down", 1), ("out", 1), ("up", 0), ("qkv", 0)):
        wanted = getattr(exact, part).weight
        pieces = [getattr(layer, part) for layer in ranks]
        if dim == 1:
            half = wanted.shape[1] // 2
            found = torch.cat([dequantize(piece.weight, piece.scale)[:, :half] for piece in pieces], 1)
            assert ((found - wanted).abs() <= 0.07 * wanted.abs() + 1e-4 * wanted.abs().max()).all(), part
        else:
            rows = {tuple(row) for row in getattr(whole, part).weight.view(torch.uint8).tolist()}
            assert {tuple(row) for piece in pieces for row in piece.weight.view(torch.uint8).tolist()} == rows, part


def test_what_is_not_finite_in_fp8_is_named(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 4] = float("inf")

    for folder, spoiled in ((tiny("llama")[1], False), (edit(tiny("llama")[1], tmp_path / "inf", spoil), True)):
        weights, info = decoder(folder, "fp8").weights, models.inspect(folder)
        with pytest.raises(BrokenCheckpoint, match=name) if spoiled else contextlib.nullcontext():
            check_finite(tensors(weights), info, weights.dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp8_on_a_cpu_is_refused_by_the_rank_too(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    with pytest.raises(InvalidValue, match=r"a CPU has no fp8\. Use dtype='int8'"):
        load(folder, tmp_path, dtype="fp8")


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
@pytest.mark.parametrize(("dtype", "cost"), [("int8", 1.005), ("fp8", 1.03)])
def test_perplexity_of_a_real_model(dtype: str, cost: float) -> None:
    """SmolLM2 on Python's own documentation."""
    folder = fetch.smollm2(quiet=True)
    ids = real_text(folder)
    exact, rounded = (perplexity(decoder(folder, each), ids) for each in ("fp32", dtype))
    assert 2 < exact < 40
    assert rounded < cost * exact


@pytest.mark.parametrize("rows", [slice(0, 9), slice(3, 5)])
def test_a_region_is_read_in_slices(rows: slice) -> None:
    region = Region((9, 6), rows, slice(0, 6))
    found = list(region.slices(12))
    assert [last - first for first, last, _ in found[:-1]] == [2] * (len(found) - 1)
    assert [part.rows.start for _, _, part in found] == list(range(rows.start, rows.stop, 2))
    assert found[-1][2].rows.stop == rows.stop
    assert len(list(Region((9, 6), rows, slice(0, 6), transposed=True).slices(12))) == 1


@pytest.mark.parametrize(
    ("dtype", "checkpoint", "on_gpu"),
    [("int8", "fp16", torch.float16), ("int4", "fp32", torch.bfloat16), ("fp8", "fp16", torch.bfloat16)],
)
def test_what_is_computed_in(dtype: str, checkpoint: str, on_gpu: torch.dtype) -> None:
    """PyTorch's product of fp8 with scales of rows is one in bf16."""
    assert weights_module.activation_dtype(dtype, torch.device("cuda"), checkpoint) == on_gpu
    assert weights_module.activation_dtype(dtype, torch.device("cpu"), checkpoint) == torch.float32
