"""The process that a kernel starts: it starts, watches and ends all others of a deployment.

`python -m miinb.server.supervisor`, one JSON line on stdin (`Order`), then stdin is a lifeline: when it ends, or the
kernel's process does, everything ends. One thread, one loop over all descriptors; children are started from it, because
their death signal is tied to the thread that started them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miinb import __version__, registry
from miinb.config import DeploymentConfig
from miinb.errors import MiinbError
from miinb.messages import Status
from miinb.server.children import Children
from miinb.server.control import ControlSocket
from miinb.server.launch import Launch
from miinb.server.owner import Order, Owner, read_order, tell
from miinb.server.process import Process, culprit, machine_oom_kills
from miinb.server.rank_status import rank_statuses
from miinb.server.restarts import MAX_RESTARTS, Restarts
from miinb.server.rolling import Rolling
from miinb.server.watchdog import Pulse, Watchdog

DRAIN_S = 10.0  # for SIGTERM
GRACE_S = 1.0  # between SIGTERM and SIGKILL of a child
ABANDONED_S = 0.2  # the same, when nobody is left who could want an answer


class Supervisor:
    """A deployment's life: starting, ready, draining, then stopped or failed."""

    def __init__(self, order: Order, lock: int) -> None:
        self.order = order
        self.config = DeploymentConfig.from_json(json.dumps(order.config))
        self.folder = Path(order.folder)
        self.lock = lock
        self.launch = Launch(order, self.config)
        self.state = "starting"
        self.persist = self.config.persist
        self.started = self.last_active = time.monotonic()
        self.start_deadline: float | None = self.started + self.config.start_timeout_s
        self.end_at: float | None = None  # draining ends then
        self.restarts = Restarts()
        self.served = False  # it was ready once: a replica that ends is started again
        self.grace_s = GRACE_S
        self.activity: dict[str, int] = {}
        self.selector = selectors.DefaultSelector()
        self.children = Children(self.selector, ended=self._ended, reported=self._reported)
        self.owner: Owner | None = None  # nobody's if it persists
        self.oom_kills = machine_oom_kills()
        self.watchdog = Watchdog()
        self.pulse = Pulse(self.started)  # the frontend's
        self.rolling = Rolling()
        self.control = ControlSocket(self.folder / "control.sock", self.selector, self._answer)
        self.entry = registry.Entry(
            name=order.name,
            instance_id=self.launch.instance_id,
            pid=os.getpid(),
            start_ticks=registry.start_ticks(os.getpid()) or 0,
            boot_id=registry.boot_id(),
            version=__version__,
            config=order.config,
            persist=self.persist,
            started_at=time.time(),
            ports=tuple(self.launch.ports),
        )

    # The loop

    def run(self) -> None:
        """Until the deployment has ended; everything that it had is gone then."""
        try:
            self.entry.save(self.folder)
            self._watch_signals()
            if not self.persist:
                self.owner = Owner(self.selector, self.order.kernel_pid, self._kernel_gone)
            tell({"phase": {"name": "start"}})
            self.children.start(self.launch.frontend())
            for replica in range(self.config.replicas):
                self._start_replica(replica)
            while self.end_at is None or (self.end_at > time.monotonic() and self.children.frontend is not None):
                for key, _ in self.selector.select(self._patience()):
                    if self.selector.get_map().get(key.fd) == key:  # the ones before it may have ended its process
                        key.data()
                self._watch_time()
        except Exception as error:
            details = traceback.format_exc()
            log(details)
            message = f"The supervisor failed: {error}."
            self._fail({"error": "StartError", "message": message, "hint": "", "details": details})
        finally:
            self.children.end(self.children, self.grace_s)
            self.control.close()
            registry.release(self.folder, self.lock)

    def _watch_signals(self) -> None:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self.selector.register(wake_read, selectors.EVENT_READ, lambda: self._terminated(wake_read))

    def _terminated(self, wake_fd: int) -> None:
        if signal.SIGTERM in os.read(wake_fd, 64):
            self.end(DRAIN_S if self.state == "ready" else 0.0)

    def _kernel_gone(self) -> None:
        self.grace_s = ABANDONED_S
        self.end(0.0)

    def _patience(self) -> float | None:
        """Seconds until the next thing that depends on time."""
        moments = [self.end_at or self.start_deadline, self.pulse.due, self.rolling.leave_by]
        if self.persist and self.state == "ready":
            moments.append(self.last_active + self.config.idle_timeout_s)
        due = [moment for moment in moments if moment is not None and math.isfinite(moment)]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _watch_time(self) -> None:
        now = time.monotonic()
        if self.start_deadline is not None and now >= self.start_deadline and self.end_at is None:
            late = min(self.children, key=lambda child: child.ready is not None)  # the first that is not
            where = f"in phase {late.phase.name}" if late.phase else "before its first report"
            cause = late.cause(starting=True)
            message = f"{late.label} was not ready after {self.config.start_timeout_s:g} s ({where})."
            hint = "Give start_timeout_s more" + (", or look at the log below." if cause["details"].strip() else ".")
            cause = {**cause, "error": "StartTimeout", "message": message, "hint": hint}
            if self.served and self._others(late.replica):
                self.start_deadline = None
                late.failure = cause
                late.signal_group(signal.SIGKILL)  # its replica gets another try, and the others serve
            else:
                self._fail(cause)
        elif self.persist and self.state == "ready" and now >= self.last_active + self.config.idle_timeout_s:
            self.end(0.0)
        if self.pulse.check(now) and self.end_at is None:
            self._suspect(None, self.pulse.silent_s)
        if self.rolling.leave_by is not None and now >= self.rolling.leave_by:
            for child in self.children.of_replica(self.rolling.leaving):
                child.signal_group(signal.SIGKILL)
            self.rolling.leave_by = None

    # Children

    def _start_replica(self, replica: int) -> None:
        self.launch.fresh_rendezvous(replica)
        for rank in range(self.config.tensor_parallel):
            self.children.start(self.launch.rank(replica, rank))

    def _reported(self, child: Process) -> None:
        if child.replica is None:
            self.pulse.heard()
        for report in child.reports():
            if "ready" in report:
                self.restarts.ready(child.replica)
            if "activity" in report:
                self._active(report["activity"])
            elif "silent" in report:
                self._suspect(**report["silent"])
            elif "phase" in report and child.replica == 0 and child.rank == 0 and self.state == "starting":
                tell({"phase": report["phase"]})
        if child.failure is not None and not self.served:
            self._fail(child.cause(starting=True))
        elif self.state == "starting" and self._all_ready:
            self._ready()
        if child.silent:
            self.children.unhear(child)

    @property
    def _all_ready(self) -> bool:
        """Every process says so, and the frontend gives requests to every replica that is not given up."""
        serving = self.config.replicas - len(self.restarts.given_up)
        ready = all(child.ready is not None for child in self.children)
        return ready and self.activity.get("replicas", 0) >= serving

    def _ready(self) -> None:
        self.state, self.served = "ready", True
        self.start_deadline = None
        self.last_active = time.monotonic()
        frontend = self.children.frontend
        told = (frontend.ready or {}) if frontend else {}
        address, tcp = str(told.get("address", "")), str(told.get("tcp", ""))
        self.entry = dataclasses.replace(
            self.entry, state="ready", address=address, tcp_address=tcp, persist=self.persist
        )
        self.entry.save(self.folder)
        tell({"phase": {"name": "ready"}})
        tell({"ready": {"address": address, "pid": os.getpid(), "instance_id": self.entry.instance_id}})
        self._roll()

    def _begin_to_roll(self, drain_s: float) -> None:
        """Those that were given up first: nothing has to end for them."""
        again = sorted(self.restarts.given_up)
        self.rolling.begin((n for n in range(self.config.replicas) if n not in again), drain_s)
        self.restarts.begin_anew()
        for replica in again:
            self._renew(replica)
        if not again:
            self._roll()

    def _roll(self) -> None:
        """All replicas are ready: the next one to be renewed may leave."""
        order, frontend = self.rolling.next(), self.children.frontend
        if order is not None and frontend is not None:
            frontend.tell(order)

    def _active(self, activity: dict[str, int]) -> None:
        busy = bool(activity.get("in_flight") or activity.get("queued"))
        was_busy = bool(self.activity.get("in_flight") or self.activity.get("queued"))
        if busy or was_busy or activity.get("requests") != self.activity.get("requests"):
            # while busy the next report moves this on; the limit counts from the end of the last request
            self.last_active = math.inf if busy else time.monotonic()
        self.activity = activity

    def _suspect(self, replica: int | None, seconds: float) -> None:
        """A replica, or the frontend (None), owes an answer. One that hangs is killed, and so started again."""
        silent = {child.pid: child for child in self.children.of_replica(replica) if child.ready is not None}
        worst = self.watchdog.hangs(replica, seconds, [*silent]) if silent else None
        if worst is not None:
            message = f"{silent[worst].label} has not answered for {seconds:.0f} s: it hangs and is killed."
            log(message)
            for child in silent.values():
                child.failure = {"error": "Unavailable", "message": message}
                child.signal_group(signal.SIGKILL)

    def _ended(self, child: Process) -> None:
        ranks = self.children.of_replica(child.replica)
        for rank in ranks:
            self._reported(rank)
        child = culprit(ranks, child)
        self.children.forget(child)
        if self.end_at is not None:
            return
        if self.rolling.has_left(child.replica):
            log(f"Replica {child.replica} has left; it is started again.")
            self._renew(child.replica)
        elif not self.served:
            self._fail(child.cause(starting=True, oom_kills=machine_oom_kills() - self.oom_kills))
        else:
            self._lost(child)

    def _others(self, replica: int | None) -> bool:
        """Whether there are other replicas than this one; the frontend (None) is no replica's alone."""
        return replica is not None and any(child.replica not in (None, replica) for child in self.children)

    def _lost(self, dead: Process) -> None:
        """Start the dead one's replica again (all, if it was the frontend); after some times the others go on alone."""
        cause = dead.cause(starting=False, oom_kills=machine_oom_kills() - self.oom_kills)
        self.rolling.stop(cause)
        number = self.restarts.count(dead.replica)
        if number is not None:
            log(f"{dead.label} ended: {cause['message']} Restart {number} of {MAX_RESTARTS}")
            self._renew(dead.replica)
            return
        cause["hint"] = f"{cause['hint']} It was restarted {MAX_RESTARTS} times.".strip()
        if dead.replica is None or not self._others(dead.replica):
            self._fail(cause)
            return
        log(f"Replica {dead.replica} is given up, the others go on: {cause['message']} {cause['hint']}")
        self.restarts.given_up.add(dead.replica)
        self.children.end(self.children.of_replica(dead.replica), self.grace_s)
        if self._all_ready:
            self._ready()

    def _renew(self, replica: int | None) -> None:
        """Start a replica again, or everything (None); what is left of it ends first."""
        self.watchdog.forget(replica)
        self.children.end(self.children.of_replica(replica) if replica is not None else self.children, self.grace_s)
        if replica is None:
            self.rolling.stop()
            self.restarts.given_up.clear()
            self.activity = {}
            self.children.start(self.launch.frontend())
        for number in [replica] if replica is not None else range(self.config.replicas):
            self._start_replica(number)
        self.state = "starting"
        self.last_active = time.monotonic()
        self.start_deadline = time.monotonic() + self.config.start_timeout_s

    # Ends

    def end(self, drain_s: float) -> None:
        """Leave the loop when the requests in flight are done, after `drain_s` at the latest."""
        draining, self.end_at = self.end_at is not None, min(self.end_at or math.inf, time.monotonic() + drain_s)
        self.state = "draining" if self.state != "failed" else self.state
        self.entry = dataclasses.replace(self.entry, state=self.state)
        with contextlib.suppress(OSError):  # a full disk is no reason to live on
            self.entry.save(self.folder)
        frontend = self.children.frontend
        if drain_s > 0 and frontend is not None and not draining:  # told twice, it ends at once
            frontend.signal_group(signal.SIGTERM)  # it refuses new requests, finishes the others and leaves

    def _fail(self, cause: Mapping[str, str]) -> None:
        self.state = "failed"
        log(f"failed: {cause['message']}")
        tell({"failed": dict(cause)})
        self.end(0.0)

    # Questions

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        command = question.get("command")
        if question.get("instance_id") != self.entry.instance_id:
            raise ValueError("another deployment has its name now")
        answer: dict[str, Any] = {}
        if command == "status":
            answer["status"] = dataclasses.asdict(self.status())
        elif command == "stop":
            answer["pids"] = [os.getpid(), *(child.pid for child in self.children)]
            self.end(float(question.get("drain_s", 0.0)))
        elif command == "keep":
            self._keep()
        elif command == "roll":
            if self.state != "ready" or self.rolling.active:
                raise ValueError("it is not ready, or its replicas are being renewed already")
            self._begin_to_roll(float(question.get("drain_s", DRAIN_S)))
        elif command == "rolling":
            answer = {"active": self.rolling.active, "failure": self.rolling.failure}
        else:
            raise ValueError(f"there is no command {command!r}")
        return answer

    def _keep(self) -> None:
        if self.persist:
            return
        kept = dataclasses.replace(self.entry, persist=True)
        kept.save(self.folder)  # first: on a full disk it stays as it was
        self.entry, self.persist = kept, True
        self.last_active = max(self.last_active, time.monotonic())
        if self.owner is not None:
            self.owner.release()

    def status(self) -> Status:
        """The deployment at this moment."""
        config, known = self.config, next((c.ready for c in self.children if c.replica == 0 and c.ready), {})
        phase = next((child.phase for child in self.children if child.phase and child.ready is None), None)
        return Status(
            name=self.order.name,
            state=self.state,
            model=config.model,
            task=self.order.task or config.task or "",
            engine=str(known.get("engine", config.engine)),
            dtype=str(known.get("dtype", config.dtype)),
            device=str(known.get("device", config.device)),
            address=self.entry.address,
            tcp_address=self.entry.tcp_address,
            pid=os.getpid(),
            persist=self.persist,
            uptime_s=time.monotonic() - self.started,
            in_flight=self.activity.get("in_flight", 0),
            queued=self.activity.get("queued", 0),
            requests=self.activity.get("requests", 0),
            kv_dtype=config.kv_dtype,
            ranks=rank_statuses(self.children, self.launch, self.restarts.given_up),
            phase=phase,
        )


def log(text: str) -> None:
    """One line into supervisor.log."""
    with contextlib.suppress(OSError):  # a full disk is no reason to end
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Run one deployment from start to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the Stop button must not reach it
    order = read_order()
    folder = Path(order.folder)
    try:
        lock = registry.claim(folder)
        (folder / "logs").mkdir(mode=0o700)
        errors = os.open(folder / "logs" / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(errors, 2)
        supervisor = Supervisor(order, lock)
    except (MiinbError, OSError) as error:
        hint = getattr(error, "hint", "")
        name = type(error).__name__ if isinstance(error, MiinbError) else "StartError"
        tell({"failed": {"error": name, "message": getattr(error, "message", str(error)), "hint": hint}})
        return 1
    supervisor.run()
    return 1 if supervisor.state == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
