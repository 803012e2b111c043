"""From the fused QKV projection to rotated queries and appended keys and values, in one pass."""

from __future__ import annotations

from torch import Tensor

from miinb.kernels import reference


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
) -> Tensor:
    """Normalize (where asked) and rotate queries and keys, and write keys and values to their slots of the cache.

    Args:
        qkv: [T, (heads + 2 * kv_heads) * head_size]: all query heads, then all key heads, then all value heads.
        positions: [T] int64, the tokens' places in their sequences.
        cos: [max_length, rotary_dim / 2] fp32, one row a position; None is no rotation.
        sin: as `cos`.
        k_cache: [pages, page_tokens, kv_heads, head_size], written at `slots`.
        v_cache: as `k_cache`.
        slots: [T] int64, page * page_tokens + offset.
        heads: query heads.
        kv_heads: key and value heads.
        head_size: elements of a head.
        rotary_dim: leading elements of a head that are rotated.
        interleaved: rotated pairs are neighbors (GPT-J) rather than halves.
        q_norm: [head_size], weight of an RMS norm of each query head before the rotation (Qwen3), or None.
        k_norm: the same for key heads.
        eps: of these norms.

    Returns:
        The queries, [T, heads, head_size].
    """
    return reference.rope_append(
        qkv,
        positions,
        cos,
        sin,
        k_cache,
        v_cache,
        slots,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
    )
