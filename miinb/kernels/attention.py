"""Attention over the paged KV cache: split-KV decode and variable-length prefill."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import (
    INTERPRETED,
    arrival_counters,
    jit,
    launch_options,
    power_of_2,
    tl,
    use_triton,
    wait_for_inputs,
)

_LOG2E = 1.4426950408889634
_BLOCK_BYTES = 16384  # of the keys in one step of a program, and as many values
_ROW_PROGRAMS = 256  # decode: at most so many for one row, about two for each multiprocessor of an H100,
_DECODE_PROGRAMS = 1024  # and so many for all rows, as far as there are keys for them
_LEAST_KEYS = 64  # of one part of a context; more in longer ones, as merging many parts costs more than it gains
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
    heads, kv_heads, rows = settings["HEADS"], settings["KV_HEADS"], lengths.shape[0]
    fewest = _MIXED_SPLITS if mixed else 1
    splits = min(max(min(_ROW_PROGRAMS // kv_heads, _DECODE_PROGRAMS // (rows * kv_heads)), fewest), 32)
    block_g = max(power_of_2(heads // kv_heads), 16)
    parts = rows * kv_heads * splits
    _decode[(kv_heads, rows, splits)](  # rows in their order, which begins with the longest contexts
        *tensors,
        torch.empty((parts, block_g, settings["HEAD_SIZE"]), dtype=torch.float32, device=q.device),
        torch.empty((parts, 2, block_g), dtype=torch.float32, device=q.device),
        arrival_counters(q.device),
        q.stride(0),
        *block_table.stride(),
        scale * _LOG2E,
        splits,
        _LEAST_KEYS,
        MIXED=mixed,
        BLOCK_G=block_g,
        **settings,
        **_blocks(q, most=64, stages=2, warps=2 if settings["FP8"] else 4),
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
        scale * _LOG2E,
        BLOCK_M=block_m,
        **settings,
        **_blocks(q, most=32, stages=3, warps=4),
    )


def _blocks(q: Tensor, most: int, stages: int, warps: int) -> dict[str, Any]:
    """Keys in a step, at most so many and few enough for the shared memory of any head size, and steps in flight."""
    block_d = max(power_of_2(q.shape[2]), 16)
    block_n = min(max(_BLOCK_BYTES // (block_d * q.element_size()), 16), most)
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages, **launch_options(q)}


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _softmax_step(
    query, top, total, acc, k_cache, v_cache, kv_scale, table, page_stride, key, key_end, position, slope, kv_head,
    scale, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, FP8: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One block of keys in the online softmax (Dao et al., 2022): new maxima [M], sums [M] and outputs [M, D].

    `scale` holds log2(e), as 2**x is what the hardware computes. The products of an fp8 cache are made with the
    numbers as they are stored; the scales of keys go to the scores, and those of values into the weights.
    """
    d = tl.arange(0, BLOCK_D)
    there = key < key_end
    number, offset = key.to(tl.uint32) // PAGE, key.to(tl.uint32) % PAGE  # a division of signed numbers takes longer
    page = tl.load(table + number * page_stride, mask=there, other=0).to(tl.int64)
    at = ((page * PAGE + offset) * KV_HEADS + kv_head)[:, None] * HEAD_SIZE + d[None, :]
    mask = there[:, None] & (d < HEAD_SIZE)[None, :]
    k = tl.load(k_cache + at, mask=mask, other=0.0)
    v = tl.load(v_cache + at, mask=mask, other=0.0)
    if FP8:
        k, v = _widen(k, query.dtype), _widen(v, query.dtype)
        both = (page * KV_HEADS + kv_head) * PAGE + offset  # a key's and a value's scale are read as one number
        both = tl.load(kv_scale.to(tl.pointer_type(tl.uint32)) + both, mask=there, other=0)
    scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
    if FP8:
        scores *= (both << 16).to(tl.float32, bitcast=True)[None, :]
    if SOFTCAP > 0:
        # softcap * tanh(score / softcap) with tanh(u) = 2 * sigmoid(2 * u) - 1
        scores = (2 * tl.sigmoid(scores * (2 * 0.6931471805599453 / SOFTCAP)) - 1) * (SOFTCAP * 1.4426950408889634)
    distance = key[None, :] - position[:, None]
    if HAS_ALIBI:
        scores += slope[:, None] * distance.to(tl.float32)
    seen = there[None, :] & (distance <= 0)
    if WINDOW > 0:
        seen = seen & (distance > -WINDOW)
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that sees no key of this block
    weight = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    added = tl.sum(weight, 1)
    if FP8:  # times the largest fp8 number in sum and output alike: the weights are then far from fp16's least ones
        added *= 448.0
        weight *= (both & 0xFFFF0000).to(tl.float32, bitcast=True)[None, :] * 448.0
    total = total * shrink + added
    acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return new_top, total, acc


@jit
def _widen_in_place(x, dtype: tl.constexpr):
    """fp8 as `dtype`, in the layout in which it was loaded.

    The move does nothing, but the compiler cannot turn it and the conversion around. It would have every thread gather
    the bytes that it needs for the product one by one: shared memory transposes numbers of 16 bits, not of 8.
    """
    x = x.to(dtype)
    if dtype == tl.float16:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=False, pack=2)
    return x


@jit
def _convert(x, dtype: tl.constexpr):
    return x.to(dtype)


# Chosen here: a kernel that reads a global number has another key in Triton's cache for each order of first use.
_widen = _convert if INTERPRETED else _widen_in_place


@jit
def _query(q, at, mask, scale, FP8: tl.constexpr):
    """Queries [M, D], and what their scores are multiplied by.

    fp8 becomes fp16 in one instruction and bf16 in several, so those of an fp8 cache are fp16, each with its largest
    number at 1, as bf16 goes further than fp16 does.
    """
    query = tl.load(q + at, mask=mask, other=0.0)
    if FP8:
        largest = tl.maximum(tl.max(tl.abs(query.to(tl.float32)), 1), 1e-30)
        wide = query.to(tl.float32) / largest[:, None]
        query = wide if query.dtype == tl.float32 else wide.to(tl.float16)
        scale = scale * largest[:, None]
    return query, scale


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
    span, parts = _parts(length - first, splits, least, BLOCK_N)
    begin, end = first + split * span, tl.minimum(first + (split + 1) * span, length)
    query, by = _query(q + token.to(tl.int64) * q_stride, head[:, None] * HEAD_SIZE + d[None, :], mask, scale, FP8)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    position = tl.zeros([BLOCK_G], tl.int32) + length - 1
    table = block_table + row.to(tl.int64) * table_stride
    for start in range(begin, end, BLOCK_N):
        top, total, acc = _softmax_step(
            query, top, total, acc, k_cache, v_cache, kv_scale, table, page_stride, start + tl.arange(0, BLOCK_N), end,
            position, slope, kv_head, by, KV_HEADS, HEAD_SIZE, PAGE, WINDOW, SOFTCAP, HAS_ALIBI, FP8, BLOCK_D,
        )
    to = out + (token.to(tl.int64) * HEADS + head[:, None]) * HEAD_SIZE + d[None, :]
    unit = row * KV_HEADS + kv_head
    if parts <= 1:
        if split == 0:
            tl.store(to, (acc / tl.where(total == 0.0, 1.0, total)[:, None]).to(out.dtype.element_ty), mask=mask)
    elif split < parts:
        at = (unit * splits + split).to(tl.int64) * BLOCK_G
        tl.store(partial + (at + g)[:, None] * HEAD_SIZE + d[None, :], acc, mask=mask)
        tl.store(weights + at * 2 + g, top)
        tl.store(weights + at * 2 + BLOCK_G + g, total)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(counters + unit, 1, sem="acq_rel") == parts - 1:
            tl.store(counters + unit, 0)
            base = (unit * splits).to(tl.int64) * BLOCK_G
            result = _merge(partial + base * HEAD_SIZE, weights + base * 2, parts, g, d, mask, HEAD_SIZE, BLOCK_G)
            tl.store(to, result.to(out.dtype.element_ty), mask=mask)


@jit
def _parts(keys, splits, least, BLOCK_N: tl.constexpr):
    """Keys in a part of a context, and the parts that there are."""
    fewest = tl.minimum(tl.maximum(keys // 16, least), 4 * least)
    span = tl.cdiv(tl.maximum(tl.cdiv(keys, splits), fewest), BLOCK_N) * BLOCK_N
    return span, tl.cdiv(keys, span)


@jit
def _merge(partial, weights, parts, g, d, mask, HEAD_SIZE: tl.constexpr, BLOCK_G: tl.constexpr):
    """The attention [BLOCK_G, BLOCK_D] of all parts, always summed in the same order.

    Loads go past the first-level cache, which does not see the writes of other multiprocessors.
    """
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(weights + part * 2 * BLOCK_G + g, cache_modifier=".cg"))
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, d.shape[0]], tl.float32)
    for part in tl.range(parts, loop_unroll_factor=4):
        share = tl.exp2(tl.load(weights + part * 2 * BLOCK_G + g, cache_modifier=".cg") - top)
        total += share * tl.load(weights + (part * 2 + 1) * BLOCK_G + g, cache_modifier=".cg")
        at = partial + (part * BLOCK_G + g)[:, None] * HEAD_SIZE + d[None, :]
        acc += share[:, None] * tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return acc / total[:, None]


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
        query, by = _query(q, at * q_stride + head[:, None] * HEAD_SIZE + d[None, :], mask, scale, FP8)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        first = 0
        if WINDOW > 0:
            first = tl.maximum(before + begin - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(before + begin + TOKENS, length)
        table = block_table + row.to(tl.int64) * table_stride
        for key in range(first, end, BLOCK_N):
            top, total, acc = _softmax_step(
                query, top, total, acc, k_cache, v_cache, kv_scale, table, page_stride,
                key + tl.arange(0, BLOCK_N), end, position, slope, kv_head, by, KV_HEADS, HEAD_SIZE, PAGE, WINDOW,
                SOFTCAP, HAS_ALIBI, FP8, BLOCK_D,
            )
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        to = out + at * HEADS * HEAD_SIZE + head[:, None] * HEAD_SIZE + d[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=mask)
