"""Numbers of quantized weights made floats in one instruction each, by putting their bits into those of a float.

What such a float stands for is the number and a power of two, which is taken away again: see `formats` for the words.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from miinb.kernels.dispatch import INTERPRETED, jit, tl

#: Whether kernels may hold the GPU's own instructions: the interpreter knows none.
_ASSEMBLY = None if tl is None else tl.constexpr(not INTERPRETED)


# fmt: off
@jit
def byte_of(word, J: tl.constexpr):
    """32768 + the unsigned number in byte J (0 is the lowest): 32896 + the int8 number."""
    if _ASSEMBLY:
        # the float's bytes from the highest: 0x47, 0, the number, 0
        SELECT: tl.constexpr = "0x7604" if J == 0 else "0x7614" if J == 1 else "0x7624" if J == 2 else "0x7634"
        word = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x47000000, " + SELECT + ";", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word = (((word >> 8 * J) & 0xFF) << 8) | 0x47000000
    return word.to(tl.float32, bitcast=True)


@jit
def nibble_of(word, LOWEST: tl.constexpr):
    """The number in the four bits from 8, 12 or 16 on, and 32768, 2048 or 128 more."""
    MASK: tl.constexpr = 0xF << LOWEST
    FLOAT: tl.constexpr = 0x47000000 if LOWEST == 8 else 0x45000000 if LOWEST == 12 else 0x43000000
    if _ASSEMBLY:  # and, or as one instruction
        OPERANDS: tl.constexpr = (
            "0xF00, 0x47000000" if LOWEST == 8 else "0xF000, 0x45000000" if LOWEST == 12 else "0xF0000, 0x43000000"
        )
        word = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, " + OPERANDS + ", 0xEA;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word = (word & MASK) | FLOAT
    return word.to(tl.float32, bitcast=True)


@jit
def number_of(words, J: tl.constexpr, BITS: tl.constexpr):
    """Numbers J of words and 32768 more; of int4 32768, 2048 or 128 by J (see `_weights_of`)."""
    if BITS == 8:
        number = byte_of(words, J)
    elif J < 2:
        number = nibble_of(words << 8, 8 + 4 * J)
    elif J < 5:
        number = nibble_of(words, 4 * J)
    else:
        number = nibble_of(words >> 12, 4 * J - 12)
    return number


@jit
def halves_of(words):
    """The two bf16 numbers of each word, the one in the lower bits first."""
    return words.to(tl.int16).to(tl.bfloat16, bitcast=True), (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@jit
def widened(words, step, zero, BITS: tl.constexpr, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """The weights [N, 4 Q * 32 // BITS] of words [N, 4 Q], in the order of their columns.

    Nothing moves between threads where a thread has whole parts, or the four of a tensor core have one.

    Args:
        words: Q parts of each row.
        step: of each word, how much a number stands for: fp32; of int4 bf16.
        zero: of each word, what the unsigned number 0 stands for; as the step.
        BITS: 8 or 4.
        DTYPE: of the result, to which each weight is rounded.
        EXACT: rounded once, as int4 is to bf16 anyway; else with an error of 0.002 steps before, for an operation less.
    """
    N: tl.constexpr = words.shape[0]
    Q: tl.constexpr = words.shape[1] // 4
    low = _pair_of(words, step, zero, 0, BITS, DTYPE, EXACT)
    high = _pair_of(words, step, zero, 1, BITS, DTYPE, EXACT)
    if BITS == 8:
        both = tl.reshape(tl.join(low, high), [N, Q, 4, 2, 2])
        weights = tl.reshape(tl.permute(both, (0, 1, 4, 2, 3)), [N, 16 * Q])
    else:
        third = _pair_of(words, step, zero, 2, BITS, DTYPE, EXACT)
        fourth = _pair_of(words, step, zero, 3, BITS, DTYPE, EXACT)
        # of the two dimensions that are added the last is the higher bit of the pair's place
        quarter = tl.join(tl.join(low, high), tl.join(third, fourth))
        quarter = tl.reshape(quarter, [N, Q, 4, 2, 2, 2])
        weights = tl.reshape(tl.permute(quarter, (0, 1, 5, 4, 2, 3)), [N, 32 * Q])
    return weights


@jit
def _pair_of(words, step, zero, P: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """The weights of columns 8 P + 2 w and 8 P + 2 w + 1: [..., 2]."""
    if _ASSEMBLY and BITS == 4 and tl.bfloat16 == DTYPE:
        first, second = _bf16_pair(words, step, zero, P)
    else:
        first = _weights_of(words, step.to(tl.float32), zero.to(tl.float32), P, BITS, EXACT).to(DTYPE)
        second = _weights_of(words, step.to(tl.float32), zero.to(tl.float32), P + 16 // BITS, BITS, EXACT).to(DTYPE)
    return tl.join(first, second)


@jit
def _weights_of(words, step, zero, J: tl.constexpr, BITS: tl.constexpr, EXACT: tl.constexpr):
    EXTRA: tl.constexpr = 32768.0 if BITS == 8 or J % 5 == 0 or J == 2 else 128.0 if J % 3 == 1 and J > 1 else 2048.0
    if EXACT:
        weights = (number_of(words, J, BITS) - EXTRA) * step + zero
    else:
        weights = number_of(words, J, BITS) * step + (zero - EXTRA * step)
    return weights


@jit
def _bf16_pair(words, step, zero, P: tl.constexpr):
    """Two neighbors by instructions that do both: their bits into those of 128 + the number, 128 away, times, plus."""
    SHIFT: tl.constexpr = "0" if P == 0 else "4" if P == 1 else "8" if P == 2 else "12"
    return tl.inline_asm_elementwise(
        "{ .reg .b32 pair, by, low;\n"
        "shr.u32 pair, $2, " + SHIFT + ";\n"
        "lop3.b32 pair, pair, 0x000F000F, 0x43004300, 0xEA;\n"
        "mov.b32 by, 0x3F803F80; mov.b32 low, 0xC300C300;\n"
        "fma.rn.bf16x2 pair, pair, by, low;\n"
        "mov.b32 by, {$3, $3}; mov.b32 low, {$4, $4};\n"
        "fma.rn.bf16x2 pair, pair, by, low;\n"
        "mov.b32 {$0, $1}, pair; }",
        "=h,=h,r,h,h",
        [words, step, zero],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=1,
    )
