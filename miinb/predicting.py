"""A predict request on the client's side: cut into calls that the server takes, in flight together, ended together."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import grpc

from miinb.errors import Cancelled, DeadlineExceeded, Interrupted, MiinbError, QueueFull
from miinb.messages import PredictedEvent
from miinb.rpc import codec, failures

#: Inputs and bytes of one call. Below what the server takes: several calls are tokenized while others are computed.
CALL_INPUTS = codec.MAX_INPUTS // 4
CALL_BYTES = codec.MAX_REQUEST_BYTES // 4
#: Calls of one request at the same time; the others wait here.
MAX_CALLS = 8
#: Between the tries of a call of several that a full queue has refused.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 1.0

Inputs = Sequence[Mapping[str, str]]
#: How an error of the server names an input of its call.
_PLACE = re.compile(r"\binputs\[(\d+)\]")


def cut(inputs: Inputs) -> Iterator[range]:
    """The places of each call's inputs, in order. What is too large by itself is a call of its own."""
    first, size = 0, 0
    for place, values in enumerate(inputs):
        own = sum(len(value.encode("utf-8", "surrogatepass")) for value in values.values())
        if place > first and (place - first == CALL_INPUTS or size + own > CALL_BYTES):
            yield range(first, place)
            first, size = place, 0
        size += own
    yield range(first, len(inputs))


class PredictCall(Protocol):
    """One call to the server: `direct.DirectCall`, or `GrpcCall`."""

    def result(self) -> bytes:
        """Wait for the answer's bytes. Raises MiinbError; Cancelled where the call was canceled, by whomever."""

    def cancel(self) -> None:
        """End it, from any thread."""


class GrpcCall:
    """A call through gRPC, of its future."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def result(self) -> bytes:
        """See `PredictCall`."""
        try:
            return bytes(self._future.result())
        except grpc.RpcError as failure:
            raise failures.error_of(failure) from None
        except grpc.FutureCancelledError:
            raise Cancelled("The request was canceled.") from None

    def cancel(self) -> None:
        """See `PredictCall`."""
        self._future.cancel()


class PredictCalls:
    """The calls of one predict request.

    Args:
        call: begins a call: (bytes of the request, timeout in seconds).
        done: called at the end of each call with its row of the requests table.
        advance: called in the caller's thread with the number of inputs that have been answered since.
    """

    def __init__(
        self,
        call: Callable[[bytes, float], PredictCall],
        done: Callable[[dict[str, Any]], object],
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        self._call = call
        self._done = done
        self._advance = advance
        self._running: set[PredictCall] = set()
        self._lock = threading.Lock()
        self._cancelled = False

    def cancel(self) -> None:
        """End the calls that run, and those that would come."""
        with self._lock:
            self._cancelled = True
            calls = tuple(self._running)
        for call in calls:
            call.cancel()

    def run(self, inputs: Inputs, options: Mapping[str, Any], limit_s: float, *, alone: bool) -> PredictedEvent:
        """The answers to all inputs, in order.

        Args:
            inputs: at least one.
            options: of the task.
            limit_s: of the whole request.
            alone: the user gave one input, and no list.

        Raises:
            RequestError: a call failed; the message names the input by its place in `inputs`. The others are ended.
            Interrupted: the Stop button was pressed.
        """
        end = time.monotonic() + limit_s

        parts, request_id = list(cut(inputs)), uuid.uuid4().hex

        def ask(places: range) -> PredictedEvent:
            try:
                data = codec.encode_predict(inputs[places.start : places.stop], options, request_id)
                return self._ask(data, len(places), end, patient=len(parts) > 1)
            except MiinbError as error:
                raise _placed(error, places.start, alone) from None

        try:
            events = [ask(parts[0])] if len(parts) == 1 else self._together(ask, parts)
        except KeyboardInterrupt:
            self.cancel()
            raise Interrupted("stopped; the deployment lives on.") from None
        return merge(events)

    def _together(self, ask: Callable[[range], PredictedEvent], parts: Sequence[range]) -> list[PredictedEvent]:
        with ThreadPoolExecutor(min(len(parts), MAX_CALLS), "miinb-predict") as pool:
            ended = False
            try:
                futures = {pool.submit(ask, places): places for places in parts}
                waiting: set[Future[PredictedEvent]] = set(futures)
                while waiting:
                    done, waiting = wait(waiting, timeout=0.5, return_when="FIRST_COMPLETED")
                    for future in sorted(done, key=lambda one: futures[one].start):
                        future.result()  # raises its error; those of calls that are ended for it are not asked for
                        self._advance(len(futures[future]))
                ended = True
            finally:
                if not ended:
                    pool.shutdown(wait=False, cancel_futures=True)
                    self.cancel()
        return [future.result() for future in futures]

    def _ask(self, data: bytes, inputs: int, end: float, *, patient: bool) -> PredictedEvent:
        begin = time.perf_counter()
        event: PredictedEvent | None = None
        error: MiinbError | None = None
        try:
            event = codec.decode_predicted(self._patiently(data, end) if patient else self._called(data, end))
        except MiinbError as failure:
            error = failure
            if isinstance(error, Cancelled) and not self._cancelled:  # by the server, or the channel was closed
                error = failures.stopped()
            raise error from None
        finally:
            self._done(_row(event, error, inputs, time.perf_counter() - begin))
        return event

    def _patiently(self, data: bytes, end: float) -> bytes:
        """As `_called`, but a queue that is full, of this very request's calls perhaps, is waited for."""
        wait_s = FIRST_WAIT_S
        while True:
            try:
                return self._called(data, end)
            except QueueFull:
                if self._cancelled or time.monotonic() + wait_s > end:
                    raise
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _called(self, data: bytes, end: float) -> bytes:
        call = self._call(data, max(end - time.monotonic(), 0.001))
        with self._lock:
            self._running.add(call)
            late = self._cancelled
        try:
            if late:
                call.cancel()
            return call.result()
        except BaseException:  # the Stop button too
            call.cancel()
            raise
        finally:
            with self._lock:
                self._running.discard(call)


def merge(events: Sequence[PredictedEvent]) -> PredictedEvent:
    """The answers of several calls as those of one; `PredictTiming` says what the times are."""
    if len(events) == 1:
        return events[0]
    return dataclasses.replace(
        events[0],
        outputs=[output for event in events for output in event.outputs],
        vectors=b"".join(event.vectors for event in events),
        queue_s=max(event.queue_s for event in events),
        preprocess_s=sum(event.preprocess_s for event in events),
        model_s=sum(event.model_s for event in events),
        postprocess_s=sum(event.postprocess_s for event in events),
    )


def _placed(error: MiinbError, first: int, alone: bool) -> MiinbError:
    """The error with the input's place in the user's list; of one that was given alone, without a place."""

    def place(match: re.Match[str]) -> str:
        return "inputs" if alone else f"inputs[{int(match[1]) + first}]"

    error.message = _PLACE.sub(place, error.message, count=1)
    return error


def _row(event: PredictedEvent | None, error: MiinbError | None, inputs: int, e2e_s: float) -> dict[str, Any]:
    """The row of the requests table; a field that does not apply is left out."""
    cancelled = event is None and (error is None or isinstance(error, Cancelled))
    failed = "cancelled" if cancelled else "timeout" if isinstance(error, DeadlineExceeded) else "error"
    row: dict[str, Any] = {"status": "ok" if event else failed, "batch_size": inputs, "e2e_s": e2e_s}
    if error is not None:
        row["error"] = type(error).__name__
    if event is not None:
        times = ("queue_s", "preprocess_s", "model_s", "postprocess_s")
        row |= {name: getattr(event, name) for name in times} | {"finish_reason": "stop"}
    return row
