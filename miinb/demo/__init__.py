"""The default models and the two-command demonstration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

#: Environment variable that names another default model: a folder or a hub name.
MODEL_VARIABLE = "MIINB_DEMO_MODEL"

TINY = Path(__file__).with_name("tiny")
ENCODERS = Path(__file__).with_name("encoders")
IMAGES = Path(__file__).with_name("tiny-stable-diffusion")


def tiny_model() -> Path:
    """The folder of the tiny model that ships inside the package (about 0.6 million parameters, bf16, own work)."""
    return TINY


def tiny_encoder(task: str) -> Path:
    """The folder of the tiny BERT inside the package with an encoder task's head (0.1 million parameters, own work).

    Embeddings come from the one that fills masks.

    Raises:
        InvalidValue: there is none for this task; the near name is in the hint.
    """
    from miinb.errors import InvalidValue, did_you_mean

    known = sorted(folder.name.removeprefix("tiny-bert-") for folder in ENCODERS.glob("tiny-bert-*"))
    name = "fill-mask" if task == "feature-extraction" else task
    if name not in known:
        raise InvalidValue(f"There is no tiny encoder for {task!r}.", hint=did_you_mean(task, known))
    return ENCODERS / f"tiny-bert-{name}"


def tiny_images() -> Path:
    """The folder of the tiny Stable Diffusion inside the package (5.5 million parameters, fp16, own work).

    It draws circles, squares and triangles in red, yellow, green and blue: "a large red circle on a gray background".
    """
    return IMAGES


def default_model(*, quiet: bool = False) -> str:
    """The folder of SmolLM2-135M-Instruct, fetched and converted once into the user's cache.

    Where it cannot be fetched (no network), the tiny model takes its place, and a line on stdout says so.
    The environment variable `MIINB_DEMO_MODEL` names another model instead.

    Args:
        quiet: no progress bars; the line about the tiny model stays.
    """
    from miinb.demo.fetch import smollm2
    from miinb.errors import ModelError

    if named := os.environ.get(MODEL_VARIABLE):
        return named
    try:
        return str(smollm2(quiet=quiet))
    except ModelError as error:
        print(f"{error.line()}\nThe tiny model inside the package takes its place; its answers are those of a toy.")
        return str(tiny_model())


def main(argv: Sequence[str] | None = None) -> int:
    """The command `miinb demo`; returns the exit status."""
    from miinb.demo.tour import main as tour

    return tour(argv)
