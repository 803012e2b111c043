"""Do both arms answer the same? The choices that an answer makes, and how far its numbers are from the other's."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Cosine from which two embeddings are the same answer.
SAME_COSINE = 0.999


@dataclass(frozen=True, slots=True)
class Answer:
    """What an arm answered to one text.

    Attributes:
        choices: the label, each token's label, start and end, the token of the mask; none of an embedding.
        values: the numbers behind them (logits or probabilities), or the embedding.
    """

    choices: tuple[Any, ...]
    values: tuple[float, ...]

    def share(self, other: Answer) -> float:
        """Share of the choices that are the same; of embeddings 1 or 0."""
        if not self.choices and not other.choices:
            return float(cosine(self.values, other.values) >= SAME_COSINE)
        same = sum(bool(a == b) for a, b in zip(self.choices, other.choices, strict=False))
        return same / max(len(self.choices), len(other.choices))

    def distance(self, other: Answer) -> float:
        """Largest difference of the numbers over the largest of them; infinite where their counts differ."""
        if len(self.values) != len(other.values):
            return math.inf
        most = max((abs(value) for value in self.values), default=0.0)
        apart = max((abs(a - b) for a, b in zip(self.values, other.values, strict=True)), default=0.0)
        return apart / most if most else apart


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    """Cosine of two vectors; 0 if one is zero."""
    product = sum(a * b for a, b in zip(left, right, strict=True))
    size = math.sqrt(sum(a * a for a in left) * sum(b * b for b in right))
    return product / size if size else 0.0


#: Answers by the `prompt_id` of their request, one for each text that is compared (without values: not kept).
Answers = Mapping[str, Sequence[Answer]]


def compare(rows: Sequence[MutableMapping[str, Any]], mine: Answers, truth: Answers) -> dict[str, Any]:
    """Fill `equal` and `equal_share` of an arm's rows from its answers and the baseline's; facts for its run.

    Returns:
        `value_error`: the largest relative difference of the numbers; `cosine`: of embeddings, the least.
    """
    distances, cosines = [], []
    for row in rows:
        found, expected = mine.get(row["prompt_id"]), truth.get(row["prompt_id"])
        if row["warmup"] or row["status"] != "ok" or not found or not expected:
            continue
        pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a.values and b.values]
        if not pairs:
            continue  # the outputs of that pass were not kept
        shares = [a.share(b) for a, b in pairs]
        row["equal"], row["equal_share"] = min(shares) == 1.0, sum(shares) / len(shares)
        distances += [a.distance(b) for a, b in pairs]
        cosines += [cosine(a.values, b.values) for a, b in pairs if not a.choices and len(a.values) == len(b.values)]
    facts: dict[str, Any] = {"value_error": max(distances)} if distances else {}
    return facts | ({"cosine": min(cosines)} if cosines else {})
