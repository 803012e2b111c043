"""What the client makes of requests for pictures: those that are stopped, and servers that are away for a moment."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from miinb import image_calls
from miinb.errors import Cancelled, DeadlineExceeded, Interrupted, QueueFull, Unavailable
from miinb.image_calls import ImageCalls
from miinb.image_messages import ImagesEnd, ImagesProgress, ImagesRequest, ImageTimes, Picture
from miinb.image_params import ImageParams
from miinb.image_results import ImageResult
from miinb.rpc import image_codec
from tests.test_image_sources import file_of, noise

FILE = file_of(noise(8, 8))
END = ImagesEnd(ImageTimes(steps_s=0.5), 3)


class Call:
    """Says this, or raises it."""

    def __init__(self, script: Iterable[Any]) -> None:
        self.script: Iterator[Any] = iter(script)
        self.closed = False

    def __iter__(self) -> Call:
        return self

    def __next__(self) -> tuple[bytes, bytes]:
        event = next(self.script)
        if isinstance(event, BaseException):
            raise event
        return image_codec.encode_images_event(event)

    def cancel(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def answering(*scripts: Sequence[Any]) -> tuple[ImageCalls, list[dict[str, Any]], list[Call]]:
    """Calls that say one script after the other; rows of the requests table; the calls."""
    rows: list[dict[str, Any]] = []
    made: list[Call] = []
    left = iter(scripts)

    def call(data: bytes, left_s: float) -> Call:
        made.append(Call(next(left)))
        return made[-1]

    return ImageCalls(call, lambda row: rows.append(row) or row), rows, made


def picture(index: int, seed: int) -> Picture:
    return Picture(index, FILE, seed, 8, 8)


def asked(images: int = 1, prompt: str = "a") -> ImagesRequest:
    return ImagesRequest(prompt, ImageParams(num_inference_steps=9, num_images_per_prompt=images))


def test_pictures_that_were_done_when_it_was_stopped_are_kept() -> None:
    script = [ImagesProgress(4, 9), picture(0, 5), picture(2, 7), picture(1, 6), ImagesProgress(5, 9)]
    calls, rows, _ = answering([*script, KeyboardInterrupt()])
    with pytest.raises(Interrupted) as stopped:
        calls.run([asked(8)], 10.0)
    told = str(stopped.value)
    assert "stopped at step 5 of 9, with 3 of 8 pictures done; the deployment lives on." in told
    assert "sys.last_value.result" in told
    result = stopped.value.result
    assert isinstance(result, ImageResult)
    assert (result.seeds, result.prompts, result.files) == ((5, 6, 7), ("a",) * 3, (FILE,) * 3)
    assert result.timing.e2e_s == 3 * result.timing.s_per_image > 0
    assert [row["status"] for row in rows] == ["cancelled"]
    assert "3 images" in str(result)
    assert not any(name in str(result) for name in ("text", "steps", "VAE")), "nobody has measured them"


def test_of_one_picture_nothing_is_kept() -> None:
    calls, _, _ = answering([ImagesProgress(4, 9), KeyboardInterrupt()])
    with pytest.raises(Interrupted) as stopped:
        calls.run([asked()], 10.0)
    assert str(stopped.value) == "stopped at step 4 of 9; the deployment lives on."
    assert stopped.value.result is None


def test_of_a_list_it_is_said_how_many_pictures_were_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_calls, "MAX_CALLS", 1)
    done = [ImagesProgress(9, 9), picture(0, 5), picture(1, 6), END]
    calls, rows, _ = answering(done, [ImagesProgress(3, 9), picture(0, 7), KeyboardInterrupt()], [Cancelled("")])
    with pytest.raises(Interrupted) as stopped:
        calls.run([asked(2, prompt) for prompt in "abc"], 10.0)
    assert "stopped at step 4 of 9 on average, with 3 of 6 pictures done" in str(stopped.value)
    result = stopped.value.result
    assert (result.prompts, result.seeds) == (("a", "a", "b"), (5, 6, 7))
    assert [row["status"] for row in rows][:2] == ["ok", "cancelled"]


AWAY = Unavailable("No replica of the model is ready.")
DONE = [picture(0, 5), END]


def waits_of(calls: ImageCalls, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have waited between its tries."""
    waits: list[float] = []
    monkeypatch.setattr(calls._cancelled, "wait", waits.append)
    return waits


def test_a_server_that_is_away_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, rows, made = answering([AWAY], [AWAY], [AWAY], DONE)
    waits = waits_of(calls, monkeypatch)
    assert calls.run([asked()], 10.0).seeds == (5,)
    assert waits == [0.1, 0.2, 0.4]
    assert [row["status"] for row in rows] == ["ok"]
    assert all(call.closed for call in made)
    calls, rows, _ = answering(*[[AWAY]] * 4, DONE)
    waits_of(calls, monkeypatch)
    with pytest.raises(Unavailable, match="No replica"):
        calls.run([asked()], 10.0)
    assert [row["status"] for row in rows] == ["error"]


@pytest.mark.parametrize(
    ("script", "limit_s"), [([ImagesProgress(1, 9), AWAY], 10.0), ([picture(0, 5), AWAY], 10.0), ([AWAY], 0.05)]
)
def test_not_where_something_has_come_or_the_time_is_up(script: list[Any], limit_s: float) -> None:
    calls, _, made = answering(script, DONE)
    with pytest.raises(Unavailable):
        calls.run([asked()], limit_s)
    assert len(made) == 1


def test_a_deployment_that_was_stopped_is_not_asked_again() -> None:
    begun: list[bytes] = []

    def call(data: bytes, left_s: float) -> Any:
        begun.append(data)
        raise Unavailable("The deployment was stopped.")

    with pytest.raises(Unavailable, match="was stopped"):
        ImageCalls(call, lambda row: row).run([asked()], 10.0)
    assert len(begun) == 1


FULL = QueueFull("1024 requests run or wait already; 1 more would not fit.", hint="Try again later.")


def test_one_of_several_that_a_full_queue_refuses_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_calls, "MAX_CALLS", 1)
    calls, rows, made = answering(DONE, *[[FULL]] * 7, DONE)
    waits = waits_of(calls, monkeypatch)
    assert calls.run([asked(), asked()], 10.0).seeds == (5, 5)
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 1.6, 1.6]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert all(call.closed for call in made)


def test_a_single_one_is_refused_at_once() -> None:
    calls, _, made = answering([FULL], DONE)
    with pytest.raises(QueueFull) as refused:
        calls.run([asked(8)], 10.0)
    assert len(made) == 1
    assert (refused.value.result, refused.value.hint) == (None, "Try again later.")


def test_a_queue_that_stays_full_ends_the_call_at_its_limit_and_keeps_what_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_calls, "MAX_CALLS", 1)
    calls, rows, _ = answering([picture(0, 5), picture(1, 6), END], *[[FULL]] * 9)
    begin = time.monotonic()
    with pytest.raises(QueueFull, match=r"^prompts\[1\]: 1024 requests") as refused:
        calls.run([asked(2), asked(2, "b"), asked(2, "c")], 0.6)
    assert 0.45 < time.monotonic() - begin < 5
    assert "Try again later. 2 of 6 pictures done. What is done is in this error's .result" in str(refused.value)
    assert refused.value.result.seeds == (5, 6)
    assert [row["status"] for row in rows][:2] == ["ok", "error"]


@pytest.mark.parametrize("count", [1, 2])
def test_pictures_that_were_done_when_a_call_failed_are_kept(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_calls, "MAX_CALLS", 1)
    calls, _, _ = answering([picture(0, 5), picture(2, 7), picture(1, 6), DeadlineExceeded("Too late.")])
    with pytest.raises(DeadlineExceeded) as late:
        calls.run([asked(8)] * count, 10.0)
    result = late.value.result
    assert isinstance(result, ImageResult)
    assert result.seeds == (5, 6, 7)
    assert f"3 of {8 * count} pictures done." in late.value.line()


def test_of_several_that_fail_at_once_it_is_said_that_none_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_calls, "MAX_CALLS", 1)
    calls, _, _ = answering([DeadlineExceeded("Too late.")])
    with pytest.raises(DeadlineExceeded, match="Too late") as late:
        calls.run([asked()] * 2, 10.0)
    assert late.value.result is None
    assert late.value.hint == "No picture of this call is done."


def test_a_picture_is_kept_though_one_before_it_did_not_come() -> None:
    calls, _, _ = answering([picture(3, 8), picture(0, 5), picture(2, 7), KeyboardInterrupt()])
    with pytest.raises(Interrupted, match="with 3 of 4 pictures done") as stopped:
        calls.run([asked(4)], 10.0)
    assert stopped.value.result.seeds == (5, 7, 8)


def test_a_task_that_is_canceled_keeps_the_pictures_that_were_done() -> None:
    cancelled, waits = threading.Event(), threading.Event()

    def script() -> Iterator[Any]:
        yield picture(0, 5)
        yield picture(1, 6)
        waits.set()
        assert cancelled.wait(10)
        raise Cancelled("")

    call = Call(script())
    call.cancel = cancelled.set  # type: ignore[method-assign]
    calls = ImageCalls(lambda data, left_s: call, lambda row: row)

    async def stop() -> None:
        task = asyncio.create_task(calls.awaited(lambda: calls.run([asked(4)], 10.0)))
        while not waits.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as stopped:
            await task
        cause = stopped.value.__cause__
        assert isinstance(cause, Cancelled)
        assert cause.result.seeds == (5, 6)

    asyncio.run(stop())
    assert cancelled.is_set()


def test_a_task_that_is_canceled_before_it_begins_has_nothing() -> None:
    calls, _, _ = answering(DONE)
    begin = threading.Event()

    def work() -> ImageResult:
        assert begin.wait(10)
        return calls.run([asked()], 10.0)

    async def stop() -> None:
        task = asyncio.create_task(calls.awaited(work))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as stopped:
            await task
        begin.set()
        assert isinstance(stopped.value.__cause__, Cancelled)
        assert stopped.value.__cause__.result is None

    asyncio.run(stop())


@pytest.mark.parametrize(("images", "together"), [(1, 16), (32, 16), (64, 8)])
def test_few_pictures_are_asked_for_at_the_same_time(images: int, together: int) -> None:
    running, most, lock = 0, 0, threading.Lock()
    gathered = threading.Barrier(together)

    def script() -> Iterator[Any]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gathered.wait(10)
        time.sleep(0.02)
        yield picture(0, 5)
        with lock:
            running -= 1
        yield END

    calls = ImageCalls(lambda data, left_s: Call(script()), lambda row: row)
    calls.run([asked(images)] * 2 * together, 20.0)
    assert most == together
