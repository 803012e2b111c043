"""A few rows times a quantized matrix on tensor cores: numbers are widened on their way to them.

Numbers j of all words go along as one plane of weights, whose columns are those of x from 4 j on in each part; so a
step is as many products as a word has numbers, and no number has to change its place: Triton 3.6 has the words read
where the tensor cores want the weights, as long as nothing but memory and constants goes into them. A weight is a
number times its step plus what 0 stands for, rounded once to x's dtype, as `dequantized` rounds it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miinb.kernels.dispatch import (
    arrival_counters,
    jit,
    launch_options,
    shared_memory_bytes,
    tl,
    wait_for_inputs,
)
from miinb.kernels.formats import bits_of
from miinb.kernels.product import write_tile
from miinb.kernels.widen import byte_of, even_of, odd_of


class Tile(NamedTuple):
    """What one program computes, and how: `rows` x `outputs` (of a gated pair half as many, twice)."""

    rows: int
    outputs: int
    warps: int
    stages: int  # loads in flight


#: The first tile that has the rows, or some of the last one, of which the second reads the weights from the L2 cache.
#: Not measured yet. Of 64 rows and more Triton would use instructions that take weights from shared memory alone.
_TILES = (Tile(16, 64, 4, 4), Tile(32, 64, 4, 4))
#: Of more rows the weights are widened once for all (`dequantize.py`).
MOST_ROWS = 64
_PROGRAMS = 264  # two for each multiprocessor of an H100
_MOST_PARTS = 8


def quantized_product_tile(x: Tensor, n: int, bits: int, *, gated: bool) -> dict[str, Any] | None:
    """The kernel's options for x [T, K] and N outputs (of a gated pair: one half's), or None where it has no form.

    Columns must divide into steps, so that the kernel needs no masks for weights.
    """
    rows, k = x.shape
    if not 2 <= rows <= MOST_ROWS or x.element_size() != 2:
        return None
    tile = next((tile for tile in _TILES if rows <= tile.rows), _TILES[-1])
    outputs = tile.outputs // 2 if gated else tile.outputs
    words = 32 if bits == 4 and k % 256 == 0 else 16
    columns = 256 if words == 32 else 128
    if k % columns or k % 128 or n % outputs:
        return None
    stage_bytes = tile.rows * columns * 2 + tile.outputs * (columns * bits // 8 + 16)
    stages = min(shared_memory_bytes(x) // 2 // stage_bytes, tile.stages)
    if stages < 2:
        return None
    split = 1 if gated else min(max(_PROGRAMS // (n // outputs), 1), _MOST_PARTS, k // columns)
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": outputs, "BLOCK_W": words, "SPLIT": split}
    return blocks | {"num_warps": tile.warps, "num_stages": stages}


def quantized_product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    tile: dict[str, Any],
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual; gated: activation(gate) * up of its two halves.

    Args:
        x: [T, K], contiguous, of 2-byte numbers.
        weight: [N, W] words (see `formats`), or [2 * N, W] if gated, the gate's rows first.
        scale: of the weight.
        bias: as many as the weight has rows, or None.
        tile: of `quantized_product_tile`.
        activation: a key of `activation.KINDS` or None.
        residual: [T, N] contiguous, or None.
        gated: whether the weight is a gated pair.
        out: [T, N] contiguous, where the result goes; or None.

    Returns:
        [T, N] in x's dtype; sums are fp32, and always added in the same order.
    """
    rows, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device) if out is None else out
    split, bits = tile["SPLIT"], bits_of(scale)
    partial = torch.empty((split, rows, n), dtype=torch.float32, device=x.device) if split > 1 else None
    _product[(-(-rows // tile["BLOCK_M"]) * (n // tile["BLOCK_N"]), split)](
        x,
        weight,
        scale.view(torch.int32),
        bias,
        residual,
        y,
        partial,
        arrival_counters(x.device),
        rows,
        n,
        K=k,
        BITS=bits,
        ACTIVATION=activation,
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        **tile,
        **launch_options(x),
    )
    return y


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("rows",))
def _product(
    x, weight, scale, bias, residual, y, partial, counters, rows, n, K: tl.constexpr, BITS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):
    """One program a tile of outputs and part of the sum; the last to finish of a tile adds the parts in their order."""
    unit, part = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(rows, BLOCK_M)
    m = unit % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    j = unit // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_W)
    NUMBERS: tl.constexpr = 32 // BITS
    PITCH: tl.constexpr = K // NUMBERS
    HALVES: tl.constexpr = 2 if BITS == 8 else 1  # int8: a step is two groups, whose scales are a word
    STEPS: tl.constexpr = PITCH // BLOCK_W // HALVES
    SPAN: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    # places past the last row compute another row again
    from_x = x + (m % rows)[:, None] * K + (word // 4 * (4 * NUMBERS) + word % 4)[None, :]
    from_weight = weight + j.to(tl.int64)[:, None] * PITCH + word[None, :]
    SCALES: tl.constexpr = K // 64 if BITS == 4 else K // 128  # of a row: pairs, or scales of two groups
    SPREAD: tl.constexpr = BLOCK_W // (BLOCK_W * NUMBERS // 64) if BITS == 4 else BLOCK_W  # words with one of them
    from_scale = scale + j.to(tl.int64)[:, None] * SCALES + tl.arange(0, BLOCK_W // SPREAD)[None, :]
    other, other_scale = n.to(tl.int64) * PITCH, n.to(tl.int64) * SCALES
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GATED:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    wait_for_inputs(PDL)
    for step in range(part * SPAN, tl.minimum((part + 1) * SPAN, STEPS)):
        factor = spread(tl.load(from_scale + step * (BLOCK_W // SPREAD)), SPREAD)
        if GATED:
            factor2 = spread(tl.load(from_scale + other_scale + step * (BLOCK_W // SPREAD)), SPREAD)
        for half in tl.static_range(HALVES):
            at = (step * HALVES + half) * BLOCK_W
            words = tl.load(from_weight + at)
            if GATED:
                words2 = tl.load(from_weight + other + at)
            for i in tl.static_range(NUMBERS):
                value = tl.load(from_x + at * NUMBERS + 4 * i)
                plane = weights_of(words, factor, i, half, BITS).to(x.dtype.element_ty)
                acc = tl.dot(value, plane.T, acc)
                if GATED:
                    plane = weights_of(words2, factor2, i, half, BITS).to(x.dtype.element_ty)
                    acc2 = tl.dot(value, plane.T, acc2)
    to = m[:, None] * n + j[None, :]
    mask = (m < rows)[:, None]
    write_tile(
        acc, acc2 if GATED else acc, bias, residual, y, partial, counters, unit, part, rows, to, j, n, mask, SPLIT,
        ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL,
    )


@jit
def spread(factor, SPREAD: tl.constexpr):
    """Scales [BLOCK_N, n] for each of the words that they belong to, [BLOCK_N, SPREAD * n]."""
    wide = tl.broadcast_to(factor[:, :, None], [factor.shape[0], factor.shape[1], SPREAD])
    return tl.reshape(wide, [factor.shape[0], factor.shape[1] * SPREAD])


@jit
def weights_of(words, factor, J: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """The fp32 weights that numbers J of words stand for, by their scales."""
    if BITS == 8:
        factor = (factor << 16 if HALF == 0 else factor & -65536).to(tl.float32, bitcast=True)
        weights = byte_of(words, J) * factor - 32896.0 * factor
    else:
        step = (factor << 16).to(tl.float32, bitcast=True)
        low = (factor & -65536).to(tl.float32, bitcast=True)
        if J < 3:
            words = words << (16 if J == 0 else 8)
        elif J > 4:
            words = words >> (16 if J == 7 else 8)
        if J % 2 == 0:
            weights = even_of(words) * step + (low - 128.0 * step)
        else:
            weights = odd_of(words) * step + (low - 2048.0 * step)
    return weights
