"""How well a loaded decoder predicts a text: the measure of what quantization costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.engine.decoder import Decoder
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.step_batch import StepBatch, StepRow

#: Of the cache on a GPU; on a CPU a page is a whole window.
PAGE_TOKENS = 16


def perplexity(
    decoder: Decoder, token_ids: Sequence[int], *, window: int = 512, kv_dtype: torch.dtype | None = None
) -> float:
    """exp of the mean negative log-likelihood of each token after the ones before it in its window.

    Args:
        decoder: with one rank.
        token_ids: the text.
        window: it is cut into parts of so many tokens; the first of a part is not predicted.
        kv_dtype: as for `token_losses`.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    window = min(window, decoder.spec.max_length)
    parts = [token_ids[start : start + window] for start in range(0, len(token_ids), window)]
    losses, _ = token_losses(decoder, parts, kv_dtype=kv_dtype)
    return math.exp(float(losses.double().mean()))


@torch.inference_mode()
def token_losses(
    decoder: Decoder, windows: Sequence[Sequence[int]], *, first: int = 1, kv_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """What the model says of each token of some windows after the ones before it in its window.

    Args:
        decoder: with one rank.
        windows: tokens, each window computed alone, in one step.
        first: the tokens from this index of a window on are predicted, at least 1.
        kv_dtype: of the KV cache, which every token's attention reads; None: the weights'.

    Returns:
        Of the N predicted tokens, in their order and on the CPU: negative log-likelihoods [N] fp32 (natural
        logarithm), and the tokens [N] int64 that were likeliest in their places.

    Raises:
        ValueError: no window has a token to predict.
    """
    windows = [window for window in windows if len(window) > first]
    if not windows:
        raise ValueError("a perplexity needs two tokens")
    device = decoder.weights.embed.device
    longest = max(map(len, windows))
    page_tokens = PAGE_TOKENS if device.type == "cuda" else longest
    pages = -(-longest // page_tokens)
    size = CacheSize(pages, page_tokens, longest, 1, 0)
    cache = KVCache(decoder.spec, size, kv_dtype or decoder.weights.dtype, device)
    losses, likeliest = [], []
    for window in windows:
        batch = StepBatch.of_rows([StepRow(window, 0, range(pages))], page_tokens, device)
        batch.logit_rows = torch.arange(first - 1, len(window) - 1, device=device)
        targets = torch.tensor(window[first:], device=device)
        logits = decoder.forward(batch, cache).float()
        losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
        likeliest.append(logits.argmax(-1).cpu())
    return torch.cat(losses), torch.cat(likeliest)
