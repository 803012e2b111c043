"""The paged KV cache: its memory, and how much of it there is.

On a GPU a page holds `page_tokens` tokens and a sequence has a table of pages (PagedAttention, arXiv:2309.06180). On a
CPU a page is a whole slot of `max_length` tokens, so that attention reads one contiguous slice; the memory is not
touched, and so not taken, before it is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miinb.config import DeploymentConfig
from miinb.engine.spec import DecoderSpec
from miinb.errors import InvalidValue, OutOfMemory
from miinb.wording import size_words

#: Rows in one step when the user does not say: a CPU is busy with few.
DEFAULT_BATCH = {"cuda": 128, "cpu": 16}
#: Longest sequence when the user does not say: a slot of a CPU's cache is reserved whole.
DEFAULT_LENGTH = {"cuda": 1 << 20, "cpu": 8192}
#: Share of the free memory that the cache may take when the user does not say.
SHARE = {"cuda": 0.85, "cpu": 0.4}


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How the cache is laid out."""

    pages: int
    page_tokens: int
    max_length: int
    max_batch: int
    size_bytes: int


class KVCache:
    """Keys and values of every layer, `k[i]` and `v[i]` of shape [pages, page_tokens, kv_heads, head_size]."""

    def __init__(self, spec: DecoderSpec, size: CacheSize, dtype: torch.dtype, device: torch.device) -> None:
        shape = (spec.layers, 2, size.pages, size.page_tokens, spec.kv_heads, spec.head_size)
        self.memory = torch.empty(shape, dtype=dtype, device=device)
        if device.type == "cuda":
            self.memory.zero_()  # padding rows of a graph read pages that nothing has written; they must be finite
        self.k: list[Tensor] = [layer[0] for layer in self.memory]
        self.v: list[Tensor] = [layer[1] for layer in self.memory]
        self.pages = size.pages
        self.page_tokens = size.page_tokens

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Put the first tokens of a page into another."""
        for layer in (*self.k, *self.v):
            layer[target, :tokens] = layer[source, :tokens]

    @property
    def size_bytes(self) -> int:
        """Bytes that were reserved."""
        return self.memory.nbytes


def size_cache(
    spec: DecoderSpec, config: DeploymentConfig, device: str, element_bytes: int, free_bytes: int
) -> CacheSize:
    """Pages, longest sequence and most rows, from what the user asked for and the memory that is free.

    Args:
        spec: the rank's decoder.
        config: `max_length`, `max_batch`, `options.kv_cache_bytes` and `options.page_tokens` count.
        device: "cuda" or "cpu".
        element_bytes: bytes of one number in the cache.
        free_bytes: free memory of the device once the weights are there.

    Raises:
        InvalidValue: `max_length` is above what the model was made for.
        OutOfMemory: what was asked for does not fit.
    """
    token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_size * element_bytes
    budget = config.options.kv_cache_bytes or int(free_bytes * SHARE[device])
    limit = spec.max_length
    if config.max_length is not None and config.max_length > limit:
        raise InvalidValue(f"max_length: {config.max_length} is above the model's {limit} positions.")
    fits = budget // token_bytes
    length = config.max_length or min(limit, DEFAULT_LENGTH[device], fits)
    batch = config.max_batch or DEFAULT_BATCH[device]
    if device == "cpu":
        pages = min(batch, fits // length) if config.max_batch is None else batch
        page_tokens = length
    else:
        page_tokens = config.options.page_tokens
        pages = min(fits // page_tokens, batch * -(-length // page_tokens))
    short = pages * page_tokens < length or pages * page_tokens > fits or length < 8
    if short:
        need = token_bytes * length * (batch if device == "cpu" and config.max_batch else 1)
        raise OutOfMemory(
            f"A KV cache of {batch} x {length} tokens needs {size_words(need)}; {size_words(budget)} are free.",
            hint="Give a smaller max_length or max_batch.",
        )
    batch = min(batch, pages)
    return CacheSize(pages, page_tokens, length, batch, pages * page_tokens * token_bytes)
