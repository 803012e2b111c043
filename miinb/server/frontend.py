"""The frontend process: `python -m miinb.server.frontend`. docs/internals.md says how it is started.

One asyncio loop: gRPC on a unix socket (and on loopback TCP with a token, when a port was asked for), rank 0 of every
replica on another unix socket. SIGTERM drains: new requests are refused, running ones may end within `drain_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from miinb.config import DeploymentConfig
from miinb.messages import EngineInfo
from miinb.rpc import codec
from miinb.rpc.address import unix_address
from miinb.rpc.direct import Method, socket_beside
from miinb.server import ipc
from miinb.server.balancer import Balancer
from miinb.server.direct import DirectServer, Serve
from miinb.server.encoders.registry import ENCODER_TASKS
from miinb.server.encoders.tokenization import EncoderText
from miinb.server.service import Inference, TokenCheck
from miinb.server.text import TextCodec
from miinb.tasks import find_task

LAST_WORDS_S = 0.5  # less than a child has between SIGTERM and SIGKILL
DRAIN_S = 600.0  # the supervisor knows how long it waits; this only bounds a forgotten frontend
BETWEEN_CALLS_S = 0.1  # in which the next call of a list comes, once those before it have ended
TICK_S = 1.0
#: What changes as requests come and go is told so much later, together.
REPORT_S = 0.02
#: Calls beyond those that replicas run or queue: health checks, descriptions, and refusals with a name.
SPARE_CALLS = 256
#: Connections to the direct socket, and at most half of the files that this process may open.
MAX_CONNECTIONS = 4096
DEFAULT_MAX_BATCH = 1024

GRPC_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", codec.MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),  # never too many: under load pings come in bunches, and after the last answer
    ("grpc.max_metadata_size", 8192),
    ("grpc.absolute_max_metadata_size", 8192),
    ("grpc.server_handshake_timeout_ms", 10_000),
)

log = logging.getLogger(__name__)


class StatusPipe:
    """JSON lines to the supervisor, on the pipe whose number is in MIINB_STATUS_FD. Never blocks."""

    def __init__(self) -> None:
        number = os.environ.get("MIINB_STATUS_FD")
        self._fd = int(number) if number else None
        if self._fd is not None:
            os.set_blocking(self._fd, False)

    def send(self, line: Mapping[str, Any]) -> None:
        """Write one line; a full or closed pipe drops it."""
        if self._fd is not None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._fd, (json.dumps(line) + "\n").encode())


class Frontend:
    """The servers of one deployment and what they share."""

    def __init__(self, config: DeploymentConfig, folder: Path, name: str, drain_s: float, status: StatusPipe) -> None:
        self._config = config
        self._folder = folder
        self._drain_s = drain_s
        self._status = status
        self._name = name
        self._balancer = Balancer(
            self._load_text,
            max_queue=config.options.max_queue,
            on_change=self._replicas_changed,
            on_left=self._changed,
        )
        self._service = Inference(self._balancer, name, self._changed)
        self._report_due: asyncio.TimerHandle | None = None  # what has changed is told then
        self._health = HealthServicer()
        self._health_tasks: set[asyncio.Task[None]] = set()
        self._servers: list[grpc.aio.Server] = []
        self._for_ranks: asyncio.Server | None = None  # held here: uvloop ends what nobody holds
        methods: dict[int, Serve] = {Method.PREDICT: self._service.predict, Method.IMAGES: self._service.images}
        self._direct = DirectServer(methods, self._most_calls, room_for_connections())

    def _load_text(self, info: EngineInfo) -> TextCodec | EncoderText | None:
        task, folder = find_task(info.task), self._folder / info.tokenizer_folder
        if task.streams:
            return TextCodec.load(folder)
        return EncoderText.load(folder) if task.name in ENCODER_TASKS else None

    def _replicas_changed(self) -> None:
        self._report()  # a deployment is ready when all its replicas are
        task = asyncio.ensure_future(self._set_health())
        self._health_tasks.add(task)
        task.add_done_callback(self._health_tasks.discard)

    async def _set_health(self) -> None:
        Status = health_pb2.HealthCheckResponse
        status = Status.SERVING if self._balancer.replicas else Status.NOT_SERVING
        for service in {"", codec.SERVICE, self._name}:
            await self._health.set(service, status)

    @property
    def _most_calls(self) -> int:
        """At the same time."""
        rows = (self._config.max_batch or DEFAULT_MAX_BATCH) + self._config.options.max_queue
        return self._config.replicas * rows + SPARE_CALLS

    def _server(self, token: str | None) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[] if token is None else [TokenCheck(token)],
            options=GRPC_OPTIONS,
            maximum_concurrent_rpcs=self._most_calls,
        )
        server.add_generic_rpc_handlers((self._service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._servers.append(server)
        return server

    async def start(self) -> dict[str, str]:
        """Listen on every socket; the addresses of the ready line."""
        await self._set_health()
        self._for_ranks = await ipc.listen(self._folder / "engine.sock", self._balancer.make_channel)
        socket = self._folder / "rpc.sock"
        await self._direct.start(socket_beside(socket))
        socket.unlink(missing_ok=True)
        address = unix_address(socket)
        server = self._server(None)
        server.add_insecure_port(address)
        socket.chmod(0o600)
        await server.start()
        addresses = {"address": address}
        if self._config.port is not None:
            token = (self._folder / "token").read_text().strip()
            server = self._server(token)
            port = server.add_insecure_port(f"127.0.0.1:{self._config.port}")
            await server.start()
            addresses["tcp"] = f"127.0.0.1:{port}"
        return addresses

    async def run(self) -> None:
        """Serve until SIGTERM; a second one ends at once."""
        loop = asyncio.get_running_loop()
        signals: asyncio.Queue[None] = asyncio.Queue()
        loop.add_signal_handler(signal.SIGTERM, signals.put_nowait, None)
        self._status.send({"ready": await self.start()})
        loop.add_reader(0, self._told, loop)
        activity = asyncio.ensure_future(self._every_second())
        await signals.get()
        self._balancer.stopping = True
        self._service.admission.drain()
        log.info("draining for at most %.0f s", self._drain_s)
        await self._health.enter_graceful_shutdown()
        second, rest = asyncio.ensure_future(signals.get()), asyncio.ensure_future(self._at_rest())
        await asyncio.wait({rest, second}, timeout=self._drain_s, return_when=asyncio.FIRST_COMPLETED)
        self._balancer.close()  # what still runs is told why it ends
        await asyncio.gather(self._direct.stop(), *(server.stop(LAST_WORDS_S) for server in self._servers))
        for task in (activity, second, rest):
            task.cancel()
        if self._for_ranks is not None:
            self._for_ranks.close()
        for file in ("rpc.sock", "direct.sock", "engine.sock"):
            (self._folder / file).unlink(missing_ok=True)

    async def _at_rest(self) -> None:
        """Until no request has run for a moment. Who watches the health, or is connected and says nothing, is none."""
        while self._direct.busy or self._service.admission.rest_s < BETWEEN_CALLS_S:
            await asyncio.sleep(BETWEEN_CALLS_S / 10)

    def _told(self, loop: asyncio.AbstractEventLoop) -> None:
        """The supervisor has written a line: a replica is to leave. A line fits a pipe's buffer: it comes whole."""
        text = os.read(0, 1 << 16)
        if not text:
            loop.remove_reader(0)
        for line in text.splitlines():
            order = json.loads(line)
            self._balancer.leave(int(order["leave"]), float(order["drain_s"]))

    def _changed(self) -> None:
        """Tell it: what has ended before its client knows, so that who asks then gets true numbers."""
        if not self._service.in_flight:
            self._report()
        elif self._report_due is None:
            self._report_due = asyncio.get_running_loop().call_later(REPORT_S, self._report)

    def _report(self) -> None:
        if self._report_due is not None:
            self._report_due.cancel()
            self._report_due = None
        service, counters = self._service, self._service.counters
        activity = {"in_flight": service.in_flight, "queued": counters.queued, "requests": counters.requests}
        self._status.send({"activity": {**activity, "replicas": len(self._balancer.replicas)}})

    async def _every_second(self) -> None:
        """Tell the supervisor what there is, which also shows it that this process lives; end what nobody reads."""
        while True:
            self._service.end_unread()
            self._balancer.let_go()
            self._report()
            for replica, seconds in self._balancer.silent().items():
                self._status.send({"silent": {"replica": replica, "seconds": seconds}})
            await asyncio.sleep(TICK_S)


def room_for_connections() -> int:
    """How many connections to the direct socket this process takes; it lets itself open as many files as it may."""
    asked = 2 * MAX_CONNECTIONS  # sockets of ranks and gRPC, logs
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < asked:
        soft = asked if hard == resource.RLIM_INFINITY else min(asked, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(min(MAX_CONNECTIONS, soft // 2), 1)


def main() -> None:
    """Read the JSON line of stdin and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the Stop button of a notebook is not for the server
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    status = StatusPipe()
    try:
        line = json.loads(sys.stdin.readline())
        config = DeploymentConfig.from_json(json.dumps(line["config"]))
        frontend = Frontend(
            config, Path(line["folder"]), line.get("name", ""), float(line.get("drain_s", DRAIN_S)), status
        )
        uvloop.run(frontend.run())
    except Exception as error:
        log.exception("the frontend failed")
        status.send({"failed": {"error": type(error).__name__, "message": str(error), "hint": "", "details": ""}})
        sys.exit(1)


if __name__ == "__main__":
    main()
