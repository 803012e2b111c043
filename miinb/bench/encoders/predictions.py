"""Predictions as answers that can be compared, whether they are transformers' dictionaries or this project's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miinb.bench.encoders.answers import Answer

#: What a prediction chooses, and of how many predictions of a text.
CHOICES: dict[str, tuple[tuple[str, ...], int | None]] = {
    "text-classification": (("label",), 1),
    "token-classification": (("entity", "start", "end"), None),
    "question-answering": (("answer",), 1),
    "fill-mask": (("token",), 1),
}


def answer_of(task: str, predictions: Sequence[Any]) -> Answer:
    """The predictions of one text.

    Args:
        task: Hugging Face's name.
        predictions: dictionaries or dataclasses, best first.
    """
    if task == "feature-extraction":
        (vector,) = predictions
        return Answer((), tuple(float(value) for value in _get(vector, "embedding")))
    names, most = CHOICES[task]
    chosen = tuple(tuple(_get(one, name) for name in names) for one in predictions[:most])
    return Answer(chosen or ("none",), tuple(float(_get(one, "score")) for one in predictions) or (0.0,))


def _get(prediction: Any, name: str) -> Any:
    return prediction[name] if isinstance(prediction, Mapping) else getattr(prediction, name)
