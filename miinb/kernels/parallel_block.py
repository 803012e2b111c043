"""One token through a block whose MLP does not need its attention: both at a time.

Attention leaves most of a GPU's memory idle, and the MLP's first product needs nothing of it but time. A layer's
kernels are launched in this order: norm; `late_product` (queries, keys and values); attention; `early_product`;
`last_products`. The early product does not wait for those between it and the norm, whose result it reads:

* It starts when every program of attention runs, which start when every program of the late product has waited for what
  is before it. So the norm has been written.
* It writes to `early_memory`, which is taken before these kernels are launched: none of their memory is the same.
* Its last program waits for attention. So whoever waits for this kernel has waited for both.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels.dispatch import jit, launch_options, tl, use_triton, wait_for_inputs
from miinb.kernels.linear import PackedLinear, gemv, gemv_tile


def early_memory(x: Tensor, qkv: PackedLinear, up: PackedLinear, *, gated: bool) -> Tensor | None:
    """Where `early_product` of x [T, K] is to write, [1, I]; None: these layers go in their order."""
    plain = qkv.scale is None and up.scale is None
    early = x.shape[0] == 1 and plain and use_triton(x) and launch_options(x)["PDL"]
    width = up.weight.shape[0] // 2 if gated else up.weight.shape[0]
    return torch.empty((1, width), dtype=x.dtype, device=x.device) if early else None


def late_product(x: Tensor, packed: PackedLinear) -> Tensor:
    """`linear.linear` of x [1, K]; it lets the next kernel start late."""
    return gemv(x, packed, None, None, gated_pair=False, start="after")


def early_product(x: Tensor, up: PackedLinear, activation: str, out: Tensor, *, gated: bool) -> Tensor:
    """`linear.linear`, or `linear.gated_linear`, of x [1, K] into `early_memory`, beside the kernel before it."""
    return gemv(x, up, activation, None, gated_pair=gated, out=out, start="beside")


def last_products(x: Tensor, down: PackedLinear, attended: Tensor, out: PackedLinear) -> Tensor:
    """The block's sum [1, N], of one kernel.

    Args:
        x: [1, K], the MLP's.
        down: [N, K].
        attended: [1, K2], attention's.
        out: [N, K2].
    """
    n, k = down.weight.shape
    y = torch.empty((1, n), dtype=x.dtype, device=x.device)
    tile = last_tile(n, k)
    _gemv_of_two[(-(-n // tile["BLOCK_N"]),)](
        *(x, down.weight, down.bias),
        *(attended, out.weight, out.bias),
        y,
        n,
        K=k,
        K2=out.weight.shape[1],
        HAS_BIAS=down.bias is not None,
        HAS_BIAS2=out.bias is not None,
        **tile,
        **launch_options(x),
    )
    return y


def last_tile(n: int, k: int) -> dict[str, Any]:
    """Of `last_products`: the fastest of those measured on an H200 of GPT-NeoX-20B's, whole and halved."""
    return {"BLOCK_N": 1, "BLOCK_K": 4096, "num_warps": 8} if k > 4096 else gemv_tile(n, k, False)


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _gemv_of_two(
    x, weight, bias, x2, weight2, bias2, y, n, K: tl.constexpr, K2: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_BIAS2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):
    """As `linear._gemv`: each program computes BLOCK_N outputs, and asks for its first weights before it waits."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    there = row < n
    at = weight + row.to(tl.int64)[:, None] * K + column[None, :]
    first = tl.load(at, mask=there[:, None] & (column < K)[None, :], other=0.0)
    wait_for_inputs(PDL)
    total = first.to(tl.float32) * tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
    total += _products(x, at, there, column, BLOCK_K, K, BLOCK_K)
    at = weight2 + row.to(tl.int64)[:, None] * K2 + column[None, :]
    total += _products(x2, at, there, column, 0, K2, BLOCK_K)
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    if HAS_BIAS2:
        result += tl.load(bias2 + row, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=there)


@jit
def _products(x, weight, there, column, BEGIN: tl.constexpr, END: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K]: products of columns from BEGIN on, still to be summed over the tile."""
    total = tl.zeros([there.shape[0], BLOCK_K], tl.float32)
    for start in range(BEGIN, END, BLOCK_K):
        inside = start + column < END
        tile = tl.load(weight + start, mask=there[:, None] & inside[None, :], other=0.0)
        total += tile.to(tl.float32) * tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total
