"""One generate call on the client's side: an iterator of chunks that can be canceled, and its `Result` at the end."""

from __future__ import annotations

import datetime
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import grpc

from miinb.errors import Cancelled, DeadlineExceeded, Interrupted, MiinbError, Unavailable
from miinb.messages import (
    Chunk,
    FinishReason,
    GenerateRequest,
    RequestBegin,
    RequestEnd,
    SequenceEnd,
    StreamEvent,
    Timing,
    TokenLogprob,
    Usage,
)
from miinb.results import Result, Row
from miinb.rpc import codec, failures

#: UNAVAILABLE before the first token is tried again so often, after so many seconds (doubled each time).
RETRIES = 3
RETRY_WAIT_S = 0.1

#: Opens the call: (bytes of the request, timeout in seconds) -> gRPC call.
Open = Callable[[bytes, float], Any]


class Stream(Iterator[Chunk]):
    """Chunks of one answer as they come. `cancel()` ends it from any thread; `result` is the whole.

    Args:
        open_call: opens the gRPC call.
        timeout_s: limit of the whole request, seconds.
        done: called once at the end with the row of the requests table; returns the row that is kept.
    """

    def __init__(
        self, open_call: Open, request: GenerateRequest, timeout_s: float, done: Callable[[dict[str, Any]], Row]
    ) -> None:
        self._open = open_call
        self._data = codec.encode_generate(request)
        self._request = request
        self._done = done
        self._t_submit = time.perf_counter()
        self._deadline = self._t_submit + timeout_s
        self._submitted = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._t_first = self._t_end = math.nan
        self._attempts = 0
        self._chunks = 0
        self._cancelled = False
        self._error: BaseException | None = None
        self._begin: RequestBegin | None = None
        self._end: RequestEnd | None = None
        count = request.params.num_return_sequences
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._token_ids: list[list[int]] = [[] for _ in range(count)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
        self._reasons: list[FinishReason] = ["cancelled"] * count
        self._result: Result | None = None
        self._row: Row = {}
        self._finishing = threading.Lock()
        self._call = self._open(self._data, timeout_s)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        while not self._finished:
            try:
                event = self._next_event()
            except StopIteration:
                self._finish(None if self._end or self._cancelled else Unavailable("The answer ended too early."))
            except KeyboardInterrupt:
                self.cancel()
                self._finish(None)
                raise Interrupted(f"stopped after {self.output_tokens} tokens; the deployment lives on.") from None
            except MiinbError as error:
                self._call.cancel()
                self._finish(error)
            else:
                if isinstance(event, Chunk):
                    return self._take(event)
                self._note(event)
        if self._error is not None:
            raise self._error
        raise StopIteration

    @property
    def _finished(self) -> bool:
        return not math.isnan(self._t_end)

    @property
    def output_tokens(self) -> int:
        """New tokens so far, of all sequences."""
        return sum(map(len, self._token_ids))

    @property
    def cancelled(self) -> bool:
        """Whether `cancel()` ended it."""
        return self._cancelled

    def cancel(self) -> None:
        """End the request; its slot is free at the model's next step. What came so far stays in `result`."""
        if not self._finished:
            self._cancelled = True
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    @property
    def result(self) -> Result:
        """The whole answer; reads what has not come yet.

        Raises:
            RequestError: the request failed.
        """
        for _ in self:
            pass
        if self._result is None:
            self._result = self._make_result()
        return self._result

    def _take(self, chunk: Chunk) -> Chunk:
        if chunk.text and math.isnan(self._t_first):
            self._t_first = time.perf_counter()
        self._chunks += 1
        self._texts[chunk.index].append(chunk.text)
        self._token_ids[chunk.index].extend(chunk.token_ids)
        self._logprobs[chunk.index].extend(chunk.logprobs)
        return chunk

    def _note(self, event: RequestBegin | SequenceEnd | RequestEnd) -> None:
        if isinstance(event, SequenceEnd):
            self._reasons[event.index] = event.finish_reason
        elif isinstance(event, RequestBegin):
            self._begin = event
        else:
            self._end = event

    def _next_event(self) -> StreamEvent:
        while True:
            try:
                return codec.decode_event(next(self._call))
            except grpc.RpcError as failure:
                self._open_again(failure)

    def _open_again(self, failure: Any) -> None:
        """Open the call again if the server was away and nothing has been shown yet; else raise the error."""
        wait_s = RETRY_WAIT_S * 2**self._attempts
        left_s = self._deadline - time.perf_counter() - wait_s
        error = failures.error_of(failure, cancelled=self._cancelled)
        away = failure.code() is grpc.StatusCode.UNAVAILABLE and not failures.final(error)
        if not away or self._cancelled or self._chunks or self._attempts >= RETRIES or left_s <= 0:
            raise error from None
        self._attempts += 1
        time.sleep(wait_s)
        self._call = self._open(self._data, left_s)
        if self.cancelled:  # by another thread, while there was no call
            self._call.cancel()

    def _finish(self, error: MiinbError | None) -> None:
        with self._finishing:
            if self._finished:
                return
            self._t_end = time.perf_counter()
        self._error = None if self._cancelled and isinstance(error, Cancelled) else error
        self._row = self._done(self._make_row())

    def _timing(self) -> Timing:
        e2e_s = self._t_end - self._t_submit
        ttft_s = self._t_first - self._t_submit
        tokens = self.output_tokens
        tpot_s = (e2e_s - ttft_s) / (tokens - 1) if tokens > 1 and self._end else math.nan
        server = self._end.timing if self._end else Timing()
        return Timing(
            queue_s=server.queue_s,
            tokenize_s=server.tokenize_s,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            model_s=server.model_s,
            detokenize_s=server.detokenize_s,
            e2e_s=e2e_s,
        )

    def _usage(self) -> Usage:
        if self._end:
            return self._end.usage
        return Usage(self._begin.prompt_tokens if self._begin else 0, self.output_tokens)

    def _make_result(self) -> Result:
        return Result(
            texts=tuple("".join(parts) for parts in self._texts),
            finish_reasons=tuple(self._reasons),
            usage=self._usage(),
            timing=self._timing(),
            token_ids=tuple(map(tuple, self._token_ids)),
            logprobs=tuple(map(tuple, self._logprobs)),
            seeds=(self._end.seed,) if self._end else (),
            rows=(self._row,),
            dropped_messages=self._begin.dropped_messages if self._begin else 0,
            history=self._end.history if self._end else (),
        )

    def _make_row(self) -> dict[str, Any]:
        """The row of the requests table; a field that does not apply is left out."""
        usage, timing = self._usage(), self._timing()
        text = "\0".join("".join(parts) for parts in self._texts)
        timeout = isinstance(self._error, DeadlineExceeded)
        status = "timeout" if timeout else "error" if self._error else "cancelled" if self._cancelled else "ok"
        row: dict[str, Any] = {
            "status": status,
            "error": type(self._error).__name__ if self._error else None,
            "finish_reason": self._reasons[0] if status in ("ok", "cancelled") else None,
            "output_tokens": usage.output_tokens,
            "seed": self._end.seed if self._end else self._request.params.seed,
            "t_submit": self._submitted,
            "queue_s": timing.queue_s,
            "preprocess_s": timing.tokenize_s,
            "ttft_s": timing.ttft_s,
            "tpot_s": timing.tpot_s,
            "model_s": timing.model_s,
            "postprocess_s": timing.detokenize_s,
            "e2e_s": timing.e2e_s,
            "chunk_count": self._chunks,
            "output_sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(),
        }
        if self._begin:
            row["prompt_tokens"] = usage.prompt_tokens
        if self._end:
            row["cached_tokens"] = usage.cached_tokens
        return row


class StreamGroup:
    """The running streams of one call, to cancel them together."""

    def __init__(self) -> None:
        self._streams: set[Stream] = set()
        self._lock = threading.Lock()
        self._cancelled = False
        self._tokens = 0  # of streams that have ended

    @contextmanager
    def running(self, stream: Stream) -> Iterator[None]:
        """The time in which a stream belongs to the group."""
        with self._lock:
            self._streams.add(stream)
            cancelled = self._cancelled
        if cancelled:
            stream.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._streams.discard(stream)
                self._tokens += stream.output_tokens

    def cancel(self) -> int:
        """Cancel all, also those that come; the number of tokens so far."""
        with self._lock:
            self._cancelled = True
            streams = tuple(self._streams)
            tokens = self._tokens
        for stream in streams:
            stream.cancel()
        return tokens + sum(stream.output_tokens for stream in streams)
