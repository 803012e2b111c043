"""Replicas of one deployment: renewed one after another, and lost."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

import miinb
from miinb.demo import tiny_model
from miinb.errors import InvalidValue, Unavailable


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


def test_a_replica_that_is_killed_costs_its_own_requests_alone_and_comes_back() -> None:
    """The streams of the other go on; what was in flight on the dead one fails as `Unavailable`."""
    with miinb.Session(tiny_model(), replicas=2, device="cpu", options={"threads": 1}, max_length=512) as session:
        streams = [session.stream(f"number {i}", max_new_tokens=450, ignore_eos=True) for i in range(4)]
        for stream in streams:
            next(stream)
        before = session.status()
        assert before.in_flight == 4
        victim = next(rank for rank in before.ranks if rank.replica == 1)
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
