"""Ranks of one model: torch.distributed through DeepSpeed, and the two collectives that the decoder needs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


class Group:
    """The tensor-parallel ranks of one replica. Collectives are issued by one thread, on one stream.

    Attributes:
        rank: this process's place.
        size: how many ranks share the model.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, in place."""
        import deepspeed.comm as comm

        x = x.contiguous()  # DeepSpeed's shared-memory operator leaves other tensors unreduced, silently
        comm.inference_all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's `x` [L, n] side by side: [L, n * size]."""
        import deepspeed.comm as comm

        parts = [torch.empty_like(x) for _ in range(self.size)]
        comm.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)


def init_distributed(*, replica: int, rank: int, ranks: int, folder: Path, device: str) -> Group | None:
    """Bring up DeepSpeed's process group of one replica; needed with one rank too, for what builds on it.

    The rendezvous is a file in the deployment's private folder, because a TCP store listens on every interface.
    MASTER_PORT is only a name then: DeepSpeed's shared-memory operator calls its segments after it, so two groups need
    two. The supervisor gives it; one rank alone takes its process number.

    Returns:
        The group, or None with one rank.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks), CROSS_RANK="0",
        CROSS_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT") or str(os.getpid()),
        GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo",
    )  # fmt: skip
    if device == "cpu" and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # Through a descriptor, which stays open: torch takes a URL's path as it stands and ends it at a ? or #.
    rendezvous = Path(f"/proc/self/fd/{os.open(folder, os.O_DIRECTORY)}/rdzv-{replica}")
    if deepspeed.comm.is_initialized():
        return Group(rank, ranks) if ranks > 1 else None
    if ranks == 1:
        rendezvous.unlink(missing_ok=True)  # of a process that was killed; it would be waited for
    # Its build takes half a minute on a fresh machine, and a killed build leaves a lock that later starts wait for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",  # not as_uri(): torch does not decode it, and would wait for ever
        rank=rank,
        world_size=ranks,
        auto_mpi_discovery=False,
        verbose=False,
    )
    return Group(rank, ranks) if ranks > 1 else None
