"""Calls for pictures on the client's side, whose server is a list of messages."""

from __future__ import annotations

import functools
import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import pytest
from PIL import Image

from miinb import errors, image_calls
from miinb.image_calls import ImageCalls, OnProgress
from miinb.image_messages import ImagesEnd, ImagesEvent, ImagesProgress, ImagesRequest, ImageTimes, Picture
from miinb.image_params import ImageParams
from miinb.rpc import image_codec

STEPS = 5


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES: tuple[ImagesEvent, ...] = (Picture(0, png(), 7, 8, 8), ImagesEnd(ImageTimes(), 3))


class Call:
    """An answer; `read` is set when its last message has been."""

    def __init__(self, events: Iterator[ImagesEvent]) -> None:
        self._events = events
        self.read = threading.Event()
        self.cancelled = threading.Event()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[bytes, bytes]:
        if self.cancelled.is_set():
            raise errors.Cancelled("The request was canceled.")
        event = next(self._events)
        if isinstance(event, ImagesEnd):
            self.read.set()
        return image_codec.encode_images_event(event)

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        pass


def calls(answers: list[Call], on_progress: OnProgress | None, rows: list[dict[str, Any]]) -> ImageCalls:
    def done(row: dict[str, Any]) -> dict[str, Any]:
        rows.append(row)
        return row

    waiting = iter(answers)
    return ImageCalls(lambda data, left_s: next(waiting), done, on_progress)


def asked(count: int = 1) -> list[ImagesRequest]:
    return [ImagesRequest("a", ImageParams(num_inference_steps=STEPS)) for _ in range(count)]


def steps() -> list[ImagesEvent]:
    return [ImagesProgress(step, STEPS, b"small" if step == 2 else b"") for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("count", [1, 2])
def test_what_comes_while_progress_is_told_is_read_and_the_newest_told(count: int) -> None:
    answers = [Call(iter([*steps(), *PICTURES])) for _ in range(count)]
    told: list[ImagesProgress] = []

    def slow(progress: ImagesProgress) -> None:
        told.append(progress)
        assert all(answer.read.wait(5) for answer in answers)  # no answer waits for this

    result = calls(answers, slow, []).run(asked(count), 20.0)
    assert len(result.seeds) == count
    assert len(told) <= 2
    assert told[-1].step == told[-1].total == STEPS
    assert [progress.preview for progress in told if progress.preview] == [b"small"]  # none is lost or told twice


def test_progress_is_told_as_it_comes_in_the_callers_thread() -> None:
    told: list[tuple[int, bool]] = []
    heard = threading.Event()

    def events() -> Iterator[ImagesEvent]:
        for event in steps():
            heard.clear()
            yield event
            assert heard.wait(5)
        yield from PICTURES

    def tell(progress: ImagesProgress) -> None:
        told.append((progress.step, threading.current_thread() is threading.main_thread()))
        heard.set()

    calls([Call(events())], tell, []).run(asked(), 20.0)
    assert told == [(step, True) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_callback_raises_ends_the_calls(count: int) -> None:
    answers = [Call(endless()) for _ in range(count)]
    rows: list[dict[str, Any]] = []

    def broken(progress: ImagesProgress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        calls(answers, broken, rows).run(asked(count), 20.0)
    assert all(answer.cancelled.is_set() for answer in answers)
    assert [row["status"] for row in rows] == ["cancelled"] * count


def endless() -> Iterator[ImagesEvent]:
    for step in range(1, 1 << 20):
        yield ImagesProgress(step, 1 << 20)
        time.sleep(0.01)


@pytest.mark.parametrize("tell", [None, lambda progress: None], ids=["silent", "told"])
def test_a_failure_names_its_prompt_where_there_are_several(tell: Callable[[ImagesProgress], object] | None) -> None:
    def failing() -> Iterator[ImagesEvent]:
        yield ImagesProgress(1, STEPS)
        raise errors.InvalidRequest("prompt: it is too long.")

    with pytest.raises(errors.InvalidRequest, match=r"^prompt: it is too long"):
        calls([Call(failing())], tell, []).run(asked(), 20.0)
    with pytest.raises(errors.InvalidRequest, match=r"^prompts\[1\]: it is too long"):
        calls([Call(endless()), Call(failing())], tell, []).run(asked(2), 20.0)


@pytest.mark.parametrize("count", [1, 3])
def test_progress_is_told_five_times_a_second_at_most_and_at_last(count: int) -> None:
    def events() -> Iterator[ImagesEvent]:
        for step in range(1, 61):
            yield ImagesProgress(step, 60)
            time.sleep(0.01)
        yield from PICTURES

    told: list[tuple[float, int]] = []
    answers = [Call(events()) for _ in range(count)]
    calls(answers, lambda progress: told.append((time.monotonic(), progress.step)), []).run(asked(count), 20.0)
    apart = [after[0] - before[0] for before, after in itertools.pairwise(told)]
    assert len(told) >= 3
    assert min(apart[:-1]) > image_calls.PACE_S - 0.02
    assert told[-1][1] == 60


def test_what_is_held_back_is_told_before_more_comes() -> None:
    told: list[int] = []
    heard = threading.Event()

    def tell(progress: ImagesProgress) -> None:
        told.append(progress.step)
        if progress.step == 2:
            heard.set()

    def events() -> Iterator[ImagesEvent]:
        yield from steps()[:1]
        time.sleep(0.05)
        yield from steps()[1:2]
        assert heard.wait(5)
        yield from PICTURES

    calls([Call(events())], tell, []).run(asked(), 20.0)
    assert told == [1, 2]


class Awaited:
    async def __call__(self, progress: ImagesProgress) -> None: ...


async def awaited(progress: ImagesProgress) -> None: ...


@pytest.mark.parametrize("on_progress", [awaited, Awaited(), functools.partial(awaited)])
def test_an_async_function_is_refused_before_anything_is_sent(on_progress: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"^on_progress: nobody would await an async") as refused:
        calls([], on_progress, [])
    assert refused.value.hint
