"""A request for pictures in the frontend: its rows, their progress, their files. Knows neither gRPC nor protobuf."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from miinb.config import MAX_SEED
from miinb.errors import InvalidRequest, RequestError, from_name
from miinb.image_messages import (
    ImagesEnd,
    ImagesEvent,
    ImagesProgress,
    ImagesRequest,
    ImageTimes,
    PaintedEvent,
    PaintProgress,
    PaintRequest,
    Picture,
)
from miinb.image_params import with_strength
from miinb.image_sources import pixels
from miinb.messages import FailedEvent
from miinb.server.balancer import Balancer, Replica, RowEvent
from miinb.server.generation import SEED_BITS
from miinb.server.picture_files import picture_file, preview_file
from miinb.tasks import find_task

#: Least time between two messages of progress: five a second.
PACE_S = 0.2
#: Reads files to begin from: one at a time, as a large one takes a few hundred MB meanwhile.
_READER = ThreadPoolExecutor(1, "miinb-sources")
_File = tuple[PaintedEvent, bytes, float]


class Imaging:
    """A running request. `events()` yields its answer; `cancel()` ends what still runs.

    Args:
        request: what was asked.
        replica: that computes it.
        on_begin: see `start`.
    """

    def __init__(self, request: ImagesRequest, replica: Replica, on_begin: Callable[[], None] = lambda: None) -> None:
        self._on_begin = on_begin
        self._request = request
        self._replica = replica
        self._places: dict[int, int] = {}  # of rows that run: which picture each is
        self._steps: dict[int, int] = {}
        self._events: asyncio.Queue[RowEvent | asyncio.Future[_File]] = asyncio.Queue()
        self._files: set[asyncio.Future[_File]] = set()
        self._painted: list[PaintedEvent] = []
        self._told = 0  # steps, and when the next may be told
        self._not_before = 0.0

    @classmethod
    async def start(
        cls,
        request: ImagesRequest,
        balancer: Balancer,
        *,
        t_submit: float,
        deadline: float,
        on_begin: Callable[[], None] = lambda: None,
    ) -> Imaging:
        """Hand its rows to the least loaded replica; `on_begin` is called with each event of theirs.

        Raises:
            InvalidRequest, QueueFull, Unavailable: it cannot be served; nothing was started.
        """
        count = request.params.num_images_per_prompt
        replica = await balancer.pick(count)
        if not find_task(replica.info.task).image:
            raise InvalidRequest(f"This deployment serves {replica.info.task}, not pictures.")
        params = with_strength(request.params, image=request.image is not None, mask=request.mask is not None)
        source = None
        if request.image is not None:
            loop = asyncio.get_running_loop()
            size, source = await loop.run_in_executor(_READER, pixels, request.image, request.mask, params)
            params = params.model_copy(update={"width": size[0], "height": size[1]})
            replica = await balancer.pick(count)  # it may have gone or filled meanwhile
        self = cls(dataclasses.replace(request, params=params), replica, on_begin)
        asked, request_id = request.params.seed, request.request_id or secrets.token_hex(16)
        first = secrets.randbits(SEED_BITS) if asked is None else asked
        try:
            for place in range(count):
                row_id = balancer.next_row_id()
                own = params.model_copy(update={"seed": (first + place) % (MAX_SEED + 1)})
                more = place + 1 < count
                row = PaintRequest(row_id, request.prompt, own, t_submit, deadline, source, more, request_id)
                replica.submit(row, self._take)
                self._places[row_id], self._steps[row_id] = place, 0
        except BaseException:
            self.cancel()
            raise
        return self

    def _take(self, event: RowEvent) -> None:
        """A row's event; of a picture the file is begun at once, while the next one is decoded."""
        self._on_begin()
        if not isinstance(event, PaintedEvent):
            self._events.put_nowait(event)
            return
        self._painted.append(event)
        file = asyncio.get_running_loop().run_in_executor(None, self._file, event)
        self._files.add(file)
        file.add_done_callback(self._events.put_nowait)

    async def events(self) -> AsyncIterator[ImagesEvent]:
        """The answer as it comes: progress, each picture when it is complete, the end.

        Raises:
            MiinbError: a picture failed; the others are canceled.
        """
        picture_s, clock = 0.0, asyncio.get_running_loop().time
        while self._places:
            event = await self._events.get()
            if isinstance(event, PaintProgress):
                if (progress := self._progress(event, clock())) is not None:
                    preview = await asyncio.to_thread(preview_file, event) if self._shows(event) else b""
                    yield dataclasses.replace(progress, preview=preview)
            elif isinstance(event, asyncio.Future):
                self._files.discard(event)
                painted, data, seconds = event.result()
                picture_s = max(picture_s, seconds)
                place = self._places.pop(painted.row_id)
                yield Picture(place, data, painted.seed, painted.width, painted.height, painted.flagged)
            elif isinstance(event, FailedEvent):
                self._places.pop(event.row_id)
                raise from_name(event.error, event.message, hint=event.hint)
            else:
                raise RequestError("The replica did not answer as it should.")
        yield self._end(picture_s)

    def _file(self, event: PaintedEvent) -> _File:
        """A picture's file, and the seconds that it took."""
        begin = time.perf_counter()
        data = picture_file(event, self._request, self._replica.info.model)
        return event, data, time.perf_counter() - begin

    def _progress(self, event: PaintProgress, now: float) -> ImagesProgress | None:
        """How far the request is: its pictures' steps on average, as they may be in several batches; or nothing new."""
        self._steps[event.row_id] = event.step
        step = sum(self._steps.values()) // len(self._steps)
        due = step > self._told and (now >= self._not_before or step == event.total)
        if not due and not self._shows(event):
            return None
        self._not_before, self._told = now + PACE_S, max(step, self._told)
        return ImagesProgress(self._told, event.total)

    def _shows(self, event: PaintProgress) -> bool:
        """Whether it has a preview of the request's first picture."""
        return bool(event.preview) and self._places.get(event.row_id) == 0

    def _end(self, picture_s: float) -> ImagesEnd:
        painted = self._painted
        names = {name for event in painted for name in event.times}
        times = {name: max(event.times.get(name, 0.0) for event in painted) for name in names}
        facts = dict(painted[0].facts) | {"batch": max(event.facts["batch"] for event in painted)}
        return ImagesEnd(ImageTimes(**times, picture_s=picture_s), **facts)

    def cancel(self) -> None:
        """End every row that still runs; safe to call at any time."""
        for row_id in self._places:
            self._replica.cancel(row_id)
