"""What comes back from a pass: when the tokens of each request came, and what was measured with them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from miinb.bench.encoders.answers import Answer
from miinb.bench.records import utc_now
from miinb.errors import MiinbError
from miinb.messages import SequenceRequest

#: `perf_counter` when this process loaded the module: where `Trace.began_s` counts from.
CLOCK_S = time.perf_counter()


@dataclass(slots=True)
class Trace:
    """One request of a pass; times are seconds after the pass began, when all its requests were submitted.

    Attributes:
        submitted: UTC, ISO 8601.
        prompt_tokens, wanted: its lengths.
        began_s: when its pass began, on this process's clock.
        times: of each token.
        cut: it was ended because the pass took too long.
        error: why it failed.
    """

    submitted: str
    prompt_tokens: int
    wanted: int
    began_s: float = 0.0
    times: list[float] = field(default_factory=list)
    ended: bool = False
    cut: bool = False
    end_s: float = 0.0
    error: str = ""

    @classmethod
    def of(cls, request: SequenceRequest, began: float) -> Trace:
        """The trace of a request that is being submitted; `began` is `perf_counter` at the pass's start."""
        return cls(utc_now(), len(request.token_ids), request.params.max_new_tokens, began - CLOCK_S)

    def end(self, now: float, *, cut: bool = False) -> None:
        """The request is over: with its last token, or when it was cut."""
        self.ended, self.cut = True, cut
        self.end_s = now if cut or not self.times else self.times[-1]


@dataclass(slots=True)
class Measured:
    """One workload of one arm: records as dicts of `Record`'s fields, facts for the run's environment.

    `answers` of encoders, by `prompt_id`: what is compared with the baseline's.
    """

    suite: str
    records: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    answers: dict[str, list[Answer]] = field(default_factory=dict)


def error_text(error: BaseException) -> str:
    """An error in one line; a `MiinbError` says all without the name of its class."""
    lines = str(error).strip().splitlines() or ["no text"]
    return lines[0] if isinstance(error, MiinbError) else f"{type(error).__name__}: {lines[0]}"
