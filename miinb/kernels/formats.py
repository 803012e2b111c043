"""Quantized weights as data: how the numbers and the scales of a matrix [N, K] lie in memory, and what they stand for.

Columns of a row are in groups of `GROUP`, the last of which may have fewer. There are four forms.

* int8 of a CPU: numbers [N, K] int8, and a scale a group, [N, groups] fp32.
* int8 of a GPU: numbers plus 128 in words, four each, and a scale a group, [N, groups] bf16.
* int4: whole numbers from 0 to 15 in words, eight each, and a pair a group, [N, groups, 2] bf16: the step, and what the
  number 0 stands for.
* fp8: e4m3 numbers [N, K filled up with zeros to a multiple of 16], and a scale a row, [N] fp32. A part of a row is 16
  numbers: 4 w to 4 w + 3 are its columns 2 w, 2 w + 1, 2 w + 8 and 2 w + 9.

Words are int32. Four of them, 16 bytes, are a part of a row: 16 columns of int8 or 32 of int4. Word w of a part has its
columns 8 p + 2 w and 8 p + 2 w + 1 as its numbers p and p + half, counted from the lowest bits; half is 2 of int8 and 4
of int4. So four neighboring threads with a word each have all that a tensor core wants from them (`mma` and `wgmma`
give thread w of four the columns 2 w, 2 w + 1, 2 w + 8 and 2 w + 9 of 16), and neighbors of int4 come out of a word
together, each in its half of 32 bits. Numbers past the last column count for nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Columns of a quantized weight that have one scale; the last group of a row may have fewer.
GROUP = 64
#: Words of a part.
PART_WORDS = 4
#: The largest int4 number, and what int8 numbers in words are moved by.
INT4_MAX, INT8_OFFSET = 15, 128
#: Numbers of four bits of exponent and three of mantissa, the largest, and what a row is filled up to a multiple of.
FP8, FP8_MAX, FP8_COLUMNS = torch.float8_e4m3fn, 448.0, 16


def bits_of(scale: Tensor) -> int:
    """4 or 8: of the whole numbers that have these scales."""
    return 4 if scale.dim() == 3 else 8


def groups_of(columns: int) -> int:
    """Groups of a row of so many columns."""
    return -(-columns // GROUP)


def part_columns(bits: int) -> int:
    """Columns of a part."""
    return PART_WORDS * 32 // bits


def words_of(columns: int, bits: int) -> int:
    """Words of a row of so many columns."""
    return -(-columns // part_columns(bits)) * PART_WORDS


def fp8_columns(columns: int) -> int:
    """Numbers of a row of fp8 with so many columns."""
    return -(-columns // FP8_COLUMNS) * FP8_COLUMNS


def pack_fp8(numbers: Tensor) -> Tensor:
    """fp8 numbers [N, K] in the order of a part, [N, fp8_columns(K)]."""
    rows, columns = numbers.shape
    filled = F.pad(numbers.view(torch.uint8), (0, fp8_columns(columns) - columns))  # of bytes PyTorch knows more
    return filled.view(rows, -1, 2, 4, 2).transpose(2, 3).flatten(1).view(FP8)


def unpack_fp8(numbers: Tensor) -> Tensor:
    """fp8 numbers [..., W] in the order of their columns."""
    parts = numbers.view(torch.uint8).view(*numbers.shape[:-1], -1, 4, 2, 2)
    return parts.transpose(-3, -2).flatten(-4).view(FP8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """[N, K] whole numbers from 0 to 2**bits - 1, of any dtype, as words [N, words_of(K, bits)] int32."""
    rows, columns = numbers.shape
    filled = F.pad(numbers.to(torch.int32), (0, -columns % part_columns(bits)))
    half = 16 // bits
    parts = filled.view(rows, -1, half, PART_WORDS, 2)
    words = parts[:, :, 0, :, 0].clone()
    for j in range(1, 2 * half):
        words |= parts[:, :, j % half, :, j // half] << bits * j
    return words.flatten(1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The whole numbers [..., K] int32 of words [..., W]; K is that of whole parts."""
    parts = words.reshape(*words.shape[:-1], -1, 1, PART_WORDS)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)[:, None]
    numbers = (parts >> shifts) & ((1 << bits) - 1)
    halves = numbers.view(*numbers.shape[:-2], 2, -1, PART_WORDS)
    return halves.movedim(-3, -1).flatten(-4)


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The fp32 numbers that quantized rows stand for.

    Args:
        weight: [..., K] int8 or fp8, or [..., W] words.
        scale: [..., groups]; of int4 [..., groups, 2], of fp8 [...].

    Returns:
        [..., K]; of words and fp8 with K filled up.
    """
    wide = scale.float()
    if weight.dtype == FP8:
        return unpack_fp8(weight).float() * wide[..., None]
    if bits_of(scale) == 4:
        numbers = unpack(weight, 4)
        step, low = wide.repeat_interleave(GROUP, -2)[..., : numbers.shape[-1], :].unbind(-1)
        return numbers * step + low
    numbers = unpack(weight, 8) - INT8_OFFSET if weight.dtype == torch.int32 else weight
    return numbers * wide.repeat_interleave(GROUP, -1)[..., : numbers.shape[-1]]
