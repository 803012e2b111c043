"""The trained tiny Stable Diffusion of the package: its pictures are right, and how far from diffusers' they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miinb.demo import tiny_images
from miinb.demo.judging import GUIDANCE, SEEDS, STEPS, is_right, judge
from miinb.demo.shapes import prompts
from miinb.engine.diffusion import ImageExecutor
from tests.engine.image_rows import latents_of, painted, pixels, psnr, request, run, start, work
from tests.engine.tiny_images import distance

SIDE, ENGINES = 128, ("optimized", "baseline")
#: Prompt and seed of the pictures that arms are compared by.
COMPARED = (("a red circle", 0), ("a blue triangle", 1))


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ImageExecutor]]:
    """The optimized engine and the baseline."""
    state = tmp_path_factory.mktemp("state")
    how: dict[str, Any] = {"dtype": "fp32", "max_batch": 8}
    both = {engine: start(tiny_images(), state, engine=engine, **how)[0] for engine in ENGINES}
    yield both
    for one in both.values():
        one.close()


def pictures(executor: ImageExecutor, asked: Sequence[tuple[str, int]]) -> list[np.ndarray]:
    """The pixels of each prompt and seed, as the model is judged."""
    how: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    rows = [request(row_id, prompt, seed=seed, **how) for row_id, (prompt, seed) in enumerate(asked)]
    found = painted(run(executor, *rows))
    return [pixels(found[row.row_id]) for row in rows]


@pytest.fixture(scope="module")
def exact(arms: dict[str, ImageExecutor]) -> list[np.ndarray]:
    """The compared pictures in fp32."""
    return pictures(arms["optimized"], COMPARED)


def test_its_pictures_show_the_color_and_the_shape_of_their_prompts(arms: dict[str, ImageExecutor]) -> None:
    assert arms["optimized"].info.engine == "optimized"
    asked = [(prompt, seed) for prompt in prompts() for seed in SEEDS]
    seen = [judge(picture.astype(np.uint8)) for picture in pictures(arms["optimized"], asked)]
    wrong = [(*one, shown) for one, shown in zip(asked, seen, strict=True) if not is_right(one[0], shown)]
    assert len(asked) == 24
    assert len(wrong) <= 2, wrong


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_its_latents_are_diffusers(arms: dict[str, ImageExecutor], scheduler: str) -> None:
    asked = work(width=SIDE, height=SIDE, steps=STEPS, guidance=GUIDANCE, scheduler=scheduler)
    texts, seeds = zip(*COMPARED, strict=True)
    ours, theirs = (latents_of(arm, asked, seeds, *texts) for arm in arms.values())
    assert distance(ours, theirs) < 1e-4
    assert distance(theirs[:1], theirs[1:]) > 0.1


def test_its_pictures_are_diffusers(arms: dict[str, ImageExecutor], exact: list[np.ndarray]) -> None:
    theirs = pictures(arms["baseline"], COMPARED)
    assert max(np.abs(one - other).max() for one, other in zip(exact, theirs, strict=True)) <= 1


@pytest.mark.parametrize(
    ("fields", "least_db"),
    [
        ({"dtype": "bf16"}, 40),
        ({"dtype": "int8"}, 45),
        ({"dtype": "fp32", "options": {"threads": 1, "step_reuse": 3}}, 20),
    ],
    ids=["bf16", "int8", "step_reuse"],
)
def test_what_is_not_exact_is_near_and_right(
    fields: dict[str, Any], least_db: float, exact: list[np.ndarray], tmp_path: Path
) -> None:
    executor, _ = start(tiny_images(), tmp_path / "state", max_batch=2, **fields)
    try:
        made = pictures(executor, COMPARED)
    finally:
        executor.close()
    assert all(psnr(one, other) > least_db for one, other in zip(made, exact, strict=True))
    for (prompt, _), picture in zip(COMPARED, made, strict=True):
        assert is_right(prompt, judge(picture.astype(np.uint8)))
