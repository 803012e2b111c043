"""Linear layers on packed weights: a matrix-vector kernel for one row, `product` or cuBLAS for more."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.activation import activate, activation_of, gated
from miinb.kernels.dequantize import product_of_many
from miinb.kernels.dispatch import (
    INTERPRETED,
    jit,
    launch_options,
    let_next_start,
    power_of_2,
    tl,
    use_triton,
    wait_for_all,
    wait_for_inputs,
)
from miinb.kernels.formats import FP8, bits_of
from miinb.kernels.fp8_gemv import fp8_gemv
from miinb.kernels.fp8_many import fp8_product_of_many
from miinb.kernels.fp8_product import fp8_product, fp8_product_tile
from miinb.kernels.gated_product import gated_product, is_gated_many
from miinb.kernels.large_product import is_large, large_product
from miinb.kernels.norm import layer_norm
from miinb.kernels.product import product, product_tile
from miinb.kernels.quantized_gemv import quantized_gemv
from miinb.kernels.quantized_product import quantized_product, quantized_product_tile
from miinb.kernels.wide_product import is_wide, wide_linear, wide_linear_norm


@dataclass(slots=True)
class PackedLinear:
    """Weights of one linear layer in the layout that the kernels read.

    Attributes:
        weight: [N, K]: one row an output, as `torch.nn.Linear` has it; where there is a `scale`, a quantized one of the
            forms that `formats` has.
        bias: [N] or None.
        scale: of each quantized row, or of each group of its columns. None: the weight is what it says. Operators that
            have no kernel for a form use the reference, which widens it.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


Start = Literal["", "after", "beside"]

#: Activations that cuBLAS applies to a product with a bias before it is written, and whether each is its gelu.
_EPILOGUES = {"relu": False, "gelu_tanh": True}


def linear(
    x: Tensor,
    packed: PackedLinear,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    overwrite: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual.

    Args:
        x: [T, K].
        packed: the layer's weights [N, K].
        activation: a key of `activation.KINDS` or None.
        residual: [T, N] or None.
        overwrite: whether the result may take the residual's place, which spares cuBLAS a copy.
        out: [T, N], contiguous, where a GPU writes the product, without activation and residual; or None.

    Returns:
        [T, N] in x's dtype; sums are fp32.
    """
    if not use_triton(x) or packed.weight.dtype == torch.int8:
        return reference.linear(
            x, packed.weight, packed.bias, activation=activation, residual=residual, scale=packed.scale
        )
    if packed.scale is not None:
        return _quantized(x, packed, packed.scale, activation, residual, out)
    if x.shape[0] == 1:
        return gemv(x, packed, activation, residual, gated_pair=False, out=out)
    if activation is None and residual is None and out is None and is_wide(x, packed.weight.shape[0]):
        return wide_linear(x, packed.weight, packed.bias)
    fused = _EPILOGUES.get(activation or "") if packed.bias is not None and not INTERPRETED else None
    epilogue = activation is not None and fused is None
    if epilogue and out is None and is_large(x, packed.weight.shape[0]):
        y = large_product(x, packed.weight, packed.bias, activation)
        return y if residual is None else y + residual
    if tile := product_tile(x, packed.weight.shape[0], gated=False, epilogue=epilogue):
        if out is not None:
            return product(x, packed.weight, packed.bias, tile, out=out)
        return product(x, packed.weight, packed.bias, tile, activation=activation, residual=residual)
    if out is not None:
        return _cublas(x, packed, out)
    if residual is not None and packed.bias is None and activation is None:
        return torch.addmm(residual, x, packed.weight.t(), out=residual if overwrite else None)
    if fused is not None and packed.bias is not None:
        y = torch._addmm_activation(packed.bias, x, packed.weight.t(), use_gelu=fused)
    else:
        y = F.linear(x, packed.weight, packed.bias)
        y = y if activation is None else activate(y, activation)
    return y if residual is None else y + residual


def _quantized(
    x: Tensor, packed: PackedLinear, scale: Tensor, activation: str | None, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    weight, bias = packed.weight, packed.bias
    options: dict[str, Any] = {"activation": activation, "residual": residual, "out": out}
    if weight.dtype == FP8:
        if x.shape[0] == 1:
            return fp8_gemv(x, weight, scale, bias, **options)
        if tile := fp8_product_tile(x, weight.shape[0], gated=False):
            return fp8_product(x, weight, scale, bias, tile, **options)
        return fp8_product_of_many(x, weight, scale, bias, **options)
    if x.shape[0] == 1:
        return quantized_gemv(x, weight, scale, bias, **options)
    if tile := quantized_product_tile(x, weight.shape[0], bits_of(scale), gated=False):
        return quantized_product(x, weight, scale, bias, tile, **options)
    return product_of_many(x, weight, scale, bias, **options)


def _cublas(x: Tensor, packed: PackedLinear, out: Tensor) -> Tensor:
    if packed.bias is None:
        return torch.mm(x, packed.weight.t(), out=out)
    return torch.addmm(packed.bias, x, packed.weight.t(), out=out)


def linear_norm(
    x: Tensor, packed: PackedLinear, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `layer_norm` of `linear(x, packed, residual=residual)`, with its weight and bias [N], and what it is of."""
    plain = packed.scale is None and packed.weight.dtype == x.dtype
    if use_triton(x) and plain and bias is not None and is_wide(x, packed.weight.shape[0]):
        return wide_linear_norm(x, packed.weight, packed.bias, residual, weight, bias, eps)
    return layer_norm(linear(x, packed), weight, bias, eps, residual)


def gated_linear(x: Tensor, packed: PackedLinear, kind: str) -> Tensor:
    """activation(gate) * up of [gate, up] = `linear(x, packed)`.

    Args:
        x: [T, K].
        packed: [2 * I, K], the gate's rows first.
        kind: a key of `activation.KINDS`.

    Returns:
        [T, I].
    """
    y = _fused_gated(x, packed, kind) if use_triton(x) else None
    return gated(linear(x, packed), kind) if y is None else y


def _fused_gated(x: Tensor, packed: PackedLinear, kind: str) -> Tensor | None:
    """`gated_linear` in one kernel, or None where there is none."""
    weight, scale, bias, n = packed.weight, packed.scale, packed.bias, packed.weight.shape[0] // 2
    if scale is None:
        if x.shape[0] == 1:
            return gemv(x, packed, kind, None, gated_pair=True)
        # Of many rows a UNet's alone; decoders' were measured with cuBLAS.
        if kind == "gelu" and is_gated_many(x, n):
            return gated_product(x, weight, bias, kind)
        if tile := product_tile(x, n, gated=True, epilogue=kind == "gelu"):
            return product(x, weight, bias, tile, activation=kind, gated=True)
    elif weight.dtype == FP8:
        if x.shape[0] == 1:
            return fp8_gemv(x, weight, scale, bias, activation=kind, gated_pair=True)
        if tile := fp8_product_tile(x, n, gated=True):
            return fp8_product(x, weight, scale, bias, tile, activation=kind, gated=True)
    elif weight.dtype == torch.int32:
        if x.shape[0] == 1:
            return quantized_gemv(x, weight, scale, bias, activation=kind, gated_pair=True)
        if tile := quantized_product_tile(x, n, bits_of(scale), gated=True):
            return quantized_product(x, weight, scale, bias, tile, activation=kind, gated=True)
    return None


def gemv(
    x: Tensor,
    packed: PackedLinear,
    activation: str | None,
    residual: Tensor | None,
    *,
    gated_pair: bool,
    out: Tensor | None = None,
    start: Start = "",
) -> Tensor:
    """`linear` of x [1, K], or `gated_linear` for a pair, by the matrix-vector kernel.

    Args:
        x: [1, K].
        packed: whose weights are not quantized.
        activation: see `linear`.
        residual: see `linear`; None for a pair.
        gated_pair: whether the first half of the rows is the gate's.
        out: [1, outputs], where it is written, or None.
        start: when the next kernel may start. "": with this one; "after": when what was before this one has ended;
            "beside": with this one, which waits for nothing but at its end (see `parallel_block.py`).
    """
    rows, k = packed.weight.shape
    n = rows // 2 if gated_pair else rows
    y = torch.empty((1, n), dtype=x.dtype, device=x.device) if out is None else out
    tile = gemv_tile(n, k, gated_pair)
    _gemv[(-(-n // tile["BLOCK_N"]),)](
        x,
        packed.weight,
        packed.bias,
        residual,
        y,
        n,
        K=k,
        ACTIVATION=activation,
        GATED=gated_pair,
        HAS_BIAS=packed.bias is not None,
        HAS_RESIDUAL=residual is not None,
        START=start,
        **tile,
        **launch_options(x),
    )
    return y


def gemv_tile(n: int, k: int, gated_pair: bool) -> dict[str, Any]:
    """Tile of the matrix-vector kernel: the fastest of those measured, of GPT-2's layers on an H100, and on an H200 of
    LLaMA-8B's and GPT-NeoX-20B's, whole and halved, in a graph of all layers.
    """
    if k <= 1024:
        block_n, block_k, warps = (4, 256, 1) if n > 16384 else (4, power_of_2(k), 4)
    elif n <= 1024:
        block_n, block_k, warps = (1, 2048, 4)
    elif k > 12288:
        block_n, block_k, warps = (1, 4096, 4)
    elif k > 4096:
        block_n, block_k, warps = (1, 2048, 4 if k % 2048 == 0 else 2)
    elif n * k < 1 << 24 and not gated_pair:
        block_n, block_k, warps = (4, 1024, 4)
    else:
        block_n, block_k, warps = (2, 1024, 4)
    if gated_pair and block_n > 2:
        block_n //= 2
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps}


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _gemv(
    x, weight, bias, residual, y, n, K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, START: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):
    """Each program computes BLOCK_N outputs (BLOCK_N of the gate and their partners of the other half if GATED).

    The first tile of weights is asked for before the wait: memory works while the kernel before this one ends.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    there = row < n
    at = weight + row.to(tl.int64)[:, None] * K + column[None, :]
    mask = there[:, None] & (column < K)[None, :]
    tile = tl.load(at, mask=mask, other=0.0)
    if GATED:
        other = n * K  # below 2**31 elements in any gate that fits a GPU
        partner = tl.load(at + other, mask=mask, other=0.0)
    if START == "beside":
        let_next_start(PDL)
    elif START == "after":
        wait_for_all(PDL)
        let_next_start(PDL)
    else:
        wait_for_inputs(PDL)
    value = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
    total = tile.to(tl.float32) * value
    if GATED:
        total2 = partner.to(tl.float32) * value
    for start in range(BLOCK_K, K, BLOCK_K):
        mask = there[:, None] & (start + column < K)[None, :]
        tile = tl.load(at + start, mask=mask, other=0.0)
        value = tl.load(x + start + column, mask=start + column < K, other=0.0).to(tl.float32)[None, :]
        total += tile.to(tl.float32) * value
        if GATED:
            total2 += tl.load(at + other + start, mask=mask, other=0.0).to(tl.float32) * value
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    result = activation_of(result, ACTIVATION)
    if GATED:
        up = tl.sum(total2, 1)
        if HAS_BIAS:
            up += tl.load(bias + n + row, mask=there, other=0.0).to(tl.float32)
        result *= up
    if HAS_RESIDUAL:
        result += tl.load(residual + row, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=there)
    if START == "beside" and tl.program_id(0) == tl.num_programs(0) - 1:
        wait_for_all(PDL)
