"""Ranks of one model: torch.distributed through DeepSpeed, and the two collectives that split models need."""

from __future__ import annotations

import atexit
import functools
import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from miinb.engine import shared_memory, symmetric
from miinb.kernels import all_reduce as kernels
from miinb.kernels import best_of_ranks
from miinb.kernels.all_reduce import Boards

#: Longest wait in a collective. Ranks enter them together, so only one that is dead or stopped takes so long.
COLLECTIVE_S = 60.0
#: Longest wait for the others when a process leaves the group.
LEAVE_S = 5.0


class PeerLost(Exception):
    """Another rank ended or does not answer: this one cannot go on, and is not the one to blame."""


class OutOfStep(PeerLost):
    """This rank failed where the others went on: it ends, and is the one to blame."""


class Group:
    """The tensor-parallel ranks of one replica. Collectives are issued by one thread, on one stream.

    Attributes:
        rank: this process's place.
        size: how many ranks share the model.
        kind: what carries the collectives: "nccl", "gloo" or "shared memory".
        boards: memory of linked GPUs, through which small sums go instead (`symmetric.connect`); None: there is none.
        reductions, gathers: collectives since `begin`, so that a rank that fails within a step knows which are left.
    """

    def __init__(self, rank: int, size: int, kind: str = "gloo") -> None:
        self.rank = rank
        self.size = size
        self.kind = kind
        self.boards: Boards | None = None
        self.reductions = self.gathers = 0
        # Half-precision sums of the operator need AVX-512; without it they are made in fp32, which is still the faster.
        self._native = {torch.float32, torch.bfloat16} if shared_memory.level() > 1 else {torch.float32}

    def begin(self) -> None:
        """A step begins."""
        self.reductions = self.gathers = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`; may be in place.

        Raises:
            PeerLost: a rank is gone.
        """
        self.reductions += 1
        x = x.contiguous()  # DeepSpeed's shared-memory operator leaves other tensors unreduced, silently
        if self.boards is not None and self.boards.fits(x):
            return kernels.all_reduce(x, self.boards)
        if self.kind == "shared memory" and x.dtype not in self._native:
            return self._sum(x.float()).to(x.dtype)
        return self._sum(x)

    def reduce_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, **options: bool
    ) -> tuple[Tensor, Tensor] | None:
        """`all_reduce`, the residual's addition and the norm as one kernel: `kernels.all_reduce.reduce_norm`.

        Returns:
            The norm's output and the sum, or None: there is no such kernel for this message, and nothing was done.
        """
        if self.boards is None or not self.boards.fits(x):
            return None
        self.reductions += 1
        return kernels.reduce_norm(x.contiguous(), self.boards, weight, bias, eps, residual, **options)

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's `x` [L, n] side by side: [L, n * size].

        Raises:
            PeerLost: a rank is gone.
        """
        self.gathers += 1
        board = torch.zeros((self.size, *x.shape), dtype=x.dtype, device=x.device)
        if self.kind == "shared memory":  # a sum in which each place has one rank's numbers is exact
            wide = board.float()
            wide[self.rank] = x
            board = self._sum(wide).to(x.dtype)
        elif self.kind == "nccl":
            self._wait(self._comm.all_gather_into_tensor, board, x.contiguous())
        else:
            self._wait(self._comm.all_gather, list(board.unbind()), x.contiguous())
        return torch.cat(board.unbind(), -1)

    def best(self, value: Tensor, token_id: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The tokens with the largest logits, of which every rank has a part: only each rank's best one crosses.

        Args:
            value, token_id: of this rank's part, as `kernels.head.largest` has them.
            first: what token the part begins with.

        Returns:
            As `kernels.head.argmax`, the same on every rank.

        Raises:
            PeerLost: a rank is gone.
        """
        if self.boards is not None and best_of_ranks.fits(len(value), self.boards):
            self.gathers += 1
            return best_of_ranks.best_of_ranks(value, token_id, self.boards, first)
        candidates = self.gather(torch.stack([value, (token_id + first).float()], -1))  # ids below 2**24 are exact
        values, ids = candidates.view(-1, self.size, 2).unbind(-1)
        best = values.amax(-1)  # NaN if one is: no id is chosen then, and any will do
        winner = torch.where(values == best[:, None], ids, float(1 << 24)).amin(-1)  # the lowest of equal ones
        return torch.where(best.isnan(), 0.0, winner).long(), torch.isfinite(best)

    def least(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values (at start-up)."""
        box = torch.tensor([value], dtype=torch.int64, device=device)
        self._wait(self._comm.all_reduce, box, self._comm.ReduceOp.MIN)
        return int(box)

    @functools.cached_property
    def _comm(self) -> Any:
        import deepspeed.comm as comm

        return comm

    def _sum(self, x: Tensor) -> Tensor:
        self._wait(self._comm.inference_all_reduce, x)
        return x

    def _wait(self, collective: Any, *tensors: Any) -> None:
        try:
            collective(*tensors)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise PeerLost(f"Rank {self.rank} lost the others in a collective: {error}") from error


def init_distributed(
    *, replica: int, rank: int, ranks: int, folder: Path, device: str, shared: bool = False
) -> Group | None:
    """Bring up DeepSpeed's process group of one replica; needed with one rank too, for what builds on it.

    The rendezvous is a file in the deployment's private folder, because a TCP store listens on every interface.
    MASTER_PORT is only a name then: DeepSpeed's shared-memory operator calls its segments after it, so two groups need
    two. The supervisor gives it; one rank alone takes its process number.

    Args:
        replica: which copy of the model this is.
        rank: this process's place in it.
        ranks: how many it has.
        folder: the deployment's.
        device: "cuda" or "cpu".
        shared: use DeepSpeed's shared-memory all-reduce (`shared_memory.load` has been called); all ranks alike.

    Returns:
        The group, or None with one rank.
    """
    set_environment(rank=rank, ranks=ranks, device=device)
    import deepspeed
    import deepspeed.ops

    # Through a descriptor, which stays open: torch takes a URL's path as it stands and ends it at a ? or #.
    rendezvous = Path(f"/proc/self/fd/{os.open(folder, os.O_DIRECTORY)}/rdzv-{replica}")
    if deepspeed.comm.is_initialized():
        return Group(rank, ranks) if ranks > 1 else None
    if ranks == 1:
        rendezvous.unlink(missing_ok=True)  # of a process that was killed; it would be waited for
    # Its build takes half a minute on a fresh machine, and a killed build leaves a lock that later starts wait for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = shared
    if ranks == 1:
        atexit.register(leave_group)  # whoever loaded the model; of several ranks the worker says when
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",  # not as_uri(): torch does not decode it, and would wait for ever
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=COLLECTIVE_S),
        auto_mpi_discovery=False,
        verbose=False,
    )
    if ranks == 1:
        return None
    if shared:
        deepspeed.comm.barrier()  # every rank has mapped every segment: the names are needed no more
        shared_memory.unlink(rank)
    return Group(rank, ranks, "nccl" if device == "cuda" else "shared memory" if shared else "gloo")


def leave_group(limit_s: float = LEAVE_S) -> None:
    """Leave the process group, if there is one: NCCL complains of a process that ends within, or aborts it.

    Leaving waits for the other ranks: where one of them is gone this process ends after `limit_s`, with exit code 1.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    limit = threading.Timer(limit_s, os._exit, (1,))
    limit.daemon = True
    limit.start()
    torch.distributed.destroy_process_group()
    limit.cancel()


def set_environment(*, rank: int, ranks: int, device: str) -> None:
    """What DeepSpeed, NCCL, gloo and PyTorch read from the environment: loopback interfaces only, no multicast."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks), CROSS_RANK="0",
        CROSS_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT") or str(os.getpid()),
        GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo", NCCL_NVLS_ENABLE="0", TORCH_SYMMMEM="CUDA",
        **{symmetric.NO_MULTICAST: "1"},
    )  # fmt: skip
    if device == "cpu" and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
