"""Quantized weights as data: how the numbers and the scales of a matrix [N, K] lie in memory, and what they stand for.

int8: numbers [N, K], and a scale for each `GROUP` columns of a row: [N, ceil(K / GROUP)].

int4: whole numbers from 0 to 15, eight in a word: [N, 4 * ceil(K / 32)] int32. Four words, 16 bytes, hold 32 columns:
the number of column 32 h + 4 j + w is in word 4 h + w, in the bits from 4 j on. So whoever has four words and takes the
j-th number of each has four neighbors, whose inputs are one load. A group of `GROUP` columns has a pair of bf16,
[N, ceil(K / GROUP), 2]: its step, and what the number 0 stands for. Numbers past the last column are 0 and are not read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Columns of a quantized weight that have one scale; the last group of a row may have fewer.
GROUP = 64
#: Columns of four words of int4, the words, and the numbers in each.
INT4_COLUMNS, INT4_WORDS, INT4_NUMBERS = 32, 4, 8
#: The largest int4 number.
INT4_MAX = 15


def is_int4(weight: Tensor) -> bool:
    """Whether these are packed numbers of four bits."""
    return weight.dtype == torch.int32


def int4_words(columns: int) -> int:
    """Words of a row of so many columns."""
    return -(-columns // INT4_COLUMNS) * INT4_WORDS


def groups_of(columns: int) -> int:
    """Groups of a row of so many columns."""
    return -(-columns // GROUP)


def pack_int4(numbers: Tensor) -> Tensor:
    """[N, K] whole numbers from 0 to 15, of any dtype, as words [N, int4_words(K)] int32."""
    rows, columns = numbers.shape
    parts = F.pad(numbers.to(torch.int32), (0, -columns % INT4_COLUMNS)).view(rows, -1, INT4_NUMBERS, INT4_WORDS)
    words = parts[:, :, 0].clone()
    for j in range(1, INT4_NUMBERS):
        words |= parts[:, :, j] << 4 * j
    return words.flatten(1)


def unpack_int4(words: Tensor) -> Tensor:
    """The whole numbers [..., K] int32 of words [..., W]; K is a multiple of 32."""
    parts = words.unflatten(-1, (-1, 1, INT4_WORDS))
    shifts = torch.arange(0, 4 * INT4_NUMBERS, 4, dtype=torch.int32, device=words.device)[:, None]
    return ((parts >> shifts) & INT4_MAX).flatten(-3)


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The fp32 numbers that quantized rows stand for.

    Args:
        weight: [..., K] int8, or [..., words] int32 of int4.
        scale: [..., groups]; of int4 [..., groups, 2].

    Returns:
        [..., K]; of int4 with K filled up to a multiple of 32.
    """
    if not is_int4(weight):
        return weight * scale.float().repeat_interleave(GROUP, -1)[..., : weight.shape[-1]]
    numbers = unpack_int4(weight).float()
    step, low = scale.float().repeat_interleave(GROUP, -2)[..., : numbers.shape[-1], :].unbind(-1)
    return numbers * step + low
