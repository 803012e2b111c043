"""Prompts for measuring text-to-image: made of a few words by a seed, all different."""

from __future__ import annotations

import itertools
import random

_SUBJECTS = (
    *("a red fox", "a lighthouse", "an old sailing ship", "a bowl of oranges", "a steam locomotive", "a snow owl"),
    *("a wooden cabin", "a hot-air balloon", "a city street", "a stone bridge", "a field of tulips", "a gray cat"),
)
_PLACES = (
    *("on a quiet beach", "in a misty forest", "under a starry sky", "in heavy rain", "at sunrise", "in deep snow"),
    *("by a mountain lake", "in a desert", "at night"),
)
_STYLES = (
    *("oil painting", "watercolor", "photograph, 35 mm", "pencil drawing", "linocut print", "detailed illustration"),
)
#: How many there are.
MOST = len(_SUBJECTS) * len(_PLACES) * len(_STYLES)


def picture_prompts(count: int, seed: int = 0) -> list[str]:
    """So many prompts (at most `MOST`), no two the same; the same for the same seed."""
    every = [", ".join((f"{subject} {place}", style)) for subject, place, style in _all()]
    return random.Random(f"pictures/{seed}").sample(every, min(count, MOST))


def _all() -> itertools.product[tuple[str, str, str]]:
    return itertools.product(_SUBJECTS, _PLACES, _STYLES)
