"""A few rows times an fp8 matrix on tensor cores: numbers are widened on their way to them, exactly.

e4m3 numbers are numbers of bf16 and of fp16 too, so nothing is rounded; a row's scale multiplies its sum at the end.
Triton 3.6 reads the numbers from shared memory where the tensor cores want the weights, and widens them there.
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
from miinb.kernels.product import write_tile


class Tile(NamedTuple):
    """What one program computes, and how: `rows` x `outputs` (of a gated pair so many of each half)."""

    rows: int
    outputs: int
    warps: int
    stages: int  # loads in flight


#: The first tile that has the rows, or some of the last one, of which the second reads the weights from the L2 cache.
#: Not measured yet. Of 64 rows and more Triton would use instructions that take weights from shared memory alone.
_TILES = (Tile(16, 64, 4, 6), Tile(32, 64, 4, 6))
#: More are made fp8 themselves (`fp8_many.py`).
MOST_ROWS = 64
_PROGRAMS = 264  # two for each multiprocessor of an H100
_MOST_PARTS = 8


def fp8_product_tile(x: Tensor, n: int, *, gated: bool) -> dict[str, Any] | None:
    """The kernel's options for x [T, K] and N outputs (of a gated pair: one half's), or None where it has no form.

    Columns must divide into steps, so that the kernel needs no masks for weights.
    """
    rows, k = x.shape
    if not 2 <= rows <= MOST_ROWS or x.element_size() != 2:
        return None
    tile = next((tile for tile in _TILES if rows <= tile.rows), _TILES[-1])
    columns = 128 if k % 128 == 0 else 64
    if k % columns or n % tile.outputs:
        return None
    stage_bytes = columns * (2 * tile.rows + tile.outputs * (2 if gated else 1))
    stages = min(shared_memory_bytes(x) // 2 // stage_bytes, tile.stages)  # two programs at a time
    split = 1 if gated else min(max(_PROGRAMS // (n // tile.outputs), 1), _MOST_PARTS, k // columns)
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "BLOCK_K": columns, "SPLIT": split}
    return blocks | {"num_warps": tile.warps, "num_stages": stages}


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
    _product[(-(-rows // tile["BLOCK_M"]) * (n // tile["BLOCK_N"]), split)](
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
    tiles = tl.cdiv(rows, BLOCK_M)
    m = unit % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    j = unit // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    STEPS: tl.constexpr = K // BLOCK_K
    SPAN: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    from_x = x + (m % rows)[:, None] * K + column[None, :]  # places past the last row compute another row again
    from_weight = weight + j.to(tl.int64)[:, None] * K + column[None, :]
    other = n.to(tl.int64) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GATED:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    wait_for_inputs(PDL)
    for step in range(part * SPAN, tl.minimum((part + 1) * SPAN, STEPS)):
        value = tl.load(from_x + step * BLOCK_K)
        weights = tl.load(from_weight + step * BLOCK_K).to(tl.float32)  # to bf16 at once takes a slow instruction each
        acc = tl.dot(value, weights.to(x.dtype.element_ty).T, acc)
        if GATED:
            weights = tl.load(from_weight + other + step * BLOCK_K).to(tl.float32)
            acc2 = tl.dot(value, weights.to(x.dtype.element_ty).T, acc2)
    acc *= tl.load(scale + j)[None, :]
    if GATED:
        acc2 *= tl.load(scale + n + j)[None, :]
    to = m[:, None] * n + j[None, :]
    mask = (m < rows)[:, None]
    write_tile(
        acc, acc2 if GATED else acc, bias, residual, y, partial, counters, unit, part, rows, to, j, n, mask, SPLIT,
        ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL,
    )
