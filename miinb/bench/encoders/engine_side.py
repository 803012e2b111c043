"""This project's executor in process: from tokens on the host to results on the host, without a server."""

from __future__ import annotations

import dataclasses
import itertools
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from miinb import hardware, models, planner
from miinb.bench.encoders.answers import Answer
from miinb.bench.encoders.inputs import Encoded
from miinb.bench.encoders.side import Run
from miinb.bench.encoders.suites import Job
from miinb.config import DeploymentConfig
from miinb.engine.loading import load_executor
from miinb.errors import MiinbError
from miinb.messages import EncodeRequest, FailedEvent, Phase

#: What is asked of each task, so that both arms' answers can be compared.
OPTIONS: dict[str, dict[str, Any]] = {
    "text-classification": {"function": "none"},
    "fill-mask": {"top_k": 5},
    "feature-extraction": {"pooling": "mean"},
}


@dataclass(slots=True)
class Ready:
    """A request that waits for its pass, and the tokens of each of its sequences."""

    request: EncodeRequest
    lengths: list[int]


class EngineSide:
    """The optimized engine of a job.

    Args:
        job: model, task, dtype, device.
        folder: its checkpoint.

    Raises:
        MiinbError: it could not be loaded, or something else than the fused engine would run.
    """

    batched = compiled = False

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._ids = itertools.count()
        config = DeploymentConfig.parse(
            {"model": str(folder), "task": job.task, "dtype": job.dtype, "device": job.device}
        )
        machine = hardware.detect()
        config = planner.resolve(config, planner.plan(config, models.inspect(folder), machine), machine)
        gpus = [0] if job.device == "cuda" else None
        self._executor = load_executor(config, replica=0, rank=0, gpus=gpus, folder=folder, report=_quiet)
        if self._executor.info.engine != "optimized":
            reason = "; ".join(self._executor.info.plan.warnings)
            self._executor.close()
            raise MiinbError(reason or "The fused engine does not run this model.")

    def prepare(self, sequences: Sequence[Encoded], size: int) -> Ready:
        """All sequences as one request, whatever the baseline's batches are; packed, as a frame brings them."""
        ids = array("i", (token for one in sequences for token in one.token_ids))
        lengths = [len(one.token_ids) for one in sequences]
        types = array("i", (kind for one in sequences for kind in one.type_ids))
        starts = itertools.accumulate(lengths, initial=0)
        wanted = [start + one.mask for start, one in zip(starts, sequences, strict=False) if one.mask is not None]
        options = OPTIONS.get(self._job.task, {})
        return Ready(EncodeRequest(0, ids, lengths, 0.0, types, wanted, options), lengths)

    def run(self, ready: Ready) -> Run:
        """One request from submit to its event. Raises MiinbError if it fails."""
        request = dataclasses.replace(ready.request, row_id=next(self._ids), t_submit=time.monotonic())
        events: list[Any] = []
        self._executor.encode(request)
        while self._executor.busy:
            self._executor.step(events.append, _nothing)
        (event,) = events
        if isinstance(event, FailedEvent):
            raise MiinbError(f"{event.error}: {event.message}")
        return Run(event, event.model_s, event.queue_s)

    def answers(self, ready: Ready, run: Run, count: int) -> list[Answer]:
        """Of the first `count` sequences."""
        values = np.frombuffer(run.results.values, np.float32).reshape(-1, run.results.columns)
        ids = np.frombuffer(run.results.ids, np.int32)
        task, found, start = self._job.task, [], 0
        for place, length in enumerate(ready.lengths[:count]):
            rows = length if task in ("token-classification", "question-answering") else 1
            mine = values[start : start + rows]
            start += rows
            if task == "fill-mask":
                choices: tuple[Any, ...] = (int(ids[place * run.results.columns]),)
            elif task == "feature-extraction":
                choices = ()
            else:
                choices = tuple(mine.argmax(0 if task == "question-answering" else 1).tolist())
            found.append(Answer(choices, tuple(mine.flatten().tolist())))
        return found

    def facts(self) -> dict[str, Any]:
        """What is kept besides the records."""
        info = self._executor.info
        return {"load_s": info.load_s, "plan": str(info.plan).splitlines(), "status": self._executor.status()}

    def close(self) -> None:
        """Let go of the model."""
        self._executor.close()


def _quiet(phase: Phase) -> None:
    """Phases of a start are not shown here."""


def _nothing() -> None:
    """No socket is to be drained."""
