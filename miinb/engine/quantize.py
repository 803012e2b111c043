"""Weight-only quantization: every weight matrix as whole numbers with a scale for each group of columns.

int8 is ZeroQuant's scheme for weights (Yao et al., 2022): symmetric, to the nearest. int4 has a step and a lowest value
for each group, of which the ones are taken that lose the least. Both work tensor by tensor while the model loads.
Activations are not quantized. `kernels.formats` has the layouts and the way back; `calibrate.py` rounds int4 better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from miinb.kernels.formats import GROUP, INT4_MAX, INT8_OFFSET, groups_of, pack, words_of

#: Quantized at a time: on a CPU what is computed in between stays in its cache.
_BLOCK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}
#: Shares of a group's range that int4 tries to cover: a few large weights that are cut may make all others better.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(slots=True)
class Account:
    """What quantization has changed: sums of squares of all changes, and of the weights."""

    error: Tensor | float = 0.0
    total: Tensor | float = 0.0

    def add(self, weight: Tensor, change: Tensor) -> None:
        """Count fp32 weights and how much each was changed; a GPU is not waited for."""
        self.error = self.error + torch.linalg.vector_norm(change).double() ** 2
        self.total = self.total + torch.linalg.vector_norm(weight).double() ** 2

    @property
    def rounding(self) -> float:
        """Root of the mean square of all changes, relative to the weights' own."""
        return math.sqrt(float(self.error) / float(self.total)) if self.total else 0.0


class Quantizer:
    """Quantizes the matrices of one model and keeps account of what that changes.

    Args:
        bits: 8 or 4.
        levels: the largest number of int8.
        words: int8 in the form of a GPU; int4 has only that one.
        account: shared with other quantizers of the model, or None.
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        levels: int = 127,
        words: bool = False,
        account: Account | None = None,
    ) -> None:
        self.bits = bits
        self.account = account or Account()
        self._levels = levels
        self._words = words or bits == 4

    def empty(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Room for a matrix: numbers and scales as `kernels.formats` has them."""
        groups = groups_of(columns)
        if not self._words:
            numbers = torch.empty((rows, columns), dtype=torch.int8, device=device)
            return numbers, torch.empty((rows, groups), device=device)
        words = torch.empty((rows, words_of(columns, self.bits)), dtype=torch.int32, device=device)
        shape = (rows, groups, 2) if self.bits == 4 else (rows, groups)
        return words, torch.empty(shape, dtype=torch.bfloat16, device=device)

    def quantize(self, weight: Tensor, numbers: Tensor, scale: Tensor) -> None:
        """Quantize `weight` [N, K] into what `empty` made. What is not finite makes a scale that is not."""
        if weight.is_meta:
            return
        rows = max(1, _BLOCK_ELEMENTS[weight.device.type] // weight.shape[1])
        one = self._int4 if self.bits == 4 else self._int8
        for part, out, factors in zip(*(torch.split(tensor, rows) for tensor in (weight, numbers, scale)), strict=True):
            one(part, out, factors)

    def _int8(self, part: Tensor, out: Tensor, factors: Tensor) -> None:
        groups = grouped(part)
        factors.copy_(torch.linalg.vector_norm(groups, math.inf, dim=-1) / self._levels)
        used = factors.float()[..., None]
        scaled = groups / used.clamp(min=torch.finfo(torch.float32).tiny)
        whole = scaled.round().clamp(-self._levels, self._levels)
        numbers = whole.flatten(1)[:, : part.shape[1]]
        out.copy_(pack(numbers + INT8_OFFSET, 8) if self._words else numbers)
        self._count(part, groups, (scaled - whole) * used)

    def _int4(self, part: Tensor, out: Tensor, factors: Tensor) -> None:
        groups = grouped(part)
        there = torch.arange(groups[0].numel(), device=part.device).view(groups.shape[1:]) < part.shape[1]
        factors.copy_(fit_int4(groups, there))
        numbers = round_int4(groups, factors)
        out.copy_(pack(numbers.flatten(1)[:, : part.shape[1]], 4))
        step, low = factors.float()[..., None].unbind(-2)
        self._count(part, groups, numbers * step + low - groups)

    def _count(self, part: Tensor, groups: Tensor, change: Tensor) -> None:
        columns = part.shape[1]
        self.account.add(*(each.flatten(1)[:, :columns] for each in (groups, change)))

    @property
    def rounding(self) -> float:
        """See `Account.rounding`."""
        return self.account.rounding


def grouped(weight: Tensor) -> Tensor:
    """[N, K] as fp32 [N, groups, GROUP], filled up with the last column."""
    rows, columns = weight.shape
    more = -columns % GROUP
    filled = torch.cat((weight, weight[:, -1:].expand(rows, more)), 1) if more else weight
    return filled.float().reshape(rows, -1, GROUP)


def fit_int4(groups: Tensor, importance: Tensor | None = None) -> Tensor:
    """The pair [..., groups, 2] bf16 of each group that changes it least, of those that cover some share of its range.

    Args:
        groups: [..., groups, GROUP] fp32.
        importance: [groups, GROUP]: what the square of a column's change counts, or None for all alike.
    """
    least, most = torch.aminmax(groups, dim=-1)
    middle, width = (least + most) / 2, (most - least) / INT4_MAX
    best = lost = torch.empty(0)
    for share in _SHARES:
        step = width * share
        pair = torch.stack((step, middle - step * (INT4_MAX / 2)), -1).bfloat16()
        used, low = pair.float()[..., None].unbind(-2)
        change = (round_int4(groups, pair) * used + low - groups).square()
        loss = (change if importance is None else change * importance).sum(-1)
        if share == _SHARES[0]:
            best, lost = pair, loss
            continue
        better = loss < lost
        best, lost = torch.where(better[..., None], pair, best), torch.where(better, loss, lost)
    return best


def round_int4(groups: Tensor, pair: Tensor) -> Tensor:
    """The whole numbers of groups [..., groups, GROUP] by their pairs [..., groups, 2], as fp32."""
    step, low = pair.float()[..., None].unbind(-2)
    return ((groups - low) / step.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(0, INT4_MAX)
