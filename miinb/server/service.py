"""The gRPC service `miinb.v1.Inference`: bytes in, bytes out, every failure a code with a name."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

import miinb
from miinb.errors import Cancelled, MiinbError, RequestError
from miinb.image_messages import ImagesEnd, ImagesRequest
from miinb.messages import (
    GenerateRequest,
    RequestBegin,
)
from miinb.rpc import codec, failures, image_codec
from miinb.seconds import LONGEST_S
from miinb.server.admission import Admission
from miinb.server.awake import Awake
from miinb.server.balancer import Balancer
from miinb.server.conversations import Conversations, Turn
from miinb.server.direct import MAX_UNREAD_S, Send
from miinb.server.generation import Generation
from miinb.server.imaging import Imaging
from miinb.server.prediction import predict

#: A call without a deadline of its own has this one.
MAX_DEADLINE_S = 3600.0
#: Above so many streams a stream's chunks are at least so far apart, and all have at most so many chunks a second.
MANY_STREAMS = 32
PACE_S = 0.04
MAX_CHUNKS_S = 4000

log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(slots=True)
class Counters:
    """What the frontend has done, and what it does now."""

    requests: int = 0
    in_flight: int = 0  # whose clients wait
    queued: int = 0  # of those in flight: no token yet, no picture begun
    failed: int = 0
    cancelled: int = 0
    output_tokens: int = 0


class Writer:
    """Writes the messages of one call and knows since when its client has not taken one (None: it has)."""

    def __init__(self, send: Send, task: asyncio.Task[Any] | None) -> None:
        self.since: float | None = None
        self.given_up = False
        self._send = send
        self._task = task

    async def write(self, message: bytes, tail: bytes = b"") -> None:
        """Write one message; waits while the client's window is full."""
        self.since = time.monotonic()
        await self._send(message, tail)
        self.since = None

    def give_up(self) -> None:
        """End the call."""
        self.given_up = True
        if self._task is not None:
            self._task.cancel()


class Inference:
    """The service's methods over the replicas of a balancer.

    Args:
        balancer: the replicas.
        name: the deployment's.
        on_change: called when a request comes or has ended.
    """

    def __init__(self, balancer: Balancer, name: str, on_change: Callable[[], None] = lambda: None) -> None:
        self.counters = Counters()
        self.admission = Admission()
        self._on_change = on_change
        self._balancer = balancer
        self._conversations = Conversations()
        self._awake = Awake()
        self._name = name
        self._writers: set[Writer] = set()

    @property
    def in_flight(self) -> int:
        """Requests whose clients wait, and those that a replica may still compute though nobody waits any more."""
        return self.counters.in_flight + self._balancer.left

    def handlers(self) -> Any:
        """The methods for `grpc.aio.Server.add_generic_rpc_handlers`; requests stay bytes, so that junk is ours."""
        methods = {
            codec.GENERATE: grpc.unary_stream_rpc_method_handler(self._generate),
            image_codec.GENERATE_IMAGES: grpc.unary_stream_rpc_method_handler(self._generate_images),
            codec.PREDICT: grpc.unary_unary_rpc_method_handler(self._predict),
            codec.CREATE_SESSION: grpc.unary_unary_rpc_method_handler(self._create_session),
            codec.DESTROY_SESSION: grpc.unary_unary_rpc_method_handler(self._destroy_session),
            codec.DESCRIBE: grpc.unary_unary_rpc_method_handler(self._describe),
        }
        return grpc.method_handlers_generic_handler(
            codec.SERVICE, {path.rpartition("/")[2]: handler for path, handler in methods.items()}
        )

    async def _generate(self, data: bytes, context: Any) -> None:
        run = functools.partial(self._run_generate, data)
        await aborting(self._streamed(run, sender(context), context.time_remaining()), context)

    async def _generate_images(self, data: bytes, context: Any) -> None:
        async def run(writer: Writer, deadline: float) -> None:
            await writer.write(await self._run_images(data, writer, deadline))

        await aborting(self._streamed(run, sender(context), context.time_remaining()), context)

    async def _predict(self, data: bytes, context: Any) -> bytes:
        run = functools.partial(self._run_predict, data)
        return await aborting(self._bounded(run, context.time_remaining()), context)

    async def predict(self, data: bytes, left_s: float, send: Send) -> bytes:
        """Answer a predict request that came without gRPC; both are the bytes of its messages.

        Args:
            data: the request.
            left_s: seconds that it may take.
            send: for answers of several messages.

        Raises:
            MiinbError: it was refused, or failed.
        """
        return await self._bounded(functools.partial(self._run_predict, data), left_s)

    async def images(self, data: bytes, left_s: float, send: Send) -> bytes:
        """The same of a request for pictures: all messages but the last are sent."""
        return await self._streamed(functools.partial(self._run_images, data), send, left_s)

    def end_unread(self) -> None:
        """End the calls whose clients have stopped reading; to be called about once a second.

        (A timer for each write would cost a quarter of the frontend's time under load.)
        """
        limit = time.monotonic() - MAX_UNREAD_S
        for writer in tuple(self._writers):
            if writer.since is not None and writer.since < limit:
                writer.give_up()

    async def _streamed(
        self, run: Callable[[Writer, float], Awaitable[_T]], send: Send, remaining_s: float | None
    ) -> _T:
        """`_bounded` of a call that writes messages; it ends where its client does not read them."""
        writer = Writer(send, asyncio.current_task())
        self._writers.add(writer)
        try:
            return await self._bounded(lambda deadline: run(writer, deadline), remaining_s)
        except asyncio.CancelledError:
            if not writer.given_up:
                raise
            raise Cancelled(f"The client did not read for {MAX_UNREAD_S:.0f} s.") from None
        finally:
            self._writers.discard(writer)

    async def _bounded(self, run: Callable[[float], Awaitable[_T]], remaining_s: float | None) -> _T:
        """Counts one request and holds it to its client's time limit, in the queue too; `run` gets the moment."""
        counters = self.counters
        counters.requests += 1
        counters.in_flight += 1
        self._on_change()
        left_s = MAX_DEADLINE_S if remaining_s is None else min(max(remaining_s, 0.0), LONGEST_S)
        try:
            async with asyncio.timeout(left_s):
                return await run(time.monotonic() + left_s)
        except asyncio.CancelledError:
            counters.cancelled += 1
            raise
        except TimeoutError:
            counters.failed += 1
            raise failures.timed_out() from None
        except Exception:
            counters.failed += 1
            raise
        finally:
            counters.in_flight -= 1
            self._on_change()

    async def _run_generate(self, data: bytes, writer: Writer, deadline: float) -> None:
        t_submit = time.monotonic()
        request = codec.decode_generate(data)
        with self.admission.call(lambda: request.request_id):
            if not request.session_id:
                await self._answer(request, writer, t_submit, deadline)
                return
            async with self._conversations.turn(request) as turn:
                await self._answer(request, writer, t_submit, deadline, turn)

    async def _answer(
        self, request: GenerateRequest, writer: Writer, t_submit: float, deadline: float, turn: Turn | None = None
    ) -> None:
        counters = self.counters
        counters.queued += 1
        waiting = True
        generation: Generation | None = None
        try:
            generation = await Generation.start(
                request,
                self._balancer,
                t_submit=t_submit,
                deadline=deadline,
                pace_s=self._pace_s,
                history=turn.history if turn is not None else (),
            )
            if turn is not None:
                turn.begin(generation.prompt)
            async for event in generation.events():
                if turn is not None:
                    event = turn.passing(event)
                if waiting and type(event) is not RequestBegin:
                    counters.queued -= 1
                    waiting = False
                await writer.write(codec.encode_event(event))
        finally:
            if waiting:
                counters.queued -= 1
            if generation is not None:
                generation.cancel()
                counters.output_tokens += generation.output_tokens

    async def _run_images(self, data: bytes, writer: Writer, deadline: float) -> bytes:
        """Writes all messages but the last, which it returns."""
        t_submit = time.monotonic()
        request = image_codec.decode_images(data)
        with self.admission.call(lambda: request.request_id):
            return await self._paint(request, writer, t_submit, deadline)

    async def _paint(self, request: ImagesRequest, writer: Writer, t_submit: float, deadline: float) -> bytes:
        imaging: Imaging | None = None
        self.counters.queued += 1
        waiting = True

        def begun() -> None:
            nonlocal waiting
            self.counters.queued -= waiting
            waiting = False

        try:
            imaging = await Imaging.start(request, self._balancer, t_submit=t_submit, deadline=deadline, on_begin=begun)
            async for event in imaging.events():
                message, file = image_codec.encode_images_event(event)
                if isinstance(event, ImagesEnd):
                    return message
                await writer.write(message, file)
            raise RequestError("The pictures have no end.")
        finally:
            begun()
            if imaging is not None:
                imaging.cancel()

    def _pace_s(self) -> float:
        streams = self.counters.in_flight
        return max(PACE_S, streams / MAX_CHUNKS_S) if streams > MANY_STREAMS else 0.0

    async def _run_predict(self, data: bytes, deadline: float) -> bytes:
        alone = self.counters.in_flight == 1
        now = time.monotonic()
        with self.admission.call(functools.partial(codec.request_id, data)):
            return await predict(data, self._balancer, self._awake, t_submit=now, deadline=deadline, alone=alone)

    async def _create_session(self, data: bytes, context: Any) -> bytes:
        return await self._change_sessions(self._conversations.create, data, context)

    async def _destroy_session(self, data: bytes, context: Any) -> bytes:
        return await self._change_sessions(self._conversations.destroy, data, context)

    async def _change_sessions(self, change: Callable[[str], None], data: bytes, context: Any) -> bytes:
        try:
            change(codec.decode_session(data))
        except Exception as error:
            await abort(context, error)
        return b""

    async def _describe(self, data: bytes, context: Any) -> bytes:
        try:
            replica = await self._balancer.pick(0)
        except MiinbError as error:
            await abort(context, error)
            raise
        return codec.encode_description(
            {
                "name": self._name,
                "version": miinb.__version__,
                "info": dataclasses.asdict(replica.info),
                "replicas": len(self._balancer.replicas),
                "counters": dataclasses.asdict(self.counters),
            }
        )


def sender(context: Any) -> Send:
    """Sends messages of a call of gRPC."""

    def send(message: bytes, tail: bytes = b"", /) -> Awaitable[None]:
        sent: Awaitable[None] = context.write(image_codec.joined(message, tail))
        return sent

    return send


async def aborting(call: Awaitable[_T], context: Any) -> _T:
    """The result of a call of gRPC, which its error ends."""
    try:
        return await call
    except Exception as error:
        await abort(context, error)
        raise  # never: `abort` raises


async def abort(context: Any, error: BaseException) -> None:
    """End a call with an error's code, text and name."""
    failure = failures.failure_of(error, lambda number, cause: log.error("error %s", number, exc_info=cause))
    await context.abort(failure.code, failure.text, failure.metadata)


class TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[type-arg, misc, unused-ignore]
    """Refuses every call, of whatever service, that does not carry the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

        async def refuse(requests: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "The token is missing or wrong.")

        self._refuse = grpc.stream_stream_rpc_method_handler(refuse)  # at once: other kinds wait for a message

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Called by gRPC for each call."""
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        if hmac.compare_digest(str(given).encode(), self._expected):
            return await continuation(details)
        return self._refuse
