"""`Session` with the whole path: supervisor, frontend and rank of the tiny model that ships in the package."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import miinb
from miinb import registry
from miinb.client import Client
from miinb.demo import tiny_model
from miinb.deployment import Deployment
from miinb.errors import (
    BrokenCheckpoint,
    DeploymentExists,
    DeploymentNotFound,
    InvalidRequest,
    InvalidValue,
    MiinbError,
    ModelNotFound,
    StartError,
    StartTimeout,
    Unavailable,
    UnknownOption,
    UnsupportedModel,
)
from miinb.rpc.address import socket_path

PROMPT = "Once upon a time,"
TINY: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "options": {"threads": 1}, "start_timeout_s": 120.0}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run") / "a ?#%2Fb"  # what addresses and URLs would split at
        folder.mkdir()
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        yield folder / "miinb"


@pytest.fixture(scope="module")
def session(state: Path) -> Iterator[miinb.Session]:
    with miinb.Session(tiny_model(), name="a/tiny", port=0, **TINY) as found:
        assert list(state.parent.parent.iterdir()) == [state.parent], "nothing beside its folder"
        yield found
    assert not list(state.iterdir())


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def _folder(session: miinb.Session) -> Path:
    socket = socket_path(session.address)
    assert socket is not None
    return socket.parent


def test_it_answers(session: miinb.Session) -> None:
    result = session.generate([PROMPT, "One day"], max_new_tokens=12)
    assert len(result.texts) == 2
    assert all(result.texts)
    assert session.generate(PROMPT, max_new_tokens=12).text == result.texts[0]
    assert "".join(chunk.text for chunk in session.stream(PROMPT, max_new_tokens=12)) == result.texts[0]
    assert session.query({"query": [PROMPT]}, max_new_tokens=12).response == [PROMPT + result.texts[0]]
    assert session.chat([{"role": "user", "content": "Tell a story."}], max_new_tokens=4).usage.output_tokens <= 4
    assert asyncio.run(_answer(session)) == result.texts[0]
    assert len(session.records) >= 6


def test_its_counters_are_true_when_an_answer_has_come(session: miinb.Session) -> None:
    before = session.status().requests
    for number in range(1, 6):
        session.generate(PROMPT, max_new_tokens=1)
        status = session.status()
        assert (status.in_flight, status.queued, status.requests) == (0, 0, before + number)


async def _answer(session: miinb.Session) -> str:
    return str((await session.agenerate(PROMPT, max_new_tokens=12)).text)


def test_it_says_what_it_is(session: miinb.Session) -> None:
    assert (session.name, session.engine, session.task, session.state) == (
        "a/tiny",
        "optimized",
        "text-generation",
        "ready",
    )
    status = session.status()
    assert status.pid == session.pid
    assert [rank.state for rank in status.ranks] == ["ready"]
    assert status.ranks[0].memory_bytes > 0
    plan = session.plan()
    assert (plan.engine, plan.dtype, plan.device) == ("optimized", "fp32", "cpu")
    chosen = {"engine", "device", "dtype", "weights", "max_length", "max_batch", "kv_cache", "step_budget"}
    assert chosen | {"load", "parity", "start"} <= {line.what for line in plan.lines}
    assert len({line.what for line in plan.lines}) == len(plan.lines)
    assert "==> rank-0-0.log <==" in session.logs()
    with pytest.raises(InvalidValue, match="no rank 7"):
        session.logs(rank=7)
    assert session.load_s > 0
    assert session.config.dtype == "fp32"
    assert "'a/tiny'" in repr(session)
    assert set(session._repr_mimebundle_()) == {"text/html", "text/plain"}


def test_every_listener_is_local(session: miinb.Session) -> None:
    """Unix sockets in a 0700 folder; TCP (asked for here) on loopback alone."""
    import psutil

    family = psutil.Process(session.pid)
    found = [
        connection.laddr.ip
        for process in [family, *family.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert found
    assert set(found) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    folder = _folder(session)
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("rpc.sock", "direct.sock", "control.sock", "token"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600


def test_its_port_is_told_and_takes_the_token_alone(session: miinb.Session, state: Path) -> None:
    address = session.status().tcp_address
    assert address.startswith("127.0.0.1:")
    (token,) = (path.read_text().strip() for path in state.glob("*/token"))
    with contextlib.closing(Client(address, token)) as client:
        assert client.generate("a", max_new_tokens=1).token_ids
    with contextlib.closing(Client(address)) as client, pytest.raises(MiinbError, match="token"):
        client.generate("a", max_new_tokens=1)


def test_no_secret_is_shown(session: miinb.Session) -> None:
    import psutil

    folder = _folder(session)
    token = (folder / "token").read_text()
    family = psutil.Process(session.pid)
    for process in [family, *family.children(recursive=True)]:
        assert token not in " ".join(process.cmdline())
        assert token not in " ".join(process.environ().values())
    assert token not in (folder / "deployment.json").read_text()
    assert token not in "".join(log.read_text() for log in (folder / "logs").iterdir())


def test_others_find_it_and_join_it(session: miinb.Session) -> None:
    (status,) = [one for one in miinb.deployments() if one.name == "a/tiny"]
    assert status.state == "ready"
    joined = miinb.attach("a/tiny")
    assert joined.generate(PROMPT, max_new_tokens=3).text
    assert joined is session  # one session a deployment in this process, so that no record is missed
    assert miinb.Session._of(joined._deployment).plan() == session.plan()  # as another process would see it
    with pytest.raises(DeploymentNotFound, match="Did you mean 'a/tiny'"):
        miinb.attach("a/tinny")


def test_its_name_is_taken(session: miinb.Session) -> None:
    with pytest.raises(DeploymentExists, match="'a/tiny'"):
        miinb.Session(tiny_model(), name="a/tiny", **TINY)
    assert session.state == "ready"


def test_a_bad_request_harms_nothing(session: miinb.Session) -> None:
    with pytest.raises(InvalidRequest, match="Did you mean 'temperature'"):
        session.generate(PROMPT, temprature=1.0)
    assert session.state == "ready"


def test_a_dead_rank_comes_back(session: miinb.Session) -> None:
    before = session.status().ranks[0].pid
    os.kill(before, 9)
    until(lambda: [rank.pid for rank in session.status().ranks] not in ([], [before]))
    until(lambda: session.status().state == "ready", 60.0)
    assert session.generate(PROMPT, max_new_tokens=3).text


def test_restart_and_stop(session: miinb.Session) -> None:
    pid, instance = session.pid, session.instance_id
    session.restart()
    assert session.pid != pid
    assert session.instance_id != instance
    assert session.name == "a/tiny"
    assert session.generate(PROMPT, max_new_tokens=3).text
    last = session.stop()
    assert last is not None
    assert last.state == session.state == session.status().state == "stopped"
    assert session.stop() is None
    assert not miinb.deployments()


def refused(session: miinb.Session) -> bool:
    """Whether a request is: one may still be let in while the frontend is being told."""
    try:
        session.generate(PROMPT, max_new_tokens=1)
    except Unavailable:
        return True
    return False


@pytest.mark.parametrize("joined", [False, True])
def test_a_stop_that_drains_lets_requests_end(state: Path, joined: bool) -> None:
    """By who started it, whose end the supervisor watches for, and by who joined; others are refused meanwhile."""
    with miinb.Session(tiny_model(), name="drained", **TINY) as session, ThreadPoolExecutor(5) as pool:
        stopping = miinb.attach("drained") if joined else session
        running = [session.stream(PROMPT, max_new_tokens=450, ignore_eos=True) for _ in range(4)]
        for stream in running:
            next(stream)
        results = [pool.submit(lambda stream=stream: stream.result) for stream in running]
        stopped = pool.submit(stopping.stop, drain_s=300.0)
        until(lambda: refused(session))
        for result in (one.result(300) for one in results):
            assert (result.finish_reasons, len(result.token_ids[0])) == (("length",), 450)
        assert stopped.result(300).state == "stopped"


def test_what_a_stop_that_drains_lets_end_can_be_read_after_it(state: Path) -> None:
    with miinb.Session(tiny_model(), **TINY) as session:
        streams = [session.stream(PROMPT, max_new_tokens=450, ignore_eos=True) for _ in range(8)]
        for stream in streams:
            next(stream)
        session.stop(drain_s=300.0)
        assert [stream.result.finish_reasons for stream in streams] == [("length",)] * 8
        assert [len(stream.result.token_ids[0]) for stream in streams] == [450] * 8
        with pytest.raises(Unavailable, match="was stopped"):
            session.generate(PROMPT)


def test_a_restart_lets_requests_end_and_keeps_the_records(state: Path) -> None:
    with miinb.Session(tiny_model(), **TINY) as session, ThreadPoolExecutor(1) as pool:
        read, unread = (session.stream(PROMPT, max_new_tokens=450, ignore_eos=True) for _ in range(2))
        next(read), next(unread)
        result = pool.submit(lambda: read.result)
        session.restart(drain_s=300.0)
        assert len(result.result(300).token_ids[0]) == len(unread.result.token_ids[0]) == 450
        session.generate(PROMPT, max_new_tokens=3)
        assert list(session.records["output_tokens"]) == [450, 450, 3]
        assert list(session.records["seq"]) == [0, 1, 2]
        cut_off = session.stream(PROMPT, max_new_tokens=450, ignore_eos=True)
        next(cut_off)
        session.restart(drain_s=0)
        with pytest.raises(Unavailable, match="was stopped while this request ran"):
            _ = cut_off.result
        assert list(session.records["status"]) == ["ok"] * 3 + ["error"]


def test_who_is_cut_off_by_the_end_of_a_drain_is_told_so(state: Path) -> None:
    with miinb.Session(tiny_model(), **TINY) as session, ThreadPoolExecutor(32) as pool:
        for wrong in (float("nan"), -1, "1", None, True):
            with pytest.raises(InvalidValue, match=r"drain_s: .* is no number of seconds"):
                session.stop(drain_s=wrong)  # type: ignore[arg-type]
            for rolling in (False, True):
                with pytest.raises(InvalidValue, match=r"drain_s: .* is no number of seconds"):
                    session.restart(rolling=rolling, drain_s=wrong)  # type: ignore[arg-type]
        streams = [session.stream(PROMPT, max_new_tokens=490, ignore_eos=True) for _ in range(64)]
        for stream in streams[:8]:
            next(stream)
        ends = reading(pool, streams[:32])
        session.stop(drain_s=0.01)
        told = {one.result(300) for one in (*ends, *reading(pool, streams[32:]))}
    assert "The deployment was stopped while this request ran." in told
    # a request that had not come yet when the drain began is a new one
    late = "The deployment is being stopped; it takes no new requests."
    assert told <= {"The deployment was stopped while this request ran.", late, "length"}


def reading(pool: ThreadPoolExecutor, streams: list[miinb.streams.Stream]) -> list[Any]:
    """What their ends will be, told by threads: a reason or an error's message."""

    def end(stream: miinb.streams.Stream) -> str:
        try:
            return stream.result.finish_reasons[0]
        except MiinbError as error:
            return error.message

    return [pool.submit(end, stream) for stream in streams]


def test_a_second_stop_cuts_nothing_off_that_the_first_lets_end(state: Path) -> None:
    """From another thread of the same session, as a panel has, and from another process."""
    with miinb.Session(tiny_model(), name="twice", **TINY) as session, ThreadPoolExecutor(15) as pool:
        joined = miinb.Session._of(Deployment(registry.find("twice")))  # as another process has it
        streams = [session.stream(PROMPT, max_new_tokens=450, ignore_eos=True) for _ in range(12)]
        until(lambda: session.status().in_flight == 12)
        ends = reading(pool, streams)
        stops = [pool.submit(one.stop, drain_s=300.0) for one in (session, session, joined)]
        assert [one.result(300) for one in ends] == ["length"] * 12
        assert {one.result(300).state for one in stops} == {"stopped"}


def test_a_stop_that_drains_lets_all_prompts_of_a_list_end(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miinb.client, "MAX_STREAMS", 4)
    with miinb.Session(tiny_model(), **TINY) as session, ThreadPoolExecutor(1) as pool:
        running = pool.submit(session.generate, [PROMPT] * 12, max_new_tokens=100, ignore_eos=True)
        until(lambda: session.status().in_flight == 4)
        session.stop(drain_s=300.0)
        assert running.result(300).finish_reasons == ("length",) * 12


def test_who_only_watches_or_is_connected_is_not_waited_for(state: Path) -> None:
    with miinb.Session(tiny_model(), port=0, **TINY) as session, grpc.insecure_channel(session.address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        host, _, port = session.status().tcp_address.partition(":")
        with socket.create_connection((host, int(port))):
            begin = time.monotonic()
            session.stop(drain_s=300.0)
            assert time.monotonic() - begin < 20.0


def test_the_port_of_a_deployment_can_be_had_again_at_once(state: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with miinb.Session(tiny_model(), port=port, **TINY) as session, socket.create_connection(("127.0.0.1", port)):
        session.restart()
        assert session.generate(PROMPT, max_new_tokens=3).text
        with pytest.raises(StartError, match=f"Port {port} cannot be used"):
            miinb.Session(tiny_model(), port=port, **TINY)


@pytest.mark.parametrize("drain_s", [0.0, 60.0])
def test_a_stop_that_is_interrupted_before_its_order_leaves_all_as_it_was(
    state: Path, monkeypatch: pytest.MonkeyPatch, drain_s: float
) -> None:
    monkeypatch.setattr(miinb.client, "MAX_STREAMS", 2)
    with miinb.Session(tiny_model(), name="lives", **TINY) as session, ThreadPoolExecutor(1) as pool:
        running = pool.submit(session.generate, [PROMPT] * 8, max_new_tokens=100, ignore_eos=True)
        until(lambda: session.status().in_flight == 2)
        os.kill(session.pid, signal.SIGSTOP)  # a supervisor that is busy
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            session.stop(drain_s=drain_s)
        os.kill(session.pid, signal.SIGCONT)
        until(lambda: session.state == "ready")
        if drain_s:
            assert running.result(60).finish_reasons == ("length",) * 8
        else:  # it was to end at once
            assert isinstance(running.exception(60), Unavailable)
        assert session.generate(PROMPT, max_new_tokens=3).text
        assert miinb.attach("lives") is session


def test_an_interrupt_of_a_drain_cuts_nothing_off(state: Path) -> None:
    with miinb.Session(tiny_model(), **TINY) as session, ThreadPoolExecutor(8) as pool:
        streams = [session.stream(PROMPT, max_new_tokens=450, ignore_eos=True) for _ in range(8)]
        until(lambda: session.status().in_flight == 8)
        ends = reading(pool, streams)
        rank = session.status().ranks[0].pid
        os.kill(rank, signal.SIGSTOP)  # so that the drain lasts
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            session.stop(drain_s=300.0)
        os.kill(rank, signal.SIGCONT)
        assert [one.result(300) for one in ends] == ["length"] * 8


def test_a_restart_by_who_joined_before_it_was_kept_keeps_it(state: Path) -> None:
    with miinb.Session(tiny_model(), name="kept", **TINY) as owner:
        joined = miinb.Session._of(Deployment(registry.find("kept")))  # as another process has it
        owner.keep()
        assert not joined.persist
        joined.restart()
        assert joined.persist
        assert joined.status().persist
        joined.stop()


def test_a_restart_that_cannot_work_ends_nothing(state: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(tiny_model(), folder)
    with miinb.Session(folder, **TINY) as session:
        folder.rename(elsewhere)
        with pytest.raises(ModelNotFound):
            session.restart()
        assert session.state == "ready"
        assert session.generate(PROMPT, max_new_tokens=3).text
        elsewhere.rename(folder)
        (folder / "tokenizer.json").write_text("{")  # seen by the rank alone
        with pytest.raises(BrokenCheckpoint, match=r"has ended; restart\(\) tries"):
            session.restart()
        assert session.state == session.status().state == "stopped"
        with pytest.raises(Unavailable, match=r"did not start again: .*tokenizer\.json"):
            session.generate(PROMPT)


def test_who_joined_before_a_restart_is_told_to_join_again(state: Path) -> None:
    with miinb.Session(tiny_model(), name="shared", **TINY) as owner:
        joined = miinb.Session._of(Deployment(registry.find("shared")))  # as another process has it
        owner.restart()
        with pytest.raises(Unavailable, match=r"started the deployment again\. Join it with miinb\.attach\(name\)"):
            joined.generate(PROMPT)  # though the other answers at the same address
        with pytest.raises(Unavailable, match=r"another deployment has its name now\. Use miinb\.attach\('shared'\)"):
            joined.keep()
        for ask in (joined.restart, lambda: joined.generate(PROMPT)):
            with pytest.raises(MiinbError, match=r"Use miinb\.attach\('shared'\)") as told:
                ask()
            assert "restart()" not in told.value.line()
        joined.stop()
        assert owner.state == "ready"
        assert miinb.attach("shared").generate(PROMPT, max_new_tokens=3).text
        ended = miinb.Session._of(Deployment(registry.find("shared")))
    ended.stop()
    with pytest.raises(Unavailable, match=r"restart\(\); if .*miinb\.attach\(name\)"):
        ended.generate(PROMPT)


def test_a_restart_without_room_on_the_disk_says_so(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with miinb.Session(tiny_model(), **TINY) as session:
        with monkeypatch.context() as patch:
            patch.setattr("miinb.deployment.tempfile.TemporaryFile", full)
            with pytest.raises(StartError, match=r"No space left on device\. .* has ended; restart\(\) tries"):
                session.restart()
        assert session.state == "stopped"
        assert session.restart().generate(PROMPT, max_new_tokens=3).text


def broken(folder: Path, change: str) -> Path:
    shutil.copytree(tiny_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif change == "header":
        weights.write_bytes(b"\xff" * 100)
    elif change == "family":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_family"}))
    elif change == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif change == "shapes":
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    return folder


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("truncated", BrokenCheckpoint, "model.safetensors"),
        ("header", BrokenCheckpoint, "model.safetensors"),
        ("family", UnsupportedModel, "no_such_family"),
        ("shapes", BrokenCheckpoint, ""),
        ("tokenizer", BrokenCheckpoint, "tokenizer.json"),
    ],
)
def test_models_that_cannot_work(state: Path, tmp_path: Path, change: str, error: type[MiinbError], words: str) -> None:
    with pytest.raises(error) as caught:
        miinb.Session(broken(tmp_path / "model", change), **TINY)
    assert words in str(caught.value)
    assert not list(state.iterdir())


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"model": "/no/such/folder"}, ModelNotFound, "/no/such/folder"),
        ({"dtype": "fp8"}, InvalidValue, "a CPU has no fp8. Use dtype='int8'"),
        ({"device": "cuda", "gpus": [0]}, InvalidValue, "no GPU can be seen"),
        ({"tensor_parallell": 2}, UnknownOption, "Did you mean 'tensor_parallel'"),
        ({"options": {"pages": 1}}, UnknownOption, "pages"),
        ({"max_batch": 0}, InvalidValue, "max_batch"),
        ({"task": "fill-mask"}, UnsupportedModel, "fill-mask"),
        ({"name": "../up"}, InvalidValue, "name"),
    ],
)
def test_refused_before_anything_starts(
    state: Path, fields: dict[str, Any], error: type[MiinbError], words: str
) -> None:
    with pytest.raises(error) as caught:
        miinb.Session(**{"model": tiny_model(), **TINY, **fields})
    assert words in caught.value.line()
    assert not state.exists() or not list(state.iterdir())


def test_a_port_in_use_is_named(state: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"Port {port} cannot be used.*by process {os.getpid()}"):
            miinb.Session(tiny_model(), port=port, **TINY)


def test_a_start_has_a_time_limit(state: Path) -> None:
    with pytest.raises(StartTimeout, match=r"not ready after 0\.3 s") as caught:
        miinb.Session(tiny_model(), **{**TINY, "start_timeout_s": 0.3})
    assert ("log below" in caught.value.hint) == bool(caught.value.details)
    assert not list(state.iterdir())
