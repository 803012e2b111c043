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
from miinb.engine.decoder import Decoder, Operators
from miinb.engine.perplexity import perplexity
from miinb.engine.policies import POLICIES
from miinb.engine.quantize import Quantizer
from miinb.engine.weights import load_weights, tensors, weights_bytes
from miinb.errors import BrokenCheckpoint, InvalidValue
from miinb.kernels.cpu import CpuKernels
from miinb.kernels.formats import GROUP, dequantize
from miinb.kernels.linear import PackedLinear
from tests.engine.conftest import real_text
from tests.engine.test_loading import answer, edit, load, stand_in_tokenizer

Tiny = Callable[[str], tuple[Any, Path]]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Quantizer]:
    quantizer = Quantizer()
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


def decoder(folder: Path, dtype: str, ops: Operators | None = None) -> Decoder:
    info = models.inspect(folder)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    weights = load_weights(info, policy, spec, dtype=dtype, device=torch.device("cpu"))
    return Decoder(spec, weights, ops=ops or operators())


def operators() -> Operators:
    kernels = CpuKernels(torch.float32)
    return Operators(**{name: getattr(kernels, name) for name in Operators._fields})


def widen(value: Any) -> Any:
    """Weights with every quantized matrix in fp32 again."""
    for name in value.__dataclass_fields__:
        part = getattr(value, name)
        if isinstance(part, PackedLinear) and part.scale is not None:
            setattr(value, name, PackedLinear(dequantize(part.weight, part.scale), part.bias))
        elif isinstance(part, list):
            for item in part:
                widen(item)
    return value


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied-mqa", "llama-odd", "qwen3", "gpt2", "gpt2-untied", "gptj", "gpt_neox", "opt", "bloom"]
)
def test_every_family_computes_with_what_was_rounded(tiny: Tiny, name: str) -> None:
    folder = tiny(name)[1]
    ours, plain, exact = decoder(folder, "int8"), decoder(folder, "int8"), decoder(folder, "fp32")
    embed, scale = plain.weights.embed, plain.weights.embed_int8_scale
    assert scale is not None
    plain.weights.embed, plain.weights.embed_int8_scale = dequantize(embed, scale), None
    plain.weights = widen(plain.weights)
    ids = torch.arange(3, 60).tolist()
    right = perplexity(plain, ids)
    assert perplexity(ours, ids) == pytest.approx(right, rel=1e-4)
    assert perplexity(exact, ids) == pytest.approx(right, rel=0.2)
    assert 0 < ours.weights.rounding < 0.02
    kinds = {
        tensor.dtype for tensor in tensors(ours.weights) if tensor.dim() == 2 and tensor is not ours.weights.positions
    }
    assert kinds == {torch.int8, torch.float32}  # numbers and their scales
    assert weights_bytes(ours.weights) < 0.45 * weights_bytes(exact.weights)


def test_a_tied_head_shares_the_embedding(tiny: Tiny) -> None:
    weights = decoder(tiny("llama-tied-mqa")[1], "int8").weights
    assert weights.head.weight.data_ptr() == weights.embed.data_ptr()
    assert weights.embed.dtype == torch.int8


def test_a_deployment_in_int8(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    executor, _ = load(folder, tmp_path, dtype="int8", max_batch=4)
    plan = executor.info.plan
    assert (executor.info.engine, executor.info.dtype, plan.dtype) == ("optimized", "int8", "int8")
    lines = {line.what: f"{line.choice} {line.reason}" for line in plan.lines}
    assert "%" in lines["int8"]
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
