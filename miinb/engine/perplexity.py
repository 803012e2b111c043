"""How well a loaded decoder predicts a text: the measure of what quantization costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from miinb.engine.decoder import Decoder, StepBatch, StepRow
from miinb.engine.kv_cache import CacheSize, KVCache


@torch.inference_mode()
def perplexity(
    decoder: Decoder, token_ids: Sequence[int], *, window: int = 512, kv_dtype: torch.dtype | None = None
) -> float:
    """exp of the mean negative log-likelihood of each token after the ones before it in its window.

    Args:
        decoder: with one rank.
        token_ids: the text.
        window: it is cut into parts of so many tokens; the first of a part is not predicted.
        kv_dtype: of the KV cache, which every token's attention reads; None: the weights'.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    if len(token_ids) < 2:
        raise ValueError("a perplexity needs two tokens")
    window = min(window, decoder.spec.max_length)
    device = decoder.weights.embed.device
    cache = KVCache(decoder.spec, CacheSize(1, window, window, 1, 0), kv_dtype or decoder.weights.dtype, device)
    total, count = 0.0, 0
    for start in range(0, len(token_ids) - 1, window):
        part = token_ids[start : start + window]
        if len(part) < 2:
            break
        batch = StepBatch.of_rows([StepRow(part, 0, [0])], window, device)
        batch.logit_rows = torch.arange(len(part) - 1, device=device)
        targets = torch.tensor(part[1:], device=device)
        total += float(F.cross_entropy(decoder.forward(batch, cache).float(), targets, reduction="sum"))
        count += len(targets)
    return math.exp(total / count)
