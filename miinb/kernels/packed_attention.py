"""Attention of encoders: packed sequences of any lengths, each token seeing all of its own sequence."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import jit, launch_options, power_of_2, tl, use_triton, wait_for_inputs

_LOG2E = 1.4426950408889634
_PROGRAMS = 128  # what a GPU is expected to run at a time: an H100 has 132 multiprocessors
_MOST_KEYS = 128  # of one step of a program: sequences of so many tokens need no second one


def packed_attention(
    qkv: Tensor, starts: Tensor, *, heads: int, head_size: int, scale: float, max_length: int
) -> Tensor:
    """Attention within each of the packed sequences, in both directions.

    Args:
        qkv: [T, 3 * heads * head_size], contiguous, as the fused linear layer gives it: all query heads, then all key
            heads, then all value heads.
        starts: [S + 1] int32, ascending: sequence s is the tokens starts[s] to starts[s + 1] - 1. Equal neighbors are
            an empty sequence (padding of a graph). The places of tokens of no sequence are not written.
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
    tile = attention_tile(qkv, heads, head_size, max_length)
    tiles = -(-max_length // tile["BLOCK_M"])
    _packed_attention[(heads, tiles, starts.shape[0] - 1)](
        qkv, starts, out, scale * _LOG2E, HEADS=heads, HEAD_SIZE=head_size, **tile, **launch_options(qkv)
    )
    return out


def attention_tile(qkv: Tensor, heads: int, head_size: int, max_length: int) -> dict[str, Any]:
    """Queries and keys of one step of a program, its warps and the loads in flight.

    Sequences that fit into one step of keys need no loop. Where there are few tokens, a program takes fewer of them, so
    that there are programs for the whole GPU.
    """
    wide = qkv.element_size() == 4  # products of fp32 are made without tensor cores
    block_d = max(power_of_2(head_size), 16)
    keys = min(max(power_of_2(max_length), 16), 32 if wide else _MOST_KEYS)
    if block_d > 64 and max_length > keys:
        keys = min(keys, 64)
    queries = 32 if wide else 128
    queries = min(queries, max(power_of_2(max_length), 16))
    while queries > 16 and -(-qkv.shape[0] // queries) * heads < _PROGRAMS:
        queries //= 2
    return {
        "BLOCK_M": queries,
        "BLOCK_N": keys,
        "BLOCK_D": block_d,
        "ONE_STEP": max_length <= keys,
        "num_warps": 8 if queries == 128 else 4,
        "num_stages": 2,
    }


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _packed_attention(
    qkv, starts, out, scale, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ONE_STEP: tl.constexpr, PDL: tl.constexpr,
):
    """One program a head, tile of queries and sequence. Those of tiles beyond the sequence's end have nothing to do.

    The softmax is online (Dao et al., 2022) over steps of keys; `scale` holds log2(e), as 2**x is what the hardware
    computes.
    """
    head, tile, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    WIDTH: tl.constexpr = HEADS * HEAD_SIZE
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    wait_for_inputs(PDL)
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    if tile * BLOCK_M < length:
        inside = (d < HEAD_SIZE)[None, :]
        base = qkv + start.to(tl.int64) * (3 * WIDTH) + head * HEAD_SIZE + d[None, :]
        mask = (m < length)[:, None] & inside
        query = tl.load(base + m[:, None] * (3 * WIDTH), mask=mask, other=0.0)
        keys = base + WIDTH + n[:, None] * (3 * WIDTH)
        if ONE_STEP:
            there = (n < length)[:, None] & inside
            k = tl.load(keys, mask=there, other=0.0)
            v = tl.load(keys + WIDTH, mask=there, other=0.0)
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where((n < length)[None, :], scores, float("-inf"))
            weight = tl.exp2(scores - tl.max(scores, 1)[:, None])
            total = tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        else:
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for first in range(0, length, BLOCK_N):
                there = (n < length - first)[:, None] & inside
                k = tl.load(keys + first * (3 * WIDTH), mask=there, other=0.0)
                v = tl.load(keys + first * (3 * WIDTH) + WIDTH, mask=there, other=0.0)
                scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
                scores = tl.where((n < length - first)[None, :], scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                weight = tl.exp2(scores - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(weight, 1)
                acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
                top = new_top
        result = acc / total[:, None]
        to = out + start.to(tl.int64) * WIDTH + m[:, None] * WIDTH + head * HEAD_SIZE + d[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=mask)
