"""Group norms of pictures laid out as [N, H, W, C], with what is added before them and the SiLU behind them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import arrival_counters, jit, launch_options, power_of_2, tl, use_triton, wait_for_inputs

_TILE = 4096  # numbers of a tile
_COLUMNS = 256  # most columns of a tile of the statistics
_PROGRAMS = 512  # that keep a GPU busy
_WHOLE = 1 << 14  # numbers of a group that one program holds
_PARTS = (1, 32, 256)  # room for those of an image's statistics: few kinds of kernels serve all sizes


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
    block = min(power_of_2(channels), 64)
    _normalize[(images, -(-height * width // (_TILE // block)), -(-channels // block))](
        *(total, shift, residual, means, weight, bias, y),
        *sizes,
        _stride(shift),
        GROUPS=groups,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        ROWS=_TILE // block,
        COLUMNS=block,
        **kinds,
    )
    return y


def _stride(shift: Tensor | None) -> int:
    """From an image's shifts to the next one's; 0: all have the same."""
    return shift.stride(0) if shift is not None and shift.shape[0] > 1 else 0


def _statistics(
    x: Tensor, shift: Tensor | None, residual: Tensor | None, total: Tensor, groups: int, eps: float
) -> Tensor:
    """[N, groups, 2] fp32: each group's mean and the reciprocal of its deviation."""
    images, height, width, channels = x.shape
    size, rows = channels // groups, height * width
    tile = statistics_tile(images, rows, channels, groups)
    span = tile.pop("SPAN")
    parts = -(-rows // span)
    partial = torch.empty((images, groups, 2, parts), dtype=torch.float32, device=x.device)
    means = torch.empty((images, groups, 2), dtype=torch.float32, device=x.device)
    _group_statistics[(images * (groups // tile["TOGETHER"]), parts)](
        x,
        shift,
        residual,
        total,
        partial,
        means,
        arrival_counters(x.device),
        rows,
        channels,
        _stride(shift),
        parts,
        span,
        eps,
        GROUPS=groups,
        SIZE=size,
        WIDTH=power_of_2(size),
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        KEEP=total is not x,
        PARTS=next(most for most in _PARTS if parts <= most),
        **tile,
        **launch_options(x),
    )
    return means


def statistics_tile(images: int, rows: int, channels: int, groups: int) -> dict[str, int]:
    """Groups of a program, rows of a step of it, and rows of all its steps."""
    width, together = power_of_2(channels // groups), 1
    while groups % (2 * together) == 0 and 2 * together * width <= _COLUMNS:
        together *= 2
    step = max(_TILE // (together * width), 1)
    parts = min(-(-_PROGRAMS * together // (images * groups)), -(-rows // step), _PARTS[-1])
    return {"TOGETHER": together, "ROWS": step, "SPAN": -(-rows // (parts * step)) * step}


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
    block = min(power_of_2(channels + others), 64)
    _join[(images, -(-rows // (_TILE // block)), -(-(channels + others) // block))](
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
        ROWS=_TILE // block,
        COLUMNS=block,
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


@jit(plain=("rows", "parts", "span"))
def _group_statistics(
    x, shift, residual, total, partial, means, counters, rows, channels, shift_stride, parts, span, eps,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program some groups of one image and a part of its rows; the last of the parts to finish adds them up.

    What is summed is the distance from the mean of the image's first row, and its square: so the variance is right
    where the mean is large. A group has WIDTH columns of a tile, of which SIZE are its channels.
    """
    BLOCKS: tl.constexpr = GROUPS // TOGETHER
    unit, part = tl.program_id(0), tl.program_id(1)
    image, first_group = (unit // BLOCKS).to(tl.int64), unit % BLOCKS * TOGETHER
    column = tl.arange(0, TOGETHER * WIDTH)
    inside = column % WIDTH < SIZE
    channel = (first_group + column // WIDTH) * SIZE + column % WIDTH
    row = tl.arange(0, ROWS)
    start, shift_at = image * rows * channels, image * shift_stride + channel
    wait_for_inputs(PDL)
    first_row = start + channel[None, :]
    head = _summed(x, shift, residual, first_row, shift_at, inside[None, :], inside, HAS_SHIFT, HAS_RESIDUAL)
    head = tl.where(inside[None, :], head, 0.0)
    pivot = tl.sum(tl.reshape(head, [TOGETHER, WIDTH]), 1) / SIZE
    pivots = tl.reshape(tl.broadcast_to(pivot[:, None], [TOGETHER, WIDTH]), [1, TOGETHER * WIDTH])
    sums = tl.zeros([ROWS, TOGETHER * WIDTH], tl.float32)
    squares = tl.zeros([ROWS, TOGETHER * WIDTH], tl.float32)
    for begin in range(part * span, tl.minimum((part + 1) * span, rows), ROWS):
        at = start + (begin + row)[:, None] * channels + channel[None, :]
        mask = (begin + row < rows)[:, None] & inside[None, :]
        value = _summed(x, shift, residual, at, shift_at, mask, inside, HAS_SHIFT, HAS_RESIDUAL)
        if KEEP:
            kept = value.to(total.dtype.element_ty)  # rounded first: the norm is of what others will read
            tl.store(total + at, kept, mask=mask)
            value = kept.to(tl.float32)
        value = tl.where(mask, value - pivots, 0.0)
        sums += value
        squares += value * value
    some = tl.sum(tl.reshape(tl.sum(sums, 0), [TOGETHER, WIDTH]), 1)
    square = tl.sum(tl.reshape(tl.sum(squares, 0), [TOGETHER, WIDTH]), 1)
    group = image * GROUPS + first_group + tl.arange(0, TOGETHER)
    count = (rows * SIZE).to(tl.float32)
    if PARTS == 1:
        _finish(means, group, pivot, some / count, square / count, eps)
    else:
        tl.store(partial + 2 * group * parts + part, some)
        tl.store(partial + (2 * group + 1) * parts + part, square)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(counters + unit, 1, sem="acq_rel") == parts - 1:
            tl.store(counters + unit, 0)
            each = tl.arange(0, PARTS)[None, :]
            place = partial + 2 * group[:, None] * parts + each
            one = tl.load(place, mask=each < parts, other=0.0, cache_modifier=".cg")  # past the first-level cache
            two = tl.load(place + parts, mask=each < parts, other=0.0, cache_modifier=".cg")
            _finish(means, group, pivot, tl.sum(one, 1) / count, tl.sum(two, 1) / count, eps)


@jit
def _finish(means, group, pivot, mean, square, eps):
    """Means of distances and of their squares become what the norm needs."""
    tl.store(means + 2 * group, pivot + mean)
    tl.store(means + 2 * group + 1, tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps))


@jit(plain=("rows",))
def _normalize(
    x, shift, residual, means, weight, bias, y, rows, channels, shift_stride, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, SILU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):
    """One program some rows and channels of an image."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
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
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
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
