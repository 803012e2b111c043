"""The scheduler against a device that is played in plain Python: what it writes where, and what it then reads."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miinb.config import GenerationParams
from miinb.engine.rows import Row, StepPlan
from miinb.engine.scheduler import Scheduler
from miinb.errors import InvalidRequest, PromptTooLong, QueueFull
from miinb.messages import FailedEvent, FinishedEvent, SequenceRequest, TokensEvent

EOS = 0
NAN = -1


def next_token(sequence: tuple[int, ...]) -> int:
    """What the played model answers: a pure function of the whole sequence; one in seven answers is EOS."""
    return hash(sequence) % 7


def request(row_id: int, prompt: list[int], new: int = 4, deadline: float | None = None, **params) -> SequenceRequest:
    return SequenceRequest(
        row_id, prompt, GenerationParams(max_new_tokens=new, seed=0, **params), t_submit=0.0, deadline=deadline
    )


@dataclass
class Device:
    """Plays the GPU: launches are done in order, results are read up to `ahead` steps later."""

    scheduler: Scheduler
    ahead: int = 0
    now: float = 0.0
    memory: dict[tuple[int, int], int] = field(default_factory=dict)  # (page, offset): token
    last_token: dict[int, int] = field(default_factory=dict)  # by slot
    flying: deque = field(default_factory=deque)
    output: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, FinishedEvent | FailedEvent] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)

    def launch(self, plan: StepPlan) -> list[int]:
        size = self.scheduler.pool.page_tokens
        assert plan.tokens <= self.scheduler.max_step_tokens
        assert plan.counts == sorted(plan.counts, key=lambda count: count > 1)
        self.started += [row.row_id for row in plan.admitted]
        tokens = []
        for row, start, count, samples in zip(plan.rows, plan.starts, plan.counts, plan.samples, strict=True):
            for position in range(start, start + count):
                known = position < len(row.token_ids)
                token = row.token_ids[position] if known else self.last_token[row.slot]
                self.memory[row.pages[position // size], position % size] = token
            seen = tuple(self.memory[row.pages[p // size], p % size] for p in range(start + count))
            assert list(seen[: len(row.token_ids)]) == row.token_ids[: start + count], "another row's memory was read"
            answer = next_token(seen)
            tokens.append(answer)
            if samples:
                self.last_token[row.slot] = answer
        return tokens

    def step(self) -> bool:
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        if plan:
            self.flying.append((plan, self.launch(plan)))
        while len(self.flying) > (self.ahead if plan else 0):
            done, tokens = self.flying.popleft()
            self.scheduler.complete(done, tokens, [token != NAN for token in tokens], self.now)
        for event in self.scheduler.take_events():
            assert event.row_id not in self.ended, "an event after the end"
            if isinstance(event, TokensEvent):
                self.output.setdefault(event.row_id, []).extend(event.token_ids)
            else:
                self.ended[event.row_id] = event
        self.scheduler.check()
        return plan is not None

    def run(self, steps: int = 5000) -> None:
        for _ in range(steps):
            if not self.scheduler.busy and not self.flying:
                return
            self.step()
        pytest.fail("a row starves")


def make(ahead: int = 0, **changes) -> Device:
    values = {"pages": 12, "page_tokens": 4, "max_batch": 4, "max_length": 32, "vocab_size": 9, "max_step_tokens": 8}
    return Device(Scheduler(**(values | {"eos_token_ids": [EOS]} | changes)), ahead)


def answer_alone(prompt: list[int], new: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(new):
        sequence.append(next_token(tuple(sequence)))
        if sequence[-1] == EOS:
            break
    return sequence[len(prompt) :]


prompts = st.lists(st.integers(1, 3), min_size=1, max_size=20)
arrivals = st.lists(
    st.tuples(prompts, st.integers(1, 12), st.integers(0, 3), st.sampled_from([None, None, None, 0, 2, 9])), max_size=25
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=arrivals,
    ahead=st.integers(0, 1),
    pages=st.integers(8, 14),
    max_batch=st.integers(1, 6),
    budget=st.sampled_from([6, 8, 40]),
    prefix_cache=st.booleans(),
)
def test_every_row_ends_once_with_the_answer_it_has_alone(arrivals, ahead, pages, max_batch, budget, prefix_cache):
    device = make(ahead, pages=pages, max_batch=max_batch, max_step_tokens=budget, prefix_cache=prefix_cache)
    wanted = {}
    for row_id, (prompt, new, pause, cancel_after) in enumerate(arrivals):
        device.scheduler.submit(request(row_id, prompt, new))
        wanted[row_id] = answer_alone(prompt, new)
        for _ in range(pause):
            device.step()
        if cancel_after is not None:
            for _ in range(cancel_after):
                device.step()
            device.scheduler.cancel(row_id, "cancelled", device.now)
    device.run()
    assert set(device.ended) == set(wanted)
    for row_id, answer in wanted.items():
        event = device.ended[row_id]
        got = device.output.get(row_id, [])
        assert isinstance(event, FinishedEvent)
        assert event.output_tokens == len(got)
        if event.finish_reason == "cancelled":
            assert got == answer[: len(got)]
        else:
            assert got == answer
            assert event.finish_reason == ("stop" if answer[-1] == EOS else "length")
    assert device.scheduler.pool.used == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_preempted_rows_lose_nothing_and_the_oldest_goes_on(ahead):
    device = make(ahead, pages=8, max_length=32, max_step_tokens=40, eos_token_ids=[])
    for row_id in range(4):
        device.scheduler.submit(request(row_id, [row_id + 1] * 6, 20, ignore_eos=True))
    device.run()
    assert device.scheduler.preemptions > 0
    assert list(device.ended) == [0, 1, 2, 3]
    for row_id in range(4):
        sequence = [row_id + 1] * 6
        for _ in range(20):
            sequence.append(next_token(tuple(sequence)))
        assert device.output[row_id] == sequence[6:]


def test_rows_start_in_order_of_arrival_and_a_large_one_is_not_passed_by_small_ones():
    device = make(max_batch=3, pages=8, max_step_tokens=64, prefix_cache=False)
    for row_id, length in enumerate([9, 9, 28, 2, 2, 2]):
        device.scheduler.submit(request(row_id, [1 + row_id % 3] * length, 3, ignore_eos=True))
    device.run()
    assert list(dict.fromkeys(device.started)) == [0, 1, 2, 3, 4, 5]


def test_prompts_are_chunked_beside_decoding_rows():
    device = make(max_step_tokens=8)
    device.scheduler.submit(request(0, [1, 2], 10, ignore_eos=True))
    device.step()
    device.scheduler.submit(request(1, [3] * 20, 2, ignore_eos=True))
    plan = device.scheduler.schedule(1.0)
    assert plan
    assert [(row.row_id, count) for row, count in zip(plan.rows, plan.counts, strict=True)] == [(0, 1), (1, 7)]
    assert plan.samples == [True, False]


def test_a_prefix_is_computed_once_and_forgotten_when_memory_is_needed():
    device = make(pages=8, max_length=32, max_step_tokens=64)
    prompt = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    for row_id, text in enumerate([prompt, [*prompt[:8], 2, 2], [3] * 24, prompt]):
        device.scheduler.submit(request(row_id, text, 2, ignore_eos=True))
        device.run()
    cached = [event.cached_tokens for event in device.ended.values()]
    assert cached == [0, 8, 0, 4]  # the third took the end of the first's chain


def test_without_prefix_cache_nothing_is_reused():
    device = make(prefix_cache=False, max_step_tokens=64)
    for row_id in range(2):
        device.scheduler.submit(request(row_id, [1, 2, 3, 1, 2, 3], 2))
        device.run()
    assert [event.cached_tokens for event in device.ended.values()] == [0, 0]


def test_a_deadline_that_passes_in_the_queue_means_the_row_never_starts():
    device = make(max_batch=1)
    device.scheduler.submit(request(0, [1], 8, ignore_eos=True))
    device.scheduler.submit(request(1, [2], 1, deadline=3.0))
    device.scheduler.submit(request(2, [3], 1, deadline=1000.0))
    device.run()
    event = device.ended[1]
    assert isinstance(event, FailedEvent)
    assert event.error == "DeadlineExceeded"
    assert device.started == [0, 2]
    assert isinstance(device.ended[2], FinishedEvent)


def test_what_does_not_fit_is_refused_alone():
    device = make(max_queue=2)
    with pytest.raises(PromptTooLong, match="33 prompt tokens"):
        device.scheduler.submit(request(0, [1] * 33, 1))
    with pytest.raises(PromptTooLong):
        device.scheduler.submit(request(0, [1] * 30, 3))
    with pytest.raises(InvalidRequest):
        device.scheduler.submit(request(0, [], 3))
    device.scheduler.submit(request(1, [1] * 30, 2))
    most = 2 + device.scheduler.max_batch  # rows that will have a slot at the next step do not count
    for row_id in range(2, 1 + most):
        device.scheduler.submit(request(row_id, [1], 2))
    with pytest.raises(QueueFull):
        device.scheduler.submit(request(1 + most, [1], 2))
    device.run()
    assert set(device.ended) == set(range(1, 1 + most))


def test_a_row_of_nan_fails_alone_and_its_pages_are_zeroed():
    scheduler = make(max_step_tokens=64).scheduler
    for row_id in range(2):
        scheduler.submit(request(row_id, [row_id + 1] * 5, 2))
    plan = scheduler.schedule(0.0)
    assert plan
    pages = list(plan.rows[0].pages)
    scheduler.complete(plan, [1, 1], [False, True], 1.0)
    events = scheduler.take_events()
    assert [(event.row_id, type(event)) for event in events] == [(0, FailedEvent), (1, TokensEvent)]
    assert sorted(scheduler.take_blank()) == sorted(pages)
    assert scheduler.take_blank() == []
    scheduler.check()


def test_a_step_that_raised_is_undone_for_the_rows_that_are_not_to_blame():
    device = make(max_step_tokens=64)
    device.scheduler.submit(request(0, [1, 2, 3], 4, ignore_eos=True))
    device.step()
    device.scheduler.submit(request(1, [3] * 9, 4))
    plan = device.scheduler.schedule(2.0)
    assert plan
    blamed: list[Row] = [row for row in plan.rows if row.row_id == 1]
    device.scheduler.abandon(plan, blamed, InvalidRequest("no"))
    device.run()
    assert isinstance(device.ended[1], FailedEvent)
    sequence = [1, 2, 3]
    for _ in range(4):
        sequence.append(next_token(tuple(sequence)))
    assert device.output[0] == sequence[3:]


def test_the_end_of_a_row_leaves_its_memory_to_the_step_in_flight():
    device = make(1, max_batch=2, max_step_tokens=64)
    device.scheduler.submit(request(0, [1] * 4, 8, ignore_eos=True))
    device.step()
    device.scheduler.cancel(0, "cancelled", 1.0)
    assert device.scheduler.pool.used > 0
    device.step()
    assert device.scheduler.pool.used == 0
    assert set(device.ended) == {0}
