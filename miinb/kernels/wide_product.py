"""Products and convolutions with 320 outputs: a UNet's outermost layers, whose width no power of two divides well.

A program computes all outputs of some rows, as 256 and 64 of them, so nothing is computed in vain, `x` is read once,
and a layer norm of the rows can follow before anything is written. Hopper's copy engine (TMA) fetches the tiles: of a
picture pixels of one line, moved to each of the nine places of a convolution, with zeros outside. (Tiles of several
lines would reach the matrix units through registers that Triton 3.6 writes again while these still read them.)
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels.dispatch import copies_tiles, jit, launch_options, tl, wait_for_inputs

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

_OUTPUTS, _MOST, _REST = 320, 256, 64
_COLUMNS = 64  # of x in a step
_FEWEST_ROWS = 8192
_LONGEST_SUM = 512  # of a product: longer ones are cuBLAS's
_STAGES = 3  # loads in flight
#: Rows and warps of a program, twice as many of these where a norm follows; the second for convolutions, and where the
#: first would leave multiprocessors idle.
_LARGE, _SMALL = (128, 8), (64, 4)
_PROGRAMS = 128  # what a GPU is expected to run at a time: an H100 has 132 multiprocessors


def is_wide(x: Tensor, outputs: int) -> bool:
    """Whether these kernels are the fastest for x [T, K] or [N, H, W, K] and so many outputs."""
    columns = x.shape[-1]
    fits = x.element_size() == 2 and outputs == _OUTPUTS and columns % _COLUMNS == 0 and copies_tiles(x)
    suits = x.shape[2] % _SMALL[0] == 0 if x.dim() == 4 else columns <= _LONGEST_SUM
    return fits and suits and x.numel() // columns >= _FEWEST_ROWS


def wide_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution [N, H, W, 320] of 3 x 3, padded so that it keeps the size.

    Args:
        x: [N, H, W, K], contiguous, of 2-byte numbers; K a multiple of 64. The fastest where W is one, too.
        weight: [320, K, 3, 3], in memory [320, 3, 3, K] (channels_last).
    """
    return _launch(x, weight.permute(0, 2, 3, 1).flatten(1), 3, {})[0]


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias: [T, 320].

    Args:
        x: [T, K], contiguous, of 2-byte numbers; K a multiple of 64.
        weight: [320, K], contiguous.
        bias: [320] or None.
    """
    return _launch(x[None, None], weight, 1, {"bias": bias})[0].view(len(x), _OUTPUTS)


def wide_linear_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The layer norm of `wide_linear` plus a residual, and what it is of: each [T, 320].

    Args:
        x, weight, bias: of `wide_linear`.
        residual: [T, 320], contiguous, or None.
        scale, shift: [320], what the norm is multiplied by, and what is added.
        eps: added to the variance.
    """
    after = {"bias": bias, "residual": residual, "scale": scale, "shift": shift}
    total, y = _launch(x[None, None], weight, 1, after, eps)
    return y.view(len(x), _OUTPUTS), total.view(len(x), _OUTPUTS)


def _launch(
    x: Tensor, weight: Tensor, side: int, after: dict[str, Tensor | None], eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sums [N, H, W, 320] and their norm if there is a scale, else the sums again."""
    images, height, width, columns = x.shape
    rows, warps = _LARGE if side == 1 and width >= _LARGE[0] * _PROGRAMS else _SMALL
    total = torch.empty((images, height, width, _OUTPUTS), dtype=x.dtype, device=x.device)
    norm = after.get("scale") is not None
    y = torch.empty_like(total) if norm else total
    of = TensorDescriptor.from_tensor
    _wide_product[(-(-width // rows), height, images)](
        of(x, [1, 1, rows, _COLUMNS]),
        of(weight, [_MOST, _COLUMNS]),
        of(weight, [_REST, _COLUMNS]),
        *(after.get(name) for name in ("bias", "residual", "scale", "shift")),
        total,
        y,
        height,
        width,
        eps,
        K=columns,
        SIDE=side,
        ROWS=rows,
        STEP=_COLUMNS,
        MOST=_MOST,
        REST=_REST,
        HAS_BIAS=after.get("bias") is not None,
        HAS_RESIDUAL=after.get("residual") is not None,
        NORM=norm,
        num_warps=2 * warps if norm else warps,
        num_stages=_STAGES,
        **launch_options(x),
    )
    return total, y


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("height",))
def _wide_product(
    x, most, rest, bias, residual, scale, shift, total, y, height, width, eps, K: tl.constexpr, SIDE: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):
    """One program some pixels of a line of an image, with all their outputs."""
    STEPS: tl.constexpr = K // STEP
    left, top, image = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    acc1 = tl.zeros([ROWS, MOST], tl.float32)
    acc2 = tl.zeros([ROWS, REST], tl.float32)
    wait_for_inputs(PDL)
    for step in range(SIDE * SIDE * STEPS):
        place = step // STEPS
        up, along = place // SIDE - SIDE // 2, place % SIDE - SIDE // 2
        value = x.load([image, top + up, left + along, step % STEPS * STEP]).reshape(ROWS, STEP)
        acc1 = tl.dot(value, most.load([0, step * STEP]).T, acc1)
        acc2 = tl.dot(value, rest.load([MOST, step * STEP]).T, acc2)
    column = left + tl.arange(0, ROWS)
    mask = (column < width)[:, None]
    line = ((image.to(tl.int64) * height + top) * width + column)[:, None] * (MOST + REST)
    first, second = tl.arange(0, MOST), MOST + tl.arange(0, REST)
    acc1 = _added(acc1, bias, residual, first, line, mask, HAS_BIAS, HAS_RESIDUAL)
    acc2 = _added(acc2, bias, residual, second, line, mask, HAS_BIAS, HAS_RESIDUAL)
    kept1, kept2 = acc1.to(total.dtype.element_ty), acc2.to(total.dtype.element_ty)
    tl.store(total + line + first[None, :], kept1, mask=mask)
    tl.store(total + line + second[None, :], kept2, mask=mask)
    if NORM:
        acc1, acc2 = kept1.to(tl.float32), kept2.to(tl.float32)  # rounded first: the norm is of what others will read
        mean = (tl.sum(acc1, 1) + tl.sum(acc2, 1))[:, None] / (MOST + REST)
        acc1, acc2 = acc1 - mean, acc2 - mean
        square = (tl.sum(acc1 * acc1, 1) + tl.sum(acc2 * acc2, 1)) / (MOST + REST)
        factor = tl.rsqrt(square + eps)[:, None]
        tl.store(y + line + first[None, :], _scaled(acc1 * factor, scale, shift, first, y), mask=mask)
        tl.store(y + line + second[None, :], _scaled(acc2 * factor, scale, shift, second, y), mask=mask)


@jit
def _added(acc, bias, residual, column, line, mask, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias + column).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + line + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return acc


@jit
def _scaled(value, scale, shift, column, y):
    value = value * tl.load(scale + column).to(tl.float32)[None, :] + tl.load(shift + column).to(tl.float32)[None, :]
    return value.to(y.dtype.element_ty)
