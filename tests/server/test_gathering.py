"""Rank 0 takes the pictures that come right behind the first one into its batch; what generates text does not wait."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from miinb.image_messages import PaintRequest
from miinb.image_params import ImageParams
from miinb.server.worker import Server


class Executor:
    """Counts what each step finds."""

    def __init__(self, task: str) -> None:
        self.info = SimpleNamespace(task=task, device="cpu")
        self.waiting = 0
        self.steps: list[int] = []

    @property
    def busy(self) -> bool:
        return self.waiting > 0

    def paint(self, request: PaintRequest) -> None:
        self.waiting += 1

    def step(self, emit: Any, poll: Any) -> None:
        self.steps.append(self.waiting)
        self.waiting = 0


class Socket:
    """One row comes at each look; after the last one there is nothing, then the frontend is gone."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def receive(self, timeout_s: float | None = 0.0, *, spin_s: float = 0.0) -> list[PaintRequest]:
        if self.rows:
            self.rows -= 1
            return [PaintRequest(self.rows, "a", ImageParams(), time.monotonic())]
        if timeout_s is None:
            raise ConnectionError
        return []

    def send(self, *messages: Any) -> None: ...

    def flush(self) -> None: ...


@pytest.mark.parametrize(("task", "steps"), [("text-to-image", [5]), ("text-generation", [1] * 5)])
def test_rows_that_come_one_after_the_other(task: str, steps: list[int]) -> None:
    executor: Any = Executor(task)
    socket: Any = Socket(5)
    with pytest.raises(ConnectionError):
        Server(executor, socket).run()
    assert executor.steps == steps
