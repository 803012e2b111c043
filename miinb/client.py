"""The synchronous gRPC client: works in a cell, a thread and a script. Its awaitable calls are threads around it."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # else every `!command` of a cell prints a warning of gRPC

import grpc

from miinb import awaiting
from miinb.asking import Messages, chat_request, session_name, task_inputs, text_requests
from miinb.errors import Interrupted, MiinbError, Unavailable
from miinb.image_asking import image_requests
from miinb.image_calls import GrpcStream, ImageCalls, ImagesCall, OnProgress
from miinb.image_results import ImageResult
from miinb.messages import Chunk, EngineInfo, GenerateRequest, PredictedEvent
from miinb.predicting import GrpcCall, PredictCall, PredictCalls
from miinb.predictions import Predictions, predictions_of
from miinb.request_log import RequestLog
from miinb.results import Result, merge
from miinb.rpc import codec, failures, image_codec
from miinb.rpc.address import file_at, socket_path
from miinb.rpc.channel import close_channel, open_channel
from miinb.rpc.direct import Connections, Method, socket_beside
from miinb.seconds import time_limit
from miinb.spinning import spin_s
from miinb.streams import Stream, StreamGroup

if TYPE_CHECKING:
    import pandas

TIMEOUT_S = 300.0
MAX_STREAMS = 64  # of one generate call at the same time; the others wait here

_T = TypeVar("_T")


class Client:
    """Asks one deployment. Thread-safe.

    Args:
        address: the frontend's: "unix:/path" or "127.0.0.1:port".
        token: bearer token of a TCP address.
        timeout_s: limit of a request that gives none, seconds.
        log: where its requests are recorded; default one of its own.
    """

    def __init__(
        self, address: str, token: str | None = None, *, timeout_s: float = TIMEOUT_S, log: RequestLog | None = None
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._channel = open_channel(address)
        self._generate = self._channel.unary_stream(codec.GENERATE)
        self._generate_images = self._channel.unary_stream(image_codec.GENERATE_IMAGES)
        self._predict = self._channel.unary_unary(codec.PREDICT)
        self._socket = socket_path(address)
        # The supervisor's, which lives as long as the deployment; the frontend may be started again.
        self._supervisor = None if self._socket is None else self._socket.with_name("control.sock")
        self._file = file_at(self._supervisor)
        self._direct = Connections(None if self._socket is None else socket_beside(self._socket))
        self._describe = self._channel.unary_unary(codec.DESCRIBE)
        self._log = RequestLog() if log is None else log
        self._columns: dict[str, Any] | None = None
        self._silent_until = 0.0  # it did not say them
        self._asking = threading.Lock()
        self._closed: Unavailable | None = None  # what a call is told

    def close(self, *, because: MiinbError | None = None, drained: bool = False) -> None:
        """Take no new calls; those that still run end as canceled.

        Args:
            because: why the deployment could not be started again, for those that ask all the same.
            drained: the server has ended; what it still said is read, and the channel ends with its last reader.
        """
        hint = "Start it again with restart(); if another process has done that, join it with miinb.attach(name)."
        self._closed = Unavailable("The deployment was stopped.", hint=hint)
        if because is not None:
            self._closed = Unavailable(f"The deployment did not start again: {because.message}", hint=because.hint)
        if not drained:
            self._direct.close()
            close_channel(self._channel)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise Unavailable(self._closed.message, hint=self._closed.hint)
        if file_at(self._supervisor) not in (None, self._file):  # gRPC would go on with whoever is there now
            hint = "Join it with miinb.attach(name)."
            raise Unavailable("Another process has started the deployment again.", hint=hint)

    def _invoke(self, method: Callable[..., Any], data: bytes, left_s: float) -> Any:
        self._check_open()
        try:
            return method(data, timeout=left_s, metadata=self._metadata)
        except ValueError:  # gRPC's, of a channel that was closed since
            self._check_open()
            raise

    # Text

    def generate(self, prompts: str | Sequence[str], *, timeout_s: float | None = None, **parameters: Any) -> Result:
        """New text for a prompt or a list of prompts, in order; a list runs as concurrent streams.

        Args:
            prompts: one prompt or several.
            timeout_s: limit of the whole call, seconds.
            parameters: `miinb.config.GenerationParams`, and `session_id` of a conversation (see `create_session`).

        Raises:
            RequestError: a request was refused or failed; the message says which prompt's (`prompts[1]`). The others
                are canceled, and no answer of the call is kept.
            Interrupted: the Stop button was pressed.
        """
        return self._run_all(text_requests(prompts, parameters), timeout_s, StreamGroup())

    def chat(self, messages: Messages, *, timeout_s: float | None = None, **parameters: Any) -> Result:
        """The model's answer to a conversation or to a text of the user's, through its chat template.

        Of a conversation that has outgrown the context the oldest turns are left out (`Result.dropped_messages`).
        """
        return self._run_all([chat_request(messages, parameters)], timeout_s, StreamGroup())

    def stream(
        self, prompt: str | Sequence[Mapping[str, str]], *, timeout_s: float | None = None, **parameters: Any
    ) -> Stream:
        """Chunks of the answer to a prompt, or to a conversation, as they come."""
        if isinstance(prompt, str):
            (request,) = text_requests(prompt, parameters)
        else:
            request = chat_request(prompt, parameters)
        return self._open(request, self._limit(timeout_s), 1)

    def _limit(self, timeout_s: float | None) -> float:
        return time_limit(self._timeout_s if timeout_s is None else timeout_s)

    def _open(self, request: GenerateRequest, timeout_s: float, batch_size: int) -> Stream:
        def call(data: bytes, left_s: float) -> Any:
            return self._invoke(self._generate, data, left_s)

        return Stream(call, request, timeout_s, lambda row: self._record({**row, "batch_size": batch_size}))

    def _run_all(self, requests: Sequence[GenerateRequest], timeout_s: float | None, group: StreamGroup) -> Result:
        limit_s = self._limit(timeout_s)
        end = time.monotonic() + limit_s

        def run(request: GenerateRequest) -> Result:
            stream = self._open(request, max(end - time.monotonic(), 0.001), len(requests))
            with group.running(stream):
                return stream.result

        if len(requests) == 1:
            return run(requests[0])
        with ThreadPoolExecutor(min(len(requests), MAX_STREAMS), "miinb-generate") as pool:
            try:
                futures = [pool.submit(run, request) for request in requests]
                while (state := wait(futures, timeout=0.5, return_when="FIRST_EXCEPTION")).not_done:
                    if any(future.exception() for future in state.done):
                        break
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                tokens = group.cancel()
                raise Interrupted(f"stopped after {tokens} tokens; the deployment lives on.") from None
            for place, future in enumerate(futures):
                if future.done() and (failure := future.exception()):
                    pool.shutdown(wait=False, cancel_futures=True)
                    group.cancel()
                    raise _failure_of_prompt(place, failure)
        return merge([future.result() for future in futures])

    # Pictures

    def generate_images(
        self,
        prompts: str | Sequence[str],
        on_progress: OnProgress | None = None,
        /,
        *,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> ImageResult:
        """Pictures of a prompt or of each of a list, in order; a list is asked for together.

        Args:
            prompts: one prompt or several.
            on_progress: called with how far they are (`ImagesProgress`), at most five times a second, and at last;
                while a call of it runs, newer progress replaces older.
            timeout_s: limit of the whole call, seconds.
            parameters: those of `image_asking.image_requests`.

        Raises:
            RequestError: a request was refused or failed; the message says which prompt's (`prompts[1]`).
            Interrupted: the Stop button was pressed.
        """
        return self._image_calls(on_progress).run(image_requests(prompts, parameters), self._limit(timeout_s))

    async def agenerate_images(
        self, prompts: Any, on_progress: OnProgress | None = None, *, timeout_s: float | None = None, **parameters: Any
    ) -> ImageResult:
        """`generate_images`, awaitable: see `ImageCalls.awaited`. `on_progress` runs in a thread."""
        limit_s, calls = self._limit(timeout_s), self._image_calls(on_progress)
        return await calls.awaited(lambda: calls.run(image_requests(prompts, parameters), limit_s))

    def _image_calls(self, on_progress: OnProgress | None = None) -> ImageCalls:
        def call(data: bytes, left_s: float) -> ImagesCall:
            self._check_open()
            direct = self._direct.call(Method.IMAGES, data, left_s)
            return direct or GrpcStream(self._invoke(self._generate_images, data, left_s))

        return ImageCalls(call, self._record, on_progress)

    # Other tasks

    def predict(
        self,
        inputs: Any,
        advance: Callable[[int], object] = lambda count: None,
        /,
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Predictions:
        """Predictions of an encoder task, one list for each input, in order.

        Args:
            inputs: a text, a dictionary of the task's inputs ({"question": ..., "context": ...}), or any number of
                them: a list, tuple, generator, pandas Series or numpy array. Many go in several calls.
            advance: called with the number of inputs that have been answered since, where there are several calls.
            timeout_s: limit of the whole request, seconds.
            options: the task's own (`top_k`, ...).

        Raises:
            RequestError: the request was refused or failed; the message says which input's (`inputs[1500]`).
            Interrupted: the Stop button was pressed.
        """
        return self._predictions(inputs, options, timeout_s, self._calls(advance))

    def predicted(self, inputs: Any, options: Mapping[str, Any], timeout_s: float | None = None) -> PredictedEvent:
        """`predict` as the server answers it: plain data."""
        return self._ask(inputs, options, timeout_s, self._calls())[1]

    def _calls(self, advance: Callable[[int], object] = lambda count: None) -> PredictCalls:
        def call(data: bytes, left_s: float) -> PredictCall:
            self._check_open()
            direct = self._direct.call(Method.PREDICT, data, left_s, spin_s=spin_s(self._served.device))
            return direct or GrpcCall(self._invoke(self._predict.future, data, left_s))

        return PredictCalls(call, self._record, advance)

    def _predictions(
        self, inputs: Any, options: Mapping[str, Any], timeout_s: float | None, calls: PredictCalls
    ) -> Predictions:
        begin = time.perf_counter()
        plain, event = self._ask(inputs, options, timeout_s, calls)
        pooled = options.get("pooling") != "none"
        return predictions_of(self.task, plain, event, time.perf_counter() - begin, pooled=pooled)

    def _ask(
        self, inputs: Any, options: Mapping[str, Any], timeout_s: float | None, calls: PredictCalls
    ) -> tuple[list[dict[str, str]], PredictedEvent]:
        """The inputs as they were sent, and the answers."""
        limit_s = self._limit(timeout_s)
        plain = task_inputs(self.task, inputs)
        return plain, calls.run(plain, options, limit_s, alone=isinstance(inputs, (str, Mapping)))

    # Sessions

    def create_session(self, session_id: str | int) -> None:
        """Begin a conversation that the server remembers; `session_id=` of generate, chat and stream goes on with it.

        Any client of the deployment may take part; turns wait for each other.

        Raises:
            InvalidRequest: it exists already.
            QueueFull: too many are open.
        """
        self._change_session(codec.CREATE_SESSION, session_id)

    def destroy_session(self, session_id: str | int) -> None:
        """Forget a conversation. Raises InvalidRequest where there is none of that id."""
        self._change_session(codec.DESTROY_SESSION, session_id)

    def _change_session(self, method: str, session_id: str | int) -> None:
        data = codec.encode_session(session_name(session_id))
        try:
            self._invoke(self._channel.unary_unary(method), data, self._timeout_s)
        except grpc.RpcError as failure:
            raise failures.error_of(failure) from None

    # The same, awaitable

    async def agenerate(
        self, prompts: str | Sequence[str], *, timeout_s: float | None = None, **parameters: Any
    ) -> Result:
        """`generate`, awaitable; canceling the task cancels the requests."""
        group = StreamGroup()
        requests = text_requests(prompts, parameters)
        return await awaiting.in_thread(lambda: self._run_all(requests, timeout_s, group), group)

    async def achat(self, messages: Messages, *, timeout_s: float | None = None, **parameters: Any) -> Result:
        """`chat`, awaitable."""
        group = StreamGroup()
        request = chat_request(messages, parameters)
        return await awaiting.in_thread(lambda: self._run_all([request], timeout_s, group), group)

    async def apredict(self, inputs: Any, *, timeout_s: float | None = None, **options: Any) -> Predictions:
        """`predict`, awaitable; canceling the task cancels the calls."""
        calls = self._calls()
        return await awaiting.in_thread(lambda: self._predictions(inputs, options, timeout_s, calls), calls)

    async def astream(self, prompt: str | Sequence[Mapping[str, str]], **parameters: Any) -> AsyncIterator[Chunk]:
        """`stream` as an asynchronous iterator; leaving it cancels the request."""
        with self.stream(prompt, **parameters) as stream:
            while (chunk := await awaiting.run(lambda: next(stream, None))) is not None:
                yield chunk

    # The deployment

    @property
    def task(self) -> str:
        """Hugging Face's name of the deployment's task; asked for once."""
        return self._served.task

    @functools.cached_property
    def _served(self) -> EngineInfo:
        """What was served when it was asked for first."""
        return self.describe()

    def describe(self) -> EngineInfo:
        """What is served: model, engine, plan, limits.

        Raises:
            Unavailable: no replica is ready.
        """
        return EngineInfo.from_dict(self.description()["info"])

    def description(self, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """Everything that Describe says: name, version, info, replicas, counters."""
        try:
            return codec.decode_description(self._invoke(self._describe, b"", timeout_s))
        except grpc.RpcError as failure:
            raise failures.error_of(failure) from None

    def health(self, *, timeout_s: float = 5.0) -> bool:
        """Whether a replica is ready (grpc.health.v1)."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        stub = health_pb2_grpc.HealthStub(self._channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    @property
    def records(self) -> pandas.DataFrame:
        """One row for each request of this client."""
        return self._log.frame

    def _record(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._log.add({**self._known(), **row})

    def _known(self) -> dict[str, Any]:
        """Columns that are the same for all requests; asked once."""
        with self._asking:  # of calls that end together one asks
            if self._columns is None:
                if time.monotonic() < self._silent_until:
                    return {}
                try:
                    values = self.description(timeout_s=1.0)
                except Exception:  # a record is no reason for a request to fail, nor each of many for a wait
                    self._silent_until = time.monotonic() + 1.0
                    return {}
                info = EngineInfo.from_dict(values["info"])
                self._columns = {
                    "arm": info.engine,
                    "session": values["name"],
                    "task": info.task,
                    "model": info.model,
                    "engine": info.engine,
                    "dtype": info.dtype,
                    "tp": info.plan.tensor_parallel,
                    "replicas": values["replicas"],
                }
            return self._columns


def _failure_of_prompt(place: int, failure: BaseException) -> BaseException:
    """What is raised where one prompt of a list has failed."""
    if not isinstance(failure, MiinbError):
        return failure
    failure.message = failure.message.removeprefix("prompt: ")
    return failure.of(f"prompts[{place}]", hint="No answer of this call is kept.")
