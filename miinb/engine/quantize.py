"""Weight-only int8: every weight matrix as whole numbers from -127 to 127, with a scale for each group of columns.

ZeroQuant's scheme for weights (Yao et al., 2022): symmetric, to the nearest, tensor by tensor while the model loads.
Activations are not quantized. `kernels.reference.dequantize` is the way back.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.kernels.reference import GROUP

#: Quantized at a time: what is computed in between stays in the processor's cache.
_BLOCK_ELEMENTS = 1 << 16


class Quantizer:
    """Quantizes the matrices of one model and keeps account of what that changes.

    Args:
        levels: the largest number.
    """

    def __init__(self, levels: int = 127) -> None:
        self._levels = levels
        self._error = 0.0  # sums of squares
        self._total = 0.0

    def empty(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Room for a matrix: numbers [rows, columns] int8 and scales [rows, groups] fp32."""
        numbers = torch.empty((rows, columns), dtype=torch.int8, device=device)
        return numbers, torch.empty((rows, -(-columns // GROUP)), device=device)

    def quantize(self, weight: Tensor, numbers: Tensor, scale: Tensor) -> None:
        """Quantize `weight` [N, K] into what `empty` made. What is not finite makes a scale that is not."""
        rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
        for part, out, factors in zip(*(torch.split(tensor, rows) for tensor in (weight, numbers, scale)), strict=True):
            columns = part.shape[1]
            groups = F.pad(part.float(), (0, -columns % GROUP)).view(len(part), -1, GROUP)
            factors.copy_(torch.linalg.vector_norm(groups, math.inf, dim=-1) / self._levels)
            scaled = groups / factors.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
            whole = scaled.round()
            out.copy_(whole.flatten(1)[:, :columns])
            self._error += float(torch.linalg.vector_norm((scaled - whole) * factors[..., None])) ** 2
            self._total += float(torch.linalg.vector_norm(groups)) ** 2

    @property
    def rounding(self) -> float:
        """Root of the mean square of all changes, relative to the weights' own."""
        return math.sqrt(self._error / self._total) if self._total else 0.0
