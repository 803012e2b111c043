"""One row times a quantized matrix: the numbers are widened where they are used, and memory is read once.

A thread reads 16 bytes of a row, which are a part of one group of columns: 16 numbers of int8 or 32 of int4. It sums
their products with x and multiplies the sum by the group's scale, so that a scale costs little. The numbers are not
converted: put into the bits of a float they stand for 32768 + q (of int4 also for 2048 + q or 128 + q), and
what that adds to the sum, so many times the sum of x, is subtracted once a part. A weight then takes a bit operation
and a multiplication with addition (in int4 a quarter of a shift, too); rows of a program share the sums of x.
In fp32 a product so has about 2e-5 of its own size in error, far below what rounding x to bf16 or fp16 has.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels.activation import activation_of
from miinb.kernels.dispatch import jit, launch_options, power_of_2, tl, wait_for_inputs
from miinb.kernels.formats import bits_of, part_columns
from miinb.kernels.widen import number_of


def quantized_gemv(
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
        weight: [N, W] words (see `formats`); of a gated pair N is 2 I, the gate's rows first.
        scale: of the weight.
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
    bits = bits_of(scale)
    tile = quantized_gemv_tile(n, k, bits, gated_pair=gated_pair)
    _gemv[(-(-n // tile["BLOCK_N"]),)](
        x,
        weight,
        scale.view(torch.int32) if bits == 4 else scale,  # a pair is one load
        bias,
        residual,
        y,
        n,
        K=k,
        BITS=bits,
        ACTIVATION=activation,
        GATED=gated_pair,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        **tile,
        **launch_options(x),
    )
    return y


def quantized_gemv_tile(n: int, k: int, bits: int, *, gated_pair: bool) -> dict[str, Any]:
    """Outputs and parts (16 bytes each) of a row that a program reads at a time, and its warps.

    Of those measured on an H200 at the sizes of GPT-J, LLaMA-8B and GPT-NeoX-20B nearly the fastest: within 10%, which
    is what they differ by from run to run. A thread with two parts of int4 has too many registers.
    """
    parts = -(-k // part_columns(bits))
    if n <= 2048:
        block_n, block_p, warps = 1, 128, 4
    elif bits == 8:
        block_n, block_p, warps = (4, 64, 2) if n > 8192 else (8, 128, 4) if k <= 8192 else (4, 256, 8)
    else:
        block_n, block_p, warps = (8, 128, 4) if k <= 4096 else (4, 64, 2)
    if gated_pair and block_n > 4:
        block_n = 4  # of each half: registers are few
    block_p = min(block_p, power_of_2(parts))
    warps = max(1, min(warps, block_p // 32))
    return {"BLOCK_N": block_n, "BLOCK_P": block_p, "num_warps": warps}


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _gemv(
    x, weight, scale, bias, residual, y, n, K: tl.constexpr, BITS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):
    """Each program computes BLOCK_N outputs (BLOCK_N of the gate and their partners of the other half if GATED).

    The first tile of weights is asked for before the wait: memory works while the kernel before this one ends.
    """
    PARTS: tl.constexpr = (K * BITS + 127) // 128
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = row < n
    tile, factor = _load(weight, scale, row, there, 0, K, BITS, BLOCK_P)
    if GATED:
        partner, factor2 = _load(weight, scale, row + n, there, 0, K, BITS, BLOCK_P)
    wait_for_inputs(PDL)
    total = _dot(tile, factor, x, 0, K, BITS, BLOCK_P)
    if GATED:
        total2 = _dot(partner, factor2, x, 0, K, BITS, BLOCK_P)
    for start in range(BLOCK_P, PARTS, BLOCK_P):
        tile, factor = _load(weight, scale, row, there, start, K, BITS, BLOCK_P)
        if GATED:
            partner, factor2 = _load(weight, scale, row + n, there, start, K, BITS, BLOCK_P)
        total += _dot(tile, factor, x, start, K, BITS, BLOCK_P)
        if GATED:
            total2 += _dot(partner, factor2, x, start, K, BITS, BLOCK_P)
    result = tl.sum(total, 0)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    result = activation_of(result, ACTIVATION)
    if GATED:
        up = tl.sum(total2, 0)
        if HAS_BIAS:
            up += tl.load(bias + n + row, mask=there, other=0.0).to(tl.float32)
        result *= up
    if HAS_RESIDUAL:
        result += tl.load(residual + row, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=there)


@jit
def _load(weight, scale, row, there, start, K: tl.constexpr, BITS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Words [BLOCK_P, BLOCK_N, 4] of parts from `start` on, and their scales [BLOCK_P, BLOCK_N].

    Parts come first, so that Triton gives neighboring parts to neighboring threads and a thread its part of every row.
    """
    PARTS: tl.constexpr = (K * BITS + 127) // 128
    GROUPS: tl.constexpr = (K + 63) // 64
    part = start + tl.arange(0, BLOCK_P)
    inside = part[:, None] * 4 + tl.arange(0, 4)[None, :]
    at = weight + row.to(tl.int64)[None, :, None] * (4 * PARTS) + inside[:, None, :]
    from_scale = scale + row.to(tl.int64)[None, :] * GROUPS + (part // (BITS // 2))[:, None]
    if PARTS % BLOCK_P == 0:
        tile = tl.load(at, mask=there[None, :, None], other=0)
        factor = tl.load(from_scale, mask=there[None, :], other=0)
    else:
        mask = (part < PARTS)[:, None] & there[None, :]
        tile = tl.load(at, mask=mask[:, :, None], other=0)
        factor = tl.load(from_scale, mask=mask, other=0)
    return tile, factor


@jit
def _dot(tile, factor, x, start, K: tl.constexpr, BITS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sums [BLOCK_P, BLOCK_N] of the products of parts with their x."""
    SPAN: tl.constexpr = BLOCK_P * 128 // BITS
    column = (start + tl.arange(0, BLOCK_P))[:, None] * (128 // BITS) + tl.arange(0, 8)[None, :]
    x0, x1 = _load_x(x, column, K, SPAN)  # of each word's number 0, and of the first of its higher half
    x2, x3 = _load_x(x, column + 8, K, SPAN)
    if BITS == 8:
        dot = number_of(tile, 0, 8) * x0[:, None, :] + number_of(tile, 2, 8) * x1[:, None, :]
        dot += number_of(tile, 1, 8) * x2[:, None, :]
        dot += number_of(tile, 3, 8) * x3[:, None, :]
        all_x = tl.sum(x0 + x1 + x2 + x3, 1)
        result = (tl.sum(dot, 2) - 32896.0 * all_x[:, None]) * factor.to(tl.float32)
    else:
        dot = number_of(tile, 0, 4) * x0[:, None, :] + number_of(tile, 4, 4) * x1[:, None, :]
        dot += number_of(tile, 1, 4) * x2[:, None, :]
        dot += number_of(tile, 5, 4) * x3[:, None, :]
        by_32768, by_2048, by_128 = x0 + x3, x2, x1  # x of the numbers that have so much added
        x0, x1 = _load_x(x, column + 16, K, SPAN)
        x2, x3 = _load_x(x, column + 24, K, SPAN)
        dot += number_of(tile, 2, 4) * x0[:, None, :]
        dot += number_of(tile, 6, 4) * x1[:, None, :]
        dot += number_of(tile, 3, 4) * x2[:, None, :]
        dot += number_of(tile, 7, 4) * x3[:, None, :]
        by_32768, by_2048, by_128 = by_32768 + x0, by_2048 + x1 + x2, by_128 + x3
        by_32768, by_2048, by_128 = tl.sum(by_32768, 1), tl.sum(by_2048, 1), tl.sum(by_128, 1)
        step = (factor << 16).to(tl.float32, bitcast=True)
        zero = (factor & -65536).to(tl.float32, bitcast=True)
        added = 32768.0 * by_32768 + 2048.0 * by_2048 + 128.0 * by_128
        all_x = by_32768 + by_2048 + by_128
        result = (tl.sum(dot, 2) - added[:, None]) * step + zero * all_x[:, None]
    return result


@jit
def _load_x(x, column, K: tl.constexpr, SPAN: tl.constexpr):
    """Of 8 columns the even ones and the odd ones, [BLOCK_P, 4] each."""
    value = tl.load(x + column) if K % SPAN == 0 else tl.load(x + column, mask=column < K, other=0.0)
    return tl.split(tl.reshape(value.to(tl.float32), [column.shape[0], 4, 2]))
