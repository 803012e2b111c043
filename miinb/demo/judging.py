"""Says which color and which shape a picture shows, by measuring: no model judges, and no eye."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miinb.demo.shapes import COLORS, KINDS, MAX_TURN, distances, grid

#: What the tiny model is judged at: steps, guidance, and the seeds of each prompt.
STEPS, GUIDANCE, SEEDS = 20, 4.0, (0, 1)

#: A pixel belongs to a shape where its largest channel is so far above its smallest: backgrounds are gray.
_CHROMA = 0.25
#: Degrees that a hue may be away from a color's.
_HUE = 25.0
#: Shares of a picture that a shape covers.
_AREA = (0.01, 0.7)
#: What a shape and its template have in common, over what they cover together, at least.
_OVERLAP = 0.75


@dataclass(frozen=True, slots=True)
class Seen:
    """What was measured.

    Attributes:
        color: the name of the hue, "" where it is none of those that are drawn.
        kind: the shape, "" where it is like none.
        overlap: with the shape's template, 0 to 1.
    """

    color: str = ""
    kind: str = ""
    overlap: float = 0.0


def judge(picture: Any) -> Seen:
    """The color and the shape in a picture (a PIL image, or RGB [height, width, 3] uint8).

    What is colored is the shape. Its color is the mean's hue; its kind is that whose template of the same center and
    area, turned as shapes are drawn, covers it best.
    """
    rgb = np.asarray(picture)[..., :3].astype(np.float32) / 255
    mask = rgb.max(-1) - rgb.min(-1) > _CHROMA
    if not _AREA[0] <= mask.mean() <= _AREA[1]:
        return Seen()
    kind, overlap = _best(mask)
    return Seen(_color(rgb[mask].mean(0)), kind if overlap >= _OVERLAP else "", overlap)


def is_right(prompt: str, seen: Seen) -> bool:
    """Whether a picture shows the color and the shape that its prompt names ("a red circle")."""
    words = prompt.split()
    return seen.color in words and seen.kind in words


def _color(mean: NDArray[np.float32]) -> str:
    hue = _hue(mean)
    away = {name: abs((hue - _hue(rgb) + 180) % 360 - 180) for name, rgb in COLORS.items()}
    name = min(away, key=lambda one: away[one])
    return name if away[name] <= _HUE else ""


def _hue(rgb: Iterable[float]) -> float:
    return 360 * colorsys.rgb_to_hsv(*(float(value) for value in rgb))[0]


def _best(mask: NDArray[np.bool_]) -> tuple[str, float]:
    """The kind whose template overlaps most, and how much."""
    x, y = grid(max(mask.shape))
    x, y = x[:, : mask.shape[1]], y[: mask.shape[0]]
    weight = mask / mask.sum()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    area = float(mask.sum()) * (2 / max(mask.shape)) ** 2
    found = {}
    for kind in KINDS:
        radius = math.sqrt(area / _UNIT_AREAS[kind])
        overlaps = []
        for turn in np.linspace(-MAX_TURN, MAX_TURN, 9):
            cos, sin = math.cos(turn), math.sin(turn)
            right, down = ((x * cos + y * sin) / radius), ((y * cos - x * sin) / radius)
            template = distances(kind, right.astype(np.float32), down.astype(np.float32)) <= 0
            overlaps.append(float((mask & template).sum() / (mask | template).sum()))
        found[kind] = max(overlaps)
    kind = max(found, key=lambda one: found[one])
    return kind, found[kind]


def _unit_areas() -> dict[str, float]:
    """Areas of the shapes of radius 1, counted on a fine grid."""
    x, y = grid(400)
    return {kind: 16 * float((distances(kind, 2 * x, 2 * y) <= 0).mean()) for kind in KINDS}


_UNIT_AREAS = _unit_areas()
