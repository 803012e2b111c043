"""Answers of several messages on the direct socket: their order, who does not read, who leaves, who talks nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvloop

from miinb import errors
from miinb.client import Client
from miinb.image_calls import ImageCalls
from miinb.image_messages import ImagesEnd, ImagesProgress, ImagesRequest, ImageTimes, Picture
from miinb.image_params import ImageParams
from miinb.rpc import image_codec
from miinb.rpc.direct import ANSWER, REQUEST, Connections, DirectCall, Kind, Method
from miinb.server import direct
from miinb.server.direct import DirectServer, Send, Serve

ASKED = REQUEST.pack(0, 30.0, Method.IMAGES)
LARGE = 8 << 20  # more than any socket holds


class Server:
    """A server in a thread with a loop of its own, as the frontend's."""

    def __init__(self, path: Path, serve: Serve) -> None:
        self.path = path
        self.server = DirectServer({Method.IMAGES: serve}, most=9)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.run(self.server.start(path))

    def run(self, work: Awaitable[None]) -> None:
        """The end of this work in the server's loop."""

        async def done() -> None:
            await work

        asyncio.run_coroutine_threadsafe(done(), self._loop).result(20)

    def close(self) -> None:
        self.run(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@contextlib.contextmanager
def asking(server: Server) -> Iterator[socket.socket]:
    """A client of its own making that has asked, and reads when its test does."""
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(server.path))
        other.sendall(ASKED)
        yield other


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Serve], Server]]:
    made: list[Server] = []

    def begin(serve: Serve) -> Server:
        made.append(Server(tmp_path / "direct.sock", serve))
        return made[-1]

    yield begin
    for server in made:
        server.close()


@pytest.fixture
def connections(tmp_path: Path) -> Iterator[Connections]:
    made = Connections(tmp_path / "direct.sock")
    yield made
    made.close()


def call_of(connections: Connections, data: bytes = b"", timeout_s: float = 20.0) -> DirectCall:
    call = connections.call(Method.IMAGES, data, timeout_s)
    assert call is not None
    return call


def test_messages_and_tails_of_any_size_come_in_order(
    start: Callable[[Serve], Server], connections: Connections
) -> None:
    sizes = [0, 1, 5, (1 << 14) - 9, 1 << 14, 1 << 20, LARGE]
    sent = [(os.urandom(size), os.urandom(tail)) for size in sizes for tail in sizes if size + tail < 2 * LARGE]

    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        for message, tail in sent:
            await send(message, tail)
        return data

    start(serve)
    for last in (b"last", os.urandom(1 << 20)):
        assert list(call_of(connections, last)) == [*sent, (last, b"")]
    assert len(connections._idle) == 1, "one connection, for the second call too"


def test_a_failure_comes_behind_the_messages_before_it(
    start: Callable[[Serve], Server], connections: Connections
) -> None:
    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        await send(b"first", bytes(LARGE))
        raise errors.NonFinite("It is NaN.", hint="Try fp32.")

    start(serve)
    call = call_of(connections)
    assert next(call) == (b"first", bytes(LARGE))
    with pytest.raises(errors.NonFinite, match="NaN") as caught:
        next(call)
    assert caught.value.hint == "Try fp32."
    assert list(call) == []
    assert len(connections._idle) == 1


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_who_leaves_in_the_middle_ends_the_work(
    start: Callable[[Serve], Server], connections: Connections, way: str
) -> None:
    ended = threading.Event()

    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        try:
            await send(b"first")
            await asyncio.sleep(60)
        finally:
            ended.set()
        return b""

    start(serve)
    call = call_of(connections)
    next(call)
    if way == "close":
        call.close()
        assert list(call) == []
    else:
        threading.Timer(0.1, call.cancel).start()
        with pytest.raises(errors.Cancelled):
            next(call)
    assert ended.wait(10)
    assert not connections._idle
    assert not connections._calls


def test_a_time_limit_holds_between_messages(start: Callable[[Serve], Server], connections: Connections) -> None:
    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        while True:
            await send(b"more")
            await asyncio.sleep(0.05)

    start(serve)
    call = call_of(connections, timeout_s=0.4)
    with pytest.raises(errors.DeadlineExceeded):
        for _ in call:
            pass
    assert not connections._calls


def test_one_message_at_most_waits_for_who_does_not_read(start: Callable[[Serve], Server]) -> None:
    begun: list[int] = []
    ended = threading.Event()

    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        try:
            for number in range(9):
                begun.append(number)
                await send(bytes(LARGE))
        finally:
            ended.set()
        return b""

    server = start(serve)
    with asking(server):
        assert not ended.wait(0.3)
        assert begun == [0, 1]
    assert ended.wait(10), "a client that leaves ends the call, though it reads nothing"


def test_an_answer_that_nobody_reads_is_dropped(
    start: Callable[[Serve], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "MAX_UNREAD_S", 0.2)

    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        await send(b"", bytes(LARGE))
        return b"end"

    server = start(serve)
    with asking(server) as other:
        threading.Event().wait(0.6)
        assert not server.server._connections
        other.settimeout(5)
        received = 0
        while data := other.recv(1 << 20):
            received += len(data)
        assert received < LARGE


def test_who_asks_again_before_reading_waits(start: Callable[[Serve], Server]) -> None:
    begun: list[int] = []

    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        begun.append(1)
        await send(b"", bytes(LARGE))
        return b""

    server = start(serve)
    with asking(server) as other:
        other.settimeout(5)
        threading.Event().wait(0.2)  # all is written but not read
        other.sendall(ASKED)
        threading.Event().wait(0.2)
        assert begun == [1]
        left = 2 * (2 * ANSWER.size + LARGE)
        while left:
            left -= len(other.recv(min(left, 1 << 20)))
        assert begun == [1, 1]


def test_running_streams_are_told_of_the_end(start: Callable[[Serve], Server], connections: Connections) -> None:
    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        await send(b"begun")
        await asyncio.sleep(60)
        return b"end"

    server, call = start(serve), call_of(connections)
    assert next(call) == (b"begun", b"")
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(server.run, server.server.stop())
        with pytest.raises(errors.Unavailable, match="was stopped while this request ran"):
            list(call)
        stopped.result(10)


def test_who_does_not_read_keeps_no_server_from_ending(start: Callable[[Serve], Server]) -> None:
    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        await send(b"", bytes(LARGE))
        await asyncio.sleep(0 if data else 60)
        return b"end"

    server = start(serve)
    with socket.socket(socket.AF_UNIX) as running, socket.socket(socket.AF_UNIX) as ended:
        for other, data in ((running, b""), (ended, b"x")):
            other.connect(str(server.path))
            other.sendall(REQUEST.pack(len(data), 30.0, Method.IMAGES) + data)
        threading.Event().wait(0.2)
        begin = time.monotonic()
        server.run(server.server.stop())
        assert time.monotonic() - begin < 5


def test_who_talks_into_its_answer_is_let_go(start: Callable[[Serve], Server]) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        try:
            begun.set()
            await send(b"", bytes(LARGE))
            await send(b"", bytes(LARGE))
        finally:
            ended.set()
        return b""

    server = start(serve)
    with asking(server) as other:
        assert begun.wait(10)
        other.sendall(ASKED)
        assert ended.wait(10)


def answering(path: Path, *answers: bytes) -> threading.Thread:
    """A server that says this to whoever asks, and leaves."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def run() -> None:
        with listener, listener.accept()[0] as client:
            client.recv(1 << 16)
            for answer in answers:
                client.sendall(answer)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def framed(kind: int, message: bytes = b"", tail: bytes = b"") -> bytes:
    return ANSWER.pack(len(message), len(tail), kind) + message + tail


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        framed(Kind.LAST)[:-1],
        framed(Kind.LAST, b"abc")[:-1],
        framed(Kind.MORE, b"abc", b"def")[:-1],
        framed(Kind.MORE, b"abc"),
        framed(9, b"abc"),
        framed(Kind.LAST, b"abc") + b"d",
        struct.pack("<IIB", 1 << 31, 1 << 31, Kind.MORE),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_who_does_not_answer_as_a_server_does_is_unavailable(
    tmp_path: Path, connections: Connections, answer: bytes
) -> None:
    thread = answering(tmp_path / "direct.sock", answer)
    with pytest.raises(errors.Unavailable):
        list(call_of(connections))
    thread.join(10)
    assert not connections._idle
    assert not connections._calls


END = image_codec.encode_images_event(ImagesEnd(ImageTimes(), 3))[0]


def picture(index: int) -> tuple[bytes, bytes]:
    return image_codec.encode_images_event(Picture(index, b"file", 1, 8, 8))


@pytest.mark.parametrize("places", [(), (1,), (0, 2)])
def test_an_answer_without_all_its_pictures_is_none(
    tmp_path: Path, connections: Connections, places: tuple[int, ...]
) -> None:
    messages = [framed(Kind.MORE, *picture(place)) for place in places]
    thread = answering(tmp_path / "direct.sock", *messages, framed(Kind.LAST, END))
    rows: list[dict[str, object]] = []
    calls = ImageCalls(lambda data, left_s: call_of(connections), lambda row: rows.append(row) or row)
    with pytest.raises(errors.Unavailable, match="too early"):
        calls.run([ImagesRequest("a", ImageParams())], 20.0)
    thread.join(10)
    assert [row["status"] for row in rows] == ["error"]


def test_a_client_leaves_no_connection_when_its_progress_raises(
    start: Callable[[Serve], Server], connections: Connections
) -> None:
    ended = threading.Event()

    async def serve(data: bytes, left_s: float, send: Send) -> bytes:
        try:
            await send(image_codec.encode_images_event(ImagesProgress(1, 9))[0])
            await asyncio.sleep(60)
        finally:
            ended.set()
        return b""

    def told(progress: object) -> None:
        raise LookupError("the user's")

    start(serve)
    calls = ImageCalls(lambda data, left_s: call_of(connections), lambda row: row, told)
    with pytest.raises(LookupError):
        calls.run([ImagesRequest("a", ImageParams())], 20.0)
    assert ended.wait(10)
    assert not connections._calls


def test_a_client_that_cannot_ask_directly_asks_through_grpc(tmp_path: Path) -> None:
    client = Client(f"unix:{tmp_path / 'rpc.sock'}")
    assert client._direct.call(Method.IMAGES, b"", 1.0) is None
    with pytest.raises(errors.Unavailable):
        client.generate_images("a", timeout_s=2.0)
    client.close()
