"""Pictures to train the tiny image model on: colored shapes and their captions, drawn from a seeded grammar."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

COLORS = {
    "red": (0.87, 0.19, 0.17),
    "yellow": (0.96, 0.79, 0.13),
    "green": (0.17, 0.66, 0.29),
    "blue": (0.15, 0.38, 0.85),
}
KINDS = ("circle", "square", "triangle")
#: Gray level of each background, from and to.
BACKGROUNDS = {"white": (0.93, 0.99), "gray": (0.52, 0.64), "black": (0.05, 0.12)}
#: Radius of the circle of the same size, from and to; a picture reaches from -1 to 1. "" is what no caption mentions.
SIZES = {"small": (0.22, 0.32), "": (0.34, 0.50), "large": (0.54, 0.62)}

#: Half a square's side and the radius of the circle inside a triangle, for a circle of radius 1 with about their area.
_SQUARE, _TRIANGLE = 0.89, 0.78
#: How far a shape reaches from its center at most, in radii.
_REACH = 1.56
#: Shapes are turned by up to so much, in radians.
MAX_TURN = 0.2
#: Share of scenes with two shapes.
_PAIRS = 0.1


@dataclass(frozen=True, slots=True)
class Figure:
    """A shape: its color and kind, its center, radius and turn (radians)."""

    color: str
    kind: str
    x: float
    y: float
    radius: float
    turn: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: one or two shapes on a background of a gray level at the top and one at the bottom."""

    caption: str
    figures: tuple[Figure, ...]
    background: str
    levels: tuple[float, float]


def prompts() -> list[str]:
    """The 12 prompts that a model is judged by: "a red circle", ..."""
    return [f"a {color} {kind}" for color in COLORS for kind in KINDS]


def scenes(seed: int) -> Iterator[Scene]:
    """Scenes without end: the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        yield _scene(rng)


def _scene(rng: random.Random) -> Scene:
    background = rng.choice(("white", "white", "white", "gray", "gray", "black"))
    level = rng.uniform(*BACKGROUNDS[background])
    pair = rng.random() < _PAIRS
    where = [("small", -0.5), ("small", 0.5)] if pair else [(rng.choice(("small", "", "", "", "large")), 0.0)]
    figures = tuple(_figure(rng, size, x) for size, x in where)
    named = " and ".join(_named(rng, figure, "" if pair else where[0][0]) for figure in figures)
    opening = rng.choice(("", "", "", "a picture of ", "a drawing of "))
    ending = rng.choice(("", f" on a {background} background", f" on {background}"))
    return Scene(opening + named + ending, figures, background, (min(level + 0.03, 1.0), level - 0.03))


def _figure(rng: random.Random, size: str, x: float) -> Figure:
    radius = rng.uniform(*SIZES[size])
    free = max(0.0, (0.5 if x else 1.0) - _REACH * radius)
    shift_x, shift_y = rng.uniform(-free, free), rng.uniform(-free, free)
    turn = rng.uniform(-MAX_TURN, MAX_TURN)
    return Figure(rng.choice(list(COLORS)), rng.choice(KINDS), x + shift_x, shift_y, radius, turn)


def _named(rng: random.Random, figure: Figure, size: str) -> str:
    return " ".join(word for word in (rng.choice(("a", "a", "one")), size, figure.color, figure.kind) if word)


def distances(kind: str, x: Array, y: Array) -> Array:
    """How far points are outside (above 0) or inside a shape around 0, with about the area of a circle of radius 1."""
    if kind == "circle":
        return np.hypot(x, y) - np.float32(1)
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(_SQUARE)
    slope = np.float32(math.sqrt(3) / 2)
    return np.maximum(slope * np.abs(x) - y / 2, y) - np.float32(_TRIANGLE)


def grid(pixels: int) -> tuple[Array, Array]:
    """x [1, pixels] to the right and y [pixels, 1] down, of the pixels' centers, from -1 to 1."""
    places = ((2 * np.arange(pixels) + 1) / pixels - 1).astype(np.float32)
    return places[None, :], places[:, None]


def draw(scene: Scene, pixels: int) -> NDArray[np.uint8]:
    """The picture [pixels, pixels, 3], with smooth edges, a soft shadow, and a little light from above."""
    x, y = grid(pixels)
    top, bottom = scene.levels
    level = top + (bottom - top) * (y + 1) / 2
    picture = np.broadcast_to(level[..., None], (pixels, pixels, 3)).astype(np.float32)
    for figure in scene.figures:
        shadow = _from(figure, x - np.float32(0.04), y - np.float32(0.07))
        picture *= (1 - 0.3 / (1 + np.exp(np.clip(shadow / 0.05, -30, 30))))[..., None]
    for figure in scene.figures:
        cover = np.clip(0.5 - _from(figure, x, y) * pixels / 2, 0, 1)[..., None]
        light = 1 - 0.1 * np.clip((y - figure.y) / figure.radius, -1, 1)[..., None]
        picture += cover * (np.clip(light * np.array(COLORS[figure.color], np.float32), 0, 1) - picture)
    return np.rint(picture * 255).astype(np.uint8)


def _from(figure: Figure, x: Array, y: Array) -> Array:
    """How far points are from a figure's edge."""
    cos, sin = math.cos(figure.turn), math.sin(figure.turn)
    right, down = (x - figure.x) / figure.radius, (y - figure.y) / figure.radius
    return distances(figure.kind, right * cos + down * sin, down * cos - right * sin) * np.float32(figure.radius)
