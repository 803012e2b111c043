"""Requests of encoder tasks in a benchmark: inputs of known lengths, `Session.predict`, answers to compare."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miinb.bench import lengths
from miinb.bench.arms import Arm
from miinb.bench.checks import Answered
from miinb.bench.encoders.answers import Answer
from miinb.bench.encoders.inputs import Inputs
from miinb.bench.encoders.predictions import answer_of
from miinb.bench.records import Record
from miinb.bench.workload import Job, Maker, Offsets, check_texts, tokenizer_offsets
from miinb.bench_fields import most
from miinb.errors import InvalidValue

if TYPE_CHECKING:
    from miinb.config import BenchConfig


def fitted(config: BenchConfig, max_length: int) -> BenchConfig:
    """The configuration with inputs that the model takes, where their length was not asked for.

    Args:
        config: the benchmark's.
        max_length: most tokens of a sequence; 0: not known.
    """
    asked = "prompt_tokens" in config.model_fields_set or config.prompts
    if asked or not 0 < max_length < most(config.prompt_tokens):
        return config
    return config.model_copy(update={"prompt_tokens": max_length})


def maker(task: str, folder: Path | None, config: BenchConfig) -> Maker:
    """Makes synthetic inputs of `config.prompt_tokens`.

    Raises:
        InvalidValue: the deployment's tokenizer is elsewhere and no prompts were given.
    """
    if config.prompts:
        return lambda rng, tokens: None  # not called
    if folder is None:
        raise InvalidValue("The deployment's tokenizer is not on this machine.", hint="Give prompts.")
    made = Inputs(folder, task)

    def make(rng: random.Random, tokens: int) -> Any:
        return made.text(tokens, rng)

    return make


@dataclass(frozen=True, slots=True)
class PredictedAnswer:
    """The answers to the inputs of a request."""

    answers: tuple[Answer, ...]

    def compare(self, got: PredictedAnswer, record: Record) -> bool:
        """The same labels, tokens, spans (or nearly the same embeddings) for all inputs; `equal_share` that are."""
        shares = [mine.share(other) for mine, other in zip(self.answers, got.answers, strict=True)]
        record.equal_share = sum(shares) / len(shares)
        return min(shares) == 1.0


class Predictions:
    """See `kinds.Kind`. A request that is in flight cannot be ended: it is short.

    Raises:
        InvalidValue: the prompts are no inputs of the task, or do not fit the models.
    """

    def __init__(self, config: BenchConfig, arms: Sequence[Arm], stop: threading.Event) -> None:
        task, folder = str(arms[0].session.task), arms[0].tokenizer_folder
        check_texts(config, task)
        self.config = fitted(config, min(arm.plan.max_length for arm in arms))
        self.offsets: Offsets | None = tokenizer_offsets(folder)
        lengths.check(self.config, arms, self.offsets, encodes=True)
        self.make: Maker | None = maker(task, folder, self.config)

    def note(self, record: Record, job: Job) -> None:
        """See `Kind`: how many inputs a request has, and of how many tokens (unknown without a tokenizer)."""
        record.batch_size = len(job.prompt)
        if self.offsets is not None:
            texts = [tuple(one.values()) if isinstance(one, Mapping) else (one,) for one in job.prompt]
            record.prompt_tokens = sum(len(self.offsets(*text)) for text in texts)

    def ask(self, arm: Arm, job: Job, record: Record, t_submit: float) -> PredictedAnswer:
        """See `Kind`."""
        predictions = arm.session.predict(job.prompt, timeout_s=self.config.timeout_s)
        record.e2e_s = time.perf_counter() - t_submit
        timing = predictions.timing
        record.queue_s, record.preprocess_s = timing.queue_s, timing.preprocess_s
        record.model_s, record.postprocess_s = timing.model_s, timing.postprocess_s
        record.finish_reason = "stop"
        return PredictedAnswer(tuple(_answer(arm.session.task, one) for one in predictions))

    def cancel(self) -> None:
        """See `Kind`."""

    def settle(self, records: Sequence[Record], answers: Mapping[int, Answered]) -> None:
        """See `Kind`: nothing is kept."""

    def facts(self) -> dict[str, Any]:
        """See `Kind`."""
        return {}

    def warnings(self, arms: Sequence[Arm], ok: Sequence[Record]) -> list[str]:
        """See `Kind`."""
        return []


def _answer(task: str, predictions: Any) -> Answer:
    """Of one input; of a text with several masks the best of each."""
    if predictions and isinstance(predictions[0], list):
        parts = [answer_of(task, one) for one in predictions]
        return Answer(tuple(c for one in parts for c in one.choices), tuple(v for one in parts for v in one.values))
    return answer_of(task, predictions)
