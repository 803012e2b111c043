"""Rows times a quantized matrix on tensor cores: weights are widened on their way to them, once for up to 128 rows.

The weights are the left operand, which Hopper's tensor cores take from registers: a tile of words is read as they want
it, widened there, and multiplied 16 columns at a time, while the next ones are widened (see `formats`). A weight is a
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
from miinb.kernels.formats import GROUP, bits_of
from miinb.kernels.product import write_tile
from miinb.kernels.widen import halves_of, widened


class Tile(NamedTuple):
    """What one program computes, and how: `rows` of x times `outputs` of the weight's rows, 128 columns a step."""

    rows: int
    outputs: int
    warps: int
    stages: int  # loads in flight
    programs: int  # so many are wanted: a sum is split where there are fewer tiles


#: By bits. The first tile that has the rows, or the last; measured on an H200 at the sizes of LLaMA-8B: each within 10%
#: of the fastest, but for int8's second (16%).
_TILES = {
    8: (Tile(16, 64, 4, 4, 512), Tile(32, 64, 4, 6, 256), Tile(64, 128, 8, 3, 128), Tile(128, 128, 8, 3, 128)),
    4: (Tile(16, 64, 4, 6, 512), Tile(32, 64, 4, 4, 512), Tile(64, 128, 8, 3, 128), Tile(128, 128, 8, 3, 128)),
}
#: Of more rows the weights are widened once for all (`dequantize.py`).
MOST_ROWS = 256
_COLUMNS = 128
_MOST_PARTS = 8


def quantized_product_tile(x: Tensor, n: int, bits: int, *, gated: bool) -> dict[str, Any] | None:
    """The kernel's options for x [T, K] and N outputs (of a gated pair: one half's), or None where it has no form.

    Columns must divide into groups; of a gated pair rows must divide into tiles.
    """
    rows, k = x.shape
    if not 2 <= rows <= MOST_ROWS or x.element_size() != 2:
        return None
    tile = next((tile for tile in _TILES[bits] if rows <= tile.rows), _TILES[bits][-1])
    weight_rows = 2 * n if gated else n
    if k % GROUP or (gated and weight_rows % tile.outputs):
        return None
    stage_bytes = tile.rows * _COLUMNS * 2 + tile.outputs * (_COLUMNS * bits // 8 + 16)
    options = tile_options(x, tile, weight_rows, stage_bytes, gated=gated)
    return options and options | {"BLOCK_W": _COLUMNS * bits // 32}


def tile_options(x: Tensor, tile: Tile, weight_rows: int, stage_bytes: int, *, gated: bool) -> dict[str, Any] | None:
    """The options that a tile gives any kernel with weights on the left, or None where it has no room for its loads.

    Args:
        x: [T, K].
        tile: for the rows of x.
        weight_rows: rows of the weight; of a gated pair of both halves.
        stage_bytes: of shared memory that a step's loads take.
        gated: whether the weight is a gated pair, whose sums are not split.
    """
    rows, k = x.shape
    stages = min(shared_memory_bytes(x) // stage_bytes, tile.stages)
    if stages < 2:
        return None
    tiles = -(-weight_rows // tile.outputs) * -(-rows // tile.rows)
    split = 1 if gated else min(max(tile.programs // tiles, 1), _MOST_PARTS, -(-k // _COLUMNS))
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "SPLIT": split}
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
    _product[(-(-rows // tile["BLOCK_M"]) * -(-weight.shape[0] // tile["BLOCK_N"]), split)](
        x,
        weight,
        scale.view(torch.int32) if bits == 4 or k % _COLUMNS == 0 else scale,  # what a step needs of a row is one load
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
    first = unit // tiles * (BLOCK_N // 2 if GATED else BLOCK_N)
    row = left_rows(first, n, BLOCK_N, GATED)
    NUMBERS: tl.constexpr = 32 // BITS
    COLUMNS: tl.constexpr = BLOCK_W * NUMBERS
    STEPS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    SPAN: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    SCALES: tl.constexpr = 1 if BITS == 8 and K % COLUMNS == 0 else COLUMNS // 64  # of a step: a word is two of int8
    column, word, scales = tl.arange(0, COLUMNS), tl.arange(0, BLOCK_W), tl.arange(0, SCALES)
    from_x = x + (m % rows)[None, :] * K + column[:, None]
    from_weight = weight + row.to(tl.int64)[:, None] * (K // NUMBERS) + word[None, :]
    from_scale = scale + row.to(tl.int64)[:, None] * (K * SCALES // COLUMNS) + scales[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    wait_for_inputs(PDL)
    for step in range(part * SPAN, tl.minimum((part + 1) * SPAN, STEPS)):
        if K % COLUMNS == 0:
            value = tl.load(from_x + step * COLUMNS)
            words = tl.load(from_weight + step * BLOCK_W)
            factor = tl.load(from_scale + step * SCALES)
        else:
            value = tl.load(from_x + step * COLUMNS, mask=(column < K - step * COLUMNS)[:, None], other=0.0)
            words = tl.load(from_weight + step * BLOCK_W, mask=(word < K // NUMBERS - step * BLOCK_W)[None, :], other=0)
            mask = (scales < K // 64 - step * SCALES)[None, :]
            factor = tl.load(from_scale + step * SCALES, mask=mask, other=0)
        acc = tl.dot(_weights(words, factor, BITS, x.dtype.element_ty), value, acc)
    write_left(
        acc, bias, residual, y, partial, counters, unit, part, m, first, rows, n, SPLIT, ACTIVATION, GATED, HAS_BIAS,
        HAS_RESIDUAL,
    )


@jit
def left_rows(first, n, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """The weight's rows of a tile whose outputs begin at `first`; places past the last row compute another row again.

    Of a gated pair it takes 8 rows of the gate, the 8 of the other half that belong to them, and so on: a thread's sums
    are then of both.
    """
    row = tl.arange(0, BLOCK_N)
    return first + row // 16 * 8 + row % 8 + row // 8 % 2 * n if GATED else tl.minimum(first + row, n - 1)


@jit
def write_left(
    acc, bias, residual, y, partial, counters, unit, part, m, first, rows, n, SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    """`write_tile` of sums [rows of the weight, of x], the weight's as `left_rows` has them."""
    acc = acc.T
    OUTPUTS: tl.constexpr = acc.shape[1] // 2 if GATED else acc.shape[1]
    if GATED:
        acc, acc2 = tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], OUTPUTS // 8, 2, 8]), (0, 1, 3, 2)))
        acc, acc2 = tl.reshape(acc, [acc.shape[0], OUTPUTS]), tl.reshape(acc2, [acc2.shape[0], OUTPUTS])
    j = first + tl.arange(0, OUTPUTS)
    to = m[:, None] * n + j[None, :]
    mask = (m < rows)[:, None] & (j < n)[None, :]
    j = tl.minimum(j, n - 1)
    write_tile(
        acc, acc2 if GATED else acc, bias, residual, y, partial, counters, unit, part, rows, to, j, n, mask, SPLIT,
        ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL,
    )


@jit
def _weights(words, factor, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of weights [BLOCK_N, COLUMNS] as tensor cores want them, from its words and the scales of its groups."""
    if BITS == 4:
        step, zero = halves_of(factor)
        step, zero = _spread(step, words.shape[1]), _spread(zero, words.shape[1])
    else:
        if factor.dtype == tl.int32:
            factor = tl.reshape(tl.join(*halves_of(factor)), [factor.shape[0], 2 * factor.shape[1]])
        step = _spread(factor.to(tl.float32), words.shape[1])
        zero = -128.0 * step
    return widened(words, step, zero, BITS, DTYPE, False)


@jit
def _spread(factor, WORDS: tl.constexpr):
    """Of each group [BLOCK_N, n] as of each of its words, [BLOCK_N, WORDS]."""
    N: tl.constexpr = factor.shape[0]
    GROUPS: tl.constexpr = factor.shape[1]
    wide = tl.broadcast_to(factor[:, :, None], [N, GROUPS, WORDS // GROUPS])
    return tl.reshape(wide, [N, WORDS])
