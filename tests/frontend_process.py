"""A real frontend process with stand-in ranks: real processes, real sockets, no model."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from miinb.client import Client
from miinb.config import DeploymentConfig
from tests.tiny_tokenizers import byte_level

ROOT = Path(__file__).parent.parent


def wait_for(check: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """The first true answer of `check`."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := check():
            return value
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {timeout_s} s")


class FrontendProcess:
    """A frontend and its ranks; `submits` and `cancels` are what the ranks were told."""

    def __init__(self, folder: Path, *, name: str = "dep", line: dict[str, Any] | None = None, **config: Any) -> None:
        self.folder = folder
        self.events = folder / "events.jsonl"
        self.events.touch()
        self.ranks: list[subprocess.Popen[bytes]] = []
        settings = DeploymentConfig.parse({"model": "m", **config})
        read_fd, write_fd = os.pipe()
        self.process = self._start(
            [sys.executable, "-m", "miinb.server.frontend"],
            {"config": settings.model_dump(mode="json"), "folder": str(folder), "name": name, **(line or {})},
            log=folder / "frontend.log",
            pass_fds=(write_fd,),
            env={"MIINB_STATUS_FD": str(write_fd)},
        )
        os.close(write_fd)
        self.status = os.fdopen(read_fd)

    @functools.cached_property
    def ready(self) -> dict[str, str]:
        """The frontend's ready line."""
        first = json.loads(self.status.readline() or '{"failed": "at once"}')
        assert "ready" in first, first
        ready: dict[str, str] = first["ready"]
        return ready

    @property
    def address(self) -> str:
        """The address of the unix socket."""
        return self.ready["address"]

    def _start(
        self, command: list[str], line: object, *, log: Path, env: dict[str, str], pass_fds: tuple[int, ...] = ()
    ) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, pass_fds=pass_fds
            )
        assert process.stdin is not None
        process.stdin.write(json.dumps(line).encode() + b"\n")
        process.stdin.flush()
        return process

    def rank(self, replica: int = 0, *, wait: bool = True, **line: Any) -> subprocess.Popen[bytes]:
        """Start a stand-in rank and wait until it serves."""
        before = sum(rank.poll() is None for rank in self.ranks)
        process = self._start(
            [sys.executable, str(ROOT / "tests" / "standin_rank.py")],
            {"folder": str(self.folder), "replica": replica, "events": str(self.events), **line},
            log=self.folder / f"rank-{replica}.log",
            env={},
        )
        self.ranks.append(process)
        if wait:
            wait_for(lambda: self.replicas() == before + 1, "the rank's hello")
        return process

    def replicas(self) -> int:
        """How many replicas the frontend says are ready."""
        from miinb.errors import Unavailable

        with self.client() as client:
            try:
                return int(client.description()["replicas"])
            except Unavailable:
                return 0

    def told(self, kind: str) -> list[dict[str, Any]]:
        """What the ranks were told so far: "submit", "cancel", "encode"."""
        rows = [json.loads(row) for row in self.events.read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]

    def running(self) -> int:
        """Rows of requests in flight, as the frontend counts them."""
        with self.client() as client:
            return int(client.description()["counters"]["in_flight"])

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[Client]:
        """A client of its own."""
        client = Client(self.address, **options)
        try:
            yield client
        finally:
            client.close()

    def close(self) -> None:
        """Kill what is left."""
        for process in (self.process, *self.ranks):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(10)
            if process.stdin is not None:
                process.stdin.close()
        self.status.close()


def make(folder: Path, **config: Any) -> FrontendProcess:
    """A frontend in a fresh folder with a small byte-level tokenizer."""
    byte_level(folder / "tokenizer")
    return FrontendProcess(folder, **config)
