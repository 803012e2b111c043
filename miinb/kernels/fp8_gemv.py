"""One row times an fp8 matrix: numbers are widened where they are used, and memory is read once.

A thread reads 16 numbers of a row, which the GPU widens to fp16 in pairs, exactly, and multiplies them in fp32 by
inputs that it holds for several rows. A row has one scale, by which its sum is multiplied at the end.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels.activation import activation_of
from miinb.kernels.dispatch import jit, launch_options, tl, wait_for_inputs
from miinb.kernels.quantized_gemv import quantized_gemv_tile


def fp8_gemv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    gated_pair: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual; of a gated pair activation(gate) * up.

    Args:
        x: [1, K].
        weight: [N, W] fp8 (see `formats`); of a gated pair N is 2 I, the gate's rows first.
        scale: [N].
        bias: [N] or None.
        activation: a key of `activation.KINDS` or None.
        residual: [1, N] or None.
        gated_pair: whether the weight is one.
        out: where the result goes, or None.

    Returns:
        [1, N] (or [1, I]) in x's dtype; sums are fp32.
    """
    rows, k = weight.shape[0], x.shape[1]
    n = rows // 2 if gated_pair else rows
    y = torch.empty((1, n), dtype=x.dtype, device=x.device) if out is None else out
    tile = quantized_gemv_tile(n, k, 8, gated_pair=gated_pair)  # as many bytes: those of int8
    _gemv[(-(-n // tile["BLOCK_N"]),)](
        x,
        weight,
        scale,
        bias,
        residual,
        y,
        n,
        K=k,
        ACTIVATION=activation,
        GATED=gated_pair,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        **tile,
        **launch_options(x),
    )
    return y


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _gemv(
    x, weight, scale, bias, residual, y, n, K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program computes BLOCK_N outputs (BLOCK_N of the gate and their partners of the other half if GATED).

    The first tile of weights is asked for before the wait: memory works while the kernel before this one ends.
    """
    PARTS: tl.constexpr = (K + 15) // 16
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = row < n
    tile = _load(weight, row, there, 0, PARTS, BLOCK_P)
    factor = tl.load(scale + row, mask=there, other=0.0)
    if GATED:
        partner = _load(weight, row + n, there, 0, PARTS, BLOCK_P)
        factor2 = tl.load(scale + n + row, mask=there, other=0.0)
    wait_for_inputs(PDL)
    low, high = _halves(x, 0, K, BLOCK_P)
    total = _dot(tile, low, high)
    if GATED:
        total2 = _dot(partner, low, high)
    for start in range(BLOCK_P, PARTS, BLOCK_P):
        tile = _load(weight, row, there, start, PARTS, BLOCK_P)
        if GATED:
            partner = _load(weight, row + n, there, start, PARTS, BLOCK_P)
        low, high = _halves(x, start, K, BLOCK_P)
        total += _dot(tile, low, high)
        if GATED:
            total2 += _dot(partner, low, high)
    result = tl.sum(total, 0) * factor
    if HAS_BIAS:
        result += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    result = activation_of(result, ACTIVATION)
    if GATED:
        up = tl.sum(total2, 0) * factor2
        if HAS_BIAS:
            up += tl.load(bias + n + row, mask=there, other=0.0).to(tl.float32)
        result *= up
    if HAS_RESIDUAL:
        result += tl.load(residual + row, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=there)


@jit
def _load(weight, row, there, start, PARTS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Numbers [BLOCK_P, BLOCK_N, 16] of parts from `start` on.

    Parts come first, so that Triton gives neighboring parts to neighboring threads and a thread its part of every row.
    """
    part = start + tl.arange(0, BLOCK_P)
    inside = part[:, None] * 16 + tl.arange(0, 16)[None, :]
    at = weight + row.to(tl.int64)[None, :, None] * (16 * PARTS) + inside[:, None, :]
    mask = there[None, :, None]
    if PARTS % BLOCK_P != 0:
        mask = mask & (part < PARTS)[:, None, None]
    return tl.load(at, mask=mask, other=0.0)


@jit
def _load_x(x, column, K: tl.constexpr, BLOCK_P: tl.constexpr):
    value = tl.load(x + column) if K % (16 * BLOCK_P) == 0 else tl.load(x + column, mask=column < K, other=0.0)
    return value.to(tl.float32)


@jit
def _halves(x, start, K: tl.constexpr, BLOCK_P: tl.constexpr):
    """The inputs of parts from `start` on, [BLOCK_P, 8] fp32 each: 16 bytes are what a thread loads at a time."""
    column = (start + tl.arange(0, BLOCK_P))[:, None] * 16 + tl.arange(0, 8)[None, :]
    return _load_x(x, column, K, BLOCK_P), _load_x(x, column + 8, K, BLOCK_P)


@jit
def _dot(tile, low, high):
    """Sums [BLOCK_P, BLOCK_N] of the products of parts with the halves of their inputs."""
    P: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    first, second = tl.split(tl.permute(tl.reshape(tile, [P, N, 4, 2, 2]), (0, 1, 2, 4, 3)))
    first, second = tl.reshape(first, [P, N, 8]).to(tl.float32), tl.reshape(second, [P, N, 8]).to(tl.float32)
    return tl.sum(first * low[:, None, :] + second * high[:, None, :], 2)
