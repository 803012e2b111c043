"""The demonstration of pictures: a text-to-image model draws what prompts say, and is measured against diffusers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miinb.demo import tiny_images
from miinb.demo.judging import GUIDANCE, STEPS
from miinb.errors import InvalidValue

if TYPE_CHECKING:
    from miinb.session import Session

PROMPTS = (
    "a red circle",
    "a yellow triangle",
    "a large blue square on a gray background",
    "a green circle on a black background",
)
#: What the tiny model has learned, for who asks it for something else.
KNOWN = "It draws circles, squares and triangles in red, yellow, green and blue, and has learned little else."
FOLDER = "miinb-demo-images"
#: The chart of both engines.
CHART = "miinb-demo-images.png"
_SEED, _EACH = 1, 2
#: Requests of each engine in the comparison.
_REQUESTS = 4


def picture_tour(model: str | None, prompt: str | None, out: Path) -> None:
    """Serve, draw, write the pictures, measure; ends every process that it started, also when it fails.

    Args:
        model: folder or hub name of a pipeline; None: the tiny one inside the package.
        prompt: None: four of the tiny model's kind.
        out: folder in which `miinb-demo-images` is made, and a chart of that name.

    Raises:
        InvalidValue: the folder cannot be written to.
        MiinbError: what a start or a request raises.
    """
    from miinb.session import Session

    check_folder(out)
    served = model or str(tiny_images())
    title(1, f"Serving {served}")
    if model is None:
        print(KNOWN, flush=True)
    with Session(served, "text-to-image") as session:
        print(f"{session.name}: ready, loaded in {session.load_s:.1f} s\n{session.plan()}")
        title(2, "Pictures of prompts")
        asked = PROMPTS if prompt is None else (prompt,)
        options = {} if model else {"guidance_scale": GUIDANCE}
        draw(session, asked, options, out / FOLDER)
        title(3, "The same model in plain diffusers (the baseline), then both measured in turns")
        with Session(served, "text-to-image", engine="baseline", dtype=session.plan().dtype) as baseline:
            measure(session, baseline, asked, options, out / CHART)
    print("\nEvery process of the demonstration has ended. Next: miinb demo --images --notebook")


def draw(session: Session, asked: Sequence[str], options: dict[str, Any], folder: Path) -> None:
    """Two pictures of each prompt, written as they come; a line of what each took."""
    for place, prompt in enumerate(asked):
        seed = _SEED + place * _EACH  # no seed twice: files are named by it
        result: Any = session.generate(
            prompt, num_inference_steps=STEPS, num_images_per_prompt=_EACH, seed=seed, **options
        )
        timing = result.timing
        print(
            f"{prompt}: {timing.s_per_image:.2f} s a picture "
            f"(text {timing.text_encode_s:.2f} s, {STEPS} steps of both {timing.steps_s:.2f} s, "
            f"pixels of both {timing.vae_s:.2f} s)",
            flush=True,
        )
        for warning in result.warnings:
            print(f"  {warning}", flush=True)
        for file in result.save(folder):
            print(f"  {file.resolve()}", flush=True)
    print("Each file holds the prompt, seed and parameters that made it.")


def measure(optimized: Session, baseline: Session, asked: Sequence[str], options: dict[str, Any], chart: Path) -> None:
    """Benchmark both with the same prompts and seeds, print the table and what a picture takes, write the chart."""
    from miinb.bench import charts
    from miinb.bench.runner import compare

    runs = compare(
        [baseline, optimized],
        list(asked),
        requests=_REQUESTS,
        warmup=1,
        num_inference_steps=STEPS,
        seed=_SEED,
        **options,
    )
    print(runs)
    seconds = runs.requests.query("status == 'ok' and not warmup").groupby("arm")["image_s"].median()
    if {"baseline", "optimized"} <= {*seconds.index}:
        theirs, ours = seconds["baseline"], seconds["optimized"]
        print(f"a picture: {theirs:.2f} s by diffusers, {ours:.2f} s optimized: {theirs / ours:.1f}x as fast")
    path = charts.save(charts.draw("images", runs), chart)
    print(f"chart: {path.resolve()}")


def check_folder(folder: Path) -> None:
    """Raise InvalidValue where a folder is none, or cannot be written to."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidValue(f"--out: {folder} is not a folder that can be written to.")


def title(number: int, text: str) -> None:
    """The heading of a part of the demonstration."""
    print(f"\n{number}. {text}\n", flush=True)
