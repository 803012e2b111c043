"""Who looks for the next message instead of sleeping, and that it ends."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop

from miinb import spinning
from miinb.rpc.direct import Connections
from miinb.server.awake import Awake


@pytest.mark.parametrize(
    ("device", "cores", "seconds"),
    [("cuda:0", 16, spinning.SPIN_S), ("cuda:0", spinning.SPIN_CORES - 1, 0.0), ("cpu", 16, 0.0)],
)
def test_only_beside_a_gpu_and_where_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, seconds: float
) -> None:
    monkeypatch.setattr(spinning, "_cores", lambda: cores)
    assert spinning.spin_s(device) == seconds


@pytest.mark.parametrize(
    ("given", "crowded", "wanted"),
    [
        ({}, False, {"GOMP_SPINCOUNT": "1000"}),
        ({}, True, {"OMP_WAIT_POLICY": "passive"}),
        ({"OMP_WAIT_POLICY": "active"}, True, {}),
        ({"GOMP_SPINCOUNT": "7"}, False, {}),
    ],
)
def test_threads_spin_briefly_where_they_have_cores_unless_the_user_said_how(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], crowded: bool, wanted: dict[str, str]
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert spinning.openmp_waiting(crowded=crowded) == wanted


def test_of_the_threads_of_a_client_one_looks() -> None:
    connections, (ours, theirs) = Connections(None), socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        first = pool.submit(connections.look, ours, 60.0)
        while not connections._looking.locked():
            pass
        connections.look(ours, 60.0)  # returns at once
        assert not first.done()
        theirs.send(b"an answer")
        first.result(10)
        connections.look(ours, 60.0)  # the answer is there


def test_nobody_looks_for_answers_that_take_long() -> None:
    connections, (ours, theirs) = Connections(None), socket.socketpair()
    with ours, theirs:
        connections.quick = False
        connections.look(ours, 60.0)
        connections.look(ours, 0.0)


@pytest.mark.parametrize("policy", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_loop_that_looks_does_not_sleep_and_sleeps_afterwards(policy: type) -> None:
    looks = 0

    class Counting(Awake):
        def _look(self) -> None:
            nonlocal looks
            looks += 1
            super()._look()

    async def run() -> None:
        awake = Counting()
        awake.for_the_next(0.0)
        await asyncio.sleep(0)
        assert looks == 0
        awake.for_the_next(0.02)
        awake.for_the_next(0.02)  # still one that looks
        while awake._looking:
            await asyncio.sleep(0.005)
        before = looks
        await asyncio.sleep(0.01)
        assert before == looks > 10  # within one wait of 5 ms it came round again and again

    with asyncio.Runner(loop_factory=policy) as runner:
        runner.run(run())
