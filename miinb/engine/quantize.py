"""Quantization of weights: every weight matrix as numbers of fewer bits with a scale for each group of columns, or row.

int8 is ZeroQuant's scheme for weights (Yao et al., 2022): symmetric, to the nearest. int4 has a step and a lowest value
for each group, of which the ones are taken that lose the least. fp8 has a scale for each row, which makes the row's
largest number fp8's largest. All work tensor by tensor while the model loads. `kernels.formats` has the layouts and the
way back; `calibrate.py` rounds int4 better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miinb.kernels.formats import (
    FP8,
    FP8_MAX,
    GROUP,
    INT4_MAX,
    INT8_OFFSET,
    fp8_columns,
    groups_of,
    pack,
    pack_fp8,
    words_of,
)

Kind = Literal["int8", "int4", "fp8"]

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
        kind: of the numbers.
        levels: the largest number of int8.
        words: int8 in the form of a GPU; the others have only one.
        account: shared with other quantizers of the model, or None.
    """

    def __init__(
        self,
        kind: Kind = "int8",
        *,
        levels: int = 127,
        words: bool = False,
        account: Account | None = None,
    ) -> None:
        self.kind = kind
        self.account = account or Account()
        self._levels = levels
        self._words = words

    def empty(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Room for a matrix: numbers and scales as `kernels.formats` has them."""
        if self.kind == "fp8":
            numbers = torch.empty((rows, fp8_columns(columns)), dtype=FP8, device=device)
            return numbers, torch.empty(rows, device=device)
        groups = groups_of(columns)
        if self.kind == "int4":
            words = torch.empty((rows, words_of(columns, 4)), dtype=torch.int32, device=device)
            return words, torch.empty((rows, groups, 2), dtype=torch.bfloat16, device=device)
        if self._words:
            words = torch.empty((rows, words_of(columns, 8)), dtype=torch.int32, device=device)
            return words, torch.empty((rows, groups), dtype=torch.bfloat16, device=device)
        numbers = torch.empty((rows, columns), dtype=torch.int8, device=device)
        return numbers, torch.empty((rows, groups), device=device)

    def quantize(self, weight: Tensor, numbers: Tensor, scale: Tensor) -> None:
        """Quantize `weight` [N, K] into what `empty` made. What is not finite makes a scale that is not."""
        if weight.is_meta:
            return
        rows = max(1, _BLOCK_ELEMENTS[weight.device.type] // weight.shape[1])
        one = {"int8": self._int8, "int4": self._int4, "fp8": self._fp8}[self.kind]
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

    def _fp8(self, part: Tensor, out: Tensor, factors: Tensor) -> None:
        wide = part.float()
        factors.copy_(torch.linalg.vector_norm(wide, math.inf, dim=1) / FP8_MAX)
        used = factors[:, None]
        numbers = (wide / used.clamp(min=torch.finfo(torch.float32).tiny)).to(FP8)
        out.copy_(pack_fp8(numbers))
        self.account.add(wide, numbers.float() * used - wide)

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
