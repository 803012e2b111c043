"""A few rows times an fp8 matrix on tensor cores: numbers are widened on their way to them, exactly.

e4m3 numbers are numbers of bf16 and of fp16 too, so nothing is rounded; a row's scale multiplies its sum at the end.
The weights are the left operand, as in `quantized_product`: their numbers lie as tensor cores want them in registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels.dispatch import (
    arrival_counters,
    jit,
    launch_options,
    tl,
    wait_for_inputs,
)
from miinb.kernels.formats import FP8_COLUMNS
from miinb.kernels.quantized_product import Tile, left_rows, tile_options, write_left

#: The first tile that has the rows: those of int8, as measured on an H200 (`quantized_product`).
_TILES = (Tile(16, 64, 4, 4, 512), Tile(32, 64, 4, 6, 256), Tile(64, 128, 8, 3, 128))
#: More are made fp8 themselves (`fp8_many.py`).
MOST_ROWS = 64
_COLUMNS = 128


def fp8_product_tile(x: Tensor, n: int, *, gated: bool) -> dict[str, Any] | None:
    """The kernel's options for x [T, K] and N outputs (of a gated pair: one half's), or None where it has no form.

    Columns must divide into parts; of a gated pair rows must divide into tiles.
    """
    rows, k = x.shape
    if not 2 <= rows <= MOST_ROWS or x.element_size() != 2:
        return None
    tile = next(tile for tile in _TILES if rows <= tile.rows)
    weight_rows = 2 * n if gated else n
    if k % FP8_COLUMNS or (gated and weight_rows % tile.outputs):
        return None
    stage_bytes = _COLUMNS * (2 * tile.rows + tile.outputs)
    options = tile_options(x, tile, weight_rows, stage_bytes, gated=gated)
    return options and options | {"BLOCK_K": _COLUMNS}


def fp8_product(
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
        weight: [N, K] fp8 (see `formats`), or [2 * N, K] if gated, the gate's rows first.
        scale: one for each row of the weight.
        bias: as many as the weight has rows, or None.
        tile: of `fp8_product_tile`.
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
    split = tile["SPLIT"]
    partial = torch.empty((split, rows, n), dtype=torch.float32, device=x.device) if split > 1 else None
    _product[(-(-weight.shape[0] // tile["BLOCK_N"]), split)](
        x,
        weight,
        scale,
        bias,
        residual,
        y,
        partial,
        arrival_counters(x.device),
        rows,
        n,
        K=k,
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
    x, weight, scale, bias, residual, y, partial, counters, rows, n, K: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):
    """One program a tile of outputs and part of the sum; the last to finish of a tile adds the parts in their order."""
    unit, part = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    first = unit * (BLOCK_N // 2 if GATED else BLOCK_N)
    row = left_rows(first, n, BLOCK_N, GATED)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SPAN: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    column = tl.arange(0, BLOCK_K)
    from_x = x + (m % rows)[None, :] * K + column[:, None]
    from_weight = weight + row.to(tl.int64)[:, None] * K + column[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    wait_for_inputs(PDL)
    for step in range(part * SPAN, tl.minimum((part + 1) * SPAN, STEPS)):
        if K % BLOCK_K == 0:
            value = tl.load(from_x + step * BLOCK_K)
            numbers = tl.load(from_weight + step * BLOCK_K)
        else:
            there = column < K - step * BLOCK_K
            value = tl.load(from_x + step * BLOCK_K, mask=there[:, None], other=0.0)
            numbers = tl.load(from_weight + step * BLOCK_K, mask=there[None, :], other=0.0)
        acc = tl.dot(_weights(numbers, x.dtype.element_ty), value, acc)
    acc *= tl.load(scale + row)[:, None]
    write_left(
        acc, bias, residual, y, partial, counters, unit, part, m, first, rows, n, SPLIT, ACTIVATION, GATED, HAS_BIAS,
        HAS_RESIDUAL,
    )


@jit
def _weights(numbers, DTYPE: tl.constexpr):
    """A tile of weights in the order of their columns, from the numbers as `formats` has them.

    By way of fp32, as the GPU makes bf16 of fp8 by an instruction that it starts 16 of a cycle.
    """
    N: tl.constexpr = numbers.shape[0]
    Q: tl.constexpr = numbers.shape[1] // 16
    parts = tl.permute(tl.reshape(numbers, [N, Q, 4, 2, 2]), (0, 1, 3, 2, 4))
    return tl.reshape(parts, [N, 16 * Q]).to(tl.float32).to(DTYPE)
