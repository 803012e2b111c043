"""What the decoder computes once from its positions: tables of rotary angles, and ALiBi's slopes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from miinb.engine.parallel import Group
from miinb.engine.spec import DecoderSpec, Rotary

#: cos and sin of a layer's rotary embedding, or none.
Angles = tuple[Tensor, Tensor] | tuple[None, None]


def layers_angles(spec: DecoderSpec, windows: Sequence[int | None], device: torch.device) -> list[Angles]:
    """Each layer's cos and sin, by its window; layers share them."""
    length = spec.max_length
    wide: Angles = rotary_tables(spec.rotary, length, device) if spec.rotary else (None, None)
    near = rotary_tables(spec.windowed_rotary, length, device) if spec.windowed_rotary else wide
    return [near if window else wide for window in windows]


def rotary_tables(rotary: Rotary, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, dim / 2] in fp32, one row a position.

    The operations are transformers' own in their order: at far positions a last bit of a frequency shows.
    """
    exponents = torch.arange(0, rotary.dim, 2, dtype=torch.int64).float() / rotary.dim
    frequencies, factor = 1.0 / (rotary.theta**exponents), 1.0
    if rotary.scaling is not None:
        frequencies, factor = _SCALINGS[rotary.scaling["rope_type"]](frequencies, rotary, rotary.scaling)
    angles = torch.arange(length).float()[:, None] * frequencies
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def _linear(frequencies: Tensor, rotary: Rotary, values: Mapping[str, Any]) -> tuple[Tensor, float]:
    """All frequencies divided (position interpolation, arXiv:2306.15595)."""
    return frequencies / float(values["factor"]), 1.0


def _llama3(frequencies: Tensor, rotary: Rotary, values: Mapping[str, Any]) -> tuple[Tensor, float]:
    """The low frequencies divided, with a ramp between (arXiv:2407.21783)."""
    low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
    turns = float(values["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / float(values["factor"]) + smooth * frequencies, 1.0


def _yarn(frequencies: Tensor, rotary: Rotary, values: Mapping[str, Any]) -> tuple[Tensor, float]:
    """As llama3 with the ramp over dimensions, and a factor on scores (YaRN, arXiv:2309.00071)."""
    factor, length = float(values["factor"]), float(values["original_max_position_embeddings"])

    def dimension(turns: float) -> float:
        return rotary.dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = dimension(values.get("beta_fast") or 32), dimension(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    ramp = (torch.arange(rotary.dim // 2).float() - low) / (high - low or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return frequencies / factor * (1 - kept) + frequencies * kept, _yarn_factor(factor, values)


def _yarn_factor(factor: float, values: Mapping[str, Any]) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    if values.get("mscale") and values.get("mscale_all_dim"):
        return magnitude(values["mscale"]) / magnitude(values["mscale_all_dim"])
    return magnitude(1.0)


def _longrope(frequencies: Tensor, rotary: Rotary, values: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Each frequency divided by its own factor (LongRoPE, arXiv:2402.13753), within the length of its training."""
    factor, length = float(values["factor"]), float(values["original_max_position_embeddings"])
    by_default = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return frequencies / torch.tensor(values["short_factor"]), float(values.get("attention_factor") or by_default)


_SCALINGS: Mapping[str, Callable[[Tensor, Rotary, Mapping[str, Any]], tuple[Tensor, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def alibi_slopes(spec: DecoderSpec, group: Group | None, device: torch.device) -> Tensor:
    """The rank's ALiBi slopes [heads] in fp32: a geometric series; heads past a power of two take every other one."""
    ranks, rank = (group.size, group.rank) if group is not None else (1, 0)
    total = spec.heads * ranks
    closest = 1 << int(math.log2(total))
    slopes = [2 ** (-8 * (i + 1) / closest) for i in range(closest)]
    slopes += [2 ** (-4 * (2 * i + 1) / closest) for i in range(total - closest)]
    return torch.tensor(slopes[rank * spec.heads : (rank + 1) * spec.heads], dtype=torch.float32, device=device)
