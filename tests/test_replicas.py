"""Replicas of one deployment: renewed one after another, and lost."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import miinb
from miinb import registry
from miinb.demo import tiny_model
from miinb.errors import BrokenCheckpoint, InvalidValue, Unavailable
from miinb.messages import Status
from miinb.server.restarts import MAX_RESTARTS


def test_replicas_are_renewed_while_the_others_serve() -> None:
    """Threads ask all the time; nothing fails, and every process of a rank is another one afterwards."""
    failures: list[BaseException] = []
    over = threading.Event()
    with miinb.Session(tiny_model(), replicas=2, device="cpu", options={"threads": 1}, max_length=128) as session:
        with pytest.raises(InvalidValue, match="rolling"), miinb.Session(tiny_model(), device="cpu") as one:
            one.restart(rolling=True)

        def ask() -> None:
            try:
                while not over.is_set():
                    assert len(session.generate("the cat", max_new_tokens=12, ignore_eos=True).token_ids[0]) == 12
            except BaseException as error:
                failures.append(error)

        askers = [threading.Thread(target=ask) for _ in range(3)]
        for asker in askers:
            asker.start()
        before, frontend = {rank.pid for rank in session.status().ranks}, session.status().address
        assert session.restart(rolling=True) is session
        after = session.status()
        over.set()
        for asker in askers:
            asker.join()
        assert not failures
        assert after.state == "ready"
        assert len(after.ranks) == 2
        assert not before & {rank.pid for rank in after.ranks}
        assert after.address == frontend
        assert len(session.generate("the cat", max_new_tokens=3, ignore_eos=True).token_ids[0]) == 3


def test_a_late_answer_is_not_taken_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ask, late = registry.ask, []

    def slow(entry: registry.Entry, command: str, **fields: Any) -> dict[str, Any]:
        if command == "status" and len(late) < 3:
            late.append(command)
            raise Unavailable("It does not answer (timed out).")
        return ask(entry, command, **fields)

    with miinb.Session(tiny_model(), replicas=2, device="cpu", options={"threads": 1}, max_length=64) as session:
        before = {rank.pid for rank in session.status().ranks}
        monkeypatch.setattr(registry, "ask", slow)
        session.restart(rolling=True)
        assert len(late) == 3
        assert not before & {rank.pid for rank in session.status().ranks}


def test_a_deployment_is_ready_when_every_replica_takes_requests() -> None:
    """Of two requests at once each has a replica of its own, also right after the start."""
    options = {"threads": 1}
    with miinb.Session(tiny_model(), replicas=2, device="cpu", options=options, max_batch=1, max_length=512) as session:
        streams = [session.stream(f"number {i}", max_new_tokens=450, ignore_eos=True) for i in range(2)]
        times = [stream.result.timing for stream in streams]
        assert max(one.queue_s for one in times) < min(one.e2e_s for one in times) / 2  # none waited for the other


def test_a_replica_that_is_killed_costs_its_own_requests_alone_and_comes_back() -> None:
    """The streams of the other go on; what was in flight on the dead one fails as `Unavailable`."""
    with miinb.Session(tiny_model(), replicas=2, device="cpu", options={"threads": 1}, max_length=512) as session:
        before = session.status()
        victim = next(rank for rank in before.ranks if rank.replica == 1)
        streams = [session.stream(f"number {i}", max_new_tokens=450, ignore_eos=True) for i in range(4)]
        for stream in streams:
            next(stream)
        os.kill(victim.pid, signal.SIGKILL)
        ends = []
        for stream in streams:
            try:
                ends.append(len(stream.result.token_ids[0]))
            except Unavailable:
                ends.append(0)
        assert sorted(ends) == [0, 0, 450, 450]
        deadline = time.monotonic() + 60
        while not ((now := session.status()).state == "ready" and len(now.ranks) == 2):
            assert time.monotonic() < deadline, now
            assert session.generate("still", max_new_tokens=3, ignore_eos=True)
            time.sleep(0.1)
        assert {rank.pid for rank in now.ranks} - {rank.pid for rank in before.ranks}
        assert {rank.pid for rank in now.ranks if rank.replica == 0} == {before.ranks[0].pid}


def until(session: miinb.Session, condition: Callable[[Status], bool], seconds: float = 90.0) -> Status:
    deadline = time.monotonic() + seconds
    while not condition(now := session.status()):
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    return now


def _gone(session: miinb.Session, pid: int) -> None:
    until(session, lambda now: pid not in {rank.pid for rank in now.ranks})


def test_a_replica_that_ends_too_often_is_given_up_and_the_others_go_on() -> None:
    with miinb.Session(tiny_model(), replicas=2, device="cpu", options={"threads": 1}, max_length=128) as session:
        first = session.status().ranks[0]
        for _ in range(MAX_RESTARTS + 1):
            victim = until(session, lambda now: now.state == "ready").ranks[1]
            os.kill(victim.pid, signal.SIGKILL)
            _gone(session, victim.pid)
        now = until(session, lambda now: now.state == "ready")
        assert [(rank.replica, rank.pid, rank.state) for rank in now.ranks] == [
            (0, first.pid, "ready"),
            (1, 0, "failed"),
        ]
        assert "is given up" in session.logs(50)
        assert session.generate("still", max_new_tokens=3).texts
        session.restart(rolling=True)
        now = session.status()
        assert [rank.state for rank in now.ranks] == ["ready", "ready"]
        assert first.pid not in {rank.pid for rank in now.ranks}


def test_a_handle_goes_on_when_the_frontend_was_started_again() -> None:
    with miinb.Session(tiny_model(), device="cpu", options={"threads": 1}, max_length=128) as session:
        text = session.generate("the cat", max_new_tokens=5).text
        before = session.status().ranks[0].pid
        supervisor = psutil.Process(session.status().pid)
        frontend = next(child for child in supervisor.children() if "miinb.server.frontend" in child.cmdline())
        frontend.kill()
        until(session, lambda now: now.state == "ready" and now.ranks[0].pid != before)
        assert session.generate("the cat", max_new_tokens=5).text == text
        assert miinb.attach(session.name).generate("the cat", max_new_tokens=5).text == text


def test_a_roll_ends_with_the_first_replica_that_does_not_start(tmp_path: Path) -> None:
    """Its weights have become NaN: the error says so, and the other replica serves on."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    with miinb.Session(folder, replicas=2, device="cpu", options={"threads": 1}, max_length=128) as session:
        before = session.status().ranks
        file = next(folder.glob("*.safetensors"))
        tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(BrokenCheckpoint):
            session.restart(rolling=True)
        assert session.generate("still", max_new_tokens=3).texts
        assert before[1].pid in {rank.pid for rank in session.status().ranks}
        now = until(session, lambda now: now.state == "ready")
        assert [rank.state for rank in now.ranks] == ["failed", "ready"]
        assert session.generate("still", max_new_tokens=3).texts
