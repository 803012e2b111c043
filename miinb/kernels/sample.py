"""Random choice of the next token, each row with its own parameters and noise."""

from __future__ import annotations

from torch import Tensor

from miinb.kernels import reference, sample_cpu


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
    if logits.device.type == "cpu":
        return sample_cpu.sample(logits, seed, position, temperature, top_k, top_p, min_p)
    return reference.sample(logits, seed, position, temperature, top_k, top_p, min_p)
