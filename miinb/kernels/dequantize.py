"""Rows of a quantized matrix widened: of an embedding for its tokens, and of a whole weight for a product of many rows.

Such a product widens the weights once, into a scratch that all layers share, and cuBLAS multiplies. The scratch is
about as large as the L2 cache, so a large matrix goes through it in pieces, which need not leave the cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools

import torch
from torch import Tensor

from miinb.kernels import formats
from miinb.kernels.activation import activate
from miinb.kernels.dispatch import jit, launch_options, power_of_2, tl, use_triton, wait_for_inputs
from miinb.kernels.widen import halves_of, widened

#: Numbers in the scratch: 32 MB of 2 bytes each. Not measured yet.
_SCRATCH = 1 << 24
#: Pieces of a matrix have a multiple of so many rows.
_ROWS = 256
_BLOCK_PARTS = 128
_BLOCK = 2048  # numbers of fp8


@functools.cache
def scratch(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Memory that any kernel may write and the next may read; what is in it lasts for one product.

    The engine computes on one stream, so two products never need it at a time; CUDA graphs may hold on to it.
    """
    return torch.empty(_SCRATCH, dtype=dtype, device=device)


def embedding_rows(token_ids: Tensor, weight: Tensor, scale: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
    """The rows [T, columns] of a table for tokens [T], of which `kernels.formats` has the forms if there is a scale."""
    if scale is None:
        return torch.nn.functional.embedding(token_ids, weight)
    if not use_triton(weight) or weight.dtype != torch.int32:
        return formats.dequantize(weight[token_ids], scale[token_ids])[:, :columns].to(dtype)
    out = torch.empty((token_ids.shape[0], columns), dtype=dtype, device=weight.device)
    return _widen(weight, scale, out, token_ids)


def dequantized(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Write what words or fp8 [N, W] stand for to `out` [N, K], and return it; each is rounded once to its dtype."""
    if weight.dtype != formats.FP8:
        return _widen(weight, scale, out, None)
    count, k = out.shape
    block = min(power_of_2(k), _BLOCK)
    options = {"W": weight.shape[1], "BLOCK": block, "num_warps": 4} | launch_options(weight)
    _dequantize_fp8[(count, -(-k // block))](weight, scale, out, K=k, **options)
    return out


def product_of_many(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual, of x [T, K] and words or fp8 [N, W]; see `linear.linear`."""
    (rows, k), n = x.shape, weight.shape[0]
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device) if out is None else out
    piece = _SCRATCH // k // _ROWS * _ROWS or _SCRATCH // k
    for first in range(0, n, piece):
        part = slice(first, min(first + piece, n))
        count = part.stop - first
        wide = dequantized(weight[part], scale[part], scratch(x.device, x.dtype)[: count * k].view(count, k))
        if bias is None:
            torch.mm(x, wide.t(), out=y[:, part])
        else:
            torch.addmm(bias[part], x, wide.t(), out=y[:, part])
    if activation is not None:
        y = activate(y, activation)
    return y if residual is None else y + residual


def _widen(weight: Tensor, scale: Tensor, out: Tensor, rows: Tensor | None) -> Tensor:
    bits, (count, k) = formats.bits_of(scale), out.shape
    parts = weight.shape[1] // formats.PART_WORDS
    block = min(power_of_2(parts), _BLOCK_PARTS)
    _dequantize[(count, -(-parts // block))](
        weight,
        scale.view(torch.int32) if bits == 4 else scale,  # a pair is one load
        out,
        rows,
        K=k,
        BITS=bits,
        GATHER=rows is not None,
        BLOCK_P=block,
        num_warps=4,
        **launch_options(weight),
    )
    return out


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _dequantize(
    weight, scale, y, rows, K: tl.constexpr, BITS: tl.constexpr, GATHER: tl.constexpr, BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row of y and BLOCK_P parts of it: of row rows[i] of the weight, or of row i."""
    COLUMNS: tl.constexpr = 128 // BITS
    PARTS: tl.constexpr = (K * BITS + 127) // 128
    first = tl.program_id(1) * BLOCK_P
    word = first * 4 + tl.arange(0, BLOCK_P * 4)[None, :]
    wait_for_inputs(PDL)
    to = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + to) if GATHER else to
    words = tl.load(weight + row * (4 * PARTS) + word, mask=word < 4 * PARTS, other=0)
    factor = tl.load(scale + row * ((K + 63) // 64) + word // (2 * BITS), mask=word < 4 * PARTS, other=0)
    if BITS == 8:
        step = factor.to(tl.float32)
        zero = -128.0 * step
    else:
        step, zero = halves_of(factor)
    column = first * COLUMNS + tl.arange(0, BLOCK_P * COLUMNS)[None, :]
    value = widened(words, step, zero, BITS, y.dtype.element_ty, True)
    tl.store(y + to * K + column, value, mask=column < K)


@jit
def _dequantize_fp8(
    weight, scale, y, K: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    """One program a row and BLOCK columns of it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    place = column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2
    number = tl.load(weight + row * W + place, mask=column < K, other=0.0).to(tl.float32) * tl.load(scale + row)
    tl.store(y + row * K + column, number.to(y.dtype.element_ty), mask=column < K)
