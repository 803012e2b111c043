"""Requests for pictures in a benchmark: equal work, times by part, and how far the arms' pictures differ."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miinb.bench.arms import Arm
from miinb.bench.checks import REFERENCE, Answered
from miinb.bench.image_measures import note_differences
from miinb.bench.picture_prompts import picture_prompts
from miinb.bench.pixels import pixels_of
from miinb.bench.records import Record
from miinb.bench.thumbnails import MOST, entry
from miinb.bench.workload import Job, check_texts
from miinb.errors import Cancelled, InvalidRequest, InvalidValue, near
from miinb.image_params import parse_images

if TYPE_CHECKING:
    from miinb.config import BenchConfig

#: Prompts of a run that gives none.
PROMPTS = 64
#: Pictures of each arm and point that are compared: they are kept until the point has ended.
MOST_COMPARED = 64
_SHOWN = 200  # characters of a prompt beside its picture
_ASKED = ("num_inference_steps", "guidance_scale", "height", "width", "negative_prompt", "scheduler")


@dataclass(frozen=True, slots=True)
class PictureAnswer:
    """The pictures of a request, as files, in the order of their seeds."""

    files: tuple[bytes, ...]

    def compare(self, got: PictureAnswer, record: Record) -> bool:
        """The same pixels; `mse` and `max_abs_diff` of each picture, `equal_share`: of the pictures."""
        try:
            return note_differences(record, [*map(pixels_of, self.files)], [*map(pixels_of, got.files)])
        except ValueError:  # other sizes, or another number of pictures
            record.equal_share = 0.0
            return False


class Pictures:
    """See `kinds.Kind`.

    Raises:
        InvalidValue: a parameter of pictures is wrong, or the prompts are no texts.
    """

    make = offsets = None

    def __init__(self, config: BenchConfig, arms: Sequence[Arm], stop: threading.Event) -> None:
        check_texts(config, str(arms[0].session.task))
        self._asked = {name: value for name in _ASKED if (value := getattr(config, name)) is not None}
        for images in config.num_images_per_prompt:
            try:
                parse_images({**self._asked, "num_images_per_prompt": images})
            except InvalidRequest as wrong:
                raise InvalidValue(wrong.message, hint=wrong.hint) from None
        _check_scheduler(config.scheduler, arms)
        if config.prompts is None:
            config = config.model_copy(update={"prompts": picture_prompts(PROMPTS, config.seed)})
        self.config = config
        self._stop = stop
        self._running: set[tuple[asyncio.AbstractEventLoop, Any]] = set()
        self._lock = threading.Lock()
        self._kept: Counter[tuple[str, int]] = Counter()  # pictures of an arm and point that wait for the others'
        self._shown: list[dict[str, Any]] = []

    def note(self, record: Record, job: Job) -> None:
        """See `Kind`."""
        record.batch_size = job.images
        record.steps, record.guidance = self.config.num_inference_steps, self.config.guidance_scale

    def ask(self, arm: Arm, job: Job, record: Record, t_submit: float) -> PictureAnswer | None:
        """See `Kind`."""
        parameters = {**self._asked, "num_images_per_prompt": job.images, "seed": job.seed}
        try:
            result = asyncio.run(self._result(arm, job.prompt, parameters, record, t_submit))
        except asyncio.CancelledError:
            raise Cancelled("The request was stopped.") from None
        _fill(record, result)
        with self._lock:
            self._kept[arm.label, record.point] += len(result.files)
            if self._kept[arm.label, record.point] > max(MOST_COMPARED, len(result.files)) or record.warmup:
                self._kept[arm.label, record.point] -= len(result.files)
                return None
        return PictureAnswer(tuple(result.files))

    async def _result(self, arm: Arm, prompt: str, parameters: dict[str, Any], record: Record, t_submit: float) -> Any:
        """The result of a request, in a loop of its own: so it can be ended by another thread."""
        mine = asyncio.get_running_loop(), asyncio.current_task()
        with self._lock:
            self._running.add(mine)
        try:
            if self._stop.is_set():  # it began while the others were being ended
                raise asyncio.CancelledError
            result = await arm.session.agenerate(prompt, timeout_s=self.config.timeout_s, **parameters)
            record.e2e_s = time.perf_counter() - t_submit
            return result
        finally:
            with self._lock:
                self._running.discard(mine)

    def cancel(self) -> None:
        """See `Kind`; the server hears it between two steps."""
        with self._lock:  # a loop that is in the set still runs
            for loop, task in self._running:
                loop.call_soon_threadsafe(task.cancel)

    def settle(self, records: Sequence[Record], answers: Mapping[int, Answered]) -> None:
        """See `Kind`: small pictures of the first point that has some, the same prompts and seeds of each arm."""
        if self._shown:
            return
        made: dict[str, dict[tuple[str, int | None], PictureAnswer]] = {}
        for record in records:
            answer = answers.get(record.seq)
            if isinstance(answer, PictureAnswer):
                made.setdefault(record.arm, {})[record.prompt_id, record.seed] = answer
        if not made:
            return
        shared = set.intersection(*(set(mine) for mine in made.values()))
        first = made.get(REFERENCE) or next(iter(made.values()))
        keys = [key for key in first if key in shared]
        places = [(place, key) for place in range(MOST) for key in keys if place < len(first[key].files)][:MOST]
        for arm, mine in made.items():
            for place, (prompt_id, seed) in places:
                pixels = pixels_of(mine[prompt_id, seed].files[place])
                prompt, own = self._prompt(prompt_id), None if seed is None else seed + place
                self._shown.append(entry(arm, pixels, prompt_id=prompt_id, prompt=prompt, seed=own))

    def _prompt(self, prompt_id: str) -> str:
        prompts = self.config.prompts or [""]
        return str(prompts[int(prompt_id.removeprefix("p"))])[:_SHOWN]

    def facts(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"pictures": list(self._shown)} if self._shown else {}

    def warnings(self, arms: Sequence[Arm], ok: Sequence[Record]) -> list[str]:
        """See `Kind`."""
        sizes = {(r.width_px, r.height_px) for r in ok}
        return ["the arms' pictures have not one size"] if len(sizes) > 1 else []


def _check_scheduler(name: str | None, arms: Sequence[Arm]) -> None:
    """Raise InvalidValue where an arm has no scheduler of that name; servers of earlier versions tell none."""
    for arm in arms:
        if name and arm.plan.schedulers and name not in arm.plan.schedulers:
            found = near(name, arm.plan.schedulers)
            meant = f"Did you mean {found}? " if found else ""
            raise InvalidValue(
                f"scheduler: {name!r} is none for the model of {arm.label}.",
                hint=f"{meant}There are: {', '.join(arm.plan.schedulers)}.",
            )


def _fill(record: Record, result: Any) -> None:
    """The measures of a request whose pictures have come.

    More pictures than a batch holds are several batches: the server tells the last one's times, and counts those before
    it as its waiting.
    """
    timing, count = result.timing, len(result.images)
    record.images, record.prompt_tokens = count, result.usage.prompt_tokens
    record.width_px, record.height_px = result.images[0].size
    record.queue_s, record.text_encode_s, record.steps_s = timing.queue_s, timing.text_encode_s, timing.steps_s
    record.vae_s, record.postprocess_s = timing.vae_s, timing.picture_s
    record.model_s = record.text_encode_s + record.steps_s + record.vae_s
    record.image_s, record.step_s = record.e2e_s / count, record.steps_s / record.steps
    record.finish_reason = "stop"
    record.output_sha256 = hashlib.sha256(b"".join(result.files)).hexdigest()
