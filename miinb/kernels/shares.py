"""The largest shares of a softmax: what a masked token may be, or a text's best labels, in one pass over the logits."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import arrival_counters, jit, launch_options, power_of_2, tl, use_triton, wait_for_inputs

#: Most shares of a row that the kernel gives; more are sorted by PyTorch.
MOST = 16
_BLOCK = 4096


def best_shares(logits: Tensor, k: int) -> Tensor:
    """The k largest entries of each row's softmax, best first, the lowest id first among equal ones.

    Args:
        logits: [L, C], contiguous.
        k: at most C.

    Returns:
        [L, 2k] fp32: k shares of the whole row, then the bits of their ids, int32. Where a row holds NaN or infinity
        its shares are NaN (and its ids mean nothing).
    """
    rows, columns = logits.shape
    if not use_triton(logits) or k > MOST or rows == 0:
        return reference.best_shares(logits, k)
    block = min(_BLOCK, power_of_2(max(columns, 128)))
    splits = -(-columns // block)
    shares = torch.empty((rows, 2 * k), dtype=torch.float32, device=logits.device)
    best = torch.empty((rows, splits, MOST), dtype=torch.float32, device=logits.device)
    place = torch.empty((rows, splits, MOST), dtype=torch.int32, device=logits.device)
    total = torch.empty((rows, splits), dtype=torch.float32, device=logits.device)
    _best_shares[(rows, splits)](
        logits,
        best,
        place,
        total,
        arrival_counters(logits.device),
        shares,
        shares.view(torch.int32),
        columns,
        k,
        SPLITS=splits,
        BLOCK_S=power_of_2(splits),
        MOST=MOST,
        BLOCK=block,
        num_warps=min(8, block // 128),
        **launch_options(logits),
    )
    return shares


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("k",))  # type: ignore[untyped-decorator]
def _best_shares(
    logits, best, place, total, counters, shares, ids, columns, k, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    MOST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    """One program a row and BLOCK columns finds its best; the last of a row to finish merges them.

    To rank, minus infinity is the least number, so that what has been taken and what is no column come behind it.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    column = split * BLOCK + lane
    wait_for_inputs(PDL)
    value = tl.load(logits + row.to(tl.int64) * columns + column, mask=column < columns, other=float("-inf"))
    value = value.to(tl.float32)
    rank = tl.where(value == value, value, float("inf"))
    top = tl.max(rank, 0)
    # With infinity or NaN among them it is NaN.
    part = tl.sum(tl.exp(value - tl.where(top == float("-inf"), 0.0, top)), 0)
    rank = tl.where(column < columns, tl.maximum(rank, -3.4028234e38), float("-inf"))
    at = (row * SPLITS + split) * MOST
    for i in range(k):
        first, index = tl.max(rank, 0, return_indices=True)
        tl.store(best + at + i, first)
        tl.store(place + at + i, split * BLOCK + index)
        rank = tl.where(lane == index, float("-inf"), rank)
    tl.store(total + row * SPLITS + split, part)
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(counters + row, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(counters + row, 0)
        s = tl.arange(0, BLOCK_S)
        tops = tl.load(best + (row * SPLITS + s) * MOST, mask=s < SPLITS, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(total + row * SPLITS + s, mask=s < SPLITS, other=0.0, cache_modifier=".cg")
        most = tl.max(tops, 0)
        whole = tl.sum(sums * tl.exp(tops - most), 0)
        c = tl.arange(0, BLOCK_S * MOST)
        there = (c < SPLITS * MOST) & (c % MOST < k)
        left = tl.load(best + row * SPLITS * MOST + c, mask=there, other=float("-inf"), cache_modifier=".cg")
        places = tl.load(place + row * SPLITS * MOST + c, mask=there, other=0, cache_modifier=".cg")
        for i in range(k):
            score, which = tl.max(left, 0, return_indices=True)
            tl.store(shares + row * 2 * k + i, tl.exp(score - most) / whole)
            tl.store(ids + row * 2 * k + k + i, tl.sum(tl.where(c == which, places, 0), 0))
            left = tl.where(c == which, float("-inf"), left)
