"""The LM head with greedy choice: the step that ends in the next token's id."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import arrival_counters, jit, launch_options, power_of_2, tl, use_triton, wait_for_inputs
from miinb.kernels.linear import PackedLinear, linear

_BLOCK = 4096


def greedy_head(x: Tensor, packed: PackedLinear) -> tuple[Tensor, Tensor]:
    """The argmax of `linear(x, packed)`.

    Args:
        x: [L, hidden].
        packed: the head, [vocab, hidden].

    Returns:
        As `argmax`.
    """
    return argmax(linear(x, packed))


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The id of each row's largest logit, the lowest id among equal ones.

    Args:
        logits: [L, vocab], contiguous.

    Returns:
        Token ids [L] int64, and [L] bool: whether the largest logit is finite and none is NaN (the id means
        nothing where not).
    """
    if not use_triton(logits):
        return reference.argmax(logits)
    ids, finite, _ = _launch(logits)
    return ids, finite


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest logit [L] fp32, infinite or NaN where one is NaN, and its id [L] int64 as `argmax` has it."""
    if not use_triton(logits):
        values, ids = logits.max(-1)
        return values.float(), ids
    ids, _, values = _launch(logits)
    return values, ids


def _launch(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, whether all is finite, and the largest."""
    rows, vocab = logits.shape
    splits = -(-vocab // _BLOCK)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    values = torch.empty(rows, dtype=torch.float32, device=logits.device)
    best = torch.empty((rows, splits), dtype=torch.float32, device=logits.device)
    place = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    _argmax[(rows, splits)](
        logits,
        best,
        place,
        arrival_counters(logits.device),
        ids,
        finite,
        values,
        vocab,
        SPLITS=splits,
        BLOCK_S=power_of_2(splits),
        BLOCK=_BLOCK,
        num_warps=8,
        **launch_options(logits),
    )
    return ids, finite, values


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _argmax(
    logits, best, place, counters, ids, finite, values, vocab, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    """One program a row and BLOCK ids; the last of a row to finish merges them. A NaN counts as infinity."""
    row, split = tl.program_id(0), tl.program_id(1)
    column = split * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    at = logits + row.to(tl.int64) * vocab + column
    value = tl.load(at, mask=column < vocab, other=float("-inf")).to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    top, index = tl.max(value, 0, return_indices=True)
    tl.store(best + row * SPLITS + split, top)
    tl.store(place + row * SPLITS + split, split * BLOCK + index)
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(counters + row, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(counters + row, 0)
        s = tl.arange(0, BLOCK_S)
        tops = tl.load(best + row * SPLITS + s, mask=s < SPLITS, other=float("-inf"), cache_modifier=".cg")
        winner, which = tl.max(tops, 0, return_indices=True)
        places = tl.load(place + row * SPLITS + s, mask=s < SPLITS, other=0, cache_modifier=".cg")
        tl.store(ids + row, tl.sum(tl.where(s == which, places, 0), 0).to(tl.int64))
        tl.store(values + row, winner)
        tl.store(finite + row, (winner < float("inf")) & (winner > float("-inf")))
