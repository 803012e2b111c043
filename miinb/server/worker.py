"""One rank: loads its part of the model, connects to the frontend, and computes until it is told to end.

`python -m miinb.server.worker`, one JSON line on stdin (`Order`); the log file is its stdout and stderr, and reports to
the supervisor go through the pipe `MIINB_STATUS_FD`. docs/internals.md has the lines. One thread does everything.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from miinb.config import DeploymentConfig, GenerationParams
from miinb.errors import MiinbError, OutOfMemory, RankFailed
from miinb.image_messages import PaintRequest
from miinb.messages import (
    EncodeRequest,
    EngineInfo,
    FailedEvent,
    Phase,
    Plan,
    SequenceRequest,
    from_dict,
)
from miinb.server.frames import CancelRow, EngineStatus, ToRank
from miinb.server.ipc import RankSocket
from miinb.server.process import PEER_LOST
from miinb.spinning import spin_s
from miinb.tasks import TASKS

if TYPE_CHECKING:
    from miinb.engine.executor import Executor

log = logging.getLogger("miinb.worker")


@dataclass(frozen=True, slots=True)
class Order:
    """The JSON line on stdin.

    Attributes:
        gpus: the replica's GPUs as the user numbers them, one a rank ([] on a CPU); CUDA_VISIBLE_DEVICES holds these.
        port: names the replica's group; nothing listens on it.
        plan: what was chosen before the start (a `Plan`; {} is none).
        t_start: time.monotonic() of the supervisor as it started this process (0: not known).
    """

    config: Mapping[str, Any]
    folder: str
    replica: int
    rank: int
    gpus: Sequence[int] = ()
    port: int = 0
    plan: Mapping[str, Any] = field(default_factory=dict)
    t_start: float = 0.0


class Reports:
    """The pipe to the supervisor; a supervisor that is gone is no error here (the kernel ends this process then).

    Args:
        descriptor: of the pipe, if there is one.
        t_start: when this process was started, time.monotonic().
    """

    def __init__(self, descriptor: int | None, t_start: float) -> None:
        self._descriptor = descriptor
        self._since = t_start
        self._name = "start"
        self.phases_s: dict[str, float] = {}

    def write(self, **line: Any) -> None:
        """One JSON line."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, json.dumps(line).encode() + b"\n")

    def phase(self, phase: Phase) -> None:
        """Where start-up is; the phase before it ends here."""
        now = time.monotonic()
        self.phases_s[self._name] = self.phases_s.get(self._name, 0.0) + now - self._since
        self._since, self._name = now, phase.name
        log.info("%s %s/%s %s", phase.name, phase.done, phase.total, phase.text)
        self.write(phase=asdict(phase))

    def failed(self, error: BaseException) -> None:
        """Why this rank cannot serve; the traceback, where the error is none of miinb's, is in `details`."""
        details = "" if isinstance(error, MiinbError) else "".join(traceback.format_exception(error))
        cause = named_error(error)
        self.write(
            failed={
                "error": type(cause).__name__,
                "message": cause.message,
                "hint": cause.hint,
                "details": details[-8000:],
            }
        )


def with_start(info: EngineInfo, planned: Mapping[str, Any], phases_s: Mapping[str, float]) -> EngineInfo:
    """The information with the whole plan: what was chosen before, what this rank found, what each phase took."""
    words = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases_s.items())
    plan = info.plan.with_line("start", f"{sum(phases_s.values()):.1f} s", words)
    if planned:
        plan = plan.following(Plan.from_dict(planned))
    return replace(info, plan=plan, phases_s=dict(phases_s))


def named_error(error: BaseException) -> MiinbError:
    """The error of miinb's tree that says best what ended start-up."""
    from miinb.engine.compute import is_out_of_memory

    if isinstance(error, MiinbError):
        return error
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if is_out_of_memory(error):
        return OutOfMemory(
            f"The model does not fit into memory: {first or type(error).__name__}.",
            hint="Take a smaller model, max_length or max_batch.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RankFailed(f"There is no space left to write {error.filename or 'a file'}.", hint="Free some.")
    return RankFailed(f"{type(error).__name__}: {first}")


class Server:
    """Rank 0's loop: drain the socket, compute a step, hand out what came of it."""

    def __init__(self, executor: Executor, sock: RankSocket) -> None:
        self.executor = executor
        self.socket = sock
        self._told = executor.info
        self._started = time.monotonic()
        self._spin_s = spin_s(executor.info.device)

    def run(self) -> None:
        """Until the frontend is gone (ConnectionError) or SIGTERM comes (SystemExit)."""
        while True:
            if self.executor.busy:
                self._handle(self.socket.receive(0.0))
            else:  # an idle rank sleeps in here
                self._handle(self.socket.receive(None, spin_s=self._spin_s))
            if self.executor.busy:
                self.executor.step(self.socket.send, self._poll)
                if self.executor.info is not self._told:  # a fallback while serving: the plan says so
                    self._told = self.executor.info
                    self.socket.send(self._told)
                self.socket.flush()

    def _poll(self) -> None:
        """Called within long steps: cancels come in, tokens go out."""
        self._handle(self.socket.receive(0.0))

    def _handle(self, messages: Sequence[ToRank]) -> None:
        for message in messages:
            if isinstance(message, CancelRow):
                self.executor.cancel(message.row_id, message.reason)
            elif isinstance(message, EngineStatus):
                self.socket.send(EngineStatus(self._status()))
            else:
                self._submit(message)

    def _submit(self, request: SequenceRequest | EncodeRequest | PaintRequest) -> None:
        try:
            if isinstance(request, SequenceRequest):
                self.executor.submit(request)
            elif isinstance(request, PaintRequest):
                self.executor.paint(request)
            else:
                self.executor.encode(request)
        except MiinbError as error:
            self.socket.send(FailedEvent(request.row_id, type(error).__name__, error.message, error.hint))

    def _status(self) -> dict[str, Any]:
        return {**self.executor.status(), **device_memory(), "uptime_s": time.monotonic() - self._started}


def device_memory() -> dict[str, int]:
    """What this process has reserved on its GPU; empty on a CPU."""
    import torch

    return {"memory_bytes": torch.cuda.memory_reserved()} if torch.cuda.is_available() else {}


def warm_up(executor: Executor) -> None:
    """Generate a few tokens, encode a text or make a picture: a process's first steps build what all later ones use.

    Raises:
        OutOfMemory: not even that fits.
    """
    info, now = executor.info, time.monotonic()
    if TASKS[info.task].streams:
        params = GenerationParams(max_new_tokens=4, ignore_eos=True, seed=0)
        prompt = [0] * min(16, info.max_length - params.max_new_tokens)
        executor.submit(SequenceRequest(-1, prompt, params, now))
    elif TASKS[info.task].image:
        from miinb.engine.diffusion import ImageExecutor, warm_up_request

        executor.paint(warm_up_request(cast(ImageExecutor, executor), now))
    else:
        text = [0] * min(16, info.max_length)
        executor.encode(EncodeRequest(-1, text, [len(text)], now, wanted=[0] if info.task == "fill-mask" else []))
    events: list[object] = []
    while executor.busy:
        executor.step(events.append, lambda: None)
    failure = events[-1]
    if isinstance(failure, FailedEvent):
        log.warning("the first tokens failed: %s: %s", failure.error, failure.message)
        if failure.error == OutOfMemory.__name__:
            raise OutOfMemory(failure.message, hint="Take a smaller model, max_length or max_batch.")


def serve(order: Order, reports: Reports) -> None:
    """Load, connect, and run.

    Raises:
        MiinbError: the model cannot be served as asked.
        ConnectionError: the frontend is gone.
    """
    config = DeploymentConfig.from_json(json.dumps(order.config))
    folder = Path(order.folder)
    from miinb.engine.compile_job import CompileJob

    kernels = CompileJob.start(config, order.rank)
    from miinb.engine.followers import Following
    from miinb.engine.loading import load_rank  # torch: seconds
    from miinb.engine.parallel import PeerLost, leave_group

    loaded = load_rank(
        config,
        replica=order.replica,
        rank=order.rank,
        gpus=range(len(order.gpus)) if order.gpus else None,  # as CUDA numbers the visible ones
        folder=folder,
        report=reports.phase,
        kernels=kernels,
    )
    try:
        if isinstance(loaded, Following):
            _freeze()
            reports.write(ready=_facts(loaded.info))
            loaded.run()
        else:
            _lead(loaded, order, reports)
    finally:
        loaded.close()
        if not isinstance(sys.exception(), PeerLost):  # leaving would wait for the others
            leave_group()


def _lead(executor: Executor, order: Order, reports: Reports) -> None:
    """Rank 0's life once its model is there."""
    reports.phase(Phase("verify", text="first tokens"))
    warm_up(executor)
    _freeze()
    sock = RankSocket.connect(Path(order.folder, "engine.sock"))
    reports.phase(Phase("ready"))
    executor.info = info = with_start(executor.info, order.plan, reports.phases_s)
    sock.send(info)
    sock.flush()
    reports.write(ready=_facts(info))
    log.info("ready\n%s", info.plan)
    Server(executor, sock).run()


def _freeze() -> None:
    """What start-up made lives as long as the process: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def _facts(info: EngineInfo) -> dict[str, Any]:
    """What the supervisor is told of a rank that is ready."""
    return {
        "engine": info.engine,
        "dtype": info.dtype,
        "device": info.device,
        "weights_bytes": info.plan.weights_bytes,
        "kv_cache_bytes": info.plan.kv_cache_bytes,
        "graphs_bytes": info.plan.graphs_bytes,
        **device_memory(),
    }


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(0)


def main() -> int:
    """Run one rank.

    Exit code 0: told to end, or the frontend or rank 0 is gone; 1: it failed, and the supervisor knows why;
    `PEER_LOST`: another rank failed, and is the one to blame.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the Stop button is not for this process
    signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    descriptor = os.environ.pop("MIINB_STATUS_FD", None)
    order = from_dict(Order, json.loads(sys.stdin.readline()))
    reports = Reports(int(descriptor) if descriptor else None, order.t_start or time.monotonic())
    os.environ["MASTER_PORT"] = str(order.port)
    reports.phase(Phase("start"))
    try:
        serve(order, reports)
    except ConnectionError as error:
        log.info("the frontend is gone: %s", error)
        return 0
    except Exception as error:
        log.exception("this rank failed")
        if type(error).__name__ == "PeerLost":  # its class comes with PyTorch, whose import may be what failed
            os._exit(PEER_LOST)
        reports.failed(error)
        if type(error).__name__ == "OutOfStep":  # leaving in good order would wait for the others
            os._exit(1)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
