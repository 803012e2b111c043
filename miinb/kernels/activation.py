"""Elementwise activations, plain and gated."""

from __future__ import annotations

from torch import Tensor

from miinb.kernels import reference

#: What `activate`, `gated` and `linear(activation=)` know: gelu is exact (erf), gelu_tanh its approximation.
KINDS = tuple(reference.ACTIVATIONS)


def activate(x: Tensor, kind: str) -> Tensor:
    """The activation of each element of `x`; `kind` is one of `KINDS`."""
    return reference.activate(x, kind)


def gated(x: Tensor, kind: str) -> Tensor:
    """activation(gate) * up (Shazeer, 2020) of `x` [..., 2 * I], gate in its first half: [..., I]."""
    return reference.gated(x, kind)
