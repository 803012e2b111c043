"""Many clients at once: processes of threads that ask a server for one text after another, and what they saw."""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from miinb.bench.encoders.answers import Answer
from miinb.bench.encoders.predictions import answer_of
from miinb.bench.encoders.suites import Job, Workload
from miinb.bench.records import Record, utc_now
from miinb.errors import MiinbError
from miinb.predictions import PredictTiming

#: Seconds that a client process may take to import and connect.
READY_S = 60.0


@dataclass(slots=True)
class Call:
    """One request as its client saw it, on `time.perf_counter`'s clock, which all processes of a Linux host share."""

    t_start: float
    e2e_s: float
    queue_s: float = 0.0
    preprocess_s: float = 0.0
    model_s: float = 0.0
    postprocess_s: float = 0.0
    place: int = 0  # of the text among all texts, over and over
    error: str = ""

    def fill(self, timing: PredictTiming) -> None:
        """The server's parts of the time."""
        self.queue_s, self.preprocess_s = timing.queue_s, timing.preprocess_s
        self.model_s, self.postprocess_s = timing.model_s, timing.postprocess_s


def records_of(job: Job, workload: Workload, calls: Sequence[Call], number: int) -> list[dict[str, Any]]:
    """Rows of the calls of a pass, in the order of their start.

    Args:
        job: whose they are.
        workload: one text a call, or all texts in each.
        calls: in any order.
        number: of the pass; negative is a warm-up.
    """
    lengths, rows = workload.lengths, []
    first = min((call.t_start for call in calls), default=0.0)
    for call in sorted(calls, key=lambda call: call.t_start):
        made = Record("", -1, job.arm.label, model=job.model, engine=job.arm.engine, dtype=job.dtype)
        made.task, made.t_submit = job.task, utc_now()
        made.batch_size = len(lengths) if workload.together else 1
        made.prompt_tokens = sum(lengths) if workload.together else lengths[call.place % len(lengths)]
        made.block, made.warmup = number, number < 0
        made.prompt_id = str(call.place % len(lengths) if workload.clients > 1 else number)
        made.t_rel_s, made.concurrency = call.t_start - first, workload.clients
        for name in ("e2e_s", "queue_s", "preprocess_s", "model_s", "postprocess_s"):
            setattr(made, name, getattr(call, name))
        made.status, made.error = ("error", call.error) if call.error else ("ok", None)
        made.finish_reason = None if call.error else "stop"
        rows.append({name: getattr(made, name) for name in Record.__slots__})
    return rows


def processes_for(clients: int, cores: int) -> int:
    """How many processes ask: one of them must not be the bottleneck, and they must leave cores to the server."""
    return max(1, min(8, clients, cores // 2))


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients ask: `texts` in turn, client i beginning with text i, for `seconds`.

    `checked`: the answers to so many of the texts, as they came under the load, are kept.
    """

    address: str
    task: str
    texts: tuple[Any, ...]
    options: dict[str, Any]
    clients: int
    seconds: float
    checked: int = 64


def drive(load: Load, processes: int) -> tuple[list[Call], dict[str, list[Answer]]]:
    """Closed loop: each client asks for its next text as soon as it has its answer.

    Args:
        load: what is asked.
        processes: that the clients, each a thread, are spread over.

    Returns:
        All calls, and the checked answers by the text's place.

    Raises:
        MiinbError: a process did not come up.
    """
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(processes + 1), context.Queue()
    shares = [range(load.clients)[number::processes] for number in range(processes)]
    started = [context.Process(target=_ask_all, args=(load, share, gate, results)) for share in shares]
    for process in started:
        process.start()
    calls: list[Call] = []
    answers: dict[str, list[Answer]] = {}
    try:
        gate.wait(READY_S)
        for _ in started:
            some, kept = results.get(timeout=load.seconds + READY_S)
            calls += some
            answers |= kept
    except (threading.BrokenBarrierError, queue.Empty):
        raise MiinbError("A client process did not come up, or did not end.") from None
    finally:
        for process in started:
            process.join(5.0)
            if process.exitcode is None:
                process.kill()
                process.join()
    return calls, answers


def _ask_all(load: Load, share: Sequence[int], gate: Any, results: Any) -> None:
    """A client process: its threads share one channel, as those of a web server would."""
    from miinb.client import Client

    client, calls, answers = Client(load.address), list[Call](), dict[str, list[Answer]]()
    client.predict(load.texts[0])
    gate.wait(READY_S)
    end = time.perf_counter() + load.seconds

    def ask(place: int) -> None:
        while time.perf_counter() < end:
            text = place % len(load.texts)
            call = Call(time.perf_counter(), 0.0, place=place)
            try:
                predictions = client.predict(load.texts[text], **load.options)
                call.fill(predictions.timing)
            except MiinbError as failure:
                call.error = str(failure)
            call.e2e_s = time.perf_counter() - call.t_start
            calls.append(call)
            if text < load.checked and not call.error:
                answers[str(text)] = [answer_of(load.task, predictions[0])]
            place += load.clients

    threads = [threading.Thread(target=ask, args=(place,)) for place in share]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    results.put((calls, answers))
