"""Normalization with the residual addition in one pass."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import jit, launch_options, power_of_2, tl, use_triton, wait_for_inputs

#: From so many rows on a program has several, of so many numbers together: on an H200 twice as fast at 65,536 x 320.
_MANY, _TILE = 4096, 2048


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm (Zhang and Sennrich, 2019) of `x + residual`.

    Args:
        x: [..., hidden], contiguous.
        weight: [hidden], or [N, hidden] of N norms of the same numbers.
        eps: added to the mean square.
        residual: as `x`, or None.

    Returns:
        The norm's output, as `x` or [N, ..., hidden], and the sum `x + residual` (`x` itself without a residual), both
        in x's dtype.
    """
    if not use_triton(x):
        return reference.rms_norm(x, weight, eps, residual)
    return _launch(x, weight, None, eps, residual, centered=False)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Layer norm (Ba et al., 2016) of `x + residual`; arguments and results as `rms_norm`, `bias` as `weight`."""
    if not use_triton(x):
        return reference.layer_norm(x, weight, bias, eps, residual)
    return _launch(x, weight, bias, eps, residual, centered=True)


def post_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """The output of `layer_norm` alone, for blocks whose norm comes last: nobody reads the sum, so none is written."""
    if not use_triton(x):
        return reference.post_norm(x, weight, bias, eps, residual)
    return _launch(x, weight, bias, eps, residual, centered=True, keep=False)[0]


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    *,
    centered: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    hidden = x.shape[-1]
    y = torch.empty((*weight.shape[:-1], *x.shape), dtype=x.dtype, device=x.device)
    total = torch.empty_like(x) if keep and residual is not None else x
    rows, block = x.numel() // hidden, power_of_2(hidden)
    together = _together(rows, block)
    _norm[(-(-rows // together),)](
        x,
        residual,
        weight,
        bias,
        y,
        total,
        rows,
        hidden,
        eps,
        NORMS=weight.numel() // hidden,
        CENTERED=centered,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        KEEP=keep,
        ROWS=together,
        BLOCK=block,
        num_warps=min(max(together * block // 512, 1), 16),
        **launch_options(x),
    )
    return y, total


def _together(rows: int, block: int) -> int:
    """Rows of a program: several where there are many short ones."""
    return 1 if rows < _MANY else max(_TILE // block, 1)


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("rows",))
def _norm(
    x, residual, weight, bias, y, total, rows, hidden, eps, NORMS: tl.constexpr, CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program some rows."""
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    inside = (column < hidden) & (row < rows)[:, None]
    at = row[:, None] * hidden + column
    scales = numbers_of_norms(weight, column, hidden, NORMS)
    if HAS_BIAS:
        shifts = numbers_of_norms(bias, column, hidden, NORMS)
    wait_for_inputs(PDL)
    value = tl.load(x + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        added = value.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            value = added.to(value.dtype)  # rounded first: the norm is of what the next layer's residual will be
            tl.store(total + at, value, mask=inside)
            wide = value.to(tl.float32)
        else:
            wide = added
    else:
        wide = value.to(tl.float32)
    normal = normalize(wide, inside, hidden, eps, value.dtype, CENTERED)
    for i in tl.static_range(NORMS):
        result = normal * scales[i]
        if HAS_BIAS:
            result += shifts[i]
        tl.store(y + i * rows * hidden + at, result.to(value.dtype), mask=inside)


@jit
def numbers_of_norms(numbers, column, hidden, NORMS: tl.constexpr):
    """Weights or biases of each norm, in fp32."""
    found = ()
    for i in tl.static_range(NORMS):
        more = tl.load(numbers + i * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
        found = found + (more,)  # type: ignore[assignment]  # noqa: RUF005
    return found


@jit
def normalize(wide, inside, hidden, eps, dtype: tl.constexpr, CENTERED: tl.constexpr):
    """Rows in fp32, divided by their root mean square, or (CENTERED) by their deviation after their mean was taken off.

    The last dimension is a row.
    """
    if CENTERED:
        wide = tl.where(inside, wide - tl.sum(wide, -1, keep_dims=True) / hidden, 0.0)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, -1, keep_dims=True) / hidden + eps)
    if not CENTERED:
        wide = wide.to(dtype).to(tl.float32)  # rounded before the weight is applied, as the models were trained
    return wide
