"""Requests for pictures on the client's side: in flight together, their progress as one, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import inspect
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self

import grpc

from miinb import awaiting
from miinb.errors import Cancelled, Interrupted, InvalidRequest, MiinbError, QueueFull, Unavailable
from miinb.image_answers import Answer, row_of, so_far, timing_of, warnings_of
from miinb.image_messages import ImagesEnd, ImagesProgress, ImagesRequest, Picture
from miinb.image_params import steps_of
from miinb.image_results import KEPT, ImageResult, merge_images, pictures_result
from miinb.messages import Usage
from miinb.rpc import failures, image_codec
from miinb.streams import RETRIES, RETRY_WAIT_S

#: Requests of one call at the same time, and their pictures, half of what a replica lets wait; the others wait here.
MAX_CALLS, MAX_PICTURES = 16, 512
#: Seconds from one call of on_progress to the next.
PACE_S = 0.2
#: How often the wait between the tries of a request that a full queue has refused is doubled.
_DOUBLED = 4
#: Takes the progress of a call: its prompts' steps on average, and a preview of the first prompt's first picture.
OnProgress = Callable[[ImagesProgress], object]


class ImagesCall(Protocol):
    """One call to the server, an iterator of its answer's messages: `direct.DirectCall`, or `GrpcStream`."""

    def __iter__(self) -> Self: ...

    def __next__(self) -> tuple[bytes, bytes]:
        """Wait for the next message, and the file that is not in it.

        Raises:
            MiinbError: what the server says; Cancelled where the call was canceled, by whomever.
        """

    def cancel(self) -> None:
        """End it, from any thread."""

    def close(self) -> None:
        """Nobody reads it any more."""


class GrpcStream:
    """A call through gRPC."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[bytes, bytes]:
        """See `ImagesCall`; here all files are in their messages."""
        try:
            return bytes(next(self._call)), b""
        except grpc.RpcError as failure:
            raise failures.error_of(failure) from None

    def cancel(self) -> None:
        """See `ImagesCall`."""
        self._call.cancel()

    close = cancel


class ImageCalls:
    """The calls of one request for pictures.

    Args:
        call: begins one: (bytes of the request, timeout in seconds).
        done: called at the end of each with its row of the requests table; returns the row that is kept.
        on_progress: called while they run, in the thread that called `run`, at most each `PACE_S`. It misses what was
            replaced by newer progress meanwhile; the last is always told, and then the result given.

    Raises:
        InvalidRequest: on_progress cannot be called, or would have to be awaited.
    """

    def __init__(
        self,
        call: Callable[[bytes, float], ImagesCall],
        done: Callable[[dict[str, Any]], Mapping[str, Any]],
        on_progress: OnProgress | None = None,
    ) -> None:
        if on_progress is not None:
            if not callable(on_progress):
                raise InvalidRequest(f"on_progress: {type(on_progress).__name__} is no function.")
            if any(inspect.iscoroutinefunction(one) for one in (on_progress, type(on_progress).__call__)):
                raise InvalidRequest("on_progress: nobody would await an async function.", hint="Give a plain one.")
        self._call = call
        self._done = done
        self._on_progress = on_progress
        self._running: set[ImagesCall] = set()
        self._requests: Sequence[ImagesRequest] = ()
        self._steps: list[int] = []  # of each request
        self._answers: list[Answer] = []  # the same
        self._begun_at = 0.0
        self._latest = self._shown = ImagesProgress(0, 0)
        self._lock = threading.Lock()
        self._news = threading.Event()  # progress, or the end of a request
        self._cancelled = threading.Event()
        self._not_before = 0.0  # on_progress is called again

    def cancel(self) -> None:
        """End the calls that run, and those that would come; the server hears it within a step."""
        with self._lock:
            self._cancelled.set()
            calls = tuple(self._running)
        for call in calls:
            call.cancel()

    def run(self, requests: Sequence[ImagesRequest], limit_s: float) -> ImageResult:
        """The pictures of all prompts, in order.

        Raises:
            RequestError: a request was refused or failed; the others are ended, and the message says which prompt's.
                One of several that a full queue refuses is asked again until the time is up.
            Interrupted: the Stop button was pressed.
                Of both, `result` has the pictures that were complete.
        """
        self._begun_at = time.monotonic()
        end = self._begun_at + limit_s
        self._steps, self._answers = [0] * len(requests), [Answer() for _ in requests]
        self._requests = requests
        try:
            if len(requests) == 1 and self._on_progress is None:
                return self._ask(requests[0], 0, end, 1)
            return self._together(requests, end)
        except KeyboardInterrupt:
            self.cancel()
            raise self._interrupted() from None
        except MiinbError as failure:
            self._keep(failure)
            raise

    async def awaited(self, work: Callable[[], ImageResult]) -> ImageResult:
        """The result of `work`, which calls `run`, in a thread; canceling the task cancels the requests.

        Raises:
            asyncio.CancelledError: its `__cause__` is a `Cancelled`, whose `result` has what was complete.
        """
        try:
            return await awaiting.in_thread(work, self)
        except asyncio.CancelledError as stopped:
            failure = Cancelled("The request was given up.")
            self._keep(failure)
            raise stopped from failure

    def _kept(self) -> tuple[ImageResult | None, str]:
        """The pictures that are complete, whatever became of the others; "3 of 8 pictures", "" where one was asked."""
        seconds = time.monotonic() - self._begun_at
        each = zip(self._requests, self._answers, strict=False)  # `run` may only just begin
        all_kept = (answer.result or so_far(request.prompt, answer, seconds) for request, answer in each)
        kept = [one for one in all_kept if one is not None]
        done = sum(len(one.images) for one in kept)
        count = sum(request.params.num_images_per_prompt for request in self._requests)
        return merge_images(kept) if kept else None, f"{done} of {count} pictures" if count > 1 else ""

    def _interrupted(self) -> Interrupted:
        """What the Stop button leaves."""
        kept, pictures = self._kept()
        words = f"stopped at step {sum(self._steps) // len(self._requests)} of {steps_of(self._requests[0].params)}"
        if len(self._requests) > 1:
            words += " on average"
        if pictures:
            words += f", with {pictures} done"
        words += "; the deployment lives on."
        return Interrupted(words, result=kept, hint=KEPT if kept else "")

    def _keep(self, failure: MiinbError) -> None:
        """Give an error the pictures that were complete, and say so in its hint."""
        failure.result, pictures = self._kept()
        if failure.result is not None:
            failure.hint = f"{failure.hint} {pictures or 'The picture'} done. {KEPT}".lstrip()
        elif len(self._requests) > 1:
            failure.hint = f"{failure.hint} No picture of this call is done.".lstrip()

    def _together(self, requests: Sequence[ImagesRequest], end: float) -> ImageResult:
        """Ask in threads. This one tells the progress: while it does, answers come in, and only the newest is told."""
        count = len(requests)
        room = MAX_PICTURES // max(request.params.num_images_per_prompt for request in requests)
        with ThreadPoolExecutor(max(1, min(count, MAX_CALLS, room)), "miinb-images") as pool:
            wait_s: float | None = None
            ended = False
            try:
                futures = [pool.submit(self._ask, request, place, end, count) for place, request in enumerate(requests)]
                for future in futures:
                    future.add_done_callback(lambda done: self._news.set())
                while not ended:
                    self._news.wait(wait_s)
                    self._news.clear()
                    done = [place for place, future in enumerate(futures) if future.done()]
                    for place in done:
                        _raise_failure(futures[place], f"prompts[{place}]" if count > 1 else "")
                    ended = len(done) == count
                    wait_s = self._show(last=ended)  # what came before the last end, too
            finally:
                if not ended:
                    pool.shutdown(wait=False, cancel_futures=True)
                    self.cancel()
        return merge_images([future.result() for future in futures]) if count > 1 else futures[0].result()

    def _ask(self, request: ImagesRequest, place: int, end: float, batch_size: int) -> ImageResult:
        data = image_codec.encode_images(request)
        submitted = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        begin = time.perf_counter()
        answer = self._answers[place]
        error: MiinbError | None = None
        try:
            finish = self._patiently(data, place, end, several=batch_size > 1)
        except MiinbError as failure:
            error = failures.stopped() if isinstance(failure, Cancelled) and not self._cancelled.is_set() else failure
            raise error from None
        finally:
            e2e_s = time.perf_counter() - begin
            row = {"batch_size": batch_size, "t_submit": submitted}
            kept = self._done(row | row_of(request, answer, error, e2e_s))
        times, usage = timing_of(finish, e2e_s, len(answer.pictures)), Usage(prompt_tokens=finish.prompt_tokens)
        answer.result = pictures_result(
            request.prompt, answer.pictures, times, usage=usage, rows=(kept,), warnings=tuple(warnings_of(finish))
        )
        return answer.result

    def _patiently(self, data: bytes, place: int, end: float, *, several: bool) -> ImagesEnd:
        """Read all of an answer; a server that is away before it says anything is asked again, as for texts.

        So is one whose queue is full, where the request is one of several: perhaps of their pictures.
        """
        answer, tries = self._answers[place], Counter[type[MiinbError]]()
        while True:
            with self._begun(data, end) as call:
                try:
                    return self._read(call, place, answer)
                except (QueueFull, Unavailable) as failure:
                    before, left_s = tries[type(failure)], end - time.monotonic()
                    wait_s = RETRY_WAIT_S * 2 ** min(before, _DOUBLED)
                    if isinstance(failure, QueueFull):  # until the end: what runs meanwhile is kept
                        again, wait_s = several and left_s > RETRY_WAIT_S, min(wait_s, left_s / 2)
                    else:
                        again = before < RETRIES and left_s > wait_s and not failures.final(failure)
                    if answer.begun or self._cancelled.is_set() or not again:
                        raise
                    tries[type(failure)] += 1
            self._cancelled.wait(wait_s)

    @contextlib.contextmanager
    def _begun(self, data: bytes, end: float) -> Iterator[ImagesCall]:
        """A call, which ends with the block."""
        with contextlib.closing(self._call(data, max(end - time.monotonic(), 0.001))) as call:
            with self._lock:
                self._running.add(call)
                late = self._cancelled.is_set()
            if late:
                call.cancel()
            try:
                yield call
            finally:
                with self._lock:
                    self._running.discard(call)

    def _read(self, call: ImagesCall, place: int, answer: Answer) -> ImagesEnd:
        """Read all of an answer; returns its end. Raises MiinbError."""
        for message, file in call:
            answer.begun = True
            event = image_codec.decode_images_event(message, file)
            if isinstance(event, ImagesProgress):
                self._note(event, place)
            elif isinstance(event, Picture):
                answer.add(event)
            else:
                answer.end = event
        if answer.end is None or not answer.complete:
            raise Unavailable("The answer ended too early.")
        return answer.end

    def _note(self, progress: ImagesProgress, place: int) -> None:
        with self._lock:
            self._steps[place] = progress.step
            step = sum(self._steps) // len(self._steps)
            preview = self._latest.preview if place else progress.preview or self._latest.preview
            self._latest = ImagesProgress(step, progress.total, preview)
        self._news.set()

    def _show(self, *, last: bool) -> float | None:
        """Tell how far they are, if there is something new; returns for how long it is held back, None if it is not."""
        with self._lock:
            latest, shown = self._latest, self._shown
            if latest == shown or self._on_progress is None:
                return None
            if (early_s := self._not_before - time.monotonic()) > 0 and not last:
                return early_s
            self._shown = self._latest = ImagesProgress(latest.step, latest.total)
        self._not_before = time.monotonic() + PACE_S
        self._on_progress(latest)
        return None


def _raise_failure(asked: Future[ImageResult], prompt: str) -> None:
    """Raise what a request has failed of, with the prompt's name where there are several."""
    failure = asked.exception()
    if failure is None:
        return
    if not (prompt and isinstance(failure, MiinbError)):
        raise failure
    failure.message = failure.message.removeprefix("prompt: ")
    raise failure.of(prompt)
