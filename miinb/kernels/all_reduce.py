"""Sums over tensor-parallel ranks through memory that all their GPUs can read, with the norm behind them in one kernel.

Each rank writes its part to a board of its own, tells the others, waits for theirs, and reads them all: in the order of
the ranks and in fp32, so that every rank has the same bits. It pays for messages of a few hundred KB at most: each rank
reads every part whole. Short ones can be written to the others' memory instead (`pushed_sum.py`).

A board is used again two messages later. That is safe without a second wait: a rank writes message n + 2 after its
kernel of n + 1 ended, so every other rank has begun n + 1, and so has ended n, the last to read what is overwritten.

No program waits for one that cannot run. Programs wait only for the program of the same number on other ranks; there
are no more of them than multiprocessors, and each fits one. Whatever else is on the GPU then waits for this kernel or
ends without it. All ranks launch the same messages in the same order on one stream each.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miinb.kernels.dispatch import INTERPRETED, fail_after, jit, launch_options, power_of_2, tl, wait_for_inputs
from miinb.kernels.norm import normalize, numbers_of_norms
from miinb.kernels.pushed_sum import pushed_sum

#: Most programs of a launch, and so flags that each rank has for each other.
PROGRAMS = 128
#: A program that has looked so often in vain, for a minute or two, fails: its process cannot use the GPU any more, and
#: ends. NCCL's time limit does the same. A look at packets is a read of this GPU's memory, a look at flags an atomic.
MOST_LOOKS = 1 << 27
MOST_LOOKS_AT_PACKETS = 1 << 30


@dataclass(frozen=True, slots=True)
class Boards:
    """The memory of one rank and its way to that of the others.

    Attributes:
        addresses: [ranks] int64, where each rank's memory of `boards_bytes` lies for this rank's GPU: first flags,
            int64 [ranks, PROGRAMS] (who says it, for which program), the number of the newest message that is there;
            then the boards of even and of odd messages; then the packets of short ones, of each rank for even ones and
            of each for odd ones, twice as many bytes as a message's. All is zero at first.
        epochs: [PROGRAMS] int64, the number of the newest message; in memory of the GPU, so that a CUDA graph that is
            replayed goes on counting. Zeros at first.
        rank: this one.
        limit: bytes of the largest message, a multiple of 16.
        short: bytes of the largest message that is pushed, a multiple of 16.
        programs: most of a launch: at most `PROGRAMS`, and at most the GPU's multiprocessors.
        keep: what holds the memory.
    """

    addresses: Tensor
    epochs: Tensor
    rank: int
    limit: int
    short: int
    programs: int
    keep: tuple[Any, ...] = ()

    @property
    def packets_begin(self) -> int:
        """Where packets begin in each rank's memory."""
        return _packets_begin(len(self.addresses), self.limit)

    def fits(self, x: Tensor) -> bool:
        """Whether a message is small enough."""
        return x.numel() * x.element_size() <= self.limit


def boards_bytes(ranks: int, limit: int, short: int) -> int:
    """Bytes of each rank's memory; see `Boards`."""
    return _packets_begin(ranks, limit) + 4 * ranks * short


def _packets_begin(ranks: int, limit: int) -> int:
    return 8 * ranks * PROGRAMS + 2 * limit


def all_reduce(x: Tensor, boards: Boards) -> Tensor:
    """The sum of every rank's `x` [rows, hidden], contiguous; in fp32, then rounded to x's dtype."""
    return _launch(x, boards, None, None, 0.0, None, centered=False)[1]


def reduce_norm(
    x: Tensor,
    boards: Boards,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    *,
    centered: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """`norm.rms_norm`, or `norm.layer_norm` if centered, of the sum of every rank's `x` (and the residual).

    Args:
        x: [rows, hidden], contiguous: this rank's part.
        boards: that `x` fits.
        weight: [hidden], or [N, hidden] of N norms of the same numbers.
        bias: as `weight`, or None.
        eps: see `norm.rms_norm`.
        residual: as `x`, the same on every rank, or None.
        centered: whether the mean is taken off.
        keep: False: nobody reads the sum, and it is not rounded before the norm (`norm.post_norm`).

    Returns:
        The norm's output, as `x` or [N, ..., hidden], and the sum with the residual, both in x's dtype and bit for bit
        the same on every rank.
    """
    return _launch(x, boards, weight, bias, eps, residual, centered=centered, keep=keep)


def _launch(
    x: Tensor,
    boards: Boards,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    *,
    centered: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    total = torch.empty_like(x) if keep else x
    norms = weight.numel() // hidden if weight is not None else 0
    y = total
    if weight is not None:
        y = torch.empty((*weight.shape[:-1], *x.shape), dtype=x.dtype, device=x.device)
    block, ranks = power_of_2(hidden), len(boards.addresses)
    tensors = (x, residual, weight, bias, y, total, boards.addresses, boards.epochs)
    kinds: dict[str, Any] = {
        "RANKS": ranks,
        "PROGRAMS": PROGRAMS,
        "MOST_LOOKS": MOST_LOOKS,
        "NORMS": norms,
        "CENTERED": centered,
        "HAS_RESIDUAL": residual is not None,
        "HAS_BIAS": bias is not None,
        "KEEP": keep,
        **launch_options(x),
    }
    grid, warps = (min(rows, boards.programs),), min(max(block // 256, 1), 16)
    if x.element_size() == 2 and hidden % 8 == 0 and x.numel() * 2 <= boards.short:
        kinds |= {"MOST_LOOKS": MOST_LOOKS_AT_PACKETS, "INTERPRETED": INTERPRETED}
        numbers = (boards.rank, rows, hidden, boards.packets_begin, boards.short)
        pushed_sum[grid](*tensors, *numbers, eps, BLOCK=block // 4, num_warps=warps, **kinds)
    else:
        sizes = (boards.rank, rows, hidden, boards.limit)
        _reduce[grid](*tensors, *sizes, eps, PEERS=power_of_2(ranks), BLOCK=block, num_warps=warps, **kinds)
    return y, total


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("rank", "rows"))
def _reduce(
    x, residual, weight, bias, y, total, addresses, epochs, rank, rows, hidden, limit, eps, RANKS: tl.constexpr,
    PEERS: tl.constexpr, PROGRAMS: tl.constexpr, MOST_LOOKS: tl.constexpr, NORMS: tl.constexpr, CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    """A program takes every n-th row."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    scales = numbers_of_norms(weight, column, hidden, NORMS)
    if HAS_BIAS:
        shifts = numbers_of_norms(bias, column, hidden, NORMS)
    memories = ()  # nothing else stands between the others' flags and the reading of their parts
    for source in tl.static_range(RANKS):
        memories = memories + (tl.load(addresses + source),)  # type: ignore[assignment]  # noqa: RUF005
    peers = tl.arange(0, PEERS)
    theirs = tl.load(addresses + peers, mask=peers < RANKS, other=0).to(tl.pointer_type(tl.int64))
    mine = tl.load(addresses + rank)
    wait_for_inputs(PDL)
    epoch = tl.load(epochs + program) + 1
    board = 8 * RANKS * PROGRAMS + (epoch & 1) * limit
    own = _numbers(mine + board, x)
    for row in range(program, rows, programs):
        at = row * hidden + column
        tl.store(own + at, tl.load(x + at, mask=inside), mask=inside)
    _meet(
        theirs + (rank * PROGRAMS + program), mine.to(tl.pointer_type(tl.int64)) + (peers * PROGRAMS + program),
        peers < RANKS, epoch, PEERS, MOST_LOOKS,
    )
    place = tl.arange(0, PROGRAMS)
    tl.store(epochs + place, epoch, mask=place % programs == program)  # those that this launch lacks count, too
    for row in range(program, rows, programs):
        at = row * hidden + column
        wide = tl.zeros([BLOCK], tl.float32)
        for peer in tl.static_range(RANKS):
            part = _numbers(memories[peer] + board, x)
            wide += tl.load(part + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        if HAS_RESIDUAL:
            wide += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            value = wide.to(x.dtype.element_ty)
            tl.store(total + at, value, mask=inside)
            wide = value.to(tl.float32)
        if NORMS > 0:
            wide = normalize(wide, inside, hidden, eps, x.dtype.element_ty, CENTERED)
        for i in tl.static_range(NORMS):
            result = wide * scales[i]
            if HAS_BIAS:
                result += shifts[i]
            tl.store(y + i * rows * hidden + at, result.to(x.dtype.element_ty), mask=inside)


@jit
def _numbers(address, x):
    """The address as a pointer to numbers like those of `x`, which are read 16 bytes at a time."""
    return tl.multiple_of(address.to(tl.pointer_type(x.dtype.element_ty)), 16)


@jit
def _meet(theirs, mine, there, epoch, PEERS: tl.constexpr, MOST_LOOKS: tl.constexpr):
    """Say that this program's part of a message is there, and wait until it is on every rank.

    `theirs` are this rank's flags with the others, `mine` the others' with this rank, for this program; [PEERS] each.
    """
    number = tl.zeros([PEERS], tl.int64)
    tl.debug_barrier()  # all threads have written before one of them says so
    tl.atomic_xchg(theirs, number + epoch, mask=there, sem="release", scope="sys")
    seen, looks = epoch - 1, 0
    while seen < epoch:
        flags = tl.atomic_add(mine, number, mask=there, sem="acquire", scope="sys")
        seen = tl.min(tl.where(there, flags, epoch), 0)
        looks += 1
        fail_after(looks, MOST_LOOKS)
    tl.debug_barrier()  # all have waited before one of them reads
