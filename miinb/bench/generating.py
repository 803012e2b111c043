"""Requests of tasks that generate text in a benchmark: `Session.stream`, and the measures of its chunks."""

from __future__ import annotations

import hashlib
import math
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miinb.bench import lengths
from miinb.bench.arms import Arm
from miinb.bench.checks import Answered, TextAnswer
from miinb.bench.measures import fill
from miinb.bench.records import Record
from miinb.bench.workload import Job, check_texts, generation_params, load_words, tokenizer_offsets
from miinb.errors import InvalidValue

if TYPE_CHECKING:
    from miinb.config import BenchConfig

#: Share of the synthetic prompts' tokens in a prefix cache from which a reader is told.
CACHED = 0.01
#: Tokens that two synthetic prompts begin with by chance: a begin token, and a word.
ALIKE = 2


class Texts:
    """See `kinds.Kind`.

    Raises:
        InvalidValue: the prompts are no texts, or do not fit the models; or a field would not act.
    """

    make = None

    def __init__(self, config: BenchConfig, arms: Sequence[Arm], stop: threading.Event) -> None:
        if config.temperature != 1.0 and not config.do_sample:
            raise InvalidValue("temperature: acts only with do_sample=True.")
        check_texts(config, str(arms[0].session.task or "text-generation"))
        self.config = _with_new_prompts(config)
        self.offsets = tokenizer_offsets(arms[0].tokenizer_folder)
        lengths.check(config, arms, self.offsets)
        self._stop = stop
        self._streams: set[Any] = set()
        self._lock = threading.Lock()

    def note(self, record: Record, job: Job) -> None:
        """See `Kind`."""
        record.asked_tokens = job.new_tokens

    def ask(self, arm: Arm, job: Job, record: Record, t_submit: float) -> TextAnswer | None:
        """See `Kind`."""
        params = generation_params(self.config, job)
        arrivals: list[float] = []
        t_first: float | None = None
        text: list[str] = []
        token_ids: list[int] = []
        stream = arm.session.stream(job.prompt, timeout_s=self.config.timeout_s, **params)
        try:
            with self._lock:
                self._streams.add(stream)
            if self._stop.is_set():  # it was opened while the others were being cancelled
                stream.cancel()
            for chunk in stream:
                now = time.perf_counter()
                if t_first is None and chunk.text:
                    t_first = now
                arrivals.append(now)
                text.append(chunk.text)
                token_ids.extend(chunk.token_ids)
            record.e2e_s = time.perf_counter() - t_submit
        finally:
            with self._lock:
                self._streams.discard(stream)
        fill(record, stream.result, arrivals, t_first, t_submit)
        if record.finish_reason == "cancelled":
            record.status = "cancelled"
            return None
        record.output_sha256 = hashlib.sha256("".join(text).encode("utf-8", "surrogatepass")).hexdigest()
        return TextAnswer("".join(text), tuple(token_ids))

    def cancel(self) -> None:
        """See `Kind`."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()

    def settle(self, records: Sequence[Record], answers: Mapping[int, Answered]) -> None:
        """See `Kind`: nothing is kept."""

    def facts(self) -> dict[str, Any]:
        """See `Kind`."""
        return {}

    def warnings(self, arms: Sequence[Arm], ok: Sequence[Record]) -> list[str]:
        """See `Kind`."""
        found = []
        for arm in arms:
            mine = [r for r in ok if r.arm == arm.label]
            if short := sum(r.output_tokens != r.asked_tokens for r in mine):
                found.append(f"{arm.label}: {short} of {len(mine)} answers have not the tokens asked for")
        prompts = self.config.prompts
        most_sent = max((sum(r.arm == arm.label for r in ok) for arm in arms), default=0)
        if prompts and len({str(prompt) for prompt in prompts}) < most_sent:
            found.append("prompts repeat: a prefix cache can help")
        return found if prompts else [*found, *_cached(arms, ok)]


def _with_new_prompts(config: BenchConfig) -> BenchConfig:
    """The benchmark with prompts that no earlier run has left in a prefix cache, where no seed was given for them."""
    if config.prompts is not None or config.prompt_seed is not None or "seed" in config.model_fields_set:
        return config
    return config.model_copy(update={"prompt_seed": secrets.randbelow(1_000_000)})


def _cached(arms: Sequence[Arm], ok: Sequence[Record]) -> Iterator[str]:
    """Words for each arm and load whose synthetic prompts were in the prefix cache."""
    points: dict[tuple[str, int], list[Record]] = {(arm.label, r.point): [] for arm in arms for r in ok}
    for record in ok:
        points[record.arm, record.point].append(record)
    for (arm_label, _), rows in points.items():
        tokens = sum(row.prompt_tokens for row in rows)
        if sum(max(row.cached_tokens - ALIKE, 0) for row in rows) > CACHED * tokens:
            rate, share = rows[0].rate_rps, sum(row.cached_tokens for row in rows) / tokens
            load = load_words("concurrency", rows[0].concurrency) if math.isnan(rate) else load_words("rate", rate)
            yield (
                f"{arm_label} at {load}: {share:.0%} of the prompt tokens came from the prefix cache, which an "
                "earlier run of these prompts has filled; another seed has others"
            )
