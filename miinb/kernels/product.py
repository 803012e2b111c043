"""Matrix products where cuBLAS leaves the GPU idle: gated pairs, long sums, short ones, and activations that it lacks.

Between 2 and 128 rows reading the weights and multiplying take about equally long. Two things help there: to apply the
gate before anything is written, and to split a long sum over programs when the outputs alone do not fill the GPU. A
product of a few microseconds (an encoder's at batch 1) gains by programmatic dependent launch: its weights are on their
way while the kernel before it still runs. Of many rows cuBLAS is the faster, but where it lacks the activation, another
pass over all outputs would cost more than a slower product.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miinb.kernels.activation import activation_of
from miinb.kernels.dispatch import (
    arrival_counters,
    jit,
    launch_options,
    power_of_2,
    shared_memory_bytes,
    tl,
    wait_for_inputs,
)


class Tile(NamedTuple):
    """What one program computes, and how: `rows` x `outputs`, in steps of `columns`."""

    rows: int
    outputs: int
    columns: int
    warps: int
    stages: int  # loads in flight


#: Measured on an H100 at the sizes of LLaMA-8B; the first tile that has the rows.
_GATED = (Tile(16, 32, 128, 4, 5), Tile(32, 64, 128, 4, 5), Tile(64, 64, 64, 4, 5), Tile(128, 64, 128, 8, 3))
_DEEP = (Tile(16, 64, 128, 4, 7), Tile(32, 64, 128, 4, 7), Tile(64, 32, 128, 4, 7), Tile(128, 64, 64, 4, 7))
_MOST_ROWS = 128

#: Weights of so many numbers are read in a few microseconds; products with them run here up to so many rows.
_SHORT_WEIGHT = 1 << 22
_SHORT_ROWS = 256
#: Up to so many rows, measured on an H100 at the sizes of BERT, base and large.
_SHORT = {
    16: Tile(16, 32, 128, 4, 8),
    32: Tile(32, 32, 128, 4, 8),
    128: Tile(64, 32, 128, 4, 8),
    _SHORT_ROWS: Tile(64, 64, 128, 4, 8),
}
_SHORT_STAGE_BYTES = 100 << 10  # of all stages: the next kernel's programs fit beside this one's, and so begin early

#: Where the activation makes a second pass over many outputs unnecessary; the first is for fewer tiles than programs.
_MIDDLE, _LARGE = Tile(128, 64, 64, 4, 4), Tile(128, 128, 64, 4, 3)
#: Of gated pairs of many rows, while sums are so short that to write and read both halves takes about as long.
_GATED_MANY = Tile(128, 128, 64, 8, 3)
_GATED_SUM = 1280
_GROUP = 16  # tiles of rows that go along all outputs together: their x stays in the L2 cache

_PROGRAMS = 128  # what a GPU is expected to run at a time: an H100 has 132 multiprocessors


def product_tile(x: Tensor, n: int, *, gated: bool, epilogue: bool = False) -> dict[str, Any] | None:
    """The kernel's tile for a product of x [T, K] with N outputs, or None where cuBLAS is as fast.

    Columns must divide into tiles, so that the kernel needs no masks for weights.

    Args:
        x: [T, K].
        n: outputs; of a gated pair, one half's.
        gated: whether the weight is a gated pair.
        epilogue: whether to spare another pass over many outputs: for an activation that cuBLAS lacks, or a gate.
    """
    rows, k = x.shape
    if rows < 2 or x.element_size() != 2 or n % 128 or k % 64:
        return None
    if gated and rows > _MOST_ROWS:
        return _fitted(x, _GATED_MANY, 1, gated=True) if epilogue and k <= _GATED_SUM else None
    if k % 128:
        return None
    if not gated and n * k <= _SHORT_WEIGHT and rows <= _SHORT_ROWS:
        tile, split = _short(rows, n, k)
        return _fitted(x, tile, split, gated=False, ahead=True)
    if rows <= _MOST_ROWS and (gated or k >= 2 * n):
        tile = next(tile for tile in (_GATED if gated else _DEEP) if rows <= tile.rows)
        split = 1 if gated else min(max(_PROGRAMS // (n // tile.outputs), 1), 8)
        return _fitted(x, tile, split, gated=gated)
    if epilogue and rows > _MOST_ROWS:
        programs = -(-rows // _LARGE.rows) * (n // _LARGE.outputs)
        return _fitted(x, _LARGE if programs >= _PROGRAMS else _MIDDLE, 1, gated=gated)
    return None


def _short(rows: int, n: int, k: int) -> tuple[Tile, int]:
    """The tile, and the parts of its sum: it is split only if it is long, as to merge the parts takes time too."""
    tile = next(tile for most, tile in _SHORT.items() if rows <= most)
    return tile, 4 if rows <= 128 and k >= max(2048, 2 * n) else 1


def _fitted(x: Tensor, tile: Tile, split: int, *, gated: bool, ahead: bool = False) -> dict[str, Any] | None:
    """The kernel's options, with as many stages as the GPU's shared memory has room for; None if that is one."""
    stage_bytes = (tile.rows + tile.outputs * (2 if gated else 1)) * tile.columns * 2
    room = shared_memory_bytes(x)
    stages = min((min(room, _SHORT_STAGE_BYTES) if ahead else room) // stage_bytes, tile.stages)
    if stages < 2:
        return None
    lines = power_of_2(-(-x.shape[1] // tile.columns // split) * tile.columns // 64) if ahead else 0  # 128 bytes each
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "BLOCK_K": tile.columns, "SPLIT": split, "AHEAD": lines}
    return blocks | {"num_warps": tile.warps, "num_stages": stages}


def product(
    x: Tensor,
    weight: Tensor,
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
        weight: [N, K], or [2 * N, K] if gated, the gate's rows first.
        bias: as many as the weight has rows, or None.
        tile: of `product_tile`.
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
        GROUP=_GROUP,
        **tile,
        **launch_options(x),
    )
    return y


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _ask_ahead(weight, j, first, K: tl.constexpr, LINES: tl.constexpr):
    """Have these lines (128 bytes each) of the rows j of the weight brought into the L2 cache; nothing waits for it."""
    line = tl.minimum(first + tl.arange(0, LINES) * 64, K - 64)
    at = (weight + j.to(tl.int64)[:, None] * K + line[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@jit(plain=("rows",))
def _product(
    x, weight, bias, residual, y, partial, counters, rows, n, K: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a tile of outputs and part of the sum; the last to finish of a tile adds the parts, in their order.

    Programs of the same weights and different rows are neighbors: the second reads the weights from the L2 cache.
    """
    unit, part = tl.program_id(0), tl.program_id(1)
    across = GROUP * (n // BLOCK_N)
    begin = unit // across * GROUP
    tiles = tl.minimum(tl.cdiv(rows, BLOCK_M) - begin, GROUP)
    m = (begin + unit % across % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = unit % across // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    STEPS: tl.constexpr = K // BLOCK_K
    SPAN: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    from_x = x + (m % rows)[:, None] * K + column[None, :]  # places past the last row compute another row again
    from_weight = weight + j.to(tl.int64)[:, None] * K + column[None, :]
    other = n.to(tl.int64) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GATED:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if PDL and AHEAD > 0:
        _ask_ahead(weight, j, part * SPAN * BLOCK_K, K, AHEAD)
    wait_for_inputs(PDL)
    for step in range(part * SPAN, tl.minimum((part + 1) * SPAN, STEPS)):
        value = tl.load(from_x + step * BLOCK_K)
        acc = tl.dot(value, tl.load(from_weight + step * BLOCK_K).T, acc)
        if GATED:
            acc2 = tl.dot(value, tl.load(from_weight + other + step * BLOCK_K).T, acc2)
    to = m[:, None] * n + j[None, :]
    mask = (m < rows)[:, None]
    write_tile(
        acc, acc2 if GATED else acc, bias, residual, y, partial, counters, unit, part, rows, to, j, n, mask, SPLIT,
        ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL,
    )


@jit
def write_tile(
    acc, acc2, bias, residual, y, partial, counters, unit, part, rows, to, j, n, mask, SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    """A tile of sums finished, or a part of one kept; the last of a tile's parts adds all of them, in their order."""
    if SPLIT > 1:  # not GATED, whose outputs alone are many
        tl.store(partial + part * rows * n + to, acc, mask=mask)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(counters + unit, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(counters + unit, 0)
            total = tl.zeros(acc.shape, tl.float32)
            for i in tl.static_range(SPLIT):  # past the first-level cache, which does not see the others' writes
                total += tl.load(partial + i * rows * n + to, mask=mask, other=0.0, cache_modifier=".cg")
            finish_tile(total, total, bias, residual, y, to, j, n, mask, ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL)
    else:
        finish_tile(acc, acc2, bias, residual, y, to, j, n, mask, ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL)


@jit
def finish_tile(
    acc, acc2, bias, residual, y, to, j, n, mask, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    """Bias, activation, gate and residual of a tile of sums, and its way out."""
    if HAS_BIAS:
        acc += tl.load(bias + j).to(tl.float32)[None, :]
    acc = activation_of(acc, ACTIVATION)
    if GATED:
        if HAS_BIAS:
            acc2 += tl.load(bias + n + j).to(tl.float32)[None, :]
        acc *= acc2
    if HAS_RESIDUAL:
        acc += tl.load(residual + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=mask)
