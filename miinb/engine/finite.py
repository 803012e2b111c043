"""Weights that hold NaN or infinity end a start: every answer would fail, and none would say which tensor it is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from miinb.errors import BrokenCheckpoint
from miinb.kernels.formats import FP8
from miinb.models import ModelInfo


def check_finite(weights: Iterable[Tensor], model: ModelInfo, dtype: torch.dtype) -> None:
    """Refuse weights that are not numbers; one pass over them, and one wait for the device.

    Args:
        weights: what was loaded.
        model: where it came from, to find the name.
        dtype: what the weights were converted to.

    Raises:
        BrokenCheckpoint: some are NaN or infinite; the message names the first tensor of the checkpoint.
    """
    # Of quantized weights the scales tell: PyTorch has no sums of fp8.
    floats = [x for x in weights if x.is_floating_point() and x.dtype != FP8 and x.numel()]
    sums = torch.stack([_sum(tensor) for tensor in floats])
    # A sum may overflow where no weight is wrong: then each is looked at.
    if bool(sums.isfinite().all()) or all(bool(tensor.isfinite().all()) for tensor in floats):
        return
    raise _named(model, dtype)


def _sum(tensor: Tensor) -> Tensor:
    """Not finite if a weight is not; fp16 overflows soon, and a sum in another dtype makes a copy on a CPU only."""
    return tensor.sum(dtype=torch.float32) if tensor.is_cuda else tensor.sum().float()


def _named(model: ModelInfo, dtype: torch.dtype) -> BrokenCheckpoint:
    from safetensors import safe_open

    again = "Fetch the model again, or mend it."
    if model.format == "safetensors":
        for entry in sorted(model.tensors.values(), key=lambda entry: (entry.file, entry.offset)):
            with safe_open(entry.file, framework="pt") as file:
                values = file.get_tensor(entry.name)
            if not values.is_floating_point():
                continue
            if not bool(values.isfinite().all()):
                return BrokenCheckpoint(f"{entry.name} of {model.source} holds NaN or infinity.", hint=again)
            if not bool(values.to(dtype).isfinite().all()):
                text = f"{entry.name} of {model.source} has values beyond the range of {str(dtype).split('.')[-1]}."
                return BrokenCheckpoint(text, hint="Use dtype='bf16' or 'fp32'.")
    return BrokenCheckpoint(f"The weights of {model.source} hold NaN or infinity.", hint=again)
