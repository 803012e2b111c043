"""The kernel's end of one deployment: starting its supervisor, holding the lifeline, asking, and ending it provably.

A deployment that this process started lives as long as the process (not as any object), unless it is stopped or kept.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from miinb import registry
from miinb.config import DeploymentConfig
from miinb.errors import (
    DeploymentNotFound,
    Interrupted,
    InvalidValue,
    MiinbError,
    StartError,
    StartTimeout,
    Unavailable,
    all_errors,
    from_name,
)
from miinb.hardware import gpu_processes
from miinb.launching import check_port, spawn
from miinb.log_files import last_lines
from miinb.messages import Phase, Plan, Status, from_dict

#: What the supervisor has for ending everything after its own time limit, before this side gives up on it.
_SLACK_S = 15.0
#: A supervisor that is asked to stop and does not answer for so long is told by signal; then it has as long once more.
_HANG_S = 3.0
#: A supervisor that runs and says nothing for so long while it renews replicas hangs.
_SILENT_S = 60.0
_ROLL_POLL_S = 0.1
#: Programs that tests put in the place of the frontend and the worker.
_modules: dict[str, str] = {}

_owned: list[Deployment] = []


class Deployment:
    """One deployment that runs: owned (this process holds its lifeline) or joined.

    Attributes:
        entry: what the registry knows of it.
        failure: why it ended by itself, once that is known.
        ending: whether this process has ordered its end.
        stopped: whether this process has ended it.
    """

    def __init__(self, entry: registry.Entry, process: subprocess.Popen[bytes] | None = None, lifeline: int = -1):
        self.entry = entry
        self.failure: MiinbError | None = None
        self.ending = self.stopped = False
        self._process = process
        self._lifeline = lifeline
        self._output = b""
        self._last: Status | None = None
        self._lock = threading.RLock()  # of the process: several threads may end it

    # Starting and joining

    @classmethod
    def start(
        cls,
        config: DeploymentConfig,
        *,
        name: str,
        task: str,
        on_phase: Callable[[Phase], None],
        plan: Plan | None = None,
    ) -> Deployment:
        """Start a deployment and wait until it is ready; on any failure nothing is left.

        Args:
            config: resolved: what the ranks get.
            name: the deployment's.
            task: what it serves.
            on_phase: told where the start is.
            plan: what was chosen before the start; the deployment's own plan goes on from it.

        Raises:
            StartError: it did not start; `details` has the log's tail. Other classes by the cause.
            DeploymentExists: another one has the name.
            Interrupted: the user stopped the wait.
        """
        if config.port:
            check_port(config.port)
        folder = registry.folder_of(name)
        order = {
            "config": {**config.model_dump(mode="json"), "name": name, "task": task},
            "name": name,
            "folder": str(folder),
            "kernel_pid": os.getpid(),
            "task": task,
            "plan": dataclasses.asdict(plan) if plan is not None else {},
            "modules": _modules,
        }
        with tempfile.TemporaryFile() as errors:
            process, lifeline = spawn(order, errors.fileno(), persist=config.persist)
            self = cls(_entry_before_it_is_written(name, folder, process.pid), process, lifeline)
            _owned.append(self)
            try:
                self._wait_ready(config.start_timeout_s + _SLACK_S, on_phase)
            except BaseException as error:
                self._abort()
                self.stop()
                if isinstance(error, StartError) and not error.details:
                    errors.seek(0)
                    error.details = errors.read()[-4000:].decode("utf-8", errors="replace")
                if isinstance(error, KeyboardInterrupt):
                    raise Interrupted(f"The start of {name!r} was stopped; nothing is left of it.") from None
                raise
        return self

    @classmethod
    def join(cls, name: str) -> Deployment:
        """The running deployment of that name.

        Raises:
            DeploymentNotFound: there is none, or it is not ready yet.
            VersionMismatch: another version of miinb started it.
        """
        entry = registry.find(name)
        if entry.state == "starting":
            raise DeploymentNotFound(f"Deployment {name!r} is still starting.", hint="Try again when it is ready.")
        if entry.state != "ready":
            raise DeploymentNotFound(f"Deployment {name!r} is ending.", hint="Start it again when it has ended.")
        owned = next((one for one in _owned if one.entry.instance_id == entry.instance_id), None)
        return owned or cls(entry)

    def _wait_ready(self, limit_s: float, on_phase: Callable[[Phase], None]) -> None:
        deadline = time.monotonic() + limit_s
        for line in self._lines(deadline):
            if "phase" in line:
                on_phase(from_dict(Phase, line["phase"]))
            elif "failed" in line:
                raise _error(line["failed"])
            elif "ready" in line:
                entry = registry.load_entry(Path(self.entry.folder))
                if entry is None:
                    raise StartError(f"Deployment {self.entry.name!r} lost its folder while it started.")
                self.entry = entry
                return
        if time.monotonic() >= deadline:
            raise StartTimeout(f"The supervisor of {self.entry.name!r} did not answer within {limit_s:g} s.")
        code = self._process.wait() if self._process else None
        raise StartError(f"The supervisor of {self.entry.name!r} ended during start-up (exit code {code}).")

    def _lines(self, deadline: float) -> Iterator[dict[str, Any]]:
        """JSON lines of the supervisor until it ends or the deadline passes."""
        if self._process is None or self._process.stdout is None:
            return
        output = self._process.stdout.fileno()
        while True:
            while b"\n" in self._output:
                line, _, self._output = self._output.partition(b"\n")
                yield json.loads(line)
            left = deadline - time.monotonic()
            if not select.select([output], [], [], max(0.0, left))[0]:
                return
            piece = os.read(output, 1 << 16)
            if not piece:
                return
            self._output += piece

    # Asking

    @property
    def owned(self) -> bool:
        """Whether it ends with this process."""
        return self._lifeline >= 0

    def status(self, *, timeout_s: float = 5.0) -> Status:
        """Its status now.

        "stopped": another process has ended it, or its time limit has; who only joined it cannot tell that from "lost",
        which is one that was killed, or does not answer. "failed": it could not go on.
        """
        if self.stopped and self._last is not None:
            return self._last
        try:
            answer = registry.ask(self.entry, "status", timeout_s=timeout_s)
        except Unavailable:
            self._look_for_failure()
            process = self._process
            in_order = process is not None and process.poll() == 0
            over = "failed" if self.failure else "stopped" if in_order else "lost"
            state = over if over != "lost" else registry.last_state(self.entry) or over
            return _over(self._last or registry.without_answer(self.entry, state), state)
        self._last = Status.from_dict(answer["status"])
        return self._last

    def _look_for_failure(self) -> None:
        with self._lock:
            for line in self._lines(time.monotonic()):
                if "failed" in line:
                    self.failure = _error(line["failed"])

    def keep(self) -> None:
        """Let it live on when this process ends, until it has been idle for its limit."""
        registry.ask(self.entry, "keep")
        self._drop_lifeline()
        self.entry = dataclasses.replace(self.entry, persist=True)

    def logs(self, lines: int, rank: int | None) -> str:
        """The last lines of every log, or of one rank's (counted over all replicas).

        Raises:
            InvalidValue: there is no such rank.
        """
        text = last_lines(Path(self.entry.folder, "logs"), lines, rank)
        if not text:
            self._look_for_failure()
        return text or str(self.failure or "")

    # Ending

    def stop(self, *, drain_s: float = 0.0, timeout_s: float = 30.0) -> Status:
        """End it and return when every process is gone and the GPUs are free: its last status, "stopped".

        Raises:
            MiinbError: something is left after `timeout_s`; the message names it.
        """
        last = self.status(timeout_s=_HANG_S)
        pids = {self.entry.pid}
        try:
            if last.state in ("failed", "lost"):
                raise Unavailable("It does not answer.")
            pids.update(registry.ask(self.entry, "stop", drain_s=drain_s)["pids"])
            self.ending = True
        except Unavailable:
            self.ending = True
            pids.update(self._end_without_answer(drain_s + _HANG_S))
            self._drop_lifeline()
        deadline = time.monotonic() + drain_s + timeout_s
        self._reap(deadline)
        while left := _left(pids):
            if time.monotonic() > deadline:
                raise MiinbError(f"Deployment {self.entry.name!r} is not gone: {left}.", hint="Try stop() again.")
            time.sleep(0.02)
        self._drop_lifeline()  # not before: to the supervisor it is this process's death, and nothing drains for that
        registry.entries()  # sweeps what a supervisor that died could not
        self._last, self.stopped = _over(last, "stopped"), True
        return self._last

    def roll(self, *, drain_s: float) -> Status:
        """Renew the replicas one after another while the others serve; returns when all are new and ready.

        Raises:
            InvalidValue: there is one replica.
            Unavailable: it is not ready, or its replicas are being renewed already.
            StartError, ModelError: a replica did not start again (the others serve), or all has ended.
        """
        if self.entry.config.get("replicas", 1) == 1:
            raise InvalidValue(
                "rolling: one replica serves this.", hint="restart() without it; nothing serves meanwhile."
            )
        registry.ask(self.entry, "roll", drain_s=drain_s)
        heard = time.monotonic()
        while True:
            status = self.status(timeout_s=_HANG_S)
            if status.state == "lost" and self.entry.alive and time.monotonic() - heard < _SILENT_S:
                time.sleep(_ROLL_POLL_S)  # on a busy machine an answer may be late
                continue
            if status.state in ("failed", "lost", "stopped", "draining"):
                self._look_for_failure()
                raise self.failure or StartError(f"{self.entry.name} ended while its replicas were renewed.")
            heard = time.monotonic()
            news = registry.ask(self.entry, "rolling", timeout_s=_SILENT_S)
            if news["failure"]:
                raise _error(news["failure"])
            if status.state == "ready" and not news["active"]:
                return status
            time.sleep(_ROLL_POLL_S)

    def _abort(self) -> None:
        """Order the end without waiting, so that a second interrupt cannot lose it."""
        self._drop_lifeline()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _end_without_answer(self, patience_s: float) -> set[int]:
        """The supervisor did not take the order: it is starting, gone, or hangs. The processes that it had.

        It is told by signal, also if it is stopped (SIGSTOP), and killed if it does not act on that; its children are
        bound to die with it.
        """
        pid = self.entry.pid
        alive = self.entry.alive if self._process is None else self._process.poll() is None
        if not alive:
            return set()
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            children = {child.pid for child in psutil.Process(pid).children(recursive=True)}
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGCONT)
            with contextlib.suppress(psutil.TimeoutExpired):
                psutil.Process(pid).wait(patience_s)
                return children
            os.kill(pid, signal.SIGKILL)
            return children
        return set()

    def _reap(self, deadline: float) -> None:
        with contextlib.suppress(ValueError):
            _owned.remove(self)
        process = self._process
        if process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        with self._lock:
            if self._process is not None and process.stdout is not None and process.poll() is not None:
                self._look_for_failure()
                process.stdout.close()
                self._process = None

    def _drop_lifeline(self) -> None:
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)

    def forget(self) -> None:
        """In a forked child: this copy owns nothing."""
        self._drop_lifeline()
        self._process = None


def _over(last: Status, state: str) -> Status:
    """The last status of a deployment that does nothing any more."""
    return dataclasses.replace(last, state=state, ranks=(), in_flight=0, queued=0)


def _entry_before_it_is_written(name: str, folder: Path, pid: int) -> registry.Entry:
    ticks = registry.start_ticks(pid) or 0
    return registry.Entry(name, "", pid, ticks, registry.boot_id(), "", {}, folder=str(folder))


def _error(failed: Mapping[str, str]) -> MiinbError:
    name, message = failed.get("error", ""), failed.get("message", "It did not start.")
    if name not in all_errors():  # of Python or of a library
        name, message = "StartError", f"{name}: {message}" if name else message
    return from_name(name, message, failed.get("details", ""), hint=failed.get("hint", ""))


def _left(pids: set[int]) -> str:
    """What is left of these processes, in words; "" when they are gone and hold no GPU memory."""
    alive = [pid for pid in pids if registry.start_ticks(pid) is not None]
    if alive:
        return f"processes {alive}"
    holding = pids & gpu_processes()
    return f"GPU memory of processes {sorted(holding)}" if holding else ""


def _at_exit() -> None:
    for deployment in [one for one in _owned if one.owned]:
        with contextlib.suppress(MiinbError):
            deployment.stop(timeout_s=5.0)


def _in_child() -> None:
    for deployment in _owned:
        deployment.forget()
    _owned.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_child)


def deployments() -> list[Status]:
    """The deployments of this user on this machine, by name; state "lost" for one that does not answer."""
    found: list[Status] = []
    for entry in registry.entries():
        try:
            found.append(Status.from_dict(registry.ask(entry, "status")["status"]))
        except Unavailable:
            state = registry.last_state(entry)
            if entry.alive and state is not None:
                found.append(registry.without_answer(entry, state))
    return found
