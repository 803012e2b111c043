"""The paged KV cache: its memory, and how much of it there is.

On a GPU a page holds `page_tokens` tokens and a sequence has a table of pages (PagedAttention, arXiv:2309.06180). On a
CPU a page is a whole slot of `max_length` tokens, so that attention reads one contiguous slice; the memory is not
touched, and so not taken, before it is written. With kv_dtype="fp8" each token's key and value of a head has a scale
of its own beside the pages: it needs no calibration, and a token's numbers depend on that token alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miinb.config import DeploymentConfig
from miinb.engine.spec import DecoderSpec
from miinb.errors import InvalidValue, OutOfMemory
from miinb.kernels.formats import FP8
from miinb.wording import size_words

#: Of the scales of keys and values that are fp8.
SCALE = torch.bfloat16
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
    """Keys and values of every layer.

    Attributes:
        memory: all of it.
        k, v: of each layer [pages, page_tokens, kv_heads, head_size].
        scale: of each layer [pages, kv_heads, page_tokens, 2] bf16 where the cache is `FP8`: what each head's key and
            value of a token is to be multiplied by. None in other dtypes.
    """

    def __init__(self, spec: DecoderSpec, size: CacheSize, dtype: torch.dtype, device: torch.device) -> None:
        pages, tokens, heads = size.pages, size.page_tokens, spec.kv_heads
        self.memory = [torch.empty((spec.layers, 2, pages, tokens, heads, spec.head_size), dtype=dtype, device=device)]
        self.k: list[Tensor] = [layer[0] for layer in self.memory[0]]
        self.v: list[Tensor] = [layer[1] for layer in self.memory[0]]
        self.scale: list[Tensor | None] = [None] * spec.layers
        if dtype == FP8:
            self.memory.append(torch.empty((spec.layers, pages, heads, tokens, 2), dtype=SCALE, device=device))
            self.scale = list(self.memory[1])
        if device.type == "cuda":
            for memory in self.memory:
                memory.zero_()  # padding rows of a graph read pages that nothing has written; they must be finite
        self.pages = pages
        self.page_tokens = tokens

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Put the first tokens of a page into another."""
        for layer in (*self.k, *self.v):
            layer[target, :tokens] = layer[source, :tokens]
        for scale in self.scale:
            if scale is not None:
                scale[target, :, :tokens] = scale[source, :, :tokens]

    def blank(self, page: int) -> None:
        """Zero a page: it may hold NaN."""
        for layer in (*self.k, *self.v, *self.scale):
            if layer is not None:
                layer[page].zero_()

    def close(self) -> None:
        """Let go of the memory."""
        self.memory, self.k, self.v, self.scale = [], [], [], []

    @property
    def size_bytes(self) -> int:
        """Bytes that were reserved."""
        return sum(memory.nbytes for memory in self.memory)


def cache_dtype(kv_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """The cache's dtype: the weights' one unless fp8 was asked for."""
    return FP8 if kv_dtype == "fp8" else dtype


def token_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """Bytes of one token in a cache of this dtype, scales included."""
    head = spec.head_size * dtype.itemsize + (SCALE.itemsize if dtype == FP8 else 0)
    return 2 * spec.layers * spec.kv_heads * head


def size_cache(
    spec: DecoderSpec, config: DeploymentConfig, device: str, dtype: torch.dtype, free_bytes: int
) -> CacheSize:
    """Pages, longest sequence and most rows, from what the user asked for and the memory that is free.

    Args:
        spec: the rank's decoder.
        config: `max_length`, `max_batch`, `options.kv_cache_bytes` and `options.page_tokens` count.
        device: "cuda" or "cpu".
        dtype: the cache's.
        free_bytes: free memory of the device once the weights are there.

    Raises:
        InvalidValue: `max_length` is above what the model was made for.
        OutOfMemory: what was asked for does not fit.
    """
    token = token_bytes(spec, dtype)
    budget = config.options.kv_cache_bytes or int(free_bytes * SHARE[device])
    limit = spec.max_length
    if config.max_length is not None and config.max_length > limit:
        raise InvalidValue(f"max_length: {config.max_length} is above the model's {limit} positions.")
    fits = budget // token
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
        need = token * length * (batch if device == "cpu" and config.max_batch else 1)
        raise OutOfMemory(
            f"A KV cache of {batch} x {length} tokens needs {size_words(need)}; {size_words(budget)} are free.",
            hint="Give a smaller max_length or max_batch.",
        )
    batch = min(batch, pages)
    return CacheSize(pages, page_tokens, length, batch, pages * page_tokens * token)
