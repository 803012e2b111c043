"""Many rows times an fp8 matrix: the rows become fp8 too, each with a scale of its own, and tensor cores multiply fp8.

They multiply it twice as fast as bf16. What a row becomes depends on that row alone. PyTorch's product with a scale for
each row of both sides makes bf16, and wants both sizes of the weight to be multiples of 16; for all else, and for fewer
rows, the weight is widened (`dequantize.product_of_many`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels.activation import activate
from miinb.kernels.dequantize import product_of_many
from miinb.kernels.dispatch import jit, launch_options, power_of_2, tl, wait_for_inputs
from miinb.kernels.formats import FP8
from miinb.kernels.fp8_product import MOST_ROWS

_SIZES = 16  # both sizes of a weight are multiples of it


def makes_rows_fp8(x: Tensor, weight: Tensor) -> bool:
    """Whether x [T, K] is rounded to fp8 for its product with an fp8 weight [N, W]."""
    (rows, k), n = x.shape, weight.shape[0]
    return rows > MOST_ROWS and x.dtype == torch.bfloat16 and k % _SIZES == 0 and n % _SIZES == 0


def fp8_product_of_many(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual, of x [T, K] and fp8 [N, W] with scales [N]; see `linear.linear`."""
    if not makes_rows_fp8(x, weight):
        return product_of_many(x, weight, scale, bias, activation=activation, residual=residual, out=out)
    numbers, scales = fp8_rows(x)
    # Sums in fp32: tensor cores that add with fewer bits are faster, but lose more the longer a sum is.
    options: dict[str, Any] = {"bias": bias, "out_dtype": x.dtype, "use_fast_accum": False}
    options |= {} if out is None else {"out": out}  # with it PyTorch takes no meta tensors, of which there are none
    y: Tensor = torch._scaled_mm(numbers, weight.t(), scales, scale[None], **options)
    if activation is not None:
        y = activate(y, activation)
    return y if residual is None else y + residual


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, K], contiguous, as fp8 [T, K], the largest number of each as fp8's largest, and scales [T, 1] fp32.

    K is a multiple of 16, and the numbers have the order of weights (see `formats`). What is not finite makes numbers
    that are not, of its row alone.
    """
    rows, k = x.shape
    numbers = torch.empty((rows, k), dtype=FP8, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = max(power_of_2(k), 16)
    warps = min(max(block // 1024, 1), 16)
    _to_fp8[(rows,)](x, numbers, scales, k, BLOCK=block, num_warps=warps, **launch_options(x))
    return numbers, scales


@jit
def _to_fp8(x, numbers, scales, k, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    wide = tl.load(x + row * k + column, mask=column < k, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 0) / 448.0, 1e-30)
    parts = tl.permute(tl.reshape(wide / scale, [BLOCK // 16, 2, 4, 2]), (0, 2, 1, 3))
    tl.store(numbers + row * k + column, tl.reshape(parts, [BLOCK]).to(tl.float8e4nv), mask=column < k)
    tl.store(scales + row, scale)
