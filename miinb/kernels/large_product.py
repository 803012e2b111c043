"""Matrix products of many rows with an activation that cuBLAS lacks, through the copy engine of Hopper and later.

Another pass over all outputs would cost more than a slower product, and with Hopper's copies of whole tiles (TMA) this
one is as fast as cuBLAS's own. As many programs run as the GPU has multiprocessors, each of them tile after tile: the
next tile's copies are on their way while the outputs of the one before it are written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels.activation import activation_of
from miinb.kernels.dispatch import INTERPRETED, copies_tiles, jit, launch_options, tl, wait_for_inputs

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

#: Measured on an H100 at the sizes of BERT: rows, outputs and columns of a tile; its warps, and loads in flight.
_ROWS, _OUTPUTS, _COLUMNS, _WARPS, _STAGES = 128, 256, 64, 8, 3
_GROUP = 16  # tiles of rows that go along all outputs together: their x stays in the L2 cache
_PROGRAMS = 132  # multiprocessors of an H100; on others the count matters little


def is_large(x: Tensor, n: int) -> bool:
    """Whether `large_product` is the fastest for x [T, K], N outputs and an activation that cuBLAS lacks."""
    rows, k = x.shape
    fits = x.element_size() == 2 and n % _OUTPUTS == 0 and k % _COLUMNS == 0 and copies_tiles(x)
    return fits and -(-rows // _ROWS) * (n // _OUTPUTS) >= _PROGRAMS


def large_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x @ weight.T + bias).

    Args:
        x: [T, K], contiguous, of 2-byte numbers; K a multiple of 64.
        weight: [N, K], contiguous; N a multiple of 256.
        bias: [N] or None.
        activation: a key of `activation.KINDS` or None.

    Returns:
        [T, N] in x's dtype; sums are fp32.
    """
    (rows, k), n = x.shape, weight.shape[0]
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    of = TensorDescriptor.from_tensor
    _large_product[(min(_PROGRAMS, -(-rows // _ROWS) * (n // _OUTPUTS)),)](
        of(x, [_ROWS, _COLUMNS]),
        of(weight, [_OUTPUTS, _COLUMNS]),
        of(y, [_ROWS, _OUTPUTS // 2]),
        bias,
        rows,
        n,
        K=k,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        GROUP=_GROUP,
        BLOCK_M=_ROWS,
        BLOCK_N=_OUTPUTS,
        BLOCK_K=_COLUMNS,
        FLATTEN=not INTERPRETED,
        num_warps=_WARPS,
        num_stages=_STAGES,
        **launch_options(x),
    )
    return y


@jit
def tile_place(tile, down, across, GROUP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """First row and output of a tile: so many tiles of rows go along all outputs together."""
    group = tile // (GROUP * across)
    inside = tile % (GROUP * across)
    tiles = tl.minimum(down - group * GROUP, GROUP)
    return (group * GROUP + inside % tiles) * ROWS, inside // tiles * OUTPUTS


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("rows",))
def _large_product(
    x, weight, y, bias, rows, n, K: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of outputs, one after another; programs that run at a time have neighboring ones.

    A tile is written in two halves, as its place in shared memory is small.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    down, across = tl.cdiv(rows, BLOCK_M), n // BLOCK_N
    wait_for_inputs(PDL)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=FLATTEN):
        m, j = tile_place(tile, down, across, GROUP, BLOCK_M, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(K // BLOCK_K):
            acc = tl.dot(x.load([m, step * BLOCK_K]), weight.load([j, step * BLOCK_K]).T, acc)
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, HALF]), [0, 2, 1]))
        _finish(left, bias, y, m, j, HALF, ACTIVATION, HAS_BIAS)
        _finish(right, bias, y, m, j + HALF, HALF, ACTIVATION, HAS_BIAS)


@jit
def _finish(acc, bias, y, m, j, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Bias and activation of half a tile of sums, and its way out; what is past the last row is not written."""
    if HAS_BIAS:
        acc += tl.load(bias + j + tl.arange(0, WIDTH)).to(tl.float32)[None, :]
    y.store([m, j], activation_of(acc, ACTIVATION).to(y.dtype))
