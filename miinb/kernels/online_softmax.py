"""What kernels of attention over a paged cache share: keys are read block by block, and their scores made weights.

A row of one query has few scores and may have many keys, so its context is divided over programs; the last of them to
finish merges what they found (split-KV, or FlashDecoding).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels.dispatch import INTERPRETED, arrival_counters, jit, launch_options, power_of_2, tl

LOG2E = 1.4426950408889634
_BLOCK_BYTES = 16384  # of the keys in one step of a program, and as many values
_ROW_PROGRAMS = 256  # decode: at most so many for one row, about two for each multiprocessor of an H100,
_DECODE_PROGRAMS = 1024  # and so many for all rows, as far as there are keys for them
_LEAST_KEYS = 64  # of one part of a context; more in longer ones, as merging many parts costs more than it gains


def decode_parts(
    x: Tensor, rows: int, settings: dict[str, Any], fewest: int = 1
) -> tuple[tuple[int, int, int], tuple[Tensor, Tensor, Tensor], tuple[int, int]]:
    """How one token of each row is divided over programs, on the GPU of `x`.

    Returns:
        The grid: rows stay in their order, which begins with the longest contexts; what parts leave for who merges
        them: `finish`'s outputs, weights and counters; the parts of a row at most, and the keys of a part at least.
    """
    heads, kv_heads = settings["HEADS"], settings["KV_HEADS"]
    splits = min(max(min(_ROW_PROGRAMS // kv_heads, _DECODE_PROGRAMS // (rows * kv_heads)), fewest), 32)
    block_g = max(power_of_2(heads // kv_heads), 16)
    parts = rows * kv_heads * splits
    partial = torch.empty((parts, block_g, settings["HEAD_SIZE"]), dtype=torch.float32, device=x.device)
    weights = torch.empty((parts, 2, block_g), dtype=torch.float32, device=x.device)
    return (kv_heads, rows, splits), (partial, weights, arrival_counters(x.device)), (splits, _LEAST_KEYS)


def blocks(x: Tensor, head_size: int, *, most: int, stages: int, warps: int) -> dict[str, Any]:
    """Keys in a step, at most so many and few enough for the shared memory of any head size, and steps in flight."""
    block_d = max(power_of_2(head_size), 16)
    block_n = min(max(_BLOCK_BYTES // (block_d * x.element_size()), 16), most)
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages, **launch_options(x)}


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def read_keys(
    k_cache, v_cache, kv_scale, table, page_stride, key, key_end, kv_head, KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Keys and values [N, D] of a row's positions `key` before `key_end`; of an fp8 cache also their scales, as one."""
    d = tl.arange(0, BLOCK_D)
    there = key < key_end
    number, offset = key.to(tl.uint32) // PAGE, key.to(tl.uint32) % PAGE  # a division of signed numbers takes longer
    page = tl.load(table + number * page_stride, mask=there, other=0).to(tl.int64)
    at = ((page * PAGE + offset) * KV_HEADS + kv_head)[:, None] * HEAD_SIZE + d[None, :]
    mask = there[:, None] & (d < HEAD_SIZE)[None, :]
    k = tl.load(k_cache + at, mask=mask, other=0.0)
    v = tl.load(v_cache + at, mask=mask, other=0.0)
    both = offset
    if FP8:
        both = (page * KV_HEADS + kv_head) * PAGE + offset
        both = tl.load(kv_scale.to(tl.pointer_type(tl.uint32)) + both, mask=there, other=0)
    return k, v, both


@jit
def softmax_step(
    query, top, total, acc, read, key, key_end, position, slope, scale, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, FP8: tl.constexpr,
):
    """One block of keys, of `read_keys`, in the online softmax (Dao et al., 2022): new maxima [M], sums [M] and outputs
    [M, D].

    `scale` holds log2(e), as 2**x is what the hardware computes. The products of an fp8 cache are made with the
    numbers as they are stored; the scales of keys go to the scores, and those of values into the weights.
    """
    k, v, both = read
    there = key < key_end
    if FP8:
        k, v = _widen(k, query.dtype), _widen(v, query.dtype)
    scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
    if FP8:
        scores *= (both << 16).to(tl.float32, bitcast=True)[None, :]
    if SOFTCAP > 0:
        scores = capped(scores, SOFTCAP)
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
def softmax_over(
    query, top, total, acc, begin, end, k_cache, v_cache, kv_scale, table, page_stride, position, slope, kv_head, scale,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, FP8: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """`softmax_step` of the keys from `begin` to `end`."""
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        read = read_keys(
            k_cache, v_cache, kv_scale, table, page_stride, key, end, kv_head, KV_HEADS, HEAD_SIZE, PAGE, FP8, BLOCK_D
        )
        top, total, acc = softmax_step(
            query, top, total, acc, read, key, end, position, slope, scale, WINDOW, SOFTCAP, HAS_ALIBI, FP8
        )
    return top, total, acc


@jit
def capped(scores, SOFTCAP: tl.constexpr):
    """softcap * tanh(score / softcap), of scores that are multiplied by log2(e); tanh(u) = 2 * sigmoid(2 * u) - 1."""
    return (2 * tl.sigmoid(scores * (2 * 0.6931471805599453 / SOFTCAP)) - 1) * (SOFTCAP * 1.4426950408889634)


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
def for_scores(query, scale, FP8: tl.constexpr):
    """Queries [M, D] as they are multiplied with keys, and what their scores are multiplied by.

    fp8 becomes fp16 in one instruction and bf16 in several, so those of an fp8 cache are fp16, each with its largest
    number at 1, as bf16 goes further than fp16 does.
    """
    if FP8:
        largest = tl.maximum(tl.max(tl.abs(query.to(tl.float32)), 1), 1e-30)
        wide = query.to(tl.float32) / largest[:, None]
        query = wide if query.dtype == tl.float32 else wide.to(tl.float16)
        scale = scale * largest[:, None]
    return query, scale


@jit
def finish(
    to, mask, top, total, acc, partial, weights, counters, unit, split, splits, parts, g, d, HEAD_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Write what came of one part of a context; the last to finish of a `unit`'s parts merges them."""
    if parts <= 1:
        if split == 0:
            tl.store(to, (acc / tl.where(total == 0.0, 1.0, total)[:, None]).to(to.dtype.element_ty), mask=mask)
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
            tl.store(to, result.to(to.dtype.element_ty), mask=mask)


@jit
def parts_of(keys, splits, least, BLOCK_N: tl.constexpr):
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
