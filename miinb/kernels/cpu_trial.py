"""From how many rows on PyTorch's linear layer is clearly faster than the library's: a trial when a model loads."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.kernels.linear import PackedLinear

#: More rows than there are.
NEVER = 1 << 30
#: Rows at which PyTorch's linear layer is tried against the library's, and how much faster it must be to be taken: with
#: the library alone a row's answer does not depend on what else is in the step.
_TRIED_ROWS = (4, 16, 64)
_CLEARLY = 1.5


def torch_rows(linear: Callable[[Tensor, PackedLinear], Tensor], dtype: torch.dtype) -> int:
    """The least rows with which PyTorch is clearly faster, as it is in bf16 where the CPU has AMX, or `NEVER`.

    The environment variable MIINB_CPU_TORCH_ROWS gives it without a trial (0: never).
    """
    given = os.environ.get("MIINB_CPU_TORCH_ROWS", "")
    if given.isdigit():
        return int(given) or NEVER
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return NEVER  # PyTorch is as fast at best there (see docs/decisions): no trial that others may disturb
    packed = PackedLinear(torch.randn(512, 768).to(dtype))
    for rows in _TRIED_ROWS:
        x = torch.randn(rows, 768).to(dtype)
        ours, theirs = _fastest(functools.partial(linear, x, packed), functools.partial(F.linear, x, packed.weight))
        if theirs * _CLEARLY < ours:
            return rows
    return NEVER


def _fastest(*runs: Callable[[], object]) -> list[float]:
    """Seconds of the fastest of a few calls of each, in turns: those that nothing interrupted."""
    best = [float("inf")] * len(runs)
    for _ in range(6):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    return best
