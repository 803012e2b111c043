"""Linear layers on packed weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from miinb.kernels import reference


@dataclass(slots=True)
class PackedLinear:
    """Weights of one linear layer in the layout that the kernels read.

    Attributes:
        weight: [N, K]: one row an output, as `torch.nn.Linear` has it.
        bias: [N] or None.
    """

    weight: Tensor
    bias: Tensor | None = None


def linear(x: Tensor, packed: PackedLinear, *, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
    """activation(x @ weight.T + bias) + residual.

    Args:
        x: [T, K].
        packed: the layer's weights [N, K].
        activation: a key of `activation.KINDS` or None.
        residual: [T, N] or None.

    Returns:
        [T, N] in x's dtype; sums are fp32.
    """
    return reference.linear(x, packed.weight, packed.bias, activation=activation, residual=residual)
