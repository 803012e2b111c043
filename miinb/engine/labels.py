"""Names and functions of a classifier's outputs, as config.json tells them and transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def label_count(config: Mapping[str, Any]) -> int:
    """Outputs of a classifier: num_labels, else as many as id2label names, else 2."""
    named = config.get("id2label")
    return int(config.get("num_labels") or (len(named) if isinstance(named, Mapping) else 2))


def labels_of(config: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """The labels in the order of a classifier's outputs, and what is wrong with config.json's names of them.

    Without usable names they are LABEL_0, LABEL_1, ... as in transformers; the text is "" where nothing is wrong.
    """
    count, named = label_count(config), config.get("id2label")
    plain = tuple(f"LABEL_{index}" for index in range(count))
    if not named:
        return plain, ""
    try:
        found = {int(key): str(name) for key, name in named.items()}
    except (AttributeError, TypeError, ValueError):
        return plain, "config.json's id2label cannot be read: labels are called LABEL_0 and so on."
    if sorted(found) != list(range(count)):
        given = f"{len(found)} of the {count} labels" if len(found) != count else "other numbers than the labels have"
        return plain, f"config.json's id2label names {given}: they are called LABEL_0 and so on."
    return tuple(found[index] for index in range(count)), ""


def function_of(config: Mapping[str, Any]) -> str:
    """What makes a text classifier's logits scores, as transformers' pipeline decides: softmax, sigmoid or none."""
    kind = config.get("problem_type")
    if kind == "regression":
        return "none"
    return "sigmoid" if kind == "multi_label_classification" or label_count(config) == 1 else "softmax"
