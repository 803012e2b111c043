"""A model's buffers kept exact: DeepSpeed converts them to the dtype, where rotary frequencies would lose digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def exact_buffers(model: Any) -> dict[str, Tensor]:
    """The fp32 buffers of a model, by name."""
    return {name: buffer for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}


def put_back(model: Any, buffers: Mapping[str, Tensor]) -> None:
    """Give a model these buffers again, where those are now that took their place."""
    for name, buffer in buffers.items():
        place, _, last = name.rpartition(".")
        kept = model.get_submodule(place)._buffers
        kept[last] = buffer.to(kept[last].device)
