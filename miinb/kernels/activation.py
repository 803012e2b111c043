"""Elementwise activations, plain and gated."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.dispatch import jit, launch_options, tl, use_triton, wait_for_inputs

#: What `activate`, `gated` and `linear(activation=)` know: gelu is exact (erf), gelu_tanh its approximation.
KINDS = tuple(reference.ACTIVATIONS)

_BLOCK = 1024


def activate(x: Tensor, kind: str) -> Tensor:
    """The activation of each element of `x`, contiguous; `kind` is one of `KINDS`."""
    if not use_triton(x):
        return reference.activate(x, kind)
    return _launch(x, kind, gated=False)


def gated(x: Tensor, kind: str) -> Tensor:
    """activation(gate) * up (Shazeer, 2020) of `x` [..., 2 * I], contiguous, gate in its first half: [..., I]."""
    if not use_triton(x):
        return reference.gated(x, kind)
    return _launch(x, kind, gated=True)


def _launch(x: Tensor, kind: str, *, gated: bool) -> Tensor:
    width = x.shape[-1] // 2 if gated else x.shape[-1]
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    grid = (y.numel() // width, -(-width // _BLOCK))
    _activation[grid](x, y, width, KIND=kind, GATED=gated, BLOCK=_BLOCK, **launch_options(x))
    return y


@jit
def _upper_tail(t):
    """How likely a normal number is above t >= 0, within 5e-7: two to the power of a polynomial, the best of degree 5.

    A third of the instructions of the erf from which it would follow, and exact where t is large.
    """
    power = -4.7331411e-4 * t + 7.0845899e-3
    power = power * t - 5.1827464e-2
    power = power * t - 4.5999235e-1
    power = power * t - 1.1507879
    return tl.exp2(power * t - 1.0000377)


@jit
def activation_of(x, KIND: tl.constexpr):
    """The activation of fp32 values; also the epilogue of the linear kernels."""
    if KIND == "relu":
        x = tl.maximum(x, 0.0)
    elif KIND == "silu":
        x = x * tl.sigmoid(x)
    elif KIND == "gelu":
        x = tl.maximum(x, 0.0) - tl.abs(x) * _upper_tail(tl.abs(x))
    elif KIND == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
    return x


@jit
def _activation(x, y, width, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wait_for_inputs(PDL)
    at = x + row * width * (2 if GATED else 1) + column
    gate = tl.load(at, mask=inside, other=0.0)
    value = activation_of(gate.to(tl.float32), KIND)
    if GATED:
        value = value.to(gate.dtype).to(tl.float32) * tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, value.to(gate.dtype), mask=inside)
