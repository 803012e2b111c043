"""Products of few rows with many weights, where cuBLAS leaves memory idle: gated pairs, and sums over many columns.

Between 2 and 128 rows reading the weights and multiplying take about equally long. Two things help there: to apply the
gate before anything is written, and to split a long sum over programs when the outputs alone do not fill the GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels.activation import activation_of
from miinb.kernels.dispatch import arrival_counters, jit, launch_options, shared_memory_bytes, tl, wait_for_inputs

#: (rows, outputs, columns) of a tile, its warps, and loads in flight; the first tile that has the rows.
_GATED = ((16, 32, 128, 4, 5), (32, 64, 128, 4, 5), (64, 64, 64, 4, 5), (128, 64, 128, 8, 3))
_DEEP = ((16, 64, 128, 4, 7), (32, 64, 128, 4, 7), (64, 32, 128, 4, 7), (128, 64, 64, 4, 7))
_MOST_ROWS = 128
_PROGRAMS = 128  # what a GPU is expected to run at a time: an H100 has 132 multiprocessors


def product_tile(x: Tensor, n: int, *, gated: bool) -> dict[str, Any] | None:
    """The kernel's tile for a product of x [T, K] with N outputs, or None where cuBLAS is as fast.

    Tiles are the fastest of those measured on an H100 at the sizes of LLaMA-8B. Columns must divide into them, so that
    the kernel needs no masks for weights.
    """
    rows, k = x.shape
    deep = gated or k >= 2 * n
    if not 1 < rows <= _MOST_ROWS or not deep or x.element_size() != 2 or k % 128 or n % 128:
        return None
    block_m, block_n, block_k, warps, stages = next(tile for tile in (_GATED if gated else _DEEP) if rows <= tile[0])
    stage_bytes = (block_m + block_n * (2 if gated else 1)) * block_k * 2
    stages = min(shared_memory_bytes(x) // stage_bytes, stages)
    if stages < 2:
        return None
    split = 1 if gated else min(max(_PROGRAMS // (n // block_n), 1), 8)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split}
    return blocks | {"num_warps": warps, "num_stages": stages}


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
        **tile,
        **launch_options(x),
    )
    return y


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("rows",))
def _product(
    x, weight, bias, residual, y, partial, counters, rows, n, K: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):
    """One program a tile of outputs and part of the sum; the last to finish of a tile adds the parts, in their order.

    Programs of the same weights and different rows are neighbors: the second reads the weights from the L2 cache.
    """
    unit, part = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(rows, BLOCK_M)
    m = (unit % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = (unit // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
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
        acc = tl.dot(value, tl.load(from_weight + step * BLOCK_K).T, acc)
        if GATED:
            acc2 = tl.dot(value, tl.load(from_weight + other + step * BLOCK_K).T, acc2)
    to = m[:, None] * n + j[None, :]
    mask = (m < rows)[:, None]
    if SPLIT > 1:
        tl.store(partial + part * rows * n + to, acc, mask=mask)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(counters + unit, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(counters + unit, 0)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for i in tl.static_range(SPLIT):  # past the first-level cache, which does not see the others' writes
                acc += tl.load(partial + i * rows * n + to, mask=mask, other=0.0, cache_modifier=".cg")
            _finish(acc, acc, bias, residual, y, to, j, n, mask, ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL)
    elif GATED:
        _finish(acc, acc2, bias, residual, y, to, j, n, mask, ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL)
    else:
        _finish(acc, acc, bias, residual, y, to, j, n, mask, ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL)


@jit
def _finish(
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
