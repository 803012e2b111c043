"""Drawn shapes, and the measure that says which color and shape a picture shows: right ones and wrong ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from miinb.demo import judging, shapes
from miinb.demo.shapes import COLORS, KINDS, Figure, Scene


def scene(*figures: Figure, level: float = 0.95) -> Scene:
    return Scene("", figures, "white", (level, level))


def figure(color: str = "red", kind: str = "circle", **places: float) -> Figure:
    return Figure(color, kind, **({"x": 0.1, "y": -0.1, "radius": 0.4, "turn": 0.0} | places))


def test_scenes_are_seeded_and_captions_are_true() -> None:
    first, again, other = (list(itertools.islice(shapes.scenes(seed), 300)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    for each in first:
        words = each.caption.split()
        for one in each.figures:
            assert {one.color, one.kind} <= set(words)
        named = [name for name in shapes.BACKGROUNDS if name in words]
        assert named in ([], [each.background])
        if len(each.figures) == 1:
            named = [size for size in ("small", "large") if size in words]
            for size in named:
                least, most = shapes.SIZES[size]
                assert least <= each.figures[0].radius <= most
    assert {len(each.figures) for each in first} == {1, 2}


@pytest.mark.parametrize("pixels", [64, 128])
def test_every_drawn_shape_is_seen_as_what_it_is(pixels: int) -> None:
    single = [one for one in itertools.islice(shapes.scenes(5), 120) if len(one.figures) == 1]
    assert len(single) > 90
    for one in single:
        picture = shapes.draw(one, pixels)
        assert picture.shape == (pixels, pixels, 3)
        seen = judging.judge(picture)
        assert (seen.color, seen.kind) == (one.figures[0].color, one.figures[0].kind), one
        assert seen.overlap > 0.9


def test_shapes_stay_inside() -> None:
    for one in itertools.islice(shapes.scenes(6), 200):
        colored = np.ptp(shapes.draw(one, 64).astype(int), axis=-1) > 64
        assert colored.any()
        assert not colored[[0, -1]].any()
        assert not colored[:, [0, -1]].any()


@pytest.mark.parametrize(("color", "kind"), list(itertools.product(COLORS, KINDS)))
def test_other_colors_and_shapes_are_wrong(color: str, kind: str) -> None:
    seen = judging.judge(Image.fromarray(shapes.draw(scene(figure(color, kind)), 64)))
    right = [prompt for prompt in shapes.prompts() if judging.is_right(prompt, seen)]
    assert right == [f"a {color} {kind}"]


def test_what_is_no_shape_is_not_taken_for_one() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    assert judging.judge(noise) == judging.Seen()  # colored all over
    assert judging.judge(shapes.draw(scene(), 64)) == judging.Seen()  # nothing
    assert judging.judge(shapes.draw(scene(figure(radius=0.05)), 64)) == judging.Seen()  # a dot
    speckled = np.where(np.random.default_rng(1).random((64, 64, 1)) < 0.2, (220, 40, 40), 240).astype(np.uint8)
    assert judging.judge(speckled).kind == ""
    bar = np.full((64, 64, 3), 240, np.uint8)
    bar[28:36, 4:60] = (220, 40, 40)
    assert (judging.judge(bar).color, judging.judge(bar).kind) == ("red", "")
    pair = shapes.draw(scene(figure(x=-0.5, radius=0.3), figure(x=0.5, radius=0.3)), 64)
    assert judging.judge(pair).kind == ""


def test_hues_between_the_named_are_none() -> None:
    picture = shapes.draw(scene(figure("red")), 64)
    purple = picture[..., [0, 1, 0]]
    assert judging.judge(purple).color == ""
    assert judging.judge(purple).kind == "circle"
    assert judging.judge(picture[..., ::-1]).color == "blue"


def test_the_measure_bears_what_a_model_does_to_a_picture() -> None:
    """Blur, noise and weaker colors change nothing of what is seen."""
    rng = np.random.default_rng(3)
    for color, kind in itertools.product(COLORS, KINDS):
        small = Image.fromarray(shapes.draw(scene(figure(color, kind, turn=0.15)), 64)).resize((32, 32))
        values = np.asarray(small.resize((64, 64)), np.float32)
        rough = 128 + 0.8 * (values - 128) + rng.normal(0, 8, values.shape)
        seen = judging.judge(rough.clip(0, 255).astype(np.uint8))
        assert (seen.color, seen.kind) == (color, kind)
