"""From the fused QKV projection to rotated queries and appended keys and values, in one pass."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import jit, launch_options, let_next_start, power_of_2, tl, use_triton, wait_for_all

_HEADS_A_PROGRAM = 4


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_size: int,
    rotary_dim: int = 0,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """Normalize (where asked) and rotate queries and keys, and write keys and values to their slots of the cache.

    Args:
        qkv: [T, (heads + 2 * kv_heads) * head_size]: all query heads, then all key heads, then all value heads.
        positions: [T] int64, the tokens' places in their sequences.
        cos: [max_length, rotary_dim / 2] fp32, one row a position; None is no rotation.
        sin: as `cos`.
        k_cache: [pages, page_tokens, kv_heads, head_size], written at `slots`.
        v_cache: as `k_cache`.
        slots: [T] int64, page * page_tokens + offset; on a GPU, a negative one is not written (padding of a graph).
        heads: query heads.
        kv_heads: key and value heads.
        head_size: elements of a head.
        rotary_dim: leading elements of a head that are rotated.
        interleaved: rotated pairs are neighbors (GPT-J) rather than halves.
        q_norm: [head_size], weight of an RMS norm of each query head before the rotation (Qwen3), or None.
        k_norm: the same for key heads.
        eps: of these norms.
        kv_scale: [pages, kv_heads, page_tokens, 2] bf16, the scales of an fp8 cache, written as well; or None.

    Returns:
        The queries, [T, heads, head_size].
    """
    if not use_triton(qkv):
        return reference.rope_append(
            qkv, positions, cos, sin, k_cache, v_cache, slots,
            heads=heads, kv_heads=kv_heads, head_size=head_size, rotary_dim=rotary_dim, interleaved=interleaved,
            q_norm=q_norm, k_norm=k_norm, eps=eps, kv_scale=kv_scale,
        )  # fmt: skip
    return _launch(
        (qkv, positions, cos, sin, k_cache, v_cache, kv_scale, slots, q_norm, k_norm),
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_SIZE=head_size,
        HALF=rotary_dim // 2 if cos is not None else 0,
        INTERLEAVED=interleaved,
        NORM=q_norm is not None,
        PAGE=k_cache.shape[1],
        FP8=kv_scale is not None,
    )


def _launch(tensors: tuple[Any, ...], eps: float, **settings: Any) -> Tensor:
    qkv, heads, head_size = tensors[0], settings["HEADS"], settings["HEAD_SIZE"]
    all_heads = heads + 2 * settings["KV_HEADS"]
    if settings["HALF"] or settings["NORM"]:
        q, first = torch.empty((qkv.shape[0], heads, head_size), dtype=qkv.dtype, device=qkv.device), 0
    else:  # the queries stay as they are
        q, first = qkv.view(-1, all_heads, head_size)[:, :heads], heads
    _rope_append[(qkv.shape[0], -(-(all_heads - first) // _HEADS_A_PROGRAM))](
        *tensors,
        q,
        eps,
        FIRST=first,
        BLOCK_H=_HEADS_A_PROGRAM,
        BLOCK_D=power_of_2(head_size),
        num_warps=1 if head_size <= 64 else 2,
        **settings,
        **launch_options(qkv),
    )
    return q


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def angles(cos, sin, position, d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """[D] each: which element each element of a head is paired with, and what itself and that one are multiplied by."""
    other, c, s = d, 1.0, 0.0
    if HALF > 0:
        if INTERLEAVED:
            pair, other, sign = d // 2, d ^ 1, tl.where(d % 2 == 0, -1.0, 1.0)
        else:
            pair, other = d % HALF, tl.where(d < HALF, d + HALF, d - HALF)
            sign = tl.where(d < HALF, -1.0, 1.0)
        rotary = d < 2 * HALF
        c = tl.load(cos + position * HALF + pair, mask=rotary, other=1.0)
        s = tl.load(sin + position * HALF + pair, mask=rotary, other=0.0) * sign
    return other, c, s


@jit
def norm_weight(weight, at, HEAD_SIZE: tl.constexpr, NORM: tl.constexpr):
    """The weights [1, D] of a norm of a head's elements `at`, if there is one."""
    value = 1.0
    if NORM:
        value = tl.load(weight + at, mask=at < HEAD_SIZE, other=0.0).to(tl.float32)[None, :]
    return value


@jit
def turned(
    value, heads, inside, d, other, c, s, weight, partner_weight, eps, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    """Heads [H, D], normalized where asked, then rotated. `heads` points to them, and has what they are paired with."""
    dtype: tl.constexpr = value.dtype
    if NORM:
        wide = value.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, 1) / HEAD_SIZE + eps)[:, None]
        value = ((wide * inverse).to(dtype).to(tl.float32) * weight).to(dtype)
    if HALF > 0:
        partner = tl.load(heads + other[None, :], mask=inside & (d < 2 * HALF)[None, :], other=0.0)
        if NORM:
            partner = ((partner.to(tl.float32) * inverse).to(dtype).to(tl.float32) * partner_weight).to(dtype)
        rotated = (value.to(tl.float32) * c[None, :] + partner.to(tl.float32) * s[None, :]).to(dtype)
        value = tl.where((d < 2 * HALF)[None, :], rotated, value)
    return value


@jit
def to_fp8(value):
    """Rows [heads, D] as fp8, the largest number of each as fp8's largest, and their scales [heads]."""
    wide = value.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 1) / 448.0, 1e-30).to(tl.bfloat16)
    return (wide / scale.to(tl.float32)[:, None]).to(tl.float8e4nv), scale


@jit
def _rope_append(
    qkv, positions, cos, sin, k_cache, v_cache, kv_scale, slots, q_norm, k_norm, q, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, FIRST: tl.constexpr, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):
    """One program a token and BLOCK_H heads, counted over q, k, v. HALF is rotary_dim / 2, 0 without rotation."""
    token = tl.program_id(0).to(tl.int64)
    head = FIRST + tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    is_q = head < HEADS
    is_v = head >= HEADS + KV_HEADS
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (d < HEAD_SIZE)[None, :]
    wait_for_all(PDL)
    let_next_start(PDL)  # not before: attention's programs would wait beside the product, which takes 1% of a token
    at = qkv + token * (HEADS + 2 * KV_HEADS) * HEAD_SIZE + head[:, None] * HEAD_SIZE
    value = tl.load(at + d[None, :], mask=inside, other=0.0)
    position = 0
    if HALF > 0:
        position = tl.load(positions + token)
    other, c, s = angles(cos, sin, position, d, HALF, INTERLEAVED)
    weight, partner_weight = 1.0, 1.0
    if NORM:
        own = is_q[:, None]
        weight = tl.where(own, norm_weight(q_norm, d, HEAD_SIZE, NORM), norm_weight(k_norm, d, HEAD_SIZE, NORM))
        partner_weight = norm_weight(q_norm, other, HEAD_SIZE, NORM)
        partner_weight = tl.where(own, partner_weight, norm_weight(k_norm, other, HEAD_SIZE, NORM))
    new = turned(value, at, inside, d, other, c, s, weight, partner_weight, eps, HEAD_SIZE, HALF, NORM)
    value = tl.where(is_v[:, None], value, new)
    if FIRST == 0:
        tl.store(q + token * HEADS * HEAD_SIZE + head[:, None] * HEAD_SIZE + d[None, :], value, inside & is_q[:, None])
    slot = tl.load(slots + token)
    is_k = (head >= HEADS) & ~is_v
    k_head, v_head = head - HEADS, head - HEADS - KV_HEADS
    stored = inside & (slot >= 0)
    if FP8:
        value, scale = to_fp8(value)
        to = kv_scale + 2 * ((slot // PAGE) * KV_HEADS * PAGE + slot % PAGE)
        tl.store(to + 2 * PAGE * k_head, scale, is_k & (slot >= 0))
        tl.store(to + 2 * PAGE * v_head + 1, scale, is_v & (v_head < KV_HEADS) & (slot >= 0))
    to = slot * KV_HEADS * HEAD_SIZE + d[None, :]
    tl.store(k_cache + to + k_head[:, None] * HEAD_SIZE, value, stored & is_k[:, None])
    tl.store(v_cache + to + v_head[:, None] * HEAD_SIZE, value, stored & is_v[:, None])
