"""A rank that hangs is told from one that computes."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from miinb.server import watchdog
from miinb.server.watchdog import ALONE_S, CHECK_S, IDLE_S, MAX_SILENT_S, Pulse, Watchdog


def test_a_rank_without_cpu_time_hangs() -> None:
    dog = Watchdog()
    assert not any(dog.hangs(0, seconds, [1 << 22]) for seconds in (1.0, 2.0, IDLE_S))
    assert dog.hangs(0, 1.0 + IDLE_S, [1 << 22])


def test_a_rank_that_computes_does_not_hang_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter(range(10_000))
    monkeypatch.setattr(watchdog, "_cpu_s", lambda pid: float(next(used)))
    dog = Watchdog()
    assert not any(dog.hangs(0, float(second), [1]) for second in range(1, int(MAX_SILENT_S)))
    assert dog.hangs(0, MAX_SILENT_S, [1])


def test_each_silence_counts_from_its_start() -> None:
    dog, gone = Watchdog(), [1 << 22]
    assert not dog.hangs(0, 1.0, gone)
    assert not dog.hangs(0, 9.0, gone)
    assert not dog.hangs(0, 0.5, gone)  # it has answered meanwhile
    assert not dog.hangs(0, IDLE_S, gone)
    dog.forget(0)
    assert not dog.hangs(0, 1.0 + IDLE_S, gone)
    assert dog.hangs(0, 1.0 + 2 * IDLE_S, gone)


def test_the_rank_that_is_stopped_is_to_blame_while_the_others_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter(range(10_000))
    monkeypatch.setattr(watchdog, "_cpu_s", lambda pid: 0.0 if pid == sleeper.pid else float(next(used)))
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            dog, both = Watchdog(), [os.getpid(), sleeper.pid]
            assert [dog.hangs(0, seconds, both) for seconds in (1.0, 1.0 + IDLE_S)] == [None, None]
            assert dog.hangs(0, 1.0 + ALONE_S, both) == sleeper.pid
            sleeper.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED)
            dog.forget(0)
            assert [dog.hangs(0, seconds, both) for seconds in (1.0, IDLE_S)] == [None, None]
            assert dog.hangs(0, 1.0 + IDLE_S, both) == sleeper.pid
        finally:
            sleeper.kill()


def test_a_frontend_is_silent_only_while_this_process_looks() -> None:
    pulse = Pulse(0.0)
    assert not pulse.check(CHECK_S / 2)
    assert not pulse.check(10_000.0)  # the machine slept: one check, not many
    assert not pulse.check(10_000.0 + CHECK_S / 2)
    assert pulse.check(10_000.0 + CHECK_S)
    assert pulse.silent_s == 2 * CHECK_S
    pulse.heard()
    assert not pulse.check(10_000.0 + 3 * CHECK_S)


def test_cpu_time_is_read() -> None:
    assert watchdog._cpu_s(os.getpid()) > 0
