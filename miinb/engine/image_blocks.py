"""What the UNet and the VAE decoder are made of, on activations laid out as [N, H, W, C].

A convolution leaves its bias to the kernel that comes next, and a block its last addition: `Sum` holds what is still to
be added, which the next norm does in passing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.engine.decoder import Norm
from miinb.engine.polling import parts_of, poll_point
from miinb.kernels.dispatch import is_plain, use_triton
from miinb.kernels.group_norm import group_norm, join
from miinb.kernels.linear import PackedLinear, linear
from miinb.kernels.wide_product import is_wide, wide_convolution

#: Which of three neighbors in a row that was doubled are the first and which the second of two in the row before: of an
#: output at an even place, and of one at an odd place.
_MEET = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))
#: Queries of a part of an attention, at least: PyTorch takes larger blocks from so many on.
_LEAST_QUERIES = 768


@dataclass(slots=True)
class Conv:
    """A convolution.

    Attributes:
        weight: [out, in, height, width], in memory [out, height, width, in] (channels_last).
        bias: [out].
    """

    weight: Tensor
    bias: Tensor


@dataclass(slots=True)
class Upsampler:
    """A convolution of what is twice as large by nearest neighbors.

    Attributes:
        conv: the convolution.
        phases: [4 * out, in, 2, 2], channels_last: for each place of an output in its group of four (rows first), the
            sums of the weights that meet the same input.
    """

    conv: Conv
    phases: Tensor

    @classmethod
    def of(cls, conv: Conv) -> Upsampler:
        """That of a convolution of 3 x 3."""
        meet = torch.tensor(_MEET, dtype=torch.float32, device=conv.weight.device)
        phases = torch.einsum("aik,bjl,ockl->abocij", meet, meet, conv.weight.float()).flatten(0, 2)
        return cls(conv, phases.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last))


@dataclass(slots=True)
class Resnet:
    """A residual block: norm, SiLU, convolution, a shift of each channel, norm, SiLU, convolution, and the input.

    Attributes:
        shift: [1, out], the first convolution's bias; None where the step's shift (`first_shift`) holds it.
        first_shift: column of the block's first channel among the shifts of a step.
        shortcut: [out, in], what the input goes through; None: nothing.
    """

    norm1: Norm
    conv1: Tensor
    norm2: Norm
    conv2: Conv
    shift: Tensor | None = None
    first_shift: int = 0
    shortcut: PackedLinear | None = None


class Sum:
    """`x + shift + residual`, and another's channels behind: [N, H, W, C + D]; computed when it is first read.

    Args:
        x: [N, H, W, C], contiguous.
        shift: [1 or N, C] or None.
        residual: as `x`, or None.
        other: [N, H, W, D], contiguous, or None.
    """

    __slots__ = ("_pending", "_x")

    def __init__(
        self, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None, other: Tensor | None = None
    ) -> None:
        self._x = x
        parts = {"shift": shift, "residual": residual, "other": other}
        self._pending: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}

    def value(self) -> Tensor:
        """What it is."""
        if self._pending:
            poll_point()
            self._x, self._pending = join(self._x, **self._pending), {}
        return self._x

    def norm(self, norm: Norm, groups: int, eps: float, *, silu: bool, keep: bool = True) -> Tensor:
        """Its group norm, with SiLU if asked; what it is is not kept where nobody reads it again."""
        bias = norm.bias if norm.bias is not None else torch.zeros_like(norm.weight)
        poll_point()
        options: dict[str, Any] = {"groups": groups, "eps": eps, "silu": silu, "keep": keep}
        y, total = group_norm(self._x, norm.weight, bias, **options, **self._pending)
        if keep:
            self._x, self._pending = total, {}
        return y

    def joined(self, other: Tensor) -> Sum:
        """[N, H, W, C + D]: another's channels behind its own, of which there is no other yet."""
        return Sum(self._x, **self._pending, other=other)


@contextlib.contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Within it cuDNN tries its algorithms where a convolution of new sizes comes, and keeps the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """A convolution [N, H', W', out] of x [N, H, W, in], padded so that a stride of 1 keeps the size.

    Args:
        x: contiguous.
        weight: [out, in, side, side], or what `pack_convolutions` made of it.
        bias: [out] or None.
        stride: of both directions.
    """
    if bias is None and stride == 1 and weight.shape[-1] == 3 and use_triton(x) and is_wide(x, len(weight)):
        return wide_convolution(x, weight)
    poll_point()
    parts = parts_of(2.0 * x[..., 0].numel() * weight.numel()) if stride == 1 else 1
    if parts > 1:
        return _in_bands(x, weight, bias, math.ceil(len(x) * x.shape[1] / parts))
    return _convolved(x, weight, bias, stride)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    planes, pad = x.permute(0, 3, 1, 2), weight.shape[-1] // 2
    if not weight.is_mkldnn:
        y = F.conv2d(planes, weight, bias, stride, pad)
    elif is_plain():
        y = F.conv2d(planes, weight.to_dense(), bias, stride, pad)
    else:
        places = ([pad, pad], [stride, stride], [1, 1], 1)
        y = torch.ops.mkldnn._convolution_pointwise(planes, weight, bias, *places, "none", [], "")
    return y.permute(0, 2, 3, 1).contiguous()


def _in_bands(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """A convolution computed so many rows of the output at a time; the same numbers."""
    images, height, width, _ = x.shape
    side, pad = weight.shape[-1], weight.shape[-1] // 2
    more = 2 * pad - side + 1
    y = x.new_empty((images, height + more, width + more, len(weight)))
    for image in range(images):
        for first in range(0, height + more, rows):
            poll_point()
            end, before = min(first + rows, height + more), max(0, first - pad)
            band = x[image : image + 1, before : end - pad + side - 1]  # what lies within it is not padded
            y[image, first:end] = _convolved(band, weight, bias, 1)[0, first - before : end - before]
    return y


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has oneDNN's convolutions of weights in its own layout, and this CPU those of a dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def pack_convolutions(weights: Any) -> None:
    """Lay the convolutions of a CPU's model out as oneDNN computes them, which it would otherwise do in every call.

    Args:
        weights: dataclasses, and lists of them; changed in place.
    """
    if isinstance(weights, list | tuple):
        for each in weights:
            pack_convolutions(each)
    for name in getattr(weights, "__dataclass_fields__", ()):
        value = getattr(weights, name)
        if isinstance(value, Tensor) and value.dim() == 4:
            setattr(weights, name, _packed(value))
        elif not isinstance(value, Tensor):
            pack_convolutions(value)


def _packed(weight: Tensor) -> Tensor:
    pad = weight.shape[-1] // 2
    usual = [2, weight.shape[1], 16, 16]  # a picture; the layout hardly depends on its size
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, [pad, pad], [1, 1], [1, 1], 1, usual)
    return packed


def resnet(w: Resnet, stream: Sum, shift: Tensor, groups: int, eps: float) -> Sum:
    """One residual block.

    Args:
        w: its weights.
        stream: [N, H, W, in].
        shift: [1 or N, out], added to what the first convolution gives.
        groups, eps: of the norms.

    Returns:
        [N, H, W, out].
    """
    inner = convolve(stream.norm(w.norm1, groups, eps, silu=True), w.conv1)
    inner = Sum(inner, shift).norm(w.norm2, groups, eps, silu=True, keep=False)
    x = stream.value()
    residual = x if w.shortcut is None else linear(x.flatten(0, 2), w.shortcut).view(*x.shape[:3], -1)
    return Sum(convolve(inner, w.conv2.weight), w.conv2.bias[None], residual)


def upsample(stream: Sum, w: Upsampler, size: tuple[int, int]) -> Sum:
    """[N, *size, C]: nearest neighbors, then a convolution.

    Where the size doubles, the convolution is of the small input: neighbors that are equal meet the sum of their
    weights, which is 4 / 9 of the work. Sizes that were odd before they were halved end amid such neighbors.
    """
    x = stream.value()
    images, height, width, _ = x.shape
    if size != (2 * height, 2 * width):
        larger = F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="nearest").permute(0, 2, 3, 1)
        return Sum(convolve(larger.contiguous(), w.conv.weight), w.conv.bias[None])
    outputs = len(w.conv.bias)
    parts = convolve(x, w.phases).view(images, height + 1, width + 1, 2, 2, outputs)
    poll_point()
    y = _meshed(parts, images, height, width)
    return Sum(y.view(images, *size, outputs), w.conv.bias[None])


def _meshed(parts: Tensor, images: int, height: int, width: int) -> Tensor:
    """[N, height, 2, width, 2, C] of parts [N, height + 1, width + 1, 2, 2, C].

    Output (2 h + i, 2 w + j) is part (i, j) of place (h + i, w + j).
    """
    whole, row, column, down, right, _ = parts.stride()
    shape, strides = (images, height, 2, width, 2), (whole, row, row + down, column, column + right)
    wide = 16 // parts.element_size()  # numbers that are copied as one
    if parts.shape[-1] % wide:
        return parts.as_strided((*shape, parts.shape[-1]), (*strides, 1)).contiguous()
    units = parts.view(torch.complex128).as_strided(
        (*shape, parts.shape[-1] // wide), (*(step // wide for step in strides), 1)
    )
    return units.contiguous().view(parts.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of q [N, T, C] to k and v [N, S, C], each of so many heads side by side: [N * T, C]."""
    poll_point()
    texts, tokens, width = q.shape
    parts = parts_of(4.0 * q.numel() * k.shape[1])
    if parts == 1:
        return _attended(q, k, v, heads).flatten(0, 1)
    queries = max(_LEAST_QUERIES, math.ceil(texts * tokens / parts))
    y = q.new_empty((texts, tokens, width))
    for text in range(texts):
        own = slice(text, text + 1)
        for first in range(0, tokens, queries):
            poll_point()
            some = slice(first, first + queries)
            y[own, some] = _attended(q[own, some], k[own], v[own], heads)
    return y.flatten(0, 1)


def _attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
