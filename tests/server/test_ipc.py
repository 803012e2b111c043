"""Frames: every message survives the trip, sends never block, order holds, junk is refused."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import typing
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from miinb.config import GenerationParams
from miinb.image_messages import PaintedEvent, PaintRequest, PaintSource
from miinb.image_params import ImageParams
from miinb.messages import (
    EncodedEvent,
    EncodeRequest,
    EngineInfo,
    FailedEvent,
    FinishedEvent,
    Plan,
    PlanLine,
    SequenceRequest,
    TokenLogprob,
    TokensEvent,
)
from miinb.server import frames, ipc
from tests.filled import PARAMS as FILLED_PARAMS
from tests.filled import filled

INFO = EngineInfo(
    replica=1,
    model="m",
    task="text-generation",
    engine="optimized",
    dtype="fp32",
    device="cpu",
    vocab_size=100,
    max_length=64,
    max_batch=4,
    eos_token_ids=(1, 2),
    tokenizer_folder="tokenizer",
    plan=Plan("optimized", "cpu", "fp32", lines=(PlanLine("dtype", "fp32", "checkpoint"),), warnings=("w",)),
    versions={"torch": "2"},
)
PARAMS = GenerationParams(seed=2**63 - 1, stop=["\n", "é"], logit_bias={7: -1.5}, temperature=0.7, do_sample=True)
MESSAGES: list[frames.Message] = [
    INFO,
    SequenceRequest(3, [1, 2, 3], PARAMS, 12.5, 99.0),
    SequenceRequest(4, [], GenerationParams(), 0.0),
    frames.CancelRow(3, "stop"),
    TokensEvent(3, [5, 6]),
    TokensEvent(4, [7], (TokenLogprob(7, -0.5, ((7, -0.5), (8, -1.0))),)),
    FinishedEvent(3, "length", 0.1, 0.2, 0.05, 3, 2, 1),
    FailedEvent(4, "NonFinite", "NaN in the logits — sorry", "Try fp32."),
    EncodeRequest(
        6,
        array("i", [101, 7, 102, 101, 102]),
        array("i", [3, 2]),
        1.0,
        type_ids=array("i"),
        wanted=array("i", [1]),
        options={"targets": [3]},
        deadline=2.0,
    ),
    EncodedEvent(6, 2, b"\0\0\x80?" * 2, b"\1\0\0\0" * 2, 0.1, 0.2),
    frames.EngineStatus(),
    frames.EngineStatus({"running": 2}),
]


@given(st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_every_message_survives_any_fragmentation(step: int) -> None:
    data = b"".join(frames.encode(message) for message in MESSAGES)
    decoder = frames.Decoder()
    received = [m for at in range(0, len(data), step) for m in decoder.feed(data[at : at + step])]
    assert received == MESSAGES


@pytest.mark.parametrize("step", [1 << 12, 100_003, frames.SPACE_BYTES, 5 << 20])
def test_large_frames_survive_any_fragmentation_and_leave_a_small_buffer(step: int) -> None:
    sizes = [0, 3, frames.SPACE_BYTES - 200, frames.SPACE_BYTES, 3 * frames.SPACE_BYTES + 7, 5]
    messages: list[frames.Message] = []
    for number, size in enumerate(sizes):
        messages.append(replace(filled(PaintedEvent), row_id=number, pixels=os.urandom(size)))
        messages.append(TokensEvent(number, [1, 2]))
    data = b"".join(piece for message in messages for piece in frames.pieces_of(message))  # type: ignore[arg-type]
    assert data == b"".join(map(frames.encode, messages))
    decoder = frames.Decoder()
    received = [m for at in range(0, len(data), step) for m in decoder.feed(data[at : at + step])]
    assert received == messages
    assert len(decoder._buffer) == frames.SPACE_BYTES
    assert len(decoder.space()) == frames.SPACE_BYTES


def test_pictures_cross_between_a_rank_and_a_frontend(tmp_path: Path) -> None:
    sizes = (5, 786_432, 12 << 20, 786_432)
    events = [replace(filled(PaintedEvent), row_id=row, pixels=os.urandom(size)) for row, size in enumerate(sizes)]
    received: list[object] = []

    def send() -> None:
        rank = ipc.RankSocket.connect(tmp_path / "engine.sock")
        rank.send(*events)
        while not rank.flush():
            rank.receive(0.01)
        rank.close()

    async def run() -> None:
        closed = asyncio.Event()

        def channel() -> ipc.RankChannel:
            return ipc.RankChannel(lambda _, messages: received.extend(messages), lambda _: closed.set())

        server = await ipc.listen(tmp_path / "engine.sock", channel)
        sending = asyncio.ensure_future(asyncio.to_thread(send))
        async with asyncio.timeout(20):
            await closed.wait()
        await sending
        server.close()

    uvloop.run(run())
    assert received == events


@pytest.mark.parametrize("cls", typing.get_args(frames.Message), ids=lambda cls: cls.__name__)
def test_no_field_of_any_message_is_lost(cls: type) -> None:
    message = filled(cls)
    if isinstance(message, TokensEvent):  # the texts are the frontend's
        message = replace(message, logprobs=tuple(replace(e, text="", top_texts=()) for e in message.logprobs))
    if isinstance(message, EncodeRequest):  # numbers are read as they lie in the frame
        numbers = ("token_ids", "lengths", "type_ids", "wanted")
        message = replace(message, **{name: array("i", getattr(message, name)) for name in numbers})
    for params in FILLED_PARAMS:
        if isinstance(message, SequenceRequest):
            message = replace(message, params=params)
        assert frames.Decoder().feed(frames.encode(message)) == [message]


def test_what_rows_share_crosses_once() -> None:
    source, other = PaintSource(bytes(range(9)), b"abc"), PaintSource(b"xyz")
    rows = [PaintRequest(row, "a", ImageParams(seed=row), 1.0, source=source) for row in range(3)]
    rows += [PaintRequest(3, "a", ImageParams(), 1.0), PaintRequest(4, "b", ImageParams(), 1.0, source=source)]
    rows.append(PaintRequest(5, "b", ImageParams(), 1.0, source=other))
    sent: list[bytes] = []
    channel = ipc.RankChannel(lambda *_: None, lambda *_: None)
    channel.connection_made(Written(sent))
    assert all(channel.send(row) for row in rows)
    assert [data.count(source.image) for data in sent] == [1, 0, 0, 0, 0, 0]
    received = frames.Decoder().feed(b"".join(sent))
    assert received == rows
    assert received[0].source is received[4].source  # type: ignore[union-attr]
    with pytest.raises(ConnectionError, match="announced"):
        frames.Decoder().feed(frames.frame(frames.Kind.SOURCE, frames.LENGTH.pack(9), b"xyz"))
    with pytest.raises(ConnectionError, match="source"):
        frames.Decoder().feed(sent[1])


class Written(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self, sent: list[bytes]) -> None:
        super().__init__()
        self.write = sent.append  # type: ignore[assignment]

    def is_closing(self) -> bool:
        return False


def test_every_parameter_is_among_the_filled_ones() -> None:
    names = {name for params in FILLED_PARAMS for name in params.model_fields_set}
    assert names == set(GenerationParams.model_fields)


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1\r\n\r\n", frames.HEADER.pack(2, 77) + b"{}", frames.HEADER.pack(3, 6) + b"[1]", b"\xff" * 9],
    ids=["http", "unknown kind", "wrong fields", "huge"],
)
def test_junk_is_a_connection_error(junk: bytes) -> None:
    with pytest.raises(ConnectionError):
        frames.Decoder().feed(junk)


def _pair() -> tuple[ipc.RankSocket, socket.socket]:
    rank, frontend = socket.socketpair(socket.AF_UNIX)
    return ipc.RankSocket(rank), frontend


def test_a_full_socket_never_blocks_and_waiting_tokens_merge_in_order() -> None:
    rank, frontend = _pair()
    with frontend:
        steps = 0
        while rank.flush():  # until the kernel's buffer is full
            rank.send(TokensEvent(1, [steps]), TokensEvent(2, [-1]))
            steps += 1
        for _ in range(1000):
            rank.send(TokensEvent(1, [steps]), TokensEvent(2, [-1]))
            assert not rank.flush()
            steps += 1
        rank.send(FinishedEvent(2, "stop", 0, 0, 0, 1, steps), TokensEvent(1, [steps]))
        assert len(rank._outbox) <= 4, "tokens that wait next to each other are one frame"
        decoder, received = frames.Decoder(), []
        frontend.setblocking(False)
        while True:
            done = rank.flush()
            try:
                received += decoder.feed(frontend.recv(1 << 20))
            except BlockingIOError:
                if done:
                    break
    ids = {
        row: [i for m in received if isinstance(m, TokensEvent) and m.row_id == row for i in m.token_ids]
        for row in (1, 2)
    }
    assert ids == {1: list(range(steps + 1)), 2: [-1] * steps}
    assert [type(m) for m in received[-2:]] == [FinishedEvent, TokensEvent]


def test_logprobs_come_with_their_own_tokens_when_steps_wait() -> None:
    rank, frontend = _pair()
    with frontend:
        for step in range(3):
            rank.send(TokensEvent(1, [step], (TokenLogprob(step, -float(step)),)), TokensEvent(2, [step]))
        assert rank.flush()
        received = frames.Decoder().feed(frontend.recv(1 << 20))
    row = [m for m in received if isinstance(m, TokensEvent) and m.row_id == 1]
    assert [(m.token_ids, m.logprobs[0].token_id) for m in row] == [([0], 0), ([1], 1), ([2], 2)]


def test_a_frontend_that_does_not_read_is_an_error_not_endless_memory() -> None:
    rank, frontend = socket.socketpair(socket.AF_UNIX)
    with frontend:
        side = ipc.RankSocket(rank, max_outbox_bytes=1 << 20)
        sent = 0
        with pytest.raises(ConnectionError):  # noqa: PT012 (which call fills the outbox depends on the kernel's buffer)
            while sent < 1000:
                side.send(TokensEvent(1, [0] * 10_000))
                side.flush()
                sent += 1


def test_a_frontend_that_is_gone_is_a_connection_error() -> None:
    rank, frontend = _pair()
    frontend.close()
    with pytest.raises(ConnectionError):
        rank.receive(1.0)


def test_asyncio_side_and_synchronous_side_talk(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    request = SequenceRequest(1, list(range(50_000)), PARAMS, 0.0)
    seen: list[object] = []

    def rank() -> None:
        side = ipc.RankSocket.connect(path, timeout_s=10)
        side.send(INFO)
        (got,) = side.receive(10.0)
        assert isinstance(got, SequenceRequest)
        assert got == request
        side.send(TokensEvent(1, got.token_ids))
        while not side.flush():
            pass
        assert side.receive(0.0) == []
        side.close()

    async def frontend() -> None:
        closed = asyncio.get_running_loop().create_future()

        def on_messages(channel: ipc.RankChannel, messages: Sequence[ipc.ToFrontend]) -> None:
            seen.extend(messages)
            if INFO in messages:
                assert channel.send(request)

        server = await ipc.listen(path, lambda: ipc.RankChannel(on_messages, lambda _: closed.set_result(None)))
        assert path.stat().st_mode & 0o777 == 0o600
        thread = threading.Thread(target=rank)
        thread.start()
        await asyncio.wait_for(closed, 20)
        await asyncio.to_thread(thread.join, 10)
        server.close()

    asyncio.run(frontend())
    assert seen == [INFO, TokensEvent(1, request.token_ids)]


@pytest.mark.parametrize(
    "data",
    [
        frames.frame(frames.Kind.TOKENS, array("i", [1, -2]).tobytes()),
        frames.frame(frames.Kind.STATUS, b"[" * 100_000),
        frames.frame(frames.Kind.ENCODE, b"\x01"),
        frames.frame(frames.Kind.ENCODED, frames.encode(EncodedEvent(1, 2, b"12345678"))[frames.HEADER.size : -1]),
    ],
)
def test_frames_that_no_rank_sends_end_the_connection(data: bytes) -> None:
    with pytest.raises(ConnectionError):
        frames.Decoder().feed(data)
