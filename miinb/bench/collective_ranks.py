"""One rank of `miinb.bench.collectives`: `python -m miinb.bench.collective_ranks RANK RANKS FOLDER [PUSHED]`.

Every rank knows what all ranks have (it draws the same random numbers), and so what the sums must be. Rank 0 writes
FOLDER/result.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miinb.engine import symmetric
from miinb.engine.graphs import Recorder
from miinb.engine.parallel import Group, init_distributed
from miinb.kernels import norm

ROWS = (1, 4, 16, 64, 256)
HIDDEN = (2048, 4096, 8192)
DTYPE = torch.bfloat16
EPS = 1e-5
#: Messages that are checked of each shape, with other numbers each.
CHECKED = 100
#: Sums in one graph, and how often it is replayed.
SUMS, REPLAYS = 20, 25
#: Of a sum: rounding it to bf16 is half of the first, and sums in fp32 are far better than the second.
RELATIVE, ABSOLUTE = 2.0**-8, 1e-5
#: Of a norm's output, relative to the largest: it is rounded twice.
OF_NORM = 2e-2

Step = Callable[[], Any]


@contextmanager
def by_nccl(group: Group) -> Iterator[None]:
    """Within it the group's sums go by NCCL alone."""
    boards, group.boards = group.boards, None
    try:
        yield
    finally:
        group.boards = boards


@torch.inference_mode()
def check(group: Group, rows: int, hidden: int, device: torch.device) -> dict[str, Any]:
    """Sums and norms by a graph, replayed with numbers that change, against fp64's.

    Returns:
        `wrong`: elements that rounding does not explain; `apart`: messages of which another rank has other bits;
        `norm_error`: the largest of a norm, relative to its largest element.
    """
    generator = torch.Generator(device).manual_seed(rows * hidden)
    options: Any = {"device": device, "dtype": DTYPE}
    x, residual = torch.empty(rows, hidden, **options), torch.empty(rows, hidden, **options)
    weight = torch.randn(hidden, generator=generator, **options)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        return group.all_reduce(x), *_fused(group, x, residual, weight)

    replay, (found, y, total) = Recorder(group=group).record(step)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    worst = torch.zeros((), device=device)
    places = torch.arange(1, 3 * rows * hidden + 1, device=device).view(3, -1)
    digests = []
    for _ in range(CHECKED):
        parts = [torch.randn(rows, hidden, generator=generator, **options) for _ in range(group.size)]
        x.copy_(parts[group.rank])
        residual.copy_(torch.randn(rows, hidden, generator=generator, **options))
        replay()
        exact = sum((part.double() for part in parts), torch.zeros_like(x, dtype=torch.float64))
        wrong += _wrong(found, exact) + _wrong(total, exact + residual)
        normed = total.double() * total.double().square().mean(-1, keepdim=True).add(EPS).rsqrt() * weight
        worst = torch.maximum(worst, ((y - normed).abs().max() / normed.abs().max()).float())
        bits = torch.stack([tensor.view(torch.int16).flatten() for tensor in (found, y, total)]).long()
        digests.append((bits * places).sum())
    mine = torch.stack(digests)[None]
    apart = sum(int((theirs != mine).sum()) for theirs in group.gather(mine).chunk(group.size, -1))
    return {"wrong": int(wrong), "apart": apart, "norm_error": float(worst)}


def _fused(group: Group, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    both = group.reduce_norm(x, residual, weight, None, EPS, centered=False)
    if both is None:
        raise RuntimeError("the message does not fit the boards")
    return both


def _wrong(found: Tensor, exact: Tensor) -> Tensor:
    return ((found - exact).abs() > RELATIVE * exact.abs() + ABSOLUTE).sum()


@torch.inference_mode()
def measure(group: Group, rows: int, hidden: int, device: torch.device) -> dict[str, Any]:
    """Microseconds of each way, one sum behind the other; of zeros, as NCCL's are in place."""
    x, residual = (torch.zeros(rows, hidden, device=device, dtype=DTYPE) for _ in range(2))
    weight = torch.ones(hidden, device=device, dtype=DTYPE)
    times = {}
    with by_nccl(group):
        times["nccl_eager"] = eager_us(group, lambda: group.all_reduce(x))
        times["nccl"] = graph_us(group, lambda: group.all_reduce(x))
        times["nccl_norm"] = graph_us(group, lambda: norm.rms_norm(group.all_reduce(x), weight, EPS, residual))
    times["ours"] = graph_us(group, lambda: group.all_reduce(x))
    times["ours_norm"] = graph_us(group, lambda: _fused(group, x, residual, weight))
    size = x.numel() * x.element_size()
    used = size <= symmetric.most_bytes(group.size)
    # The slowest rank's: all go on together.
    slowest = {name: -group.least(round(-1e3 * us), device) / 1e3 for name, us in times.items()}
    return {"rows": rows, "hidden": hidden, "bytes": size, "used": used, **slowest}


def eager_us(group: Group, step: Step) -> float:
    """Of one sum, launched by Python."""
    return _us(group, lambda: [step() for _ in range(SUMS)])


def graph_us(group: Group, step: Step) -> float:
    """Of one sum in a CUDA graph of many."""
    replay, _ = Recorder(group=group).record(lambda: [step() for _ in range(SUMS)])
    return _us(group, replay)


def _us(group: Group, many: Step) -> float:
    times: list[float] = []
    for _ in range(3 + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        many()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / SUMS)
    return statistics.median(times[3:])


def run(group: Group, device: torch.device) -> dict[str, Any]:
    """All shapes: what was checked, and the times."""
    found: dict[str, Any] = {"checks": [], "times": []}
    for hidden in HIDDEN:
        for rows in ROWS:
            found["checks"].append({"rows": rows, "hidden": hidden, **check(group, rows, hidden, device)})
            found["times"].append(measure(group, rows, hidden, device))
    return found


def main() -> None:
    """One rank."""
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    started = time.monotonic()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = init_distributed(replica=0, rank=rank, ranks=ranks, folder=folder, device="cuda")
    if group is None:
        raise RuntimeError("one rank has nothing to sum")
    largest = max(ROWS) * max(HIDDEN) * DTYPE.itemsize
    symmetric.MOST_PUSHED = int(sys.argv[4]) if len(sys.argv) > 4 else symmetric.MOST_PUSHED
    result: dict[str, Any] = {"ranks": ranks, "checked": CHECKED, "pushed": symmetric.MOST_PUSHED}
    result["reason"] = symmetric.connect(group, device, max(largest, symmetric.most_bytes(ranks)))
    if not result["reason"]:
        result |= run(group, device)
    result["seconds"] = time.monotonic() - started
    if rank == 0:
        nccl: Any = torch.cuda.nccl
        result["nccl"] = ".".join(map(str, nccl.version()))
        (folder / "result.json").write_text(json.dumps(result))
    group.least(1, device)
    os._exit(0)  # leaving NCCL's group may wait for what its graphs hold


if __name__ == "__main__":
    main()
