"""Do the arms answer the same? Answer by answer; of texts, token by token up to the first difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from miinb.bench.records import Record

REFERENCE = "baseline"


class Answered(Protocol):
    """An answer that can be compared with another arm's."""

    def compare(self, got: Any, record: Record) -> bool:
        """Whether `got` is the same answer; which share of it is, and how it differs, goes into its `record`."""


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """New text and, where the server sends them, its tokens."""

    text: str
    token_ids: tuple[int, ...] = ()

    def compare(self, got: TextAnswer, record: Record) -> bool:
        """The same text; `equal_share`: of the tokens before the first difference."""
        record.equal_share = leading_share(self, got)
        return got.text == self.text


def compare_outputs(records: Sequence[Record], answers: Mapping[int, Answered], *, exact: bool) -> None:
    """Fill `equal_share`, and if `exact` also `equal`, of every record whose arm is not the reference.

    The reference is the arm "baseline", else the first arm. Compared are answers to the same prompt at the same point,
    warm-up left out; a request that failed on either side is not compared (it is counted as failed).
    """
    arms = list(dict.fromkeys(record.arm for record in records))
    if len(arms) < 2:
        return
    reference = REFERENCE if REFERENCE in arms else arms[0]
    expected = {
        (r.point, r.prompt_id, r.seed): answers[r.seq] for r in records if r.arm == reference and r.seq in answers
    }
    for record in records:
        key = (record.point, record.prompt_id, record.seed)
        if record.arm == reference or record.warmup or record.seq not in answers or key not in expected:
            continue
        equal = expected[key].compare(answers[record.seq], record)
        if exact:
            record.equal = equal


def leading_share(expected: TextAnswer, got: TextAnswer) -> float:
    """Share of the expected tokens (characters where there are no tokens) before the first difference."""
    left: Sequence[object] = expected.token_ids or expected.text
    right: Sequence[object] = got.token_ids if expected.token_ids else got.text
    if not left:
        return 1.0 if not right else 0.0
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return same / len(left)
