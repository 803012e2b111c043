"""Numbers of quantized weights made floats in one instruction each, by putting their bits into those of a float.

What such a float stands for is the number and a power of two (or that and 128), which the caller takes away again.
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
def even_of(word):
    """128 + the number in bits 16 to 19."""
    if _ASSEMBLY:  # and, or as one instruction
        word = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000F0000, 0x43000000, 0xEA;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word = (word & 0x000F0000) | 0x43000000
    return word.to(tl.float32, bitcast=True)


@jit
def odd_of(word):
    """2048 + the number in bits 12 to 15."""
    if _ASSEMBLY:
        word = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x0000F000, 0x45000000, 0xEA;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word = (word & 0x0000F000) | 0x45000000
    return word.to(tl.float32, bitcast=True)
