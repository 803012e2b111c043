"""Random choice of the next token, each row with its own parameters and noise."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels import reference, sample_cpu
from miinb.kernels.dispatch import jit, launch_options, tl, use_triton, wait_for_inputs

_NOISE_BLOCK = 4096
_BLOCK = 8192


def sample(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by the Gumbel-max trick: argmax(logits / temperature + noise) over the tokens kept.

    Kept are, in this order and as transformers has it: the `top_k` largest; of these the smallest set whose
    probability reaches `top_p`; and tokens of at least `min_p` times the largest probability. Ties at an edge are all
    kept. The noise is `reference.gumbel(seed, position, vocab)`: a function of (seed, position, token id) alone, so a
    row draws the same in any batch, on any rank, on any device.

    Args:
        logits: [L, vocab], penalties, biases and masks (-inf) applied.
        seed: [L] int64, 0 to 2**63 - 1.
        position: [L] int64, the place in its sequence of the token to be drawn.
        temperature: [L] fp32; 0 is greedy.
        top_k: [L] int32; 0 keeps all.
        top_p: [L] fp32; 1 keeps all.
        min_p: [L] fp32; 0 keeps all.

    Returns:
        Token ids [L] int64, and [L] bool: whether the largest logit is finite and none is NaN (the id means
        nothing where not); -inf is a token that must not be drawn.
    """
    if not use_triton(logits):
        if logits.device.type == "cpu":
            return sample_cpu.sample(logits, seed, position, temperature, top_k, top_p, min_p)
        return reference.sample(logits, seed, position, temperature, top_k, top_p, min_p)
    rows, vocab = logits.shape
    logits, seed, position = logits.contiguous(), seed.contiguous(), position.contiguous()
    temperature, top_k, top_p, min_p = (values.contiguous() for values in (temperature, top_k, top_p, min_p))
    noisy = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device)
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    options = launch_options(logits)
    _add_noise[(rows, -(-vocab // _NOISE_BLOCK))](
        logits, seed, position, temperature, noisy, vocab, BLOCK=_NOISE_BLOCK, num_warps=8, **options
    )
    _draw[(rows,)](
        logits, noisy, temperature, top_k, top_p, min_p, token_ids, finite, vocab, BLOCK=_BLOCK, num_warps=16, **options
    )
    return token_ids, finite


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _score(logits, at, inside, temperature):
    """logits / temperature in fp32 (the logits themselves where it is 0: greedy), NaN as infinity."""
    value = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    return value / tl.where(temperature == 0.0, 1.0, temperature)


@jit
def _add_noise(
    logits, seed, position, temperature, noisy, vocab, BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    """Scores with their Gumbel noise; one program a row and BLOCK tokens."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    token = first + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    place = tl.load(position + row)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed + row), block, zero + place.to(tl.uint32), zero + (place >> 32).to(tl.uint32), zero
    )
    word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])  # in the order of the token ids
    uniform = (word >> 9).to(tl.float32) * 1.1920928955078125e-07 + 5.9604644775390625e-08
    # The largest noise comes from u near 1, where the hardware's logarithm is too coarse: there the series in 1 - u.
    rest = 1.0 - uniform
    series = rest * (1 + rest * (1 / 2 + rest * (1 / 3 + rest * (1 / 4 + rest * (1 / 5 + rest * (1 / 6))))))
    waiting = tl.where(rest < 0.05, series, -tl.log(uniform))
    heat = tl.load(temperature + row)
    inside = token < vocab
    value = _score(logits, row * vocab + token, inside, heat)
    tl.store(noisy + row * vocab + token, value - tl.where(heat == 0.0, 0.0, tl.log(waiting)), mask=inside)


@jit
def _draw(
    logits, noisy, temperature, top_k, top_p, min_p, token_ids, finite, vocab, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row. The kept tokens are those above some score, so the one with the largest noisy score is found
    without sorting: try the largest of all; if it is not kept, nothing at or below its score is, and the next largest
    above that score is tried. Tokens are tried about 1 / top_p times.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    heat, mass = tl.load(temperature + row), tl.load(top_p + row)
    top = float("-inf")
    for start in range(0, vocab, BLOCK):
        there = start + column < vocab
        top = tl.maximum(top, tl.max(_score(logits, row * vocab + start + column, there, heat), 0))
    good = (top > float("-inf")) & (top < float("inf"))
    tl.store(finite + row, good)
    least = tl.maximum(_kth_largest(logits, row, vocab, heat, tl.load(top_k + row), top, BLOCK), -3.0e38)
    everything = _mass_above(logits, row, vocab, heat, top, least, True, BLOCK)
    least = tl.maximum(least, top + tl.log(tl.load(min_p + row)))
    below, drawn, tried = float("-inf"), 0, good
    while tried:
        best, drawn = float("-inf"), 0
        for start in range(0, vocab, BLOCK):
            there = start + column < vocab
            score = _score(logits, row * vocab + start + column, there, heat)
            kept = there & (score >= least) & (score > below)
            value = tl.load(noisy + row * vocab + start + column, mask=kept, other=float("-inf"))
            most, index = tl.max(value, 0, return_indices=True)
            drawn = tl.where(most > best, start + index, drawn)
            best = tl.maximum(most, best)
        below = _score(logits, row * vocab + drawn, True, heat)
        above = _mass_above(logits, row, vocab, heat, top, below, False, BLOCK)
        tried = (above > 0.0) & (above >= mass * everything) & (mass < 1.0)  # above the largest is nothing
    tl.store(token_ids + row, drawn)


@jit
def _mass_above(logits, row, vocab, heat, top, limit, INCLUSIVE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of exp(score - top) over scores above the limit (and at it if INCLUSIVE)."""
    column = tl.arange(0, BLOCK)
    total = 0.0
    for start in range(0, vocab, BLOCK):
        score = _score(logits, row * vocab + start + column, start + column < vocab, heat)
        counts = (score >= limit) if INCLUSIVE else (score > limit)
        total += tl.sum(tl.where(counts, tl.exp(score - top), 0.0), 0)
    return total


@jit
def _kth_largest(logits, row, vocab, heat, k, top, BLOCK: tl.constexpr):
    """The k-th largest score of a row, by bisection between the largest and one that k scores reach; -inf for k = 0."""
    low, high = float("-inf"), top
    if (k > 0) & (k < vocab):
        width = 1.0
        count = 0
        while (count < k) & (width < 1.0e30):  # a lower bound: at least k scores are in [top - width, top]
            width *= 4.0
            count = _count_from(logits, row, vocab, heat, top - width, BLOCK)
        low = tl.where(count < k, float("-inf"), top - width)
        step = 0
        while (step < 40) & (count != k) & (low > float("-inf")):
            middle = low + (high - low) * 0.5
            here = _count_from(logits, row, vocab, heat, middle, BLOCK)
            step = tl.where((middle == low) | (middle == high), 40, step + 1)
            low = tl.where(here >= k, middle, low)
            count = tl.where(here >= k, here, count)
            high = tl.where(here >= k, high, middle)
    return low


@jit
def _count_from(logits, row, vocab, heat, limit, BLOCK: tl.constexpr):
    """How many scores are at least the limit."""
    column = tl.arange(0, BLOCK)
    total = 0
    for start in range(0, vocab, BLOCK):
        score = _score(logits, row * vocab + start + column, start + column < vocab, heat)
        total += tl.sum((score >= limit).to(tl.int32), 0)
    return total
