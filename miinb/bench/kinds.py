"""What a benchmark does with the requests of a task: text in a stream, encoders' predictions, or pictures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from miinb.bench.arms import Arm
from miinb.bench.checks import Answered
from miinb.bench.generating import Texts
from miinb.bench.picturing import Pictures
from miinb.bench.predicting import Predictions
from miinb.bench.records import Record
from miinb.bench.summary import task_kind
from miinb.bench.workload import Job, Maker, Offsets
from miinb.errors import InvalidValue

if TYPE_CHECKING:
    from miinb.config import BenchConfig

#: Fields of `BenchConfig` that mean something for some kinds of tasks alone, and what to do instead.
_OWN: dict[tuple[str, ...], tuple[str, ...]] = {
    ("text",): ("new_tokens", "do_sample", "temperature", "prompt_seed"),
    ("text", "encoder"): ("prompt_tokens",),
    ("encoder",): ("batch_size",),
    ("image",): (
        *("num_images_per_prompt", "num_inference_steps", "guidance_scale", "height", "width", "negative_prompt"),
        "scheduler",
    ),
}
_HINTS = {
    ("new_tokens", "encoder"): "Its answers have no length.",
    ("do_sample", "encoder"): "Its answers have no length.",
    ("temperature", "encoder"): "Its answers have no length.",
    ("batch_size", "text"): "Use concurrency: the server batches by itself.",
    ("batch_size", "image"): "Use num_images_per_prompt, or concurrency: the server batches by itself.",
    ("prompt_tokens", "image"): "Its text encoder reads prompts of all lengths in the same time.",
}


class Kind(Protocol):
    """The requests of a benchmark.

    Attributes:
        config: the benchmark's, made to fit the deployments.
    """

    config: BenchConfig

    @property
    def offsets(self) -> Offsets | None:
        """Sizes synthetic texts; None without a tokenizer."""

    @property
    def make(self) -> Maker | None:
        """Makes an input of an encoder task; None of others."""

    def note(self, record: Record, job: Job) -> None:
        """What is known of a request before it is sent, into its record."""

    def ask(self, arm: Arm, job: Job, record: Record, t_submit: float) -> Answered | None:
        """Send one request, its measures into `record`; None if it was canceled. Raises MiinbError."""

    def cancel(self) -> None:
        """End what is in flight, where it can be ended."""

    def settle(self, records: Sequence[Record], answers: Mapping[int, Answered]) -> None:
        """Keep what the run keeps of these answers, which are compared and will be dropped."""

    def facts(self) -> dict[str, Any]:
        """What the environment of a run keeps besides its records."""

    def warnings(self, arms: Sequence[Arm], ok: Sequence[Record]) -> list[str]:
        """What a reader of these records must know."""


def kind_of(config: BenchConfig, arms: Sequence[Arm], stop: threading.Event) -> Kind:
    """The requests of a benchmark of these arms.

    Raises:
        InvalidValue: a field is not for their task, or cannot be; the message names it.
    """
    task = str(arms[0].session.task or "text-generation")
    kind = task_kind(task)
    for kinds, names in _OWN.items():
        for name in sorted(config.model_fields_set & {*names}):
            if kind not in kinds:
                raise InvalidValue(f"{name}: not for {task}.", hint=_HINTS.get((name, kind), ""))
    if kind != "text" and (wrong := [name for name in config.slo or () if name != "e2e"]):
        raise InvalidValue(f"slo: {wrong[0]} means nothing for {task}.", hint="Its answers have e2e alone.")
    made: dict[str, Callable[[BenchConfig, Sequence[Arm], threading.Event], Kind]]
    made = {"text": Texts, "encoder": Predictions, "image": Pictures}
    return made[kind](config, arms, stop)
