"""Weights as the products of cpu_product.c read them: outputs side by side in tiles, laid out when a model loads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.kernels.formats import GROUP
from miinb.kernels.linear import PackedLinear

#: Columns of one output that stand together in an int8 tile: what one instruction adds up.
_TOGETHER = 4
#: The same in a bf16 tile, and columns of a step of its product.
_PAIR, _STEP = 2, 32


@dataclass(frozen=True, slots=True)
class BlockedLinear:
    """Weights of one linear layer, in the place of a `PackedLinear`.

    Attributes:
        blocks: [tiles, K, tile] fp32; or [tiles, K / 2, tile, 2] bf16, with K filled up to a multiple of 32; or
            [tiles, groups, bytes] uint8, for int8: what the sums of a group begin with [tile] int32, scales [tile]
            fp32, and numbers [GROUP / 4, tile, 4] int8.
        outputs: N, of which the last tile may have fewer than others.
        columns: K.
        bias: [N] fp32 (bf16 for weights of bf16) or None.
    """

    blocks: Tensor
    outputs: int
    columns: int
    bias: Tensor | None = None

    @property
    def int8(self) -> bool:
        """Whether both sides of the product are int8."""
        return self.blocks.dtype == torch.uint8

    @property
    def tile(self) -> int:
        """Outputs that stand together."""
        return self.blocks.shape[-1] // (8 + GROUP) if self.int8 else self.blocks.shape[2]

    def plain(self) -> Tensor:
        """The weights [N, K] in fp32 or bf16, as the reference multiplies by them."""
        if self.blocks.dtype == torch.bfloat16:
            return self.blocks.transpose(1, 2).flatten(2).flatten(0, 1)[: self.outputs, : self.columns]
        if not self.int8:
            return self.blocks.transpose(1, 2).reshape(-1, self.columns)[: self.outputs]
        tile = self.tile
        scale, inner = self.blocks[..., 4 * tile : 8 * tile], self.blocks[..., 8 * tile :]
        numbers = inner.view(torch.int8).view(*inner.shape[:2], -1, tile, _TOGETHER).transpose(2, 3).flatten(3)
        wide: Tensor = numbers * scale.contiguous().view(torch.float32)[..., None]  # [tiles, groups, tile, GROUP]
        return wide.transpose(1, 2).flatten(2).flatten(0, 1)[: self.outputs, : self.columns]


def blocked(packed: PackedLinear, *, tile: int, levels: int) -> BlockedLinear:
    """The same layer in tiles; the weights are copied, so `packed` can be let go.

    Args:
        packed: weights [N, K] in fp32 or bf16, or in int8 with scales.
        tile: outputs of a tile.
        levels: the largest number that the int8 product takes; those of `packed` must not be larger.
    """
    outputs, columns = packed.weight.shape
    weight = F.pad(packed.weight, (0, 0, 0, -outputs % tile))
    if weight.dtype == torch.bfloat16:
        steps = -(-columns // _STEP)
        pairs = F.pad(weight, (0, -columns % _STEP)).view(-1, tile, steps * _STEP // _PAIR, _PAIR)
        blocks = pairs.transpose(1, 2).contiguous()
        return BlockedLinear(blocks, outputs, columns, packed.bias)
    if packed.scale is None:
        blocks = weight.view(-1, tile, columns).transpose(1, 2).contiguous()
        return BlockedLinear(blocks, outputs, columns, packed.bias)
    scale = F.pad(packed.scale, (0, 0, 0, -outputs % tile))
    numbers = F.pad(weight, (0, -columns % GROUP)).view(-1, tile, scale.shape[1], GROUP)
    numbers = numbers.transpose(1, 2).contiguous()
    begin = numbers.sum(-1, dtype=torch.int32) * -(levels + 1)  # x is moved by levels + 1, to be unsigned
    factors = scale.view(-1, tile, scale.shape[1]).transpose(1, 2).contiguous()
    inner = numbers.view(*numbers.shape[:-1], -1, _TOGETHER).transpose(2, 3).flatten(2)
    parts = (begin, factors, inner)
    return BlockedLinear(torch.cat([part.view(torch.uint8) for part in parts], -1), outputs, columns, packed.bias)
