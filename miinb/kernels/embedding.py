"""Embeddings in one pass: of decoders token and position rows, of encoders those and type rows, normalized."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import jit, launch_options, power_of_2, tl, use_triton, wait_for_inputs

_BLOCK = 2048


def fill_newest(token_ids: Tensor, newest: Tensor, slots: Tensor) -> None:
    """Put `newest[slots]` where a token is below 0, which stands for its row's newest one.

    Args:
        token_ids: [T] int64, written.
        newest: [S] int64, the newest token of each slot.
        slots: [T] int64.
    """
    if not use_triton(token_ids):
        torch.where(token_ids < 0, newest[slots], token_ids, out=token_ids)
        return
    count = token_ids.shape[0]
    block = 128
    _fill_newest[(-(-count // block),)](
        token_ids, newest, slots, count, BLOCK=block, num_warps=4, **launch_options(token_ids)
    )


def token_embedding(
    token_ids: Tensor, table: Tensor, scale: float, positions: Tensor, position_table: Tensor | None, offset: int
) -> Tensor:
    """table[token_ids] * scale + position_table[positions + offset], rounded after each.

    Args:
        token_ids: [T] int64.
        table: [vocab, hidden].
        scale: of the tokens' rows.
        positions: [T] int64; not read without a table.
        position_table: [rows, hidden], or None.
        offset: of the positions' rows.

    Returns:
        [T, hidden] in the tables' dtype.
    """
    if not use_triton(table):
        x = F.embedding(token_ids, table)
        x = x if scale == 1.0 else x * scale
        return x if position_table is None else x + F.embedding(positions + offset, position_table)
    tokens, hidden = token_ids.shape[0], table.shape[1]
    y = torch.empty((tokens, hidden), dtype=table.dtype, device=table.device)
    block = min(power_of_2(hidden), _BLOCK)
    _token_embedding[(tokens, -(-hidden // block))](
        token_ids,
        positions,
        table,
        position_table,
        y,
        hidden,
        scale,
        offset,
        SCALED=scale != 1.0,
        HAS_POSITIONS=position_table is not None,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 8),
        **launch_options(table),
    )
    return y


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
        position_table: [rows, hidden].
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
@jit(plain=("count",))
def _fill_newest(token_ids, newest, slots, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program BLOCK tokens."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    unknown = (token < count) & (tl.load(token_ids + token, mask=token < count, other=0) < 0)
    slot = tl.load(slots + token, mask=unknown, other=0)
    tl.store(token_ids + token, tl.load(newest + slot, mask=unknown, other=0), mask=unknown)


@jit(plain=("offset",))
def _token_embedding(
    token_ids, positions, table, position_table, y, hidden, scale, offset, SCALED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    """One program a token and BLOCK of its numbers."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    wait_for_inputs(PDL)
    value = tl.load(table + tl.load(token_ids + token) * hidden + column, mask=inside, other=0.0)
    if SCALED:
        value = (value.to(tl.float32) * scale).to(value.dtype)
    if HAS_POSITIONS:
        row = tl.load(positions + token) + offset
        value = value.to(tl.float32) + tl.load(position_table + row * hidden + column, mask=inside, other=0.0)
    tl.store(y + token * hidden + column, value.to(y.dtype.element_ty), mask=inside)


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
