"""The LM head with greedy choice: logits need not leave the chip."""

from __future__ import annotations

from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.linear import PackedLinear, linear


def greedy_head(x: Tensor, packed: PackedLinear) -> tuple[Tensor, Tensor]:
    """The argmax of `linear(x, packed)`; among equal logits the lowest id, as `torch.argmax` on rounded logits.

    Args:
        x: [L, hidden].
        packed: the head, [vocab, hidden].

    Returns:
        Token ids [L] int64, and [L] bool: whether the largest logit is finite and none is NaN (the id means
        nothing where not).
    """
    return reference.greedy_head(linear(x, packed))
