"""One of several ranks on linked GPUs: `python reduce_cuda.py RANK RANKS FOLDER` writes what it saw to rank-N.json.

Every rank knows what all ranks have for each message, and so the sum, in the order that the kernel adds in.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miinb.engine import symmetric
from miinb.engine.graphs import Recorder
from miinb.engine.parallel import Group, init_distributed
from miinb.kernels import reference

SHAPES = [(1, 4096), (3, 768), (16, 8192), (64, 4096), (200, 1000)]
POOL = 16
REPLAYS = 1000
EPS = 1e-5


class Messages:
    """Of one shape: `POOL` messages of each rank, residuals, and their exact sums."""

    def __init__(self, ranks: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(sum(shape))
        options: Any = {"generator": generator, "device": device}
        self.parts = torch.randn(ranks, POOL, *shape, **options).to(dtype)
        self.residuals = torch.randn(POOL, *shape, **options).to(dtype)
        self.weight = torch.randn(shape[1], **options).to(dtype)
        wide = torch.zeros(POOL, *shape, device=device)
        for part in self.parts:
            wide += part.float()
        self.sums = wide.to(dtype)
        self.totals = (wide + self.residuals.float()).to(dtype)


def eager(group: Group, device: torch.device) -> dict[str, float]:
    """Wrong elements of sums, and the largest errors of norms and of the sums against NCCL's."""
    seen = {"wrong": 0.0, "norm": 0.0, "nccl": 0.0, "apart": 0.0}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in SHAPES:
            messages = Messages(group.size, shape, dtype, device)
            for i in range(POOL):
                x = messages.parts[group.rank, i]
                y, total = reduce_norm(group, x, messages, i)
                found = group.all_reduce(x)
                seen["wrong"] += wrong(found, messages.sums[i]) + wrong(total, messages.totals[i])
                seen["norm"] = max(seen["norm"], error(y, reference.rms_norm(total, messages.weight, EPS)[0]))
                seen["nccl"] = max(seen["nccl"], error(found, group._sum(x.clone())))
                for mine in (found, total, y):
                    of_all = group.gather(mine).chunk(group.size, -1)
                    seen["apart"] += sum(wrong(theirs, mine) for theirs in of_all)
    return seen


def replayed(group: Group, device: torch.device) -> dict[str, float]:
    """Wrong elements in many replays of graphs of three sums each, with inputs that change and ranks that are late."""
    late, seen = random.Random(group.rank), {}
    for shape in SHAPES:
        messages = Messages(group.size, shape, torch.bfloat16, device)
        x, residual = torch.empty_like(messages.residuals[0]), torch.empty_like(messages.residuals[0])

        def step(x: Tensor = x, residual: Tensor = residual, messages: Messages = messages) -> tuple[Tensor, ...]:
            first = group.all_reduce(x)
            both = group.reduce_norm(x, residual, messages.weight, None, EPS, centered=False)
            assert both is not None
            return first, both[1], group.all_reduce(x)

        with torch.inference_mode():
            replay, (first, total, last) = Recorder(group=group).record(step)
            count = torch.zeros((), dtype=torch.int64, device=device)
            for i in range(REPLAYS):
                at = i % POOL
                x.copy_(messages.parts[group.rank, at])
                residual.copy_(messages.residuals[at])
                replay()
                for found, wanted in ((first, messages.sums), (total, messages.totals), (last, messages.sums)):
                    count += (found != wanted[at]).sum()
                if late.random() < 0.02:
                    torch.cuda.synchronize()
                    time.sleep(0.002)
        seen[f"{shape[0]}x{shape[1]}"] = float(count)
    return seen


def reduce_norm(group: Group, x: Tensor, messages: Messages, at: int) -> tuple[Tensor, Tensor]:
    both = group.reduce_norm(x, messages.residuals[at], messages.weight, None, EPS, centered=False)
    assert both is not None
    return both


def wrong(found: Tensor, wanted: Tensor) -> float:
    return float((found != wanted).sum())


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = init_distributed(replica=0, rank=rank, ranks=ranks, folder=folder, device="cuda")
    assert group is not None
    seen: dict[str, Any] = {"why": symmetric.connect(group, device, 4 << 20)}
    if not seen["why"]:
        large = torch.ones(600, 4096, device=device, dtype=torch.bfloat16)
        seen["large"] = group.reduce_norm(large, None, large[0], None, EPS, centered=False) is None
        seen["large sum"] = float(group.all_reduce(large).float().mean())
        seen["eager"], seen["replayed"] = eager(group, device), replayed(group, device)
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    group.least(1, device)
    os._exit(0)  # leaving NCCL's group may wait for what its graphs hold


if __name__ == "__main__":
    main()
