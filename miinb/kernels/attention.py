"""Attention over the paged KV cache: split-KV decode and variable-length prefill."""

from __future__ import annotations

from torch import Tensor

from miinb.kernels import reference


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    max_query: int,
) -> Tensor:
    """Causal attention of packed queries over each row's pages; the row's own keys and values are in the cache already.

    Args:
        q: [T, heads, head_size], the rows' queries one after another.
        k_cache: [pages, page_tokens, kv_heads, head_size].
        v_cache: as `k_cache`.
        block_table: [R, B] int32, the pages of each row in order.
        query_start: [R + 1] int32, where each row's queries begin in `q`.
        lengths: [R] int32, context of each row with its new tokens; a row's queries are its last positions.
        scale: of the scores.
        window: each query sees its own and the `window - 1` positions before; None is all.
        alibi: [heads] fp32 slopes (Press et al., 2022): slope * (key position - query position) is added; or None.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2); None is off.
        max_query: at least the longest row's queries. 1 is decode (T = R), which splits the context over programs.

    Returns:
        [T, heads, head_size].
    """
    return reference.paged_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        query_start,
        lengths,
        scale=scale,
        window=window,
        alibi=alibi,
        softcap=softcap,
        max_query=max_query,
    )
