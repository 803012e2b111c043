"""Memory of linked GPUs that every rank of a replica can read: the boards of `kernels.all_reduce`.

PyTorch's symmetric memory maps each rank's allocation into the others' address spaces. Nothing of it but that is used:
no multicast, which PyTorch would set up as well where the environment does not forbid it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miinb.kernels import all_reduce as kernels
from miinb.kernels import reference
from miinb.kernels.all_reduce import PROGRAMS, Boards, boards_bytes
from miinb.kernels.dispatch import use_triton

if TYPE_CHECKING:
    from miinb.engine.parallel import Group

#: PyTorch touches no multicast where this is "1". NVLink multicast that goes wrong takes a host's GPUs out of service.
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
#: Bytes of the largest message that is pushed, measured on two GPUs (`bench.collectives --pushed`).
MOST_PUSHED = 128 << 10
#: Difference to NCCL's sums that rounding explains, relative to the largest number: NCCL rounds after each addition.
_TOLERANCE = 2e-2


def most_bytes(ranks: int) -> int:
    """Of a message that goes this way: every rank reads every part whole, so the more ranks the smaller."""
    return 2 << 20 if ranks == 2 else 512 << 10 if ranks <= 4 else 256 << 10


def unusable(ranks: int, device: torch.device) -> str:
    """Why this rank's GPU cannot read the others' memory, or "". Asks the driver; needs no other rank."""
    if not use_triton(torch.empty(0, device=device)):
        return "there is no Triton"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPUs are older than Ampere"
    if torch.cuda.device_count() < ranks:
        return "not every rank has a GPU of its own"
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    if apart := [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]:
        return f"GPU {apart[0][0]} cannot read the memory of GPU {apart[0][1]}"
    if os.environ.get(NO_MULTICAST) != "1":
        return f"{NO_MULTICAST} is not 1"
    return ""


def connect(group: Group, device: torch.device, limit: int | None = None) -> str:
    """Give the group boards, where all of its ranks can have them and get the sums of NCCL from them.

    All ranks call it together, after the first collective may be called. They end with boards, or all without.

    Args:
        group: whose collectives go by NCCL so far.
        device: this rank's.
        limit: bytes of the largest message; None: `most_bytes`.

    Returns:
        Why there are none, or "".
    """
    reason = unusable(group.size, device)
    if not group.least(int(not reason), device):
        return reason or "another rank cannot read its peers' memory"
    boards = None
    try:
        boards = _boards(group, device, limit or most_bytes(group.size))
    except (RuntimeError, ImportError, AttributeError) as failure:
        reason = f"PyTorch gives no symmetric memory ({type(failure).__name__}: {str(failure)[:200]})"
    if not group.least(int(boards is not None), device) or boards is None:
        return reason or "another rank has no symmetric memory"
    error = _largest_error(group, boards, device)
    if not group.least(int(error <= _TOLERANCE), device):
        return f"its sums differ from NCCL's by {error:.1e}"
    group.boards = boards
    return ""


def _boards(group: Group, device: torch.device, limit: int) -> Boards:
    import torch.distributed._symmetric_memory as symmetric

    short = min(limit, MOST_PUSHED)
    memory = symmetric.empty(boards_bytes(group.size, limit, short), dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)  # before the others can find it
    world: Any = torch.distributed.group.WORLD
    handle: Any = symmetric.rendezvous(memory, world.group_name)
    # The pointers are to what was allocated; where in that the tensor lies is the same on every rank.
    offset = memory.data_ptr() - handle.buffer_ptrs[group.rank]
    addresses = torch.tensor([start + offset for start in handle.buffer_ptrs], dtype=torch.int64, device=device)
    epochs = torch.zeros(PROGRAMS, dtype=torch.int64, device=device)
    programs = min(PROGRAMS, torch.cuda.get_device_properties(device).multi_processor_count)
    return Boards(addresses, epochs, group.rank, limit, short, programs, keep=(memory, handle))


def _largest_error(group: Group, boards: Boards, device: torch.device) -> float:
    """Of sums and norms of messages that change and come one behind the other, against NCCL's; infinite for NaN."""
    worst = torch.zeros((), device=device)
    for x, residual, weight in _messages(group, boards, device):
        wanted = group.all_reduce(x.clone())
        y, total = kernels.reduce_norm(x, boards, weight, None, 1e-5, residual, centered=False)
        y_wanted, total_wanted = reference.rms_norm(wanted, weight, 1e-5, residual)
        pairs = [(kernels.all_reduce(x, boards), wanted), (total, total_wanted), (y, y_wanted)]
        for found, expected in pairs:
            worst = torch.maximum(worst, (found - expected).float().abs().max() / expected.float().abs().max())
    return float(worst.nan_to_num(torch.inf))


def _messages(group: Group, boards: Boards, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's part [rows, hidden], a residual and a norm's weight that are everybody's."""
    own = torch.Generator(device).manual_seed(1 + group.rank)
    shared = torch.Generator(device).manual_seed(0)
    for rows in (1, 3, boards.programs + 1) * 4:
        hidden = min(1024, boards.limit // (2 * rows) // 8 * 8)
        options: Any = {"device": device, "dtype": torch.bfloat16}
        x = torch.randn(rows, hidden, generator=own, **options)
        yield (
            x,
            torch.randn(rows, hidden, generator=shared, **options),
            torch.randn(hidden, generator=shared, **options),
        )
