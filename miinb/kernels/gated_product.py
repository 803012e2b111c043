"""Gated pairs of many rows (a UNet's GEGLU), through the copy engine of Hopper and later.

cuBLAS would write both halves, and another pass would read them: here a program computes a tile of the gate and the
same one of its partner, and writes what they give. At the sizes of Stable Diffusion that is 1.2 times cuBLAS's time for
the two halves alone, where its sums are long 1.05.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels.activation import activation_of
from miinb.kernels.dispatch import copies_tiles, jit, launch_options, tl, wait_for_inputs
from miinb.kernels.large_product import tile_place

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

_ROWS, _COLUMNS, _STAGES = 128, 64, 3  # of a tile; loads in flight
_LARGE, _SMALL = (128, 8), (64, 4)  # outputs of a tile and warps: of small ones two programs share a multiprocessor
_GROUP = 16  # tiles of rows that go along all outputs together: their x stays in the L2 cache
_PROGRAMS = 132  # multiprocessors of an H100; on others the count matters little
_MANY = 8  # large tiles for each of them: then programs go on from tile to tile
_FEWEST_ROWS = 256


def is_gated_many(x: Tensor, outputs: int) -> bool:
    """Whether `gated_product` is the fastest for x [T, K] and so many outputs of a pair."""
    rows, columns = x.shape
    fits = x.element_size() == 2 and outputs % _LARGE[0] == 0 and columns % _COLUMNS == 0 and copies_tiles(x)
    return fits and rows >= _FEWEST_ROWS


def gated_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(gate) * up of the halves of x @ weight.T + bias.

    Args:
        x: [T, K], contiguous, of 2-byte numbers; K a multiple of 64.
        weight: [2 * N, K], contiguous, the gate's rows first; N a multiple of 128.
        bias: [2 * N] or None.
        activation: a key of `activation.KINDS`.

    Returns:
        [T, N] in x's dtype; sums are fp32.
    """
    (rows, k), n = x.shape, weight.shape[0] // 2
    down = -(-rows // _ROWS)
    many = down * (n // _LARGE[0]) >= _MANY * _PROGRAMS
    outputs, warps = _LARGE if many else _SMALL
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    of = TensorDescriptor.from_tensor
    _gated_product[(_PROGRAMS if many else down * (n // outputs),)](
        of(x, [_ROWS, _COLUMNS]),
        of(weight, [outputs, _COLUMNS]),
        of(y, [_ROWS, outputs]),
        bias,
        rows,
        n,
        K=k,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        GROUP=_GROUP,
        ROWS=_ROWS,
        OUTPUTS=outputs,
        STEP=_COLUMNS,
        num_warps=warps,
        num_stages=_STAGES,
        **launch_options(x),
    )
    return y


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("rows",))
def _gated_product(
    x, weight, y, bias, rows, n, K: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):
    """One tile of outputs after another, or one alone; programs that run at a time have neighboring ones."""
    down, across = tl.cdiv(rows, ROWS), n // OUTPUTS
    wait_for_inputs(PDL)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        m, j = tile_place(tile, down, across, GROUP, ROWS, OUTPUTS)
        gate = tl.zeros([ROWS, OUTPUTS], tl.float32)
        up = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for step in range(K // STEP):
            value = x.load([m, step * STEP])
            gate = tl.dot(value, weight.load([j, step * STEP]).T, gate)
            up = tl.dot(value, weight.load([n + j, step * STEP]).T, up)
        if HAS_BIAS:
            column = j + tl.arange(0, OUTPUTS)
            gate += tl.load(bias + column).to(tl.float32)[None, :]
            up += tl.load(bias + n + column).to(tl.float32)[None, :]
        y.store([m, j], (activation_of(gate, ACTIVATION) * up).to(y.dtype))  # what is past the last row is not written
