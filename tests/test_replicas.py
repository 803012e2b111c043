"""Replicas of one deployment: renewed one after another, and lost."""

from __future__ import annotations

import threading

import pytest

import miinb
from miinb.demo import tiny_model
from miinb.errors import InvalidValue


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
