"""The operators of the fused encoder by device, and the layout that they want weights in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from miinb.engine.encoder import EncoderOperators, Matrix
from miinb.engine.parity import TOLERANCE
from miinb.engine.place import Place
from miinb.engine.weights import activation_dtype
from miinb.kernels.linear import PackedLinear
from miinb.messages import Plan

#: Largest difference of layers whose products are int8 on both sides, relative to the largest value.
INT8_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class EncoderKernels:
    """What a device computes an encoder with.

    Attributes:
        operators: of the forward pass.
        tolerance: how much they may differ from the references at start-up.
        levels: the largest number of int8 weights.
        pack: lays a matrix out for `operators.linear`.
    """

    operators: EncoderOperators
    tolerance: float
    levels: int = 127
    pack: Callable[[PackedLinear], Matrix] = lambda packed: packed


def encoder_kernels(plan: Plan, place: Place, checkpoint: str = "") -> tuple[EncoderKernels, Plan]:
    """The operators for a device and dtype, and the plan with a line on them where there is a choice.

    Args:
        plan: so far.
        place: the device and the dtype.
        checkpoint: the checkpoint's dtype, by miinb's names.
    """
    dtype, int8 = activation_dtype(place.dtype, place.device, checkpoint), place.dtype == "int8"
    plain = EncoderKernels(EncoderOperators(), TOLERANCE[dtype])
    if place.device.type == "cuda":
        return plain, plan
    from miinb.kernels.cpu import CpuKernels
    from miinb.kernels.cpu_build import Unavailable

    try:
        if dtype == torch.float16:
            raise Unavailable("they have no fp16")
        kernels = CpuKernels(dtype, int8=int8, tiles=True)
    except Unavailable as reason:
        return plain, plan.with_line("kernels", "PyTorch's", str(reason))
    operators = EncoderOperators(
        linear=kernels.linear, post_norm=kernels.post_norm, packed_attention=kernels.packed_attention
    )
    made = EncoderKernels(operators, INT8_TOLERANCE if int8 else TOLERANCE[dtype], kernels.levels, kernels.pack)
    if int8:
        bits = f"{kernels.levels.bit_length() + 1} bits"
        plan = plan.with_line("activations", bits, "as many as this CPU's instructions add up without loss")
    return made, plan.with_line("kernels", "compiled for this CPU", kernels.description)
