"""The draw of `sample.py` on a CPU: noise is made for the tokens that can still win, and little is sorted.

Gives what `reference.sample` gives. A sort of the vocabulary and noise for all of it would cost as much as a small
model's whole step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: A token this far below the largest cannot win: noise of 24-bit uniforms lies between -2.82 and 16.64.
NOISE_SPREAD = 19.5
#: So many of the largest are tried before the vocabulary is sorted: they nearly always hold the mass that top-p wants.
FEW = (64, 1024, 8192)

_U32 = 0xFFFFFFFF


def sample(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `sample.sample`."""
    largest, token_ids = logits.max(-1)
    finite = torch.isfinite(largest)
    parameters = [values.tolist() for values in (seed, position, temperature, top_k, top_p, min_p)]
    for row, (row_seed, place, heat, k, p, least) in enumerate(zip(*parameters, strict=True)):
        if heat > 0 and finite[row]:
            scores = logits[row].float() / heat
            floor = _floor(scores, float(largest[row]) / heat, k, p, least)
            token_ids[row] = _draw(scores, floor, row_seed, place)
    return token_ids, finite


def _floor(scores: Tensor, largest: float, k: int, p: float, least: float) -> float:
    """The lowest score [vocab] that is kept."""
    floor = -math.inf
    ordered = None
    if 0 < k < len(scores):
        floor = float(scores.topk(k).values[-1])
        ordered = scores[scores >= floor].sort(descending=True).values  # ties with the last one stay
    if p < 1:
        if ordered is not None:
            floor = _nucleus(ordered, ordered.logsumexp(0), p)[0]
        else:
            total = scores.logsumexp(0)
            for few in (*FEW, len(scores)):
                floor, enough = _nucleus(scores.topk(min(few, len(scores))).values, total, p)
                if enough:
                    break
    if least > 0:
        floor = max(floor, largest + math.log(least))
    return max(floor, largest - NOISE_SPREAD)


def _nucleus(ordered: Tensor, total: Tensor, p: float) -> tuple[float, bool]:
    """The last of the descending scores whose mass is needed to reach `p`, and whether they do reach it."""
    mass = (ordered - total).exp()
    above = mass.cumsum(0) - mass
    count = max(1, int((above < p).sum()))
    return float(ordered[count - 1]), count < len(ordered)


def _draw(scores: Tensor, floor: float, seed: int, position: int) -> int:
    """The token of the largest score with noise, of those that are not below the floor."""
    kept = (scores >= floor).nonzero()[:, 0]
    if len(kept) == 1:
        return int(kept)
    if 4 * len(kept) > len(scores):  # so many that whole blocks of four are cheaper
        words = torch.stack(_philox(torch.arange(-(-len(scores) // 4)), seed, position), -1).flatten()[kept]
    else:
        blocks = torch.stack(_philox(kept >> 2, seed, position))
        words = blocks.gather(0, (kept & 3)[None])[0]
    uniform = (words >> 9).float().mul_(2.0**-23).add_(2.0**-24)
    noisy = scores[kept].sub_(uniform.log_().neg_().log_())
    return int(kept[noisy.argmax()])


def _philox(block: Tensor, seed: int, position: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.philox`, of one row, for these blocks of four tokens; the four words of each.

    A product of two 32-bit numbers wraps in int64, but its bits are right, and masks take the two words from it.
    """
    k0, k1 = seed & _U32, seed >> 32
    c0, c1 = block, torch.full_like(block, position & _U32)
    c2, c3 = torch.full_like(block, position >> 32), torch.zeros_like(block)
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (second >> 32).bitwise_and_(_U32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (first >> 32).bitwise_and_(_U32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = second.bitwise_and_(_U32), first.bitwise_and_(_U32)
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return c0, c1, c2, c3
