"""Attention over the paged KV cache: split-KV decode and variable-length prefill."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import jit, power_of_2, tl, use_triton, wait_for_inputs
from miinb.kernels.online_softmax import (
    LOG2E,
    blocks,
    decode_parts,
    finish,
    for_scores,
    parts_of,
    softmax_over,
)

_MIXED_SPLITS = 4  # of each row of a mixed step, which may have few rows of one query among many
_PREFILL_ROWS = 64


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
    kv_scale: Tensor | None = None,
    max_query: int,
) -> Tensor:
    """Causal attention of packed queries over each row's pages; the row's own keys and values are in the cache already.

    Args:
        q: [T, heads, head_size], the rows' queries one after another.
        k_cache: [pages, page_tokens, kv_heads, head_size]; torch.float8_e4m3fn where there are scales.
        v_cache: as `k_cache`.
        block_table: [R, B] int32, the pages of each row in order; any strides.
        query_start: [R + 1] int32, where each row's queries begin in `q`.
        lengths: [R] int32, context of each row with its new tokens; a row's queries are its last positions. On a GPU a
            row may have length 0 (padding of a graph): its output is 0.
        scale: of the scores.
        window: each query sees its own and the `window - 1` positions before; None is all.
        alibi: [heads] fp32 slopes (Press et al., 2022): slope * (key position - query position) is added; or None.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2); None is off.
        kv_scale: [pages, kv_heads, page_tokens, 2] bf16, by which an fp8 cache's keys and values are multiplied; None.
        max_query: at least the longest row's queries. 1 is decode (T = R). In other steps the rows of one query still
            run as decode, which splits the context over programs, and the others as prefill.

    Returns:
        [T, heads, head_size].
    """
    if not use_triton(q):
        return reference.paged_attention(
            q, k_cache, v_cache, block_table, query_start, lengths,
            scale=scale, window=window, alibi=alibi, softcap=softcap, kv_scale=kv_scale,
        )  # fmt: skip
    settings = {
        "HEADS": q.shape[1],
        "KV_HEADS": k_cache.shape[2],
        "HEAD_SIZE": q.shape[2],
        "PAGE": k_cache.shape[1],
        "WINDOW": window or 0,
        "SOFTCAP": float(softcap or 0.0),
        "HAS_ALIBI": alibi is not None,
        "FP8": kv_scale is not None,
    }
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tensors = (q, k_cache, v_cache, kv_scale, block_table, query_start, lengths, alibi, out)
    if max_query == 1:
        _launch_decode(tensors, scale, settings, mixed=False)
        return out
    _launch_prefill(tensors, scale, settings)
    if lengths.shape[0] > 1:
        _launch_decode(tensors, scale, settings, mixed=True)
    return out


def _launch_decode(tensors: tuple[Any, ...], scale: float, settings: dict[str, Any], *, mixed: bool) -> None:
    q, block_table, lengths = tensors[0], tensors[4], tensors[6]
    fewest = _MIXED_SPLITS if mixed else 1
    grid, memory, numbers = decode_parts(q, lengths.shape[0], settings, fewest)
    _decode[grid](
        *tensors,
        *memory,
        q.stride(0),
        *block_table.stride(),
        scale * LOG2E,
        *numbers,
        MIXED=mixed,
        BLOCK_G=memory[0].shape[1],
        **settings,
        **blocks(q, settings["HEAD_SIZE"], most=64, stages=2, warps=2 if settings["FP8"] else 4),
    )


def _launch_prefill(tensors: tuple[Any, ...], scale: float, settings: dict[str, Any]) -> None:
    q, block_table, rows = tensors[0], tensors[4], tensors[6].shape[0]
    group = settings["HEADS"] // settings["KV_HEADS"]
    block_m = max(_PREFILL_ROWS, power_of_2(group))
    _prefill[(q.shape[0] // (block_m // group) + rows, settings["KV_HEADS"])](
        *tensors,
        rows,
        q.stride(0),
        *block_table.stride(),
        scale * LOG2E,
        BLOCK_M=block_m,
        **settings,
        **blocks(q, settings["HEAD_SIZE"], most=32, stages=3, warps=4),
    )


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("table_stride", "page_stride", "splits", "least"))
def _decode(
    q, k_cache, v_cache, kv_scale, block_table, query_start, lengths, alibi, out, partial, weights, counters,
    q_stride, table_stride, page_stride, scale, splits, least, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, FP8: tl.constexpr, MIXED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):
    """One program a row, KV head and part of the context; the last to finish of a row and head merges the parts.

    All query heads that share a KV head are the rows of one product. A MIXED step's longer rows are `_prefill`'s.
    """
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + g
    mask = (g < GROUP)[:, None] & (d < HEAD_SIZE)[None, :]
    slope = g.to(tl.float32)
    if HAS_ALIBI:
        slope = tl.load(alibi + head, mask=g < GROUP, other=0.0) * 1.4426950408889634
    wait_for_inputs(PDL)
    length = tl.load(lengths + row)
    token = row
    if MIXED:
        token = tl.load(query_start + row)
        alone = tl.load(query_start + row + 1) - token == 1
        length = tl.where(alone, length, 0)
        mask = mask & alone
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    span, parts = parts_of(length - first, splits, least, BLOCK_N)
    begin, end = first + split * span, tl.minimum(first + (split + 1) * span, length)
    at = q + token.to(tl.int64) * q_stride + head[:, None] * HEAD_SIZE + d[None, :]
    query, by = for_scores(tl.load(at, mask=mask, other=0.0), scale, FP8)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    position = tl.zeros([BLOCK_G], tl.int32) + length - 1
    table = block_table + row.to(tl.int64) * table_stride
    top, total, acc = softmax_over(
        query, top, total, acc, begin, end, k_cache, v_cache, kv_scale, table, page_stride, position, slope, kv_head,
        by, KV_HEADS, HEAD_SIZE, PAGE, WINDOW, SOFTCAP, HAS_ALIBI, FP8, BLOCK_N, BLOCK_D,
    )
    to = out + (token.to(tl.int64) * HEADS + head[:, None]) * HEAD_SIZE + d[None, :]
    unit = row * KV_HEADS + kv_head
    finish(to, mask, top, total, acc, partial, weights, counters, unit, split, splits, parts, g, d, HEAD_SIZE, BLOCK_G)


@jit(plain=("rows", "table_stride", "page_stride"))
def _prefill(
    q, k_cache, v_cache, kv_scale, block_table, query_start, lengths, alibi, out, rows, q_stride,
    table_stride, page_stride, scale, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):
    """One program a tile of a row's queries and KV head: (token, head of the group) pairs, tokens first.

    Row r's tiles begin at number query_start[r] // TOKENS + r, so that as many programs do for any division of the
    tokens into rows. Rows of one query are `_decode`'s.
    """
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # a prompt's longest tiles go first
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    wait_for_inputs(PDL)
    r = tl.arange(0, 256)
    begun = tl.zeros([256], tl.int32)  # rows whose tiles begin before this one or with it
    for some in range(0, rows, 256):
        number = tl.load(query_start + some + r, mask=some + r < rows, other=1 << 30) // TOKENS + some + r
        begun += (number <= tile).to(tl.int32)
    row = tl.sum(begun, 0) - 1
    start, stop = tl.load(query_start + row), tl.load(query_start + row + 1)
    length = tl.load(lengths + row)
    begin = (tile - start // TOKENS - row) * TOKENS
    token = begin + m // GROUP
    head = kv_head * GROUP + m % GROUP
    there = (m < TOKENS * GROUP) & (token < stop - start)
    mask = there[:, None] & (d < HEAD_SIZE)[None, :]
    slope = m.to(tl.float32)
    if HAS_ALIBI:
        slope = tl.load(alibi + head) * 1.4426950408889634
    before = length - (stop - start)
    position = before + token
    if (begin < stop - start) & (stop - start > 1):
        at = (start + token).to(tl.int64)[:, None]
        query = tl.load(q + at * q_stride + head[:, None] * HEAD_SIZE + d[None, :], mask=mask, other=0.0)
        query, by = for_scores(query, scale, FP8)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        first = 0
        if WINDOW > 0:
            first = tl.maximum(before + begin - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(before + begin + TOKENS, length)
        table = block_table + row.to(tl.int64) * table_stride
        top, total, acc = softmax_over(
            query, top, total, acc, first, end, k_cache, v_cache, kv_scale, table, page_stride, position, slope,
            kv_head, by, KV_HEADS, HEAD_SIZE, PAGE, WINDOW, SOFTCAP, HAS_ALIBI, FP8, BLOCK_N, BLOCK_D,
        )
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        to = out + at * HEADS * HEAD_SIZE + head[:, None] * HEAD_SIZE + d[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=mask)
