"""Group norms of pictures laid out as [N, H, W, C], with what is added before them and the SiLU behind them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

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
    other: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """Group norm (Wu and He, 2018) of `join(x, shift, residual, other)`, then SiLU if asked.

    Args:
        x: [N, H, W, C], contiguous.
        weight: [C + D].
        bias: [C + D].
        groups: into which the channels are divided.
        eps: added to the variance.
        silu: whether the output goes through x * sigmoid(x).
        shift: [1 or N, C], the channels side by side, or None: a convolution's bias, a step's time embedding.
        residual: as `x`, or None.
        other: [N, H, W, D], contiguous, or None: D is 0.
        keep: whether what is normalized is wanted.

    Returns:
        The norm's output [N, H, W, C + D], and what is normalized if it is wanted, else `x`; both in x's dtype,
        statistics are fp32.
    """
    options: dict[str, Any] = {"groups": groups, "eps": eps, "silu": silu}
    if not use_triton(x):
        options |= {"shift": shift, "residual": residual, "other": other}
        return reference.group_norm(x, weight, bias, **options, keep=keep)
    parts = _Parts(x, shift, residual, other)
    total = torch.empty(parts.shape, dtype=x.dtype, device=x.device) if keep and not parts.is_plain else x
    return _normalized(parts, total, weight, bias, options), total


class _Parts(NamedTuple):
    """What is added and joined: the first arguments of every kernel."""

    x: Tensor
    shift: Tensor | None = None
    residual: Tensor | None = None
    other: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is `x` alone."""
        return self.shift is None and self.residual is None and self.other is None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, H, W, C + D]."""
        images, height, width, channels = self.x.shape
        return images, height, width, channels + (0 if self.other is None else self.other.shape[3])

    def sizes(self) -> tuple[int, int, int, int]:
        """Pixels; channels of `x` and of the other; from an image's shifts to the next one's (0: all have the same)."""
        _, height, width, channels = self.x.shape
        stride = self.shift.stride(0) if self.shift is not None and self.shift.shape[0] > 1 else 0
        return height * width, channels, self.shape[3] - channels, stride

    def kinds(self) -> dict[str, Any]:
        """Which there are, and options of the launch."""
        there = {"HAS_SHIFT": self.shift, "HAS_RESIDUAL": self.residual, "HAS_OTHER": self.other}
        return {name: part is not None for name, part in there.items()} | launch_options(self.x)


def _whole_tile(shape: tuple[int, int, int, int], groups: int) -> dict[str, int] | None:
    """Where a whole group fits one program: its rows and columns."""
    _, height, width, channels = shape
    tile = {"ROWS": power_of_2(height * width), "COLUMNS": power_of_2(channels // groups)}
    return tile if tile["ROWS"] * tile["COLUMNS"] <= _WHOLE else None


def _normalized(parts: _Parts, total: Tensor, weight: Tensor, bias: Tensor, options: dict[str, Any]) -> Tensor:
    """The norm's output: of small groups each by one program, of others by many after those that took statistics."""
    (images, height, width, channels), groups = parts.shape, options["groups"]
    y = torch.empty(parts.shape, dtype=weight.dtype, device=weight.device)
    keep = total is not parts.x
    kinds = {"SIZE": channels // groups, "SILU": options["silu"]}
    if (tile := _whole_tile(parts.shape, groups)) is not None:
        _whole_groups[(images, groups)](
            *(*parts, total, weight, bias, y, *parts.sizes(), options["eps"]),
            KEEP=keep,
            **tile,
            num_warps=min(max(tile["ROWS"] * tile["COLUMNS"] // 1024, 4), 16),
            **kinds,
            **parts.kinds(),
        )
        return y
    means = _statistics(parts, total, groups, options["eps"])
    parts = _Parts(total) if keep else parts
    tile = _tile(channels)
    _normalize[(-(-channels // tile["COLUMNS"]) * -(-height * width // tile["ROWS"]), images)](
        *(*parts, means, weight, bias, y, *parts.sizes()), GROUPS=groups, **tile, **kinds, **parts.kinds()
    )
    return y


def _tile(channels: int) -> dict[str, int]:
    """Of kernels that read everything once: an H200 reads the fastest by many programs of two warps."""
    return {"ROWS": _ROWS, "COLUMNS": min(power_of_2(channels), _COLUMNS), "num_warps": 2}


def _statistics(parts: _Parts, total: Tensor, groups: int, eps: float) -> Tensor:
    """[N, groups, 2] fp32: each group's mean and the reciprocal of its deviation."""
    images, height, width, channels = parts.shape
    size, rows, tile = channels // groups, height * width, _tile(channels)
    blocks = -(-channels // tile["COLUMNS"])
    span = _span(rows, images * blocks)
    count = -(-rows // span)
    sums = torch.empty((images, count, 3, channels), dtype=torch.float32, device=total.device)
    means = torch.empty((images, groups, 2), dtype=torch.float32, device=total.device)
    _channel_sums[(blocks * count, images)](
        *(*parts, total, sums, *parts.sizes(), count, span), KEEP=total is not parts.x, **tile, **parts.kinds()
    )
    _group_means[(groups, images)](
        *(sums, means, rows, channels, count, eps),
        SIZE=size,
        WIDTH=power_of_2(size),
        PARTS=min(power_of_2(count), _PARTS),
        num_warps=1 if size <= 32 else 4,
        **launch_options(total),
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
    parts = _Parts(x, shift, residual, other)
    images, height, width, channels = parts.shape
    y = torch.empty(parts.shape, dtype=x.dtype, device=x.device)
    tile = _tile(channels)
    _join[(-(-channels // tile["COLUMNS"]) * -(-height * width // tile["ROWS"]), images)](
        *(*parts, y, *parts.sizes()), **tile, **parts.kinds()
    )
    return y


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit
def _summed(
    x, shift, residual, other, line, channel, shift_at, channels, others, there, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_OTHER: tl.constexpr,
):
    """Numbers of `x + shift + residual` and of what is joined, in fp32: of these channels of some lines (pixels)."""
    own = channel < channels
    at, mask = line * channels + channel[None, :], there & own[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        value += tl.load(shift + shift_at, mask=own, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_OTHER:
        second = (channel >= channels) & (channel < channels + others)
        at = line * others + (channel - channels)[None, :]
        value += tl.load(other + at, mask=there & second[None, :], other=0.0).to(tl.float32)
    return value


@jit
def _place(channels, COLUMNS: tl.constexpr):
    """Which part of the rows a program has, and its channels; programs of the same rows are neighbors."""
    blocks = tl.cdiv(channels, COLUMNS)
    unit = tl.program_id(0)
    return unit // blocks, unit % blocks * COLUMNS + tl.arange(0, COLUMNS)


@jit(plain=("rows", "parts", "span"))
def _channel_sums(
    x, shift, residual, other, total, sums, rows, channels, others, shift_stride, parts, span, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_OTHER: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program some channels of a part of an image's rows.

    What is summed is the distance from the channel's first number, and its square: so the variance is right where the
    mean is large. Without a residual the last come first: they were written last, and are still in the cache.
    """
    image, width = tl.program_id(1).to(tl.int64), channels + others
    part, channel = _place(width, COLUMNS)
    if not HAS_RESIDUAL:
        image, part = tl.num_programs(1) - 1 - image, parts - 1 - part
    inside, row, line = channel < width, tl.arange(0, ROWS), image * rows
    shift_at = image * shift_stride + channel
    wait_for_inputs(PDL)
    pivot = _summed(
        x, shift, residual, other, line, channel, shift_at, channels, others, inside[None, :], HAS_SHIFT, HAS_RESIDUAL,
        HAS_OTHER,
    )
    distances = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(part * span, tl.minimum((part + 1) * span, rows), ROWS):
        lines, there = (line + begin + row)[:, None], (begin + row < rows)[:, None]
        value = _summed(
            x, shift, residual, other, lines, channel, shift_at, channels, others, there, HAS_SHIFT, HAS_RESIDUAL,
            HAS_OTHER,
        )
        if KEEP:
            kept = value.to(total.dtype.element_ty)  # rounded first: the norm is of what others will read
            tl.store(total + lines * width + channel[None, :], kept, mask=there & inside[None, :])
            value = kept.to(tl.float32)
        value = tl.where(there, value - pivot, 0.0)
        distances += value
        squares += value * value
    to = sums + (image * parts + part) * 3 * width + channel
    tl.store(to, tl.sum(distances, 0), mask=inside)
    tl.store(to + width, tl.sum(squares, 0), mask=inside)
    tl.store(to + 2 * width, tl.sum(pivot, 0), mask=inside)


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
    x, shift, residual, other, means, weight, bias, y, rows, channels, others, shift_stride, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, SILU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_OTHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):
    """One program some rows and channels of an image."""
    image, width = tl.program_id(1).to(tl.int64), channels + others
    part, channel = _place(width, COLUMNS)
    row, inside = part * ROWS + tl.arange(0, ROWS), channel < width
    line, there = (image * rows + row)[:, None], (row < rows)[:, None]
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    group = means + 2 * (image * GROUPS + channel // SIZE)
    mean = tl.load(group, mask=inside, other=0.0)
    scale *= tl.load(group + 1, mask=inside, other=0.0)
    value = _summed(
        x, shift, residual, other, line, channel, image * shift_stride + channel, channels, others, there, HAS_SHIFT,
        HAS_RESIDUAL, HAS_OTHER,
    )
    value = (value - mean[None, :]) * scale[None, :] + offset[None, :]
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(y + line * width + channel[None, :], value.to(y.dtype.element_ty), mask=there & inside[None, :])


@jit(plain=("rows",))
def _whole_groups(
    x, shift, residual, other, total, weight, bias, y, rows, channels, others, shift_stride, eps, SIZE: tl.constexpr,
    SILU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OTHER: tl.constexpr,
    KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):
    """One program a group of an image: it holds all its numbers."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside, channel = column < SIZE, group * SIZE + column
    line, there = (image * rows + row)[:, None], (row < rows)[:, None] & inside[None, :]
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    value = _summed(
        x, shift, residual, other, line, channel, image * shift_stride + channel, channels, others, there, HAS_SHIFT,
        HAS_RESIDUAL, HAS_OTHER,
    )
    at = line * (channels + others) + channel[None, :]
    if KEEP:
        kept = value.to(total.dtype.element_ty)  # rounded first: the norm is of what others will read
        tl.store(total + at, kept, mask=there)
        value = kept.to(tl.float32)
    count = (rows * SIZE).to(tl.float32)
    mean = tl.sum(tl.sum(tl.where(there, value, 0.0), 0), 0) / count
    value = tl.where(there, value - mean, 0.0)
    value *= tl.rsqrt(tl.sum(tl.sum(value * value, 0), 0) / count + eps)
    value = value * scale[None, :] + offset[None, :]
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=there)


@jit(plain=("rows",))
def _join(
    x, shift, residual, other, y, rows, channels, others, shift_stride, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_OTHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):
    """One program some rows and channels of an image's output."""
    image, width = tl.program_id(1).to(tl.int64), channels + others
    part, channel = _place(width, COLUMNS)
    row = part * ROWS + tl.arange(0, ROWS)
    line, there = (image * rows + row)[:, None], (row < rows)[:, None]
    wait_for_inputs(PDL)
    value = _summed(
        x, shift, residual, other, line, channel, image * shift_stride + channel, channels, others, there, HAS_SHIFT,
        HAS_RESIDUAL, HAS_OTHER,
    )
    at = line * width + channel[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=there & (channel < width)[None, :])
