"""How the ranks of a replica find each other: rank 0's wires first, then DeepSpeed's process group."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from miinb.config import DeploymentConfig
from miinb.engine import shared_memory, symmetric
from miinb.engine.links import Leader, Link
from miinb.engine.parallel import Group, PeerLost, init_distributed, set_environment
from miinb.messages import Plan
from miinb.wording import size_words


@dataclass(slots=True)
class Ranks:
    """This rank's ways to the others of its replica; alone it has none.

    Attributes:
        rank: its place.
        group: for collectives.
        leader: on rank 0: to its followers.
        link: on a follower: to rank 0.
        reason: why the collectives are carried as they are.
    """

    rank: int
    group: Group | None = None
    leader: Leader | None = None
    link: Link | None = None
    reason: str = ""

    def meet(self) -> None:
        """Wait for all ranks, without a time limit: loading takes each as long as it takes. Raises PeerLost."""
        if self.leader is not None:
            self.leader.gather()
            self.leader.send(b"{}")
        elif self.link is not None:
            self.link.tell({})
            _expect(self.link)

    def connect(self, config: DeploymentConfig, device: torch.device) -> None:
        """`meet`, as the time of a collective is limited; then have small sums go by linked GPUs' memory."""
        self.meet()
        if self.group is None or self.group.kind != "nccl" or config.options.all_reduce == "nccl":
            return
        why = symmetric.connect(self.group, device)
        self.reason = f"{self.reason}: {why}" if why else f"{self.group.size} linked GPUs"

    def check(self) -> None:
        """Raise PeerLost if another rank has ended, which makes a collective raise here."""
        if self.leader is not None:
            self.leader.news()
        elif self.link is not None:
            self.link.check()

    def share_of(self, free_bytes: int, device: torch.device) -> int:
        """This rank's part of the free memory: the same on every rank, as their caches have the same pages."""
        if self.group is None:
            return free_bytes
        least = self.group.least(free_bytes, device)
        return least if device.type == "cuda" else least // self.group.size

    def agree(self, holds: bool, device: torch.device) -> bool:
        """Whether it holds on every rank: they fall back together, or none does."""
        return holds if self.group is None else bool(self.group.least(int(holds), device))

    def describe(self, plan: Plan) -> Plan:
        """The plan with a line on how the ranks work together."""
        if self.group is None:
            return plan
        kind, boards = self.group.kind, self.group.boards
        if boards is not None:
            kind = f"symmetric memory up to {size_words(boards.limit)}, {kind} above"
        return plan.with_line("all-reduce", kind, self.reason)


#: The only rank of a replica.
ALONE = Ranks(0)


def join(config: DeploymentConfig, *, replica: int, rank: int, folder: Path, device: str) -> Ranks:
    """Bring up the process group of a replica, and the wires between its ranks.

    Args:
        config: the deployment's.
        replica: which copy of the model this is.
        rank: this process's place in it.
        folder: the deployment's.
        device: "cuda" or "cpu".

    Raises:
        PeerLost: another rank ended.
    """
    ranks = config.tensor_parallel
    if ranks == 1:
        init_distributed(replica=replica, rank=0, ranks=1, folder=folder, device=device)
        return Ranks(0)
    set_environment(rank=rank, ranks=ranks, device=device)
    path = folder / f"ranks-{replica}.sock"
    me = Ranks(rank)
    if rank == 0:
        reason = _no_shared_memory(config, device)
        me.leader = Leader(path, ranks - 1)
        me.leader.send(json.dumps({"reason": reason}).encode())
    else:
        me.link = Link(path)
        reason = str(json.loads(_expect(me.link))["reason"])
        if not reason:
            shared_memory.load()
    shared = not reason
    me.group = init_distributed(replica=replica, rank=rank, ranks=ranks, folder=folder, device=device, shared=shared)
    me.reason = reason or f"{ranks} ranks on one host"
    return me


def _no_shared_memory(config: DeploymentConfig, device: str) -> str:
    """Why the ranks do not use DeepSpeed's shared-memory all-reduce, or ""."""
    if device == "cuda":
        return "asked for" if config.options.all_reduce == "nccl" else f"{config.tensor_parallel} GPUs"
    if config.options.all_reduce == "gloo":
        return "asked for"
    ranks, cores = config.tensor_parallel * config.replicas, len(os.sched_getaffinity(0))
    if config.options.all_reduce == "auto" and ranks * torch.get_num_threads() >= cores:
        return f"ranks that spin in shared memory would need more than these {cores} cores"
    return shared_memory.unusable(config.tensor_parallel)


def _expect(link: Link) -> bytes:
    data = link.receive()
    if data is None:
        raise PeerLost("Rank 0 ended.")
    return data
