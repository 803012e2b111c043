"""Normalization with the residual addition in one pass."""

from __future__ import annotations

from torch import Tensor

from miinb.kernels import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm (Zhang and Sennrich, 2019) of `x + residual`.

    Args:
        x: [..., hidden], contiguous.
        weight: [hidden].
        eps: added to the mean square.
        residual: as `x`, or None.

    Returns:
        The norm's output and the sum `x + residual` (`x` itself without a residual), both in x's dtype.
    """
    return reference.rms_norm(x, weight, eps, residual)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Layer norm (Ba et al., 2016) of `x + residual`; arguments and results as `rms_norm`, `bias` [hidden] or None."""
    return reference.layer_norm(x, weight, bias, eps, residual)
