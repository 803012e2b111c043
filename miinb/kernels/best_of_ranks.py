"""The largest of every rank's logits, where each rank has a part of the vocabulary: only its best one crosses."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels.all_reduce import MOST_LOOKS_AT_PACKETS, PROGRAMS, Boards
from miinb.kernels.dispatch import INTERPRETED, jit, launch_options, tl, wait_for_inputs
from miinb.kernels.packets import count_on, number_of, packets_of, push, wait_for_packets

_ROWS = 128  # at a time


def fits(rows: int, boards: Boards) -> bool:
    """Whether so many rows are a short message."""
    return 8 * rows <= boards.short


def best_of_ranks(value: Tensor, token_id: Tensor, boards: Boards, first: int) -> tuple[Tensor, Tensor]:
    """The tokens that all ranks choose.

    Args:
        value: [L] fp32, the largest logit of each row among this rank's; infinite where one is NaN.
        token_id: [L] int64, its place among them.
        boards: that `fits` the rows.
        first: what token this rank's first logit is of.

    Returns:
        As `head.argmax`, the same on every rank.
    """
    (rows,) = value.shape
    ids, finite = torch.empty_like(token_id), torch.empty(rows, dtype=torch.bool, device=value.device)
    _best_of_ranks[(1,)](
        value,
        token_id,
        ids,
        finite,
        boards.addresses,
        boards.epochs,
        boards.rank,
        rows,
        boards.packets_begin,
        boards.short,
        first,
        RANKS=len(boards.addresses),
        PROGRAMS=PROGRAMS,
        MOST_LOOKS=MOST_LOOKS_AT_PACKETS,
        BLOCK=_ROWS,
        INTERPRETED=INTERPRETED,
        num_warps=_ROWS // 32,
        **launch_options(value),
    )
    return ids, finite


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("rank", "rows", "first"))  # type: ignore[untyped-decorator]
def _best_of_ranks(
    value, token_id, ids, finite, addresses, epochs, rank, rows, start, limit, first, RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr, MOST_LOOKS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):
    """One program; a row is a place of a message like those of `pushed_sum`: its value's bits and its token."""
    lane = tl.arange(0, BLOCK)
    mine = tl.load(addresses + rank) + start
    wait_for_inputs(PDL)
    epoch = tl.load(epochs) + 1
    number = number_of(epoch)
    half = (epoch & 1) * RANKS
    for begin in range(0, rows, BLOCK):
        row = begin + lane
        own = _candidate(value, token_id, row, rows, first)
        for peer in tl.static_range(RANKS):
            if peer != rank:
                theirs = tl.load(addresses + peer) + start
                push(packets_of(theirs, half + rank, limit) + 2 * row, own, number, row < rows, INTERPRETED)
    count_on(epochs, epoch, 0, 1, PROGRAMS)
    for begin in range(0, rows, BLOCK):
        row = begin + lane
        own = _candidate(value, token_id, row, rows, first)
        best, winner = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
        for source in tl.static_range(RANKS):
            came = own
            if source != rank:
                packets = packets_of(mine, half + source, limit) + 2 * row
                came = wait_for_packets(packets, number, row < rows, MOST_LOOKS, INTERPRETED)
            logit, token = came.to(tl.int32).to(tl.float32, bitcast=True), (came >> 32).to(tl.int32)
            better = (logit > best) | ((logit == best) & (token < winner))
            best, winner = tl.where(better, logit, best), tl.where(better, token, winner)
        tl.store(ids + row, winner.to(tl.int64), mask=row < rows)
        tl.store(finite + row, (best < float("inf")) & (best > float("-inf")), mask=row < rows)


@jit
def _candidate(value, token_id, row, rows, first):
    bits = tl.load(value + row, mask=row < rows, other=0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return bits | (tl.load(token_id + row, mask=row < rows, other=0) + first) << 32
