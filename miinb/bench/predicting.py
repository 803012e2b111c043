"""Requests of encoder tasks in a benchmark: inputs of known lengths, `Session.predict`, answers to compare."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miinb.bench.encoders.answers import Answer
from miinb.bench.encoders.inputs import Inputs
from miinb.bench.encoders.predictions import answer_of
from miinb.bench.records import Record
from miinb.bench.summary import encodes
from miinb.bench.workload import Job, Maker, Offsets
from miinb.bench_fields import most
from miinb.errors import InvalidValue

if TYPE_CHECKING:
    from miinb.config import BenchConfig

#: Fields of `BenchConfig` that mean something for tasks that generate text alone, and for the others alone.
GENERATED = ("new_tokens", "do_sample", "temperature")
ENCODED = ("batch_size",)


def check(config: BenchConfig, task: str) -> None:
    """Refuse fields that the task would ignore, and prompts that are none of its inputs. Raises InvalidValue."""
    wrong = GENERATED if encodes(task) else ENCODED
    for name in sorted(config.model_fields_set & {*wrong}):
        hint = "Its answers have no length." if encodes(task) else "Use concurrency: the server batches by itself."
        raise InvalidValue(f"{name}: not for {task}.", hint=hint)
    if encodes(task) and (wrong_slo := [name for name in config.slo or () if name != "e2e"]):
        raise InvalidValue(f"slo: {wrong_slo[0]} means nothing for {task}.", hint="Its answers have e2e alone.")
    pairs = task == "question-answering"
    if any(isinstance(prompt, Mapping) != pairs for prompt in config.prompts or ()):
        kind = 'dictionaries of "question" and "context"' if pairs else "texts"
        raise InvalidValue(f"prompts: {task} takes {kind}.")


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


def note(record: Record, job: Job, offsets: Offsets | None) -> None:
    """How many inputs a request has, and of how many tokens (unknown without a tokenizer)."""
    record.batch_size = len(job.prompt)
    if offsets is not None:
        texts = [tuple(one.values()) if isinstance(one, Mapping) else (one,) for one in job.prompt]
        record.prompt_tokens = sum(len(offsets(*text)) for text in texts)


@dataclass(frozen=True, slots=True)
class PredictedAnswer:
    """The answers to the inputs of a request."""

    answers: tuple[Answer, ...]

    def agreement(self, got: PredictedAnswer) -> tuple[bool, float]:
        """The same labels, tokens, spans (or nearly the same embeddings) for all inputs; the share that are."""
        shares = [mine.share(other) for mine, other in zip(self.answers, got.answers, strict=True)]
        return min(shares) == 1.0, sum(shares) / len(shares)


def ask(session: Any, job: Job, record: Record, t_submit: float, timeout_s: float) -> PredictedAnswer:
    """One request through `Session.predict`, its measures into `record`. Raises MiinbError."""
    predictions = session.predict(job.prompt, timeout_s=timeout_s)
    record.e2e_s = time.perf_counter() - t_submit
    timing = predictions.timing
    record.queue_s, record.preprocess_s = timing.queue_s, timing.preprocess_s
    record.model_s, record.postprocess_s = timing.model_s, timing.postprocess_s
    record.finish_reason = "stop"
    return PredictedAnswer(tuple(_answer(session.task, one) for one in predictions))


def _answer(task: str, predictions: Any) -> Answer:
    """Of one input; of a text with several masks the best of each."""
    if predictions and isinstance(predictions[0], list):
        parts = [answer_of(task, one) for one in predictions]
        return Answer(tuple(c for one in parts for c in one.choices), tuple(v for one in parts for v in one.values))
    return answer_of(task, predictions)
