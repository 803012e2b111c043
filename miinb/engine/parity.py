"""The check at start-up: fused layers against plain references, on the weights that were loaded.

First, middle and last layer and the head compute a prompt's chunk and steps of single tokens twice. It finds kernels
that are wrong on this device or for these shapes; that the loaded weights are the right ones is for `miinb check` to
say.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miinb.engine.decoder import Decoder, Operators
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.step_batch import StepBatch, StepRow
from miinb.kernels import reference
from miinb.kernels.dispatch import plain_operators, use_triton
from miinb.kernels.embedding import token_embedding
from miinb.kernels.formats import FP8
from miinb.kernels.fp8_many import makes_rows_fp8
from miinb.kernels.linear import PackedLinear

#: Largest difference that is taken, relative to the largest value: rounding of the dtype, several operators deep.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
#: The same where the cache is fp8: a last bit that differs may be a whole step of fp8, 6 %, in a key or a value.
FP8_TOLERANCE = 0.1
#: Tokens of the prompt's chunk: above what the small-batch kernels take, so that both kinds are run.
PROMPT_TOKENS = 20
#: Rows that become fp8 for a product with fp8 weights.
MANY_ROWS = 80


def _linear(x: Tensor, packed: PackedLinear, **options: Any) -> Tensor:
    return reference.linear(x, packed.weight, packed.bias, scale=packed.scale, **options)


def _greedy_head(x: Tensor, packed: PackedLinear) -> tuple[Tensor, Tensor]:
    return reference.argmax(_linear(x, packed))


def _token_embedding(*inputs: Any) -> Tensor:
    with plain_operators():
        return token_embedding(*inputs)


def _gated_linear(x: Tensor, packed: PackedLinear, kind: str) -> Tensor:
    return reference.gated(_linear(x, packed), kind)


REFERENCE = Operators(
    rms_norm=reference.rms_norm,
    layer_norm=reference.layer_norm,
    rope_append=reference.rope_append,
    paged_attention=reference.paged_attention,
    decode_attention=None,
    linear=_linear,
    gated_linear=_gated_linear,
    greedy_head=_greedy_head,
    early_memory=lambda *_, **__: None,
    token_embedding=_token_embedding,
)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What the check saw.

    Attributes:
        error: the largest difference, relative to the reference's largest value.
        tolerance: what is taken for the dtype.
        where: the place of the largest difference ("layer 0, decode"); of none it means nothing.
        seconds: how long the check took.
    """

    error: float
    tolerance: float
    where: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the fused path may be used."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        if not self.error:  # a device whose operators are the references themselves, say
            return f"no number differs from the references' ({self.tolerance:.0e} allowed)"
        return f"largest difference {self.error:.1e} of {self.tolerance:.0e} allowed ({self.where})"


@torch.inference_mode()
def check(decoder: Decoder, page_tokens: int, kv_dtype: torch.dtype | None = None) -> ParityReport:
    """Compare the decoder's fused operators with the references on its own weights.

    Args:
        decoder: the rank's.
        page_tokens: of the cache.
        kv_dtype: of the cache; None: the weights'.
    """
    kv_dtype = kv_dtype or decoder.weights.dtype
    started = time.monotonic()
    plain = Decoder(decoder.spec, decoder.weights, group=decoder.group, ops=REFERENCE)
    last = decoder.spec.layers - 1
    worst, where = 0.0, "nowhere"
    for index in sorted({0, last // 2, last}):
        outputs = _layer_outputs(index, decoder, plain, page_tokens, kv_dtype)
        outputs += products_of_many(decoder.ops.linear, decoder.weights.layers[index], decoder.weights.dtype)
        for step, ours, theirs in outputs:
            error = difference(ours, theirs)
            if error > worst:
                worst, where = error, f"layer {index}, {step}"
    x = _head_input(decoder)
    error = difference(decoder.ops.linear(x, decoder.weights.head), plain.ops.linear(x, decoder.weights.head))
    if error > worst:
        worst, where = error, "head"
    allowed = FP8_TOLERANCE if kv_dtype == FP8 else TOLERANCE[x.dtype]
    return ParityReport(worst, allowed, where, time.monotonic() - started)


def _head_input(decoder: Decoder) -> Tensor:
    """Three rows of the head: of the right width and size."""
    head, width = decoder.weights.head, decoder.spec.embed_size or decoder.spec.hidden_size
    rows, scale = head.weight[:3], head.scale
    if scale is None:
        return rows.clone()
    return reference.dequantize(rows, scale[:3])[:, :width].to(decoder.weights.dtype)


def batches(decoder: Decoder, page_tokens: int) -> dict[str, StepBatch]:
    """The steps of the check: a chunk of a prompt, and the token after it, alone and as two rows."""
    device = decoder.weights.embed.device
    pages = list(range(-(-(PROMPT_TOKENS + 1) // page_tokens)))
    tokens = [(7 * i + 3) % decoder.weights.embed.shape[0] for i in range(PROMPT_TOKENS + 1)]
    count = min(PROMPT_TOKENS, decoder.spec.max_length - 1)
    chunk, token = StepRow(tokens[:count], 0, pages), StepRow(tokens[count : count + 1], count, pages)
    steps = {"prefill": [chunk], "decode": [token], "decode of two rows": [token, token]}
    return {name: StepBatch.of_rows(rows, page_tokens, device) for name, rows in steps.items()}


def _layer_outputs(
    index: int, decoder: Decoder, plain: Decoder, page_tokens: int, kv_dtype: torch.dtype
) -> list[tuple[str, Tensor, Tensor]]:
    """(step, fused output, reference output) of one layer."""
    page_tokens = min(page_tokens, 64)  # a CPU's page is a whole slot
    steps = batches(decoder, page_tokens)
    pages = int(steps["prefill"].block_table.shape[1])
    outputs: dict[str, list[Tensor]] = {name: [] for name in steps}
    for model in (decoder, plain):
        cache = one_layer_cache(model, pages, page_tokens, kv_dtype)
        for name, batch in steps.items():
            x, residual = model.layer(index, model.embed(batch), None, batch, cache)
            outputs[name].append(
                x.clone() if residual is None else x + residual
            )  # either ends the step (`dispatch.py`)
    return [(name, ours, theirs) for name, (ours, theirs) in outputs.items()]


def products_of_many(linear: Callable[..., Tensor], layer: Any, dtype: torch.dtype) -> list[tuple[str, Tensor, Tensor]]:
    """(matrix, product by `linear`, by the reference) of many rows and each fp8 matrix of a layer; others have none.

    For the reference the rows are rounded to fp8 where the kernels do it: a whole layer would show that, not mistakes.

    Args:
        linear: the operator.
        layer: with the matrices qkv, out, up and down.
        dtype: of the activations.
    """
    found = []
    for name in ("qkv", "out", "up", "down"):
        packed = getattr(layer, name)
        if isinstance(packed, PackedLinear) and packed.weight.dtype == FP8:
            x = torch.randn(MANY_ROWS, packed.weight.shape[1], generator=torch.Generator().manual_seed(0))
            x = x.to(packed.weight.device, dtype)
            found.append((f"{name} of many rows", linear(x, packed), _linear(_as_kernels_round(x, packed), packed)))
    return found


def _as_kernels_round(x: Tensor, packed: PackedLinear) -> Tensor:
    """Rows as their fp8 numbers stand for them, if they become such on their way into the product."""
    if not (use_triton(x) and makes_rows_fp8(x, packed.weight)):
        return x
    numbers, scale = reference.to_fp8(x, torch.float32)
    return (numbers.float() * scale[:, None]).to(x.dtype)


def one_layer_cache(decoder: Decoder, pages: int, page_tokens: int, kv_dtype: torch.dtype) -> KVCache:
    """A small cache of which every layer is the same memory."""
    spec = dataclasses.replace(decoder.spec, layers=1)
    size = CacheSize(pages, page_tokens, decoder.spec.max_length, 1, 0)
    cache = KVCache(spec, size, kv_dtype, decoder.weights.embed.device)
    layers = decoder.spec.layers
    cache.k, cache.v, cache.scale = cache.k * layers, cache.v * layers, cache.scale * layers
    return cache


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest of `theirs`; infinite for NaN."""
    scale = theirs.float().abs().max().clamp(min=1e-20)
    error = float((ours.float() - theirs.float()).abs().max() / scale)
    return math.inf if math.isnan(error) else error
