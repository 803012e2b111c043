"""Real rank processes, with the test in the frontend's and the supervisor's place."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import miinb
from miinb.config import DeploymentConfig, GenerationParams
from miinb.messages import EncodeRequest, EngineInfo, FailedEvent, FinishedEvent, SequenceRequest, TokensEvent
from miinb.server import frames

TINY = Path(miinb.__file__).parent / "demo" / "tiny"
TIMEOUT_S = 120.0


class Rank:
    """One rank process and its two peers' ends."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "engine.sock"))
        self.listener.listen(1)
        self.listener.settimeout(TIMEOUT_S)
        read_end, write_end = os.pipe()
        settings = DeploymentConfig.parse({"model": str(TINY), "device": "cpu", "dtype": "fp32", **config})
        order = {"config": settings.model_dump(mode="json"), "folder": str(folder), "replica": 0, "rank": 0}
        with (folder / "rank.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "miinb.server.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(write_end,),
                env={**os.environ, "MIINB_STATUS_FD": str(write_end), "OMP_NUM_THREADS": "1"},
            )
        os.close(write_end)
        self.reports = os.fdopen(read_end)
        assert self.process.stdin
        self.process.stdin.write(json.dumps({**order, "gpus": [], "port": 29999}).encode() + b"\n")
        self.process.stdin.flush()
        self.decoder = frames.Decoder()
        self.connection: socket.socket | None = None

    def connect(self) -> EngineInfo:
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(TIMEOUT_S)
        (hello,) = self.receive(1)
        return hello

    def send(self, *messages: Any) -> None:
        assert self.connection
        self.connection.sendall(b"".join(map(frames.encode, messages)))

    def receive(self, least: int = 1) -> list[Any]:
        assert self.connection
        found: list[Any] = []
        while len(found) < least:
            data = self.connection.recv(1 << 16)
            assert data, "the rank closed its socket:\n" + (self.folder / "rank.log").read_text()[-2000:]
            found += self.decoder.feed(data)
        return found

    def until_end(self, *row_ids: int) -> dict[int, list[Any]]:
        events: dict[int, list[Any]] = {row_id: [] for row_id in row_ids}
        left = set(row_ids)
        while left:
            for event in self.receive():
                events[event.row_id].append(event)
                if not isinstance(event, TokensEvent):
                    left.discard(event.row_id)
        return events

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reports.close()
        self.listener.close()
        if self.connection:
            self.connection.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """All of them at once, as loading PyTorch is most of a test."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name, config in {
            "optimized": {},
            "baseline": {"engine": "baseline"},
            "broken": {"model": "/nowhere/at/all"},
        }.items():
            started[name] = Rank(tmp_path_factory.mktemp("rank"), **config)
            stack.callback(started[name].close)
        for name in ("optimized", "baseline"):
            started[name].info = started[name].connect()
        yield started


def request(row_id: int, prompt: list[int], new: int = 8, **params) -> SequenceRequest:
    values = {"seed": 1, "max_new_tokens": new, "ignore_eos": True} | params
    return SequenceRequest(row_id, prompt, GenerationParams(**values), time.monotonic())


def tokens(events: list) -> list[int]:
    return [token for event in events if isinstance(event, TokensEvent) for token in event.token_ids]


PROMPTS = {0: [5, 9, 23], 1: [40] * 17, 2: [7]}


def test_both_engines_answer_alike_through_the_socket(ranks):
    answers = {}
    for name in ("optimized", "baseline"):
        rank = ranks[name]
        assert rank.info.engine == name
        assert (Path(rank.info.tokenizer_folder) / "tokenizer.json").exists()
        rank.send(*(request(row_id, prompt) for row_id, prompt in PROMPTS.items()))
        events = rank.until_end(*PROMPTS)
        assert all(isinstance(row[-1], FinishedEvent) for row in events.values()), events
        answers[name] = {row_id: tokens(row) for row_id, row in events.items()}
        assert {len(row) for row in answers[name].values()} == {8}
    assert answers["optimized"] == answers["baseline"]


@pytest.mark.parametrize("name", ["optimized", "baseline"])
def test_a_cancel_ends_a_row_soon_and_a_bad_request_fails_alone(ranks, name):
    rank = ranks[name]
    rank.send(request(10, [5], 60), request(11, [10**6], 2), EncodeRequest(12, [5], [1], 0.0))
    seen: list[Any] = []
    while not any(isinstance(event, TokensEvent) for event in seen):
        seen += rank.receive()
    rank.send(frames.CancelRow(10, "cancelled"))
    while not any(isinstance(event, FinishedEvent) for event in seen):
        seen += rank.receive()
    by_row = {event.row_id: event for event in seen if not isinstance(event, TokensEvent)}
    assert by_row[10].finish_reason == "cancelled"
    assert by_row[10].output_tokens < 60
    assert {by_row[11].error, by_row[12].error} == {"InvalidRequest"}
    assert isinstance(by_row[11], FailedEvent)


def test_status_is_answered(ranks):
    rank = ranks["optimized"]
    rank.send(frames.EngineStatus())
    (status,) = rank.receive()
    assert status.values["running"] == 0
    assert status.values["kv_pages_used"] == 0
    assert status.values["uptime_s"] > 0


def test_a_failed_start_is_reported_with_its_class(ranks):
    rank = ranks["broken"]
    assert rank.process.wait(TIMEOUT_S) == 1
    lines = [json.loads(line) for line in rank.reports]
    assert lines[0]["phase"]["name"] == "start"
    failed = lines[-1]["failed"]
    assert failed["error"] == "ModelNotFound"
    assert "/nowhere" in failed["message"]
    assert not failed["details"]  # it says all


def test_ready_is_reported_and_sigterm_or_a_lost_frontend_ends_it_cleanly(ranks):
    optimized, baseline = ranks["optimized"], ranks["baseline"]
    optimized.process.send_signal(signal.SIGINT)  # the Stop button: ignored
    optimized.send(request(20, [5], 60))
    optimized.receive()
    assert optimized.process.poll() is None
    optimized.process.send_signal(signal.SIGTERM)
    baseline.connection.close()
    assert optimized.process.wait(20) == 0
    assert baseline.process.wait(20) == 0
    for rank in (optimized, baseline):
        lines = [json.loads(line) for line in rank.reports]
        names = [line["phase"]["name"] for line in lines if "phase" in line]
        assert names[0] == "start"
        assert "load" in names
        assert lines[-1]["ready"]["engine"] == rank.info.engine
