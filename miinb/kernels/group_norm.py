"""Group norms of pictures laid out as [N, H, W, C], with what is added before them and the SiLU behind them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import jit, launch_options, power_of_2, tl, use_triton, wait_for_inputs

_COLUMNS = 64  # most channels of a program
_ROWS = 32  # of a step of it
_PROGRAMS = 2048  # that keep a GPU busy, two warps each
_WHOLE = 1 << 14  # numbers of a group that one program holds
_PARTS = 32  # of an image's statistics that are added up together


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """Group norm (Wu and He, 2018) of `x + shift + residual`, then SiLU if asked.

    Args:
        x: [N, H, W, C], contiguous.
        weight: [C].
        bias: [C].
        groups: into which the channels are divided.
        eps: added to the variance.
        silu: whether the output goes through x * sigmoid(x).
        shift: [1 or N, C], the channels side by side, or None: a convolution's bias, a step's time embedding.
        residual: as `x`, or None.
        keep: whether the sum is wanted.

    Returns:
        The norm's output, and the sum if it is wanted, else `x`; both in x's dtype, statistics are fp32.
    """
    options: dict[str, Any] = {"groups": groups, "eps": eps, "silu": silu}
    if not use_triton(x):
        return reference.group_norm(x, weight, bias, **options, shift=shift, residual=residual, keep=keep)
    keep = keep and (shift is not None or residual is not None)
    total = torch.empty_like(x) if keep else x
    return _normalized(x, shift, residual, total, weight, bias, options), total


def _whole_tile(x: Tensor, groups: int) -> dict[str, int] | None:
    """Where a whole group fits one program: its rows and columns."""
    _, height, width, channels = x.shape
    tile = {"ROWS": power_of_2(height * width), "COLUMNS": power_of_2(channels // groups)}
    return tile if tile["ROWS"] * tile["COLUMNS"] <= _WHOLE else None


def _normalized(
    x: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """The norm's output: of small groups each by one program, of others by many after those that took statistics."""
    (images, height, width, channels), groups = x.shape, options["groups"]
    y = torch.empty_like(x)
    sizes = (height * width, channels)
    kinds = {"SIZE": channels // groups, "SILU": options["silu"], **launch_options(x)}
    if (tile := _whole_tile(x, groups)) is not None:
        _whole_groups[(images, groups)](
            *(x, shift, residual, total, weight, bias, y),
            *sizes,
            _stride(shift),
            options["eps"],
            HAS_SHIFT=shift is not None,
            HAS_RESIDUAL=residual is not None,
            KEEP=total is not x,
            **tile,
            num_warps=min(max(tile["ROWS"] * tile["COLUMNS"] // 1024, 4), 16),
            **kinds,
        )
        return y
    means = _statistics(x, shift, residual, total, groups, options["eps"])
    if total is not x:
        shift = residual = None
    tile = _tile(channels)
    _normalize[(-(-channels // tile["COLUMNS"]) * -(-height * width // tile["ROWS"]), images)](
        *(total, shift, residual, means, weight, bias, y),
        *sizes,
        _stride(shift),
        GROUPS=groups,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        **tile,
        **kinds,
    )
    return y


def _tile(channels: int) -> dict[str, int]:
    """Of kernels that read everything once: an H200 reads the fastest by many programs of two warps."""
    return {"ROWS": _ROWS, "COLUMNS": min(power_of_2(channels), _COLUMNS), "num_warps": 2}


def _stride(shift: Tensor | None) -> int:
    """From an image's shifts to the next one's; 0: all have the same."""
    return shift.stride(0) if shift is not None and shift.shape[0] > 1 else 0


def _statistics(
    x: Tensor, shift: Tensor | None, residual: Tensor | None, total: Tensor, groups: int, eps: float
) -> Tensor:
    """[N, groups, 2] fp32: each group's mean and the reciprocal of its deviation."""
    images, height, width, channels = x.shape
    size, rows, tile = channels // groups, height * width, _tile(channels)
    blocks = -(-channels // tile["COLUMNS"])
    span = _span(rows, images * blocks)
    parts = -(-rows // span)
    sums = torch.empty((images, parts, 3, channels), dtype=torch.float32, device=x.device)
    means = torch.empty((images, groups, 2), dtype=torch.float32, device=x.device)
    _channel_sums[(blocks * parts, images)](
        *(x, shift, residual, total, sums, rows, channels, _stride(shift), parts, span),
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        KEEP=total is not x,
        **tile,
        **launch_options(x),
    )
    _group_means[(groups, images)](
        *(sums, means, rows, channels, parts, eps),
        SIZE=size,
        WIDTH=power_of_2(size),
        PARTS=min(power_of_2(parts), _PARTS),
        num_warps=1 if size <= 32 else 4,
        **launch_options(x),
    )
    return means


def _span(rows: int, units: int) -> int:
    """Rows of one part, where each part has so many programs: whole steps."""
    parts = min(-(-_PROGRAMS // units), -(-rows // _ROWS))
    return -(-rows // (parts * _ROWS)) * _ROWS


def join(
    x: Tensor, *, shift: Tensor | None = None, residual: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """`x + shift + residual`, with the channels of `other` behind its own.

    Args:
        x: [N, H, W, C], contiguous.
        shift: [1 or N, C], or None.
        residual: as `x`, or None.
        other: [N, H, W, D], contiguous, or None.

    Returns:
        [N, H, W, C + D], in x's dtype; sums are fp32.
    """
    if not use_triton(x):
        return reference.join(x, shift=shift, residual=residual, other=other)
    images, height, width, channels = x.shape
    others, rows = 0 if other is None else other.shape[3], height * width
    y = torch.empty((images, height, width, channels + others), dtype=x.dtype, device=x.device)
    tile = _tile(channels + others)
    _join[(-(-(channels + others) // tile["COLUMNS"]) * -(-rows // tile["ROWS"]), images)](
        x,
        shift,
        residual,
        other,
        y,
        rows,
        channels,
        others,
        _stride(shift),
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_OTHER=other is not None,
        **tile,
        **launch_options(x),
    )
    return y


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _summed(x, shift, residual, at, shift_at, mask, inside, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """Numbers of `x + shift + residual` in fp32."""
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        value += tl.load(shift + shift_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    return value


@jit
def _place(channels, COLUMNS: tl.constexpr):
    """Which part of the rows a program has, and its channels; programs of the same rows are neighbors."""
    blocks = tl.cdiv(channels, COLUMNS)
    unit = tl.program_id(0)
    return unit // blocks, unit % blocks * COLUMNS + tl.arange(0, COLUMNS)


@jit(plain=("rows", "parts", "span"))
def _channel_sums(
    x, shift, residual, total, sums, rows, channels, shift_stride, parts, span, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):
    """One program some channels of a part of an image's rows.

    What is summed is the distance from the channel's first number, and its square: so the variance is right where the
    mean is large. Without a residual the last come first: they were written last, and are still in the cache.
    """
    image = tl.program_id(1).to(tl.int64)
    part, channel = _place(channels, COLUMNS)
    if not HAS_RESIDUAL:
        image, part = tl.num_programs(1) - 1 - image, parts - 1 - part
    inside, row = channel < channels, tl.arange(0, ROWS)
    start, shift_at = image * rows * channels, image * shift_stride + channel
    wait_for_inputs(PDL)
    first = start + channel[None, :]
    pivot = _summed(x, shift, residual, first, shift_at, inside[None, :], inside, HAS_SHIFT, HAS_RESIDUAL)
    distances = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(part * span, tl.minimum((part + 1) * span, rows), ROWS):
        at = start + (begin + row)[:, None] * channels + channel[None, :]
        there = (begin + row < rows)[:, None]
        mask = there & inside[None, :]
        value = _summed(x, shift, residual, at, shift_at, mask, inside, HAS_SHIFT, HAS_RESIDUAL)
        if KEEP:
            kept = value.to(total.dtype.element_ty)  # rounded first: the norm is of what others will read
            tl.store(total + at, kept, mask=mask)
            value = kept.to(tl.float32)
        value = tl.where(there, value - pivot, 0.0)
        distances += value
        squares += value * value
    to = sums + (image * parts + part) * 3 * channels + channel
    tl.store(to, tl.sum(distances, 0), mask=inside)
    tl.store(to + channels, tl.sum(squares, 0), mask=inside)
    tl.store(to + 2 * channels, tl.sum(pivot, 0), mask=inside)


@jit(plain=("rows", "parts"))
def _group_means(
    sums, means, rows, channels, parts, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a group of an image: its channels' sums become its mean and the reciprocal of its deviation."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column, part = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    inside = column < SIZE
    start = sums + image * parts * 3 * channels + group * SIZE + column
    distance = tl.zeros([WIDTH], tl.float32)
    square = tl.zeros([WIDTH], tl.float32)
    wait_for_inputs(PDL)
    pivot = tl.load(start + 2 * channels, mask=inside, other=0.0)
    for first in range(0, parts, PARTS):
        mask = (first + part < parts)[:, None] & inside[None, :]
        at = start[None, :] + (first + part)[:, None] * 3 * channels
        distance += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        square += tl.sum(tl.load(at + channels, mask=mask, other=0.0), 0)
    distance, square = distance / rows, square / rows
    center = pivot + distance
    mean = tl.sum(center, 0) / SIZE
    apart = tl.where(inside, center - mean, 0.0)
    variance = tl.sum(tl.maximum(square - distance * distance, 0.0) + apart * apart, 0) / SIZE
    to = means + 2 * (image * tl.num_programs(0) + group)
    tl.store(to, mean)
    tl.store(to + 1, tl.rsqrt(variance + eps))


@jit(plain=("rows",))
def _normalize(
    x, shift, residual, means, weight, bias, y, rows, channels, shift_stride, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, SILU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):
    """One program some rows and channels of an image."""
    image = tl.program_id(1).to(tl.int64)
    part, channel = _place(channels, COLUMNS)
    row = part * ROWS + tl.arange(0, ROWS)
    inside = channel < channels
    mask = (row < rows)[:, None] & inside[None, :]
    at = image * rows * channels + row[:, None] * channels + channel[None, :]
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    group = means + 2 * (image * GROUPS + channel // SIZE)
    mean = tl.load(group, mask=inside, other=0.0)
    scale *= tl.load(group + 1, mask=inside, other=0.0)
    shift_at = image * shift_stride + channel
    value = _summed(x, shift, residual, at, shift_at, mask, inside, HAS_SHIFT, HAS_RESIDUAL)
    value = (value - mean[None, :]) * scale[None, :] + offset[None, :]
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@jit(plain=("rows",))
def _whole_groups(
    x, shift, residual, total, weight, bias, y, rows, channels, shift_stride, eps, SIZE: tl.constexpr,
    SILU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):
    """One program a group of an image: it holds all its numbers."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside, channel = column < SIZE, group * SIZE + column
    mask = (row < rows)[:, None] & inside[None, :]
    at = image * rows * channels + row[:, None] * channels + channel[None, :]
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    shift_at = image * shift_stride + channel
    value = _summed(x, shift, residual, at, shift_at, mask, inside, HAS_SHIFT, HAS_RESIDUAL)
    if KEEP:
        kept = value.to(total.dtype.element_ty)  # rounded first: the norm is of what others will read
        tl.store(total + at, kept, mask=mask)
        value = kept.to(tl.float32)
    count = (rows * SIZE).to(tl.float32)
    mean = tl.sum(tl.sum(tl.where(mask, value, 0.0), 0), 0) / count
    value = tl.where(mask, value - mean, 0.0)
    value *= tl.rsqrt(tl.sum(tl.sum(value * value, 0), 0) / count + eps)
    value = value * scale[None, :] + offset[None, :]
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@jit(plain=("rows",))
def _join(
    x, shift, residual, other, y, rows, channels, others, shift_stride, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_OTHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):
    """One program some rows and channels of an image's output."""
    image = tl.program_id(1).to(tl.int64)
    part, channel = _place(channels + others, COLUMNS)
    row = part * ROWS + tl.arange(0, ROWS)
    there, own = (row < rows)[:, None], channel < channels
    line = (image * rows + row)[:, None]
    wait_for_inputs(PDL)
    at, shift_at = line * channels + channel[None, :], image * shift_stride + channel
    value = _summed(x, shift, residual, at, shift_at, there & own[None, :], own, HAS_SHIFT, HAS_RESIDUAL)
    if HAS_OTHER:
        second = (channel >= channels) & (channel < channels + others)
        at = line * others + (channel - channels)[None, :]
        value += tl.load(other + at, mask=there & second[None, :], other=0.0).to(tl.float32)
    to = line * (channels + others) + channel[None, :]
    tl.store(y + to, value.to(y.dtype.element_ty), mask=there & (channel < channels + others)[None, :])
