"""The supervisor with real processes: the children are stand-ins, everything else is the real thing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import miinb
from miinb import deployment, launching, registry
from miinb.config import DeploymentConfig
from miinb.deployment import Deployment
from miinb.errors import (
    BrokenCheckpoint,
    DeploymentExists,
    DeploymentNotFound,
    MiinbError,
    OutOfMemory,
    RankFailed,
    StartError,
    StartTimeout,
    Unavailable,
)
from miinb.messages import Phase

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent.parent), str(HERE)]))
    monkeypatch.setattr(deployment, "_modules", {"frontend": "stand_in", "worker": "stand_in"})
    yield
    for one in list(deployment._owned):
        one.stop()
    for entry in registry.entries():
        os.kill(entry.pid, signal.SIGKILL)


def start(name: str = "m", phases: list[str] | None = None, **fields: object) -> Deployment:
    config = DeploymentConfig.parse({"model": "tiny", "device": "cpu", "start_timeout_s": 30.0, **fields})

    def on_phase(phase: Phase) -> None:
        if phases is not None:
            phases.append(phase.name)

    return Deployment.start(config, name=name, task="text-generation", on_phase=on_phase)


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def ranks(one: Deployment) -> list[int]:
    return [rank.pid for rank in one.status().ranks]


def gone(pid: int) -> bool:
    return registry.start_ticks(pid) is None


def test_a_deployment_starts_answers_and_leaves_nothing(tmp_path: Path) -> None:
    phases: list[str] = []
    one = start(phases=phases, replicas=2)
    status = one.status()
    assert phases == ["start", "load", "ready"]
    assert (status.name, status.state, status.task, status.persist) == ("m", "ready", "text-generation", False)
    assert [(rank.replica, rank.rank, rank.state) for rank in status.ranks] == [(0, 0, "ready"), (1, 0, "ready")]
    assert status.address == f"unix:{one.entry.folder}/rpc.sock"
    assert oct(os.stat(one.entry.folder).st_mode & 0o777) == "0o700"
    assert "==> rank-1-0.log <==" in one.logs(5, None)
    pids = [status.pid, *ranks(one)]
    assert one.stop().state == "stopped"
    assert all(gone(pid) for pid in pids)
    assert list((tmp_path / "miinb").iterdir()) == []
    assert one.stop().state == "stopped"  # again: nothing to do


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ("fail", BrokenCheckpoint, "weights.safetensors is damaged"),
        ("crash", RankFailed, "Rank 0 of replica 0 ended during start-up (exit code 3)"),
        ("memory", OutOfMemory, "ended during start-up"),
        ("killed", RankFailed, "signal SIGKILL"),
    ],
)
def test_a_failed_start_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, error: type[MiinbError], words: str
) -> None:
    monkeypatch.setenv("STAND_IN", asked)
    with pytest.raises(error) as caught:
        start()
    assert words in caught.value.message
    if asked == "crash":
        assert "something broke" in caught.value.details
    assert list((tmp_path / "miinb").iterdir()) == []


def test_a_start_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "hang")
    with pytest.raises(StartTimeout, match=r"not ready after 1 s \(in phase load\)"):
        start(start_timeout_s=1.0)
    assert registry.entries() == []


def test_a_supervisor_that_cannot_run_shows_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_SUPERVISOR", "miinb.server.no_such_module")
    with pytest.raises(MiinbError, match="ended during start-up") as caught:
        start()
    assert "no_such_module" in caught.value.details


def test_one_winner_a_name() -> None:
    one = start()
    with pytest.raises(DeploymentExists, match="'m'"):
        start()
    assert one.status().state == "ready"


def test_a_dead_rank_is_started_again_three_times() -> None:
    one = start()
    for _ in range(3):
        before = ranks(one)
        os.kill(before[0], signal.SIGKILL)
        until(lambda before=before: one.status().state == "ready" and ranks(one) != before)  # type: ignore[misc]
    os.kill(ranks(one)[0], signal.SIGKILL)
    until(lambda: one.status().state == "failed")
    assert one.failure is not None
    assert "while it served (signal SIGKILL)" in one.failure.message
    assert "restarted 3 times" in one.failure.hint
    until(lambda: registry.entries() == [])


def test_a_dead_frontend_takes_all_with_it_and_all_come_back() -> None:
    one = start()
    before = ranks(one)
    os.kill(_frontend(one), signal.SIGKILL)
    until(lambda: one.status().state == "ready" and ranks(one) != before)
    assert gone(before[0])


def test_a_replica_that_hangs_is_started_again() -> None:
    one = start()
    before = ranks(one)
    os.kill(before[0], signal.SIGSTOP)
    frontend = _frontend(one)
    for _ in range(3):  # it tells of 1, 21 and 41 s of silence
        os.kill(frontend, signal.SIGUSR2)
        time.sleep(0.1)
    until(lambda: ranks(one) not in ([], before) and one.status().state == "ready")
    assert "it hangs and is killed" in one.logs(5, None)


def test_a_frontend_that_hangs_is_started_again() -> None:
    one = start()
    before = ranks(one)
    os.kill(_frontend(one), signal.SIGSTOP)
    until(lambda: ranks(one) not in ([], before) and one.status().state == "ready", 40.0)
    assert "The frontend has not answered" in one.logs(5, None)


@pytest.mark.parametrize("joined", [False, True])
def test_a_supervisor_that_hangs_is_ended_all_the_same(tmp_path: Path, joined: bool) -> None:
    one = start()
    pids = [one.entry.pid, _frontend(one), *ranks(one)]
    os.kill(one.entry.pid, signal.SIGSTOP)
    began = time.monotonic()
    last = (Deployment(one.entry) if joined else one).stop()
    assert last.state == "stopped"
    assert time.monotonic() - began < 12.0
    assert all(gone(pid) for pid in pids)
    assert list((tmp_path / "miinb").iterdir()) == []


def _frontend(one: Deployment) -> int:
    children = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(p) == one.entry.pid]
    (frontend,) = set(children) - set(ranks(one))
    return frontend


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_a_persistent_deployment_ends_when_idle_and_not_before(tmp_path: Path) -> None:
    one = start(persist=True, idle_timeout_s=1.5)
    frontend = next(
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and _parent(p) == one.entry.pid and int(p.name) not in ranks(one)
    )
    os.kill(frontend, signal.SIGUSR1)  # one request is in flight, for longer than the limit
    time.sleep(2.0)
    assert one.status().in_flight == 1
    two = start("idle", persist=True, idle_timeout_s=0.5)
    until(lambda: gone(two.entry.pid))
    assert [entry.name for entry in registry.entries()] == ["m"]


def test_a_killed_supervisor_takes_its_ranks_and_the_next_scan_sweeps(tmp_path: Path) -> None:
    one = start()
    pids = ranks(one)
    segment = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{one.entry.ports[0]}_0")
    segment.touch()
    os.kill(one.entry.pid, signal.SIGKILL)
    until(lambda: all(gone(pid) for pid in pids))
    assert registry.entries() == []
    assert list((tmp_path / "miinb").iterdir()) == []
    assert not segment.exists()
    assert one.status().state == "lost"


KERNEL = """
import json, os, sys, time
from miinb import deployment
from miinb.config import DeploymentConfig
deployment._modules.update(frontend="stand_in", worker="stand_in")
config = DeploymentConfig.parse({"model": "tiny", "device": "cpu"})
one = deployment.Deployment.start(config, name="m", task="t", on_phase=lambda phase: None)
if sys.argv[1] == "fork" and os.fork() == 0:
    time.sleep(60)  # holds whatever it inherited
if sys.argv[1] == "keep":
    one.keep()
print(json.dumps([one.entry.pid, *(rank.pid for rank in one.status().ranks)]), flush=True)
if sys.argv[1] == "child":
    if os.fork() == 0:
        sys.exit(0)  # runs exit handlers of the copy
    os.wait()
if sys.argv[1] != "return":
    time.sleep(60)
"""


@contextlib.contextmanager
def kernel(how: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    with subprocess.Popen(
        [sys.executable, "-c", KERNEL, how], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "fork", "return"])
def test_the_deployment_ends_with_its_kernel(tmp_path: Path, how: str) -> None:
    with kernel(how) as (process, pids):
        if how != "return":
            process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        until(lambda: all(gone(pid) for pid in pids), 5.0)
        until(lambda: list((tmp_path / "miinb").iterdir()) == [], 1.0)


def test_a_forked_child_of_the_kernel_ends_nothing() -> None:
    with kernel("child") as (_, pids):
        time.sleep(1.0)
        assert not any(gone(pid) for pid in pids)


def test_a_full_disk_is_told_and_harms_nothing() -> None:
    import resource

    one = start()
    limits = resource.prlimit(one.entry.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    with pytest.raises(Unavailable, match="File too large"):
        one.keep()
    assert one.owned
    assert not one.status().persist
    resource.prlimit(one.entry.pid, resource.RLIMIT_FSIZE, limits)
    one.keep()
    assert one.status().persist
    one.stop()


def test_a_start_on_a_full_disk_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    spawn = deployment.spawn

    def cramped(*arguments: Any, **named: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            return spawn(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(deployment, "spawn", cramped)
    with pytest.raises(StartError, match="File too large"):
        start()
    assert registry.entries() == []


def test_a_kept_deployment_outlives_its_kernel() -> None:
    with kernel("keep") as (process, pids):
        process.kill()
        process.wait()
        time.sleep(0.5)
        assert not any(gone(pid) for pid in pids)
    joined = Deployment.join("m")
    assert joined.status().persist
    joined.stop()
    assert all(gone(pid) for pid in pids)


def test_interrupts_do_not_reach_the_supervisor() -> None:
    one = start()
    os.kill(one.entry.pid, signal.SIGINT)
    os.kill(ranks(one)[0], signal.SIGINT)
    time.sleep(0.3)
    assert one.status().state == "ready"


def test_a_deployment_that_ends_is_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "stubborn")  # its rank takes a second to end
    one = start()
    seen = {one.status().state}
    registry.ask(one.entry, "stop")
    with pytest.raises(DeploymentNotFound, match="is ending"):
        Deployment.join("m")
    while registry.entries():
        seen |= {status.state for status in miinb.deployments()} | {registry.last_state(one.entry) or "gone"}
    assert seen - {"gone"} <= {"ready", "draining"}
    until(lambda: one.status().state == "stopped")
    last = one.stop()
    assert one.status() == last
    assert last.state == "stopped"


def test_a_bad_question_is_answered_and_harms_nothing() -> None:
    one = start()
    for question in (b"junk\n", b'{"command": "no"}\n', b"[]\n", b"\xff" * 70000, b""):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(f"{one.entry.folder}/control.sock")
            with contextlib.suppress(OSError):
                connection.sendall(question)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(4096)
                assert not answer or "error" in json.loads(answer)
    assert one.status().state == "ready"
