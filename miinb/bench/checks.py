"""Do both arms answer the same? Text by text, and token by token up to the first difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from miinb.bench.records import Record

REFERENCE = "baseline"


class Answered(Protocol):
    """An answer: its text and, where the server sends them, its tokens."""

    text: str
    token_ids: tuple[int, ...]


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
        if exact:
            record.equal = answers[record.seq].text == expected[key].text
        record.equal_share = leading_share(expected[key], answers[record.seq])


def leading_share(expected: Answered, got: Answered) -> float:
    """Share of the expected tokens (characters where there are no tokens) before the first difference."""
    left: Sequence[object] = expected.token_ids or expected.text
    right: Sequence[object] = got.token_ids if expected.token_ids else got.text
    if not left:
        return 1.0 if not right else 0.0
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return same / len(left)
