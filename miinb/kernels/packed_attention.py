"""Attention of encoders: packed sequences of any lengths, each token seeing all of its own sequence."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import jit, launch_options, power_of_2, tl, use_triton, wait_for_inputs

_LOG2E = 1.4426950408889634


def packed_attention(
    qkv: Tensor, starts: Tensor, *, heads: int, head_size: int, scale: float, max_length: int
) -> Tensor:
    """Attention within each of the packed sequences, in both directions.

    Args:
        qkv: [T, 3 * heads * head_size], contiguous, as the fused linear layer gives it: all query heads, then all key
            heads, then all value heads.
        starts: [S + 1] int32, ascending: sequence s is the tokens starts[s] to starts[s + 1] - 1. Equal neighbors are
            an empty sequence (padding of a graph). What tokens of no sequence get says nothing.
        heads: of queries, and of keys and values.
        head_size: elements of a head.
        scale: of the scores.
        max_length: at least the longest sequence's tokens.

    Returns:
        [T, heads * head_size].
    """
    if not use_triton(qkv):
        return reference.packed_attention(
            qkv, starts, heads=heads, head_size=head_size, scale=scale, max_length=max_length
        )
    out = torch.empty((qkv.shape[0], heads * head_size), dtype=qkv.dtype, device=qkv.device)
    tile = attention_tile(qkv, head_size, max_length)
    _packed_attention[(heads, -(-qkv.shape[0] // tile["BLOCK_M"]))](
        qkv,
        starts,
        out,
        qkv.shape[0],
        starts.shape[0] - 1,
        scale * _LOG2E,
        HEADS=heads,
        HEAD_SIZE=head_size,
        **tile,
        **launch_options(qkv),
    )
    return out


def attention_tile(qkv: Tensor, head_size: int, max_length: int) -> dict[str, Any]:
    """Queries of a program and keys of one of its steps, its warps and the loads in flight; measured on an H100."""
    most = 32 if qkv.element_size() == 4 else 64  # products of fp32 are made without tensor cores
    block = min(max(power_of_2(max_length), 16), most)
    return {
        "BLOCK_M": max(block, 32),
        "BLOCK_N": block,
        "BLOCK_D": max(power_of_2(head_size), 16),
        "num_warps": 4,
        "num_stages": 3,
    }


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("tokens", "sequences"))
def _packed_attention(
    qkv, starts, out, tokens, sequences, scale, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):
    """One program a head and tile of packed tokens, which may begin and end within sequences and hold several.

    It goes over the keys of all its sequences, each query seeing those of its own: so the programs do not depend on how
    the tokens are divided, and short sequences share one. The softmax is online (Dao et al., 2022); `scale` holds
    log2(e), as 2**x is what the hardware computes.
    """
    head, begin = tl.program_id(0), tl.program_id(1) * BLOCK_M
    WIDTH: tl.constexpr = HEADS * HEAD_SIZE
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    token = begin + tl.arange(0, BLOCK_M)
    inside = (d < HEAD_SIZE)[None, :]
    wait_for_inputs(PDL)
    at = token.to(tl.int64)[:, None]
    column = head * HEAD_SIZE + d[None, :]
    query = tl.load(qkv + at * (3 * WIDTH) + column, mask=(token < tokens)[:, None] & inside, other=0.0)
    first, stop = _bounds(starts, sequences, token, begin)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.max(stop, 0)
    base = qkv + WIDTH + column
    for some in range(tl.min(first, 0), last, BLOCK_N):
        key = some + n
        keys = base + key.to(tl.int64)[:, None] * (3 * WIDTH)
        there = (key < last)[:, None] & inside
        k = tl.load(keys, mask=there, other=0.0)
        v = tl.load(keys + WIDTH, mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        own = (key[None, :] >= first[:, None]) & (key[None, :] < stop[:, None])
        scores = tl.where(own, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(new_top == float("-inf"), 0.0, new_top)  # a query with none of these keys
        weight = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        top = new_top
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + at * WIDTH + column, result.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & inside)


@jit
def _bounds(starts, sequences, token, begin):
    """First token of each token's sequence, and the one behind its last; for tokens of no sequence these are equal."""
    r = tl.arange(0, 128)
    stride = tl.cdiv(sequences, 128)
    place = (r + 1) * stride  # the sequence that ends before the tile is looked for among 128 of them, then closer
    ends = tl.load(starts + place, mask=place <= sequences, other=1 << 30)
    sequence = tl.sum((ends <= begin).to(tl.int32), 0) * stride
    near = tl.zeros([128], tl.int32)
    for some in range(0, stride, 128):
        place = sequence + 1 + some + r
        ends = tl.load(starts + place, mask=(some + r < stride) & (place <= sequences), other=1 << 30)
        near += (ends <= begin).to(tl.int32)
    sequence += tl.sum(near, 0)
    at = tl.load(starts + sequence)
    first = tl.zeros_like(token) + at
    stop = first
    while (sequence < sequences) & (at <= tl.max(token, 0)):
        end = tl.load(starts + sequence + 1)
        mine = (token >= at) & (token < end)
        first = tl.where(mine, at, first)
        stop = tl.where(mine, end, stop)
        at = end
        sequence += 1
    return first, stop
