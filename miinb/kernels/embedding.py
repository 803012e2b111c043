"""Embeddings of encoders: token, position and type rows summed and normalized in one pass."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import jit, launch_options, power_of_2, tl, use_triton, wait_for_inputs


def embedding_norm(
    token_ids: Tensor,
    positions: Tensor,
    type_ids: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    type_table: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Layer norm of token_table[token_ids] + position_table[positions] + type_table[type_ids].

    Args:
        token_ids: [T] int64.
        positions: [T] int64, from 0 in each sequence.
        type_ids: [T] int64; not read without a table.
        token_table: [vocab, hidden].
        position_table: [max_length, hidden].
        type_table: [types, hidden], or None.
        weight: [hidden], of the norm.
        bias: [hidden] or None.
        eps: added to the variance.

    Returns:
        [T, hidden] in the tables' dtype; sums and statistics are fp32.
    """
    if not use_triton(token_table):
        return reference.embedding_norm(
            token_ids, positions, type_ids, token_table, position_table, type_table, weight, bias, eps
        )
    tokens, hidden = token_ids.shape[0], token_table.shape[1]
    y = torch.empty((tokens, hidden), dtype=token_table.dtype, device=token_table.device)
    block = power_of_2(hidden)
    _embedding_norm[(tokens,)](
        token_ids,
        positions,
        type_ids,
        token_table,
        position_table,
        type_table,
        weight,
        bias,
        y,
        hidden,
        eps,
        HAS_TYPES=type_table is not None,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(token_table),
    )
    return y


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _embedding_norm(
    token_ids, positions, type_ids, token_table, position_table, type_table, weight, bias, y, hidden, eps,
    HAS_TYPES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    """One program a token."""
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    row = tl.load(token_ids + token).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    wide = tl.load(token_table + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    wide += tl.load(position_table + position * hidden + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_TYPES:
        kind = tl.load(type_ids + token).to(tl.int64)
        wide += tl.load(type_table + kind * hidden + column, mask=inside, other=0.0).to(tl.float32)
    wide = tl.where(inside, wide - tl.sum(wide, 0) / hidden, 0.0)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps) * scale
    if HAS_BIAS:
        wide += shift
    tl.store(y + token.to(tl.int64) * hidden + column, wide.to(y.dtype.element_ty), mask=inside)
