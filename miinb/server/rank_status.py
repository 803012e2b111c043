"""What the supervisor tells of each rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import psutil

from miinb.hardware import gpu_free_bytes
from miinb.messages import RankStatus, from_dict
from miinb.server.launch import Launch
from miinb.server.process import Process


def rank_statuses(children: Iterable[Process], launch: Launch, given_up: Iterable[int]) -> tuple[RankStatus, ...]:
    """Every rank in its order; those of replicas that were given up are "failed", and have no process (0)."""
    ranks = [child for child in children if child.replica is not None]
    on_gpus = any(launch.gpu(child.replica or 0, child.rank) is not None for child in ranks)
    free = gpu_free_bytes() if on_gpus else {}
    found = [_rank_status(child, launch, free) for child in ranks]
    for replica in given_up:
        size = launch.config.tensor_parallel
        found += [RankStatus(replica, rank, 0, "failed", launch.gpu(replica, rank)) for rank in range(size)]
    return tuple(sorted(found, key=lambda status: (status.replica, status.rank)))


def _rank_status(child: Process, launch: Launch, free: Mapping[int, int]) -> RankStatus:
    state = "ready" if child.ready is not None else (child.phase.name if child.phase else "start")
    facts: dict[str, Any] = {}
    with contextlib.suppress(psutil.Error):
        facts["memory_bytes"] = psutil.Process(child.pid).memory_info().rss
    facts |= {**(child.ready or {}), "state": state, "pid": child.pid}  # a rank on a GPU tells its memory there
    gpu = launch.gpu(child.replica or 0, child.rank)
    facts["free_bytes"] = 0 if gpu is None else free.get(gpu, 0)
    return from_dict(RankStatus, {**facts, "replica": child.replica, "rank": child.rank, "gpu": gpu})
