"""One new token a row: from the fused QKV projection to attention, in one kernel.

It does what `rope.py` and `attention.py` do one after the other. Of that only the new token's numbers come from the
kernel before it: pages, angles, and the keys and values of earlier steps are asked for before it waits. `dispatch.py`
says why they are there.

Of two rows or more, and of small heads, both of those kernels are faster than this one: `is_apt` tells.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import jit, let_next_start, tl, use_triton, wait_for_all
from miinb.kernels.online_softmax import (
    LOG2E,
    blocks,
    capped,
    decode_parts,
    finish,
    for_scores,
    parts_of,
    read_keys,
    softmax_over,
    softmax_step,
)
from miinb.kernels.rope import angles, norm_weight, to_fp8, turned

_LEAST_HEAD = 96


def is_apt(rows: int, head_size: int) -> bool:
    """Whether to compute so: it was faster on an H200 with LLaMA-8B's and GPT-NeoX-20B's heads, not with GPT-2's.

    Rows of a draft are of one sequence, and each attends to the keys that those before it write in the same step, which
    only the two kernels wait for. A row alone has no such.
    """
    return rows == 1 and head_size >= _LEAST_HEAD


def decode_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    rope: Mapping[str, Any],
    attention: Mapping[str, Any],
    kv_scale: Tensor | None = None,
) -> Tensor:
    """`rope_append`, then `paged_attention`, of rows that have one new token each, their last.

    No row may attend to what another row of the call writes: see `is_apt`.

    Args:
        qkv: [R, (heads + 2 * kv_heads) * head_size], as in `rope.rope_append`.
        cos, sin: [max_length, rotary_dim / 2] fp32, one row a position; None is no rotation.
        k_cache, v_cache: [pages, page_tokens, kv_heads, head_size]; written at each row's last position.
        block_table: [R, B] int32, the pages of each row in order; any strides.
        lengths: [R] int32, context of each row with its new token. On a GPU a row may have length 0 (padding of a
            graph): nothing is written to the cache for it, and its output is 0.
        rope: the heads, the rotation and the norms, by the names that `rope.rope_append` has for them.
        attention: the scale, the window, the slopes and the cap, by the names that `attention.paged_attention` has.
        kv_scale: [pages, kv_heads, page_tokens, 2] bf16, the scales of an fp8 cache, read and written; or None.

    Returns:
        [R, heads, head_size].
    """
    if not use_triton(qkv):
        return _plain(qkv, (cos, sin), (k_cache, v_cache), block_table, lengths, rope, attention, kv_scale)
    rows, head_size = lengths.shape[0], rope["head_size"]
    settings = _settings(rope, attention) | {"PAGE": k_cache.shape[1], "FP8": kv_scale is not None}
    settings["HALF"] = rope["rotary_dim"] // 2 if cos is not None else 0
    grid, memory, numbers = decode_parts(qkv, rows, settings)
    warps = _warps(rows * rope["kv_heads"], fp8=kv_scale is not None)
    out = torch.empty((rows, rope["heads"], head_size), dtype=qkv.dtype, device=qkv.device)
    _decode_attention[grid](
        *(qkv, cos, sin, k_cache, v_cache, kv_scale, block_table, lengths),
        *(attention["alibi"], rope["q_norm"], rope["k_norm"], out),
        *memory,
        *block_table.stride(),
        attention["scale"] * LOG2E,
        rope["eps"],
        *numbers,
        BLOCK_G=memory[0].shape[1],
        **settings,
        **blocks(qkv, head_size, most=64, stages=2, warps=warps),
    )
    return out


def _settings(rope: Mapping[str, Any], attention: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "HEADS": rope["heads"],
        "KV_HEADS": rope["kv_heads"],
        "HEAD_SIZE": rope["head_size"],
        "INTERLEAVED": rope["interleaved"],
        "NORM": rope["q_norm"] is not None,
        "WINDOW": attention["window"] or 0,
        "SOFTCAP": float(attention["softcap"] or 0.0),
        "HAS_ALIBI": attention["alibi"] is not None,
    }


def _warps(units: int, *, fp8: bool) -> int:
    """Of a program: the fastest of those measured on an H200 of LLaMA-8B and of GPT-NeoX-20B, whole and halved."""
    if fp8:
        return 2
    return 8 if units <= 16 else 4


def _plain(
    qkv: Tensor,
    cos_sin: tuple[Tensor | None, Tensor | None],
    caches: tuple[Tensor, Tensor],
    block_table: Tensor,
    lengths: Tensor,
    rope: Mapping[str, Any],
    attention: Mapping[str, Any],
    kv_scale: Tensor | None,
) -> Tensor:
    """The same by the references, of rows that have a token."""
    last, page_tokens = lengths.long() - 1, caches[0].shape[1]
    page = block_table.gather(1, (last // page_tokens)[:, None])[:, 0].long()
    slots = page * page_tokens + last % page_tokens
    q = reference.rope_append(qkv, last, *cos_sin, *caches, slots, kv_scale=kv_scale, **rope)
    rows = (block_table, torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device), lengths)
    return reference.paged_attention(q, *caches, *rows, kv_scale=kv_scale, **attention)


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("table_stride", "page_stride", "splits", "least"))
def _decode_attention(
    qkv, cos, sin, k_cache, v_cache, kv_scale, block_table, lengths, alibi, q_norm, k_norm, out, partial, weights,
    counters, table_stride, page_stride, scale, eps, splits, least, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, FP8: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):
    """One program a row, KV head and part of the keys that were there before; the first part's has the new one too."""
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + g
    mask = (g < GROUP)[:, None] & (d < HEAD_SIZE)[None, :]
    let_next_start(PDL)
    slope = g.to(tl.float32)
    if HAS_ALIBI:
        slope = tl.load(alibi + head, mask=g < GROUP, other=0.0) * 1.4426950408889634
    length = tl.load(lengths + row)
    last = tl.maximum(length - 1, 0)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    span, parts = parts_of(last - first, splits, least, BLOCK_N)
    begin, end = first + split * span, tl.minimum(first + (split + 1) * span, last)
    table = block_table + row.to(tl.int64) * table_stride
    other, c, s = angles(cos, sin, last.to(tl.int64), d, HALF, INTERLEAVED)
    q_weight, q_partner = norm_weight(q_norm, d, HEAD_SIZE, NORM), norm_weight(q_norm, other, HEAD_SIZE, NORM)
    page = tl.load(table + (last // PAGE) * page_stride).to(tl.int64)
    key = begin + tl.arange(0, BLOCK_N)
    read = read_keys(
        k_cache, v_cache, kv_scale, table, page_stride, key, end, kv_head, KV_HEADS, HEAD_SIZE, PAGE, FP8, BLOCK_D
    )
    wait_for_all(PDL)
    token = qkv + row.to(tl.int64) * (HEADS + 2 * KV_HEADS) * HEAD_SIZE
    at = token + head[:, None] * HEAD_SIZE
    query = tl.load(at + d[None, :], mask=mask, other=0.0)
    query = turned(query, at, mask, d, other, c, s, q_weight, q_partner, eps, HEAD_SIZE, HALF, NORM)
    query, by = for_scores(query, scale, FP8)
    top, total = tl.full([BLOCK_G], float("-inf"), tl.float32), tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if (split == 0) & (length > 0):
        k_at = token + (HEADS + kv_head) * HEAD_SIZE + tl.zeros([1, 1], tl.int32)
        top, acc = _newest(
            query, by, k_at, k_cache, v_cache, kv_scale, page, last % PAGE, kv_head, d, other, c, s, k_norm, eps,
            KV_HEADS, HEAD_SIZE, HALF, NORM, PAGE, SOFTCAP, FP8, BLOCK_G,
        )
        total += 448.0 if FP8 else 1.0
    position = last + g * 0
    top, total, acc = softmax_step(
        query, top, total, acc, read, key, end, position, slope, by, WINDOW, SOFTCAP, HAS_ALIBI, FP8
    )
    top, total, acc = softmax_over(
        query, top, total, acc, begin + BLOCK_N, end, k_cache, v_cache, kv_scale, table, page_stride, position, slope,
        kv_head, by, KV_HEADS, HEAD_SIZE, PAGE, WINDOW, SOFTCAP, HAS_ALIBI, FP8, BLOCK_N, BLOCK_D,
    )
    to = out + (row.to(tl.int64) * HEADS + head[:, None]) * HEAD_SIZE + d[None, :]
    finish(
        to, mask, top, total, acc, partial, weights, counters, row * KV_HEADS + kv_head, split, splits, parts, g, d,
        HEAD_SIZE, BLOCK_G,
    )


@jit
def _newest(
    query, by, at, k_cache, v_cache, kv_scale, page, offset, kv_head, d, other, c, s, k_norm, eps,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr, FP8: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """Put a row's newest key and value, `at` and behind, into the cache: scores [G] of it alone, and outputs [G, D]."""
    inside = (d < HEAD_SIZE)[None, :]
    weight, partner_weight = norm_weight(k_norm, d, HEAD_SIZE, NORM), norm_weight(k_norm, other, HEAD_SIZE, NORM)
    k = tl.load(at + d[None, :], mask=inside, other=0.0)
    k = turned(k, at, inside, d, other, c, s, weight, partner_weight, eps, HEAD_SIZE, HALF, NORM)
    v = tl.load(at + KV_HEADS * HEAD_SIZE + d[None, :], mask=inside, other=0.0)
    if FP8:
        k, k_scale = to_fp8(k)
        v, v_scale = to_fp8(v)
        to = kv_scale + 2 * ((page * KV_HEADS + kv_head) * PAGE + offset) + tl.zeros([1], tl.int32)
        tl.store(to, k_scale)
        tl.store(to + 1, v_scale)
    to = ((page * PAGE + offset) * KV_HEADS + kv_head) * HEAD_SIZE + d[None, :]
    tl.store(k_cache + to, k, mask=inside)
    tl.store(v_cache + to, v, mask=inside)
    scores = tl.sum(tl.sum(query.to(tl.float32) * k.to(tl.float32), 1)[:, None] * by, 1)
    outputs = tl.zeros([BLOCK_G, d.shape[0]], tl.float32) + v.to(tl.float32)
    if FP8:  # the outputs 448 times as large, as in `softmax_step`
        scores *= tl.sum(k_scale.to(tl.float32), 0)
        outputs *= v_scale.to(tl.float32)[:, None] * 448.0
    if SOFTCAP > 0:
        scores = capped(scores, SOFTCAP)
    return scores, outputs
