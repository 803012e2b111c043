"""Predict calls on a socket of their own, without gRPC: a real frontend with a stand-in rank, and a client."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest

from miinb import errors, predicting
from miinb.client import Client
from miinb.rpc import codec, failures
from miinb.rpc.address import socket_path
from miinb.rpc.direct import ANSWER, REQUEST, Connections, Kind, Method, socket_beside
from miinb.server import direct
from miinb.server.direct import DirectServer, Send
from miinb.server.frontend import room_for_connections
from tests.frontend_process import FrontendProcess, make, wait_for


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontendProcess]:
    """A frontend with a stand-in classifier."""
    process = make(tmp_path_factory.mktemp("direct") / "frontend")
    process.rank(task="text-classification")
    yield process
    process.close()


@pytest.fixture
def stopped(frontend: FrontendProcess) -> Iterator[FrontendProcess]:
    """The frontend while its rank does not answer."""
    frontend.ranks[0].send_signal(signal.SIGSTOP)
    yield frontend
    frontend.ranks[0].send_signal(signal.SIGCONT)
    wait_for(lambda: frontend.running() == 0, "the end of the calls")


@pytest.fixture
def client(frontend: FrontendProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client whose predict calls do not go through gRPC."""
    with frontend.client() as client:
        monkeypatch.setattr(client, "_predict", None)
        yield client


def path_of(frontend: FrontendProcess) -> Path:
    rpc = socket_path(frontend.address)
    assert rpc is not None
    return socket_beside(rpc)


def test_the_socket_is_the_users_alone(frontend: FrontendProcess) -> None:
    assert path_of(frontend).stat().st_mode & 0o777 == 0o600


def test_a_client_of_this_machine_asks_without_grpc(frontend: FrontendProcess, client: Client) -> None:
    found = client.predict("abc")
    with frontend.client() as other:
        other._direct = Connections(None)
        assert other.predict("abc") == found
    with ThreadPoolExecutor(16) as pool:
        texts = [letter * (1 + i) for i, letter in enumerate("abcdefghijklmnop" * 4)]
        assert list(pool.map(client.predict, texts)) == [client.predict(text) for text in texts]
    assert len(client._direct._idle) <= 16


def test_long_requests_and_answers_go_through(client: Client) -> None:
    text = "fox " * 1000
    assert len(client.predict([text] * 900)) == 900
    with pytest.raises(errors.InvalidRequest, match="larger than the 16 MiB"):
        client.predict("b" * (codec.MAX_REQUEST_BYTES + 1))


def test_errors_come_with_name_words_and_hint(client: Client) -> None:
    with pytest.raises(errors.InvalidRequest, match="no option 'topk'") as caught:
        client.predict("abc", topk=2)
    assert caught.value.hint == "Did you mean 'top_k'?"
    assert client.predict("abc"), "the connection lives on"
    assert client.records["status"].tolist() == ["error", "ok"]


def test_time_runs_out(stopped: FrontendProcess, client: Client) -> None:
    with pytest.raises(errors.DeadlineExceeded, match="time limit"):
        client.predict("abc", timeout_s=0.3)
    wait_for(lambda: stopped.running() == 0, "the end of the call")
    assert client.records["status"].tolist() == ["timeout"]


def test_the_stop_button_ends_the_call(stopped: FrontendProcess, client: Client) -> None:
    def press() -> None:
        wait_for(lambda: stopped.running() == 1, "the call")
        os.kill(os.getpid(), signal.SIGINT)

    gc.collect()  # an interrupt that meets the collector would be lost
    threading.Thread(target=press).start()
    with pytest.raises(errors.Interrupted, match="the deployment lives on"):
        client.predict("abc")
    wait_for(lambda: stopped.running() == 0, "the end of the call")


def test_an_awaitable_call_can_be_canceled(stopped: FrontendProcess, client: Client) -> None:
    async def run() -> None:
        task = asyncio.create_task(client.apredict("abc"))
        while not stopped.running():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    wait_for(lambda: stopped.running() == 0, "the end of the call")


def test_closing_the_client_ends_its_calls(stopped: FrontendProcess, client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.predict, "abc")
        wait_for(lambda: stopped.running() == 1, "the call")
        client.close()
        with pytest.raises(errors.Unavailable, match="was stopped while this request ran"):
            call.result(10)
    with pytest.raises(errors.Unavailable, match="The deployment was stopped"):
        client.predict("abc")


def test_a_late_cancel_does_not_end_somebody_elses_call(frontend: FrontendProcess) -> None:
    connections = Connections(path_of(frontend))
    data = codec.encode_predict([{"query": "abc"}], {})
    first = connections.call(Method.PREDICT, data, 10)
    assert first is not None
    answer = first.result()
    second = connections.call(Method.PREDICT, data, 10)
    assert second is not None
    first.cancel()
    assert codec.decode_predicted(second.result()).outputs == codec.decode_predicted(answer).outputs
    connections.close()


def test_a_forked_child_has_connections_of_its_own(client: Client) -> None:
    wanted = client.predict("abc")[0][0].label
    (before,) = client._direct._idle
    child = os.fork()
    if not child:
        try:
            call = client._direct.call(Method.PREDICT, codec.encode_predict([{"query": "abc"}], {}), 10)
            assert call is not None
            assert call._socket is not before
            outputs = codec.decode_predicted(call.result()).outputs
            os._exit(0 if outputs[0][0]["label"] == wanted else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.predict("abc")[0][0].label == wanted


def test_a_forked_child_that_closes_does_not_end_its_parents_calls(stopped: FrontendProcess, client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.predict, "abc")
        wait_for(lambda: stopped.running() == 1, "the call")
        child = os.fork()
        if not child:
            try:
                client._direct.close()
                os._exit(0)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stopped.ranks[0].send_signal(signal.SIGCONT)
        assert call.result(10)


@pytest.mark.parametrize("timeout_s", [1e300, 5e9, numpy.float32(30), numpy.int64(30)])
def test_any_positive_number_is_a_time_limit(client: Client, timeout_s: Any) -> None:
    assert client.predict("abc", timeout_s=timeout_s)


@pytest.mark.parametrize(
    "junk",
    [
        REQUEST.pack(codec.MAX_REQUEST_BYTES + 1, 1.0, Method.PREDICT),
        REQUEST.pack(1, 1.0, Method.PREDICT) + b"ab",
        REQUEST.pack(3, 1.0, Method.PREDICT) + b"\xff\xff\xff",
        REQUEST.pack(3, 1.0, Method.IMAGES) + b"\xff\xff\xff",
        REQUEST.pack(0, 1.0, 77),
        REQUEST.pack(0, float("nan"), Method.PREDICT),
        REQUEST.pack(0, -1.0, Method.PREDICT),
        REQUEST.pack(0, float("inf"), Method.IMAGES),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_junk_harms_nobody(frontend: FrontendProcess, client: Client, junk: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(path_of(frontend)))
        other.settimeout(5)
        other.sendall(junk)
        if head := other.recv(ANSWER.size):
            assert ANSWER.unpack(head)[2] == Kind.FAILED, "what cannot be read is refused"
    assert client.predict("abc")
    assert frontend.process.poll() is None


@pytest.mark.parametrize("method", [Method.PREDICT, Method.IMAGES])
@pytest.mark.parametrize("left_s", [float("nan"), float("inf"), float("-inf"), -1.0, 0.0])
def test_a_time_limit_that_is_none_is_refused_by_name(frontend: FrontendProcess, left_s: float, method: Method) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(path_of(frontend)))
        other.settimeout(5)
        for _ in range(2):
            other.sendall(REQUEST.pack(0, left_s, method))
            length, _, kind = ANSWER.unpack(other.recv(ANSWER.size))
            assert kind == Kind.FAILED
            error = failures.decode_failure(other.recv(length))
            assert isinstance(error, errors.InvalidRequest), "the same connection takes the next request"
            assert error.message.startswith("timeout_s: Input should be")


def said(sock: socket.socket) -> errors.MiinbError:
    """Why a connection was closed."""
    sock.settimeout(10)
    with sock.makefile("rb") as stream:
        length, _, kind = ANSWER.unpack(stream.read(ANSWER.size))
        assert kind == Kind.FAILED
        error = failures.decode_failure(stream.read(length))
        assert not stream.read(), "it is closed"
    return error


@contextlib.contextmanager
def serving(tmp_path: Path, **limits: int) -> Iterator[Callable[[], socket.socket]]:
    """Connects to a server that answers nothing; each connection is known to it when it is returned."""
    loop, made = asyncio.new_event_loop(), []

    async def forever(data: bytes, left_s: float, send: Send) -> bytes:
        if not data:
            await asyncio.sleep(60)
        return data

    server = DirectServer({Method.PREDICT: forever}, **{"most": 9, **limits})
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(10)

    def connect() -> socket.socket:
        made.append(socket.socket(socket.AF_UNIX))
        made[-1].connect(str(tmp_path / "direct.sock"))
        run(asyncio.sleep(0.05))
        return made[-1]

    run(server.start(tmp_path / "direct.sock"))
    try:
        yield connect
    finally:
        run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
        for sock in made:
            sock.close()


@pytest.mark.parametrize("pause_s", [None, 0.1])
def test_a_request_once_begun_comes_within_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause_s: float | None
) -> None:
    monkeypatch.setattr(direct, "MAX_UNSENT_S", 0.5)
    whole = REQUEST.pack(100, 10.0, Method.PREDICT) + bytes(100)
    with serving(tmp_path) as connect:
        idle, slow = connect(), connect()
        begin = time.monotonic()
        slow.sendall(whole[:1])
        for place in range(1, 40):  # a byte now and then does not help
            if pause_s is None or time.monotonic() > begin + 0.45:
                break
            slow.sendall(whole[place : place + 1])
            time.sleep(pause_s)
        error = said(slow)
        assert isinstance(error, errors.DeadlineExceeded)
        assert "did not come whole within 0.5 s" in error.message
        assert time.monotonic() - begin < 5
        for _ in range(2):  # who says nothing has no limit, nor who is whole in time
            idle.sendall(whole[:50])
            time.sleep(0.1)
            idle.sendall(whole[50:])
            assert ANSWER.unpack(idle.recv(ANSWER.size)) == (100, 0, Kind.LAST)
            assert len(idle.recv(100)) == 100
            time.sleep(0.6)


@pytest.mark.parametrize(("limits", "room"), [((1024, 1024), 512), ((1024, 5000), 2500), ((64, 1 << 20), 4096)])
def test_the_frontend_lets_itself_open_files_for_connections(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], room: int
) -> None:
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: now.append(pair))
    assert room_for_connections() == room
    assert now[-1] == (min(limits[1], 8192), limits[1])


def test_one_connection_too_many_takes_the_place_of_an_idle_one(tmp_path: Path) -> None:
    with serving(tmp_path, most_connections=3) as connect:
        running, oldest, begun = connect(), connect(), connect()
        running.sendall(REQUEST.pack(0, 60.0, Method.PREDICT))
        begun.sendall(b"a")
        newer = connect()
        error = said(oldest)
        assert isinstance(error, errors.QueueFull)
        assert "3 connections are open" in error.message
        newer.sendall(REQUEST.pack(0, 60.0, Method.PREDICT))
        time.sleep(0.1)
        assert isinstance(said(connect()), errors.QueueFull), "all others are at work"
        running.close()
        time.sleep(0.1)
        last = connect()
        last.sendall(REQUEST.pack(1, 60.0, Method.PREDICT) + b"a")
        assert ANSWER.unpack(last.recv(ANSWER.size)) == (1, 0, Kind.LAST)


def test_a_client_is_told_why_it_was_not_let_in_and_uses_another_when_it_was_closed(tmp_path: Path) -> None:
    with serving(tmp_path, most_connections=1) as connect:
        first, second = Connections(tmp_path / "direct.sock"), Connections(tmp_path / "direct.sock")
        for one in (first, second, first, second):
            call = one.call(Method.PREDICT, b"a", 10)
            assert call is not None
            assert call.result() == b"a"
            time.sleep(0.05)
        connect().sendall(REQUEST.pack(0, 60.0, Method.PREDICT))
        time.sleep(0.1)
        for size in (1, 1 << 22):
            call = first.call(Method.PREDICT, bytes(size), 10)
            assert call is not None
            time.sleep(0.1)  # it is closed before something is sent
            with pytest.raises(errors.QueueFull, match="1 connections are open"):
                call.result()
        first.close()
        second.close()


def test_who_leaves_within_a_request_leaves_nothing(frontend: FrontendProcess, client: Client) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(path_of(frontend)))
        other.sendall(REQUEST.pack(100, 1.0, Method.PREDICT) + b"abc")
    assert client.predict("abc")
    assert frontend.running() == 0


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Callable[[], FrontendProcess]]:
    """Makes frontends with a rank, always in the same folder."""
    made: list[FrontendProcess] = []

    def start() -> FrontendProcess:
        made.append(make(tmp_path / "frontend", line={"drain_s": 20.0}))
        made[-1].rank(task="text-classification")
        return made[-1]

    yield start
    for process in made:
        process.close()


def test_a_frontend_that_dies_is_said_and_another_deployment_is_not_taken_for_its_own(fresh: Any) -> None:
    frontend = fresh()
    supervisor = frontend.folder / "control.sock"  # which tells deployments apart
    supervisor.touch()
    with frontend.client() as client, ThreadPoolExecutor(1) as pool:
        assert client.predict("abc")
        frontend.ranks[0].send_signal(signal.SIGSTOP)
        call = pool.submit(client.predict, "abc")
        wait_for(lambda: frontend.running() == 1, "the call")
        frontend.process.kill()
        with pytest.raises(errors.Unavailable, match="does not answer"):
            call.result(10)
        frontend.process.wait(10)
        with pytest.raises(errors.Unavailable):
            client.predict("abc", timeout_s=5)
        frontend.ranks[0].kill()
        successor = fresh()
        assert client.predict("abc")  # the same supervisor has started it again
        supervisor.rename(supervisor.with_name("ended"))
        supervisor.touch()
        with pytest.raises(errors.Unavailable, match="started the deployment again"):
            client.predict("abc")
    with successor.client() as client:
        assert client.predict("abc")
        assert len(successor.told("encode")) >= 1


def test_running_calls_end_while_the_frontend_drains_and_new_ones_are_refused(fresh: Any) -> None:
    frontend = fresh()
    with frontend.client() as client, ThreadPoolExecutor(1) as pool:
        assert client.predict("abc")
        frontend.ranks[0].send_signal(signal.SIGSTOP)
        call = pool.submit(client.predict, "abc")
        wait_for(lambda: frontend.running() == 1, "the call")
        idle = socket.socket(socket.AF_UNIX)
        idle.connect(str(path_of(frontend)))
        frontend.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not client.health(), "health while draining")
        with idle:
            idle.settimeout(5)
            idle.sendall(REQUEST.pack(0, 1.0, Method.PREDICT))
            assert ANSWER.unpack(idle.recv(ANSWER.size))[2] == Kind.FAILED
            assert b"Unavailable" in idle.recv(1000)
        with pytest.raises(errors.Unavailable):
            client.predict("abc", timeout_s=5)
        frontend.ranks[0].send_signal(signal.SIGCONT)
        assert call.result(10)
        assert frontend.process.wait(10) == 0
    assert not path_of(frontend).exists()


def test_all_calls_of_a_list_end_while_the_frontend_drains(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "CALL_INPUTS", 1)
    monkeypatch.setattr(predicting, "MAX_CALLS", 2)
    frontend = fresh()
    with frontend.client() as client, ThreadPoolExecutor(1) as pool:
        assert client.predict("abc")
        frontend.ranks[0].send_signal(signal.SIGSTOP)
        calls = pool.submit(client.predict, ["abc"] * 7)
        wait_for(lambda: frontend.running() == 2, "the first calls")
        frontend.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not client.health(), "health while draining")
        with pytest.raises(errors.Unavailable, match="takes no new requests"):
            client.predict("abc")
        frontend.ranks[0].send_signal(signal.SIGCONT)
        assert len(calls.result(10)) == 7
        assert frontend.process.wait(10) == 0


def test_a_second_sigterm_tells_the_running_calls(fresh: Any) -> None:
    frontend = fresh()
    with frontend.client() as client, ThreadPoolExecutor(1) as pool:
        frontend.ranks[0].send_signal(signal.SIGSTOP)
        call = pool.submit(client.predict, "abc")
        wait_for(lambda: frontend.running() == 1, "the call")
        frontend.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not client.health(), "health while draining")
        frontend.process.send_signal(signal.SIGTERM)
        with pytest.raises(errors.Unavailable, match="was stopped while this request ran"):
            call.result(10)
        assert frontend.process.wait(10) == 0
    frontend.ranks[0].kill()


def test_more_calls_than_are_taken_are_refused(tmp_path: Path) -> None:
    async def run() -> list[bytes]:
        async def forever(data: bytes, left_s: float, send: Send) -> bytes:
            await asyncio.sleep(60)
            return data

        server = DirectServer({Method.PREDICT: forever}, most=2)
        await server.start(tmp_path / "direct.sock")
        streams = [await asyncio.open_unix_connection(str(tmp_path / "direct.sock")) for _ in range(3)]
        for _, writer in streams:
            writer.write(REQUEST.pack(0, 1.0, Method.PREDICT))
            await asyncio.sleep(0.05)
        refused = await streams[2][0].readexactly(ANSWER.size)
        words = [await streams[2][0].readexactly(struct.unpack_from("<I", refused)[0])]
        await server.stop()
        for reader, _ in streams[:2]:
            words.append(await reader.read())
        for _, writer in streams:
            writer.close()
        return words

    words = asyncio.run(run())
    assert b"QueueFull" in words[0]
    assert all(b"was stopped" in one for one in words[1:])


def test_who_does_not_read_its_answer_gets_no_other_one(tmp_path: Path) -> None:
    async def run() -> list[int]:
        begun = 0

        async def answer(data: bytes, left_s: float, send: Send) -> bytes:
            nonlocal begun
            begun += 1
            return bytes(8 << 20)

        server = DirectServer({Method.PREDICT: answer}, most=2)
        await server.start(tmp_path / "direct.sock")
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "direct.sock"), limit=1 << 10)
        seen = []
        for _ in range(2):
            writer.write(REQUEST.pack(0, 1.0, Method.PREDICT))
            await asyncio.sleep(0.1)
        seen.append(begun)
        for _ in range(2):
            assert len(await reader.readexactly(ANSWER.size + (8 << 20))) > 8 << 20
            await asyncio.sleep(0.1)
            seen.append(begun)
        writer.close()
        await server.stop()
        return seen

    assert asyncio.run(run()) == [1, 2, 2]
