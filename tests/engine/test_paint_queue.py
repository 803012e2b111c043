"""Whose pictures are computed next: requests take turns."""

from __future__ import annotations

from dataclasses import replace

from miinb.engine.paint_queue import PaintQueue, Row
from miinb.engine.painting import Work
from miinb.image_messages import PaintRequest
from miinb.image_params import ImageParams

WORK = Work(64, 64, 4, 7.5, "PNDMScheduler")
OTHER = replace(WORK, width=32)


class Queue:
    """Pictures by name: "b2" is the third of request "b"."""

    def __init__(self, most: int = 4) -> None:
        self.queue = PaintQueue()
        self.most = most
        self.rows: dict[str, Row] = {}

    def add(self, request_id: str, count: int, work: Work = WORK) -> None:
        first = sum(name[0] == request_id for name in self.rows)
        for number in range(first, first + count):
            asked = PaintRequest(len(self.rows), "", ImageParams(seed=0), 0.0, request_id=request_id)
            row = self.rows[f"{request_id}{number}"] = Row(asked, work)
            self.queue.add(row)

    def take(self, *begun: str) -> str:
        names = {row.request.row_id: name for name, row in self.rows.items()}
        batch = self.queue.take(lambda work: self.most, [self.rows[name] for name in begun])
        assert all(row.t_start for row in batch)
        return " ".join(names[row.request.row_id] for row in batch)


def test_requests_take_turns_in_a_batch() -> None:
    queue = Queue()
    queue.add("a", 8)
    queue.add("b", 1)
    queue.add("c", 3)
    assert len(queue.queue) == 12
    assert [queue.take() for _ in range(4)] == ["a0 b0 c0 a1", "c1 a2 c2 a3", "a4 a5 a6 a7", ""]
    assert not len(queue.queue)


def test_one_of_another_size_waits_for_no_more_than_the_batch_that_runs() -> None:
    queue = Queue()
    queue.add("a", 64)
    assert queue.take() == "a0 a1 a2 a3"
    queue.add("b", 1, OTHER)
    assert queue.take() == "b0"
    assert queue.take() == "a4 a5 a6 a7"


def test_new_requests_do_not_keep_one_that_waits_from_its_turn() -> None:
    queue = Queue()
    queue.add("a", 64)
    taken = []
    for name in "bcdef":
        taken.append(queue.take())
        queue.add(name, 1, replace(OTHER, steps=ord(name)))
    assert taken == ["a0 a1 a2 a3", "b0", "a4 a5 a6 a7", "c0", "d0"]
    assert queue.take() == "a8 a9 a10 a11"


def test_what_joins_a_batch_takes_turns_too() -> None:
    queue = Queue()
    queue.add("a", 2)
    assert queue.take() == "a0 a1"
    queue.add("a", 4)
    queue.add("b", 1)
    queue.add("c", 1, OTHER)
    assert queue.take("a0", "a1") == "b0 a2"
    assert queue.take("a0", "a1", "b0", "a2") == ""
    assert queue.take() == "c0"
    assert queue.take() == "a3 a4 a5"


def test_a_batch_that_failed_is_tried_one_by_one_and_others_have_their_turns() -> None:
    queue = Queue()
    queue.add("a", 6)
    queue.add("b", 1)
    assert queue.take() == "a0 b0 a1 a2"
    queue.queue.put_back([queue.rows[name] for name in ("a0", "b0", "a1", "a2")])
    assert all(not queue.rows[name].t_start for name in ("a0", "b0"))
    assert [queue.take() for _ in range(6)] == ["b0", "a0", "a1", "a2", "a3 a4 a5", ""]


def test_what_is_canceled_waits_no_longer() -> None:
    queue = Queue(2)
    queue.add("a", 3)
    queue.add("b", 1)
    for name in ("a0", "b0"):
        queue.queue.remove(queue.rows[name])
    assert [row.request.row_id for row in queue.queue] == [1, 2]
    assert queue.take() == "a1 a2"
