"""The scheduler against a device that is played in plain Python: what it writes where, and what it then reads."""

from __future__ import annotations

import functools
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from miinb.config import GenerationParams
from miinb.engine.rows import StepPlan
from miinb.engine.scheduler import Scheduler
from miinb.errors import InvalidRequest, OutOfMemory, PromptTooLong, QueueFull
from miinb.messages import FailedEvent, FinishedEvent, SequenceRequest, TokensEvent

EOS = 0
NAN = -1


def next_token(sequence: tuple[int, ...]) -> int:
    """What the played model answers: a pure function of the whole sequence, repetitive, EOS now and then."""
    chance = hash(sequence)
    return sequence[-3] if chance % 3 and len(sequence) > 2 and sequence[-3] != EOS else chance % 7


@functools.cache
def params_of(new: int, **params) -> GenerationParams:
    return GenerationParams(max_new_tokens=new, seed=0, **params)


def request(row_id: int, prompt: list[int], new: int = 4, deadline: float | None = None, **params) -> SequenceRequest:
    return SequenceRequest(row_id, prompt, params_of(new, **params), t_submit=0.0, deadline=deadline)


class Broken(Exception):
    """The played GPU has no memory for a row."""


@dataclass
class Device:
    """Plays the GPU: launches are done in order, results are read up to `ahead` steps later.

    Attributes:
        guilty: rows that no step can compute once they are so long.
        poisoned: rows whose answer is NaN once they are so long.
    """

    scheduler: Scheduler
    ahead: int = 0
    now: float = 0.0
    guilty: dict[int, int] = field(default_factory=dict)
    poisoned: dict[int, int] = field(default_factory=dict)
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
        assert len(plan.rows) <= self.scheduler.max_places
        self.started += [row.row_id for row in plan.admitted]
        for source, target, count in plan.copies:
            for offset in range(count):
                self.memory[target, offset] = self.memory[source, offset]
        tokens = []
        for row, start, count, samples in zip(plan.rows, plan.starts, plan.counts, plan.samples, strict=True):
            if start + count > self.guilty.get(row.row_id, 1000):
                raise Broken
            for position in range(start, start + count):
                if position < len(row.token_ids):
                    token = row.token_ids[position]
                else:
                    token = row.draft[position - row.draft_start] if row.draft else self.last_token[row.slot]
                assert self.scheduler.pool._holders[row.pages[position // size]] == 1, "a shared page is written"
                self.memory[row.pages[position // size], position % size] = token
            seen = tuple(self.memory[row.pages[p // size], p % size] for p in range(start + count))
            known = row.token_ids[: start + count]
            assert list(seen[: len(known)]) == known, "another row's memory was read"
            answer = NAN if start + count > self.poisoned.get(row.row_id, 1000) else next_token(seen)
            tokens.append(answer)
            if samples:
                self.last_token[row.slot] = answer
        return tokens

    def step(self) -> bool:
        self.now += 1.0
        if self.scheduler.drafting:
            self.land(0)
        plan = self.scheduler.schedule(self.now)
        if plan:
            try:
                self.flying.append((plan, self.launch(plan)))
            except Broken:
                fresh = {row for row, count in zip(plan.rows, plan.counts, strict=True) if count > 1}
                self.scheduler.abandon(plan, fresh | set(plan.admitted) or set(plan.rows), OutOfMemory("no"))
                plan = None
        self.land(self.ahead if plan else 0)
        for event in self.scheduler.take_events():
            assert event.row_id not in self.ended, "an event after the end"
            if isinstance(event, TokensEvent):
                self.output.setdefault(event.row_id, []).extend(event.token_ids)
            else:
                self.ended[event.row_id] = event
        self.scheduler.check()
        return plan is not None

    def land(self, left: int) -> None:
        while len(self.flying) > left:
            done, tokens = self.flying.popleft()
            self.scheduler.complete(done, tokens, [token != NAN for token in tokens], self.now)

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


def random_device(rng: random.Random) -> Device:
    """A scheduler of random size; in every third a page is a whole slot."""
    max_batch, page_tokens = rng.randint(1, 4), rng.choice([4, 4, 24])
    return make(
        rng.randint(0, 1),
        pages=max_batch if page_tokens == 24 else rng.choice([6, 6, 7]),
        page_tokens=page_tokens,
        max_batch=max_batch,
        max_length=24,
        max_step_tokens=rng.choice([6, 8, 40]),
        prefix_cache=rng.random() < 0.8,
        speculative=rng.random() < 0.5,
    )


def play(rng: random.Random) -> Device:
    """One history: rows come, are cancelled, break steps, turn to NaN; in the end each must have ended rightly."""
    device = random_device(rng)
    wanted: dict[int, list[int]] = {}
    shared = rng.choices([1, 2, 3], k=12)
    for row_id in range(rng.randint(1, 6)):
        prompt = shared[: rng.randint(0, 12)] + rng.choices([1, 2, 3], k=rng.randint(1, 5))
        new = rng.randint(1, min(9, 24 - len(prompt)))
        wanted[row_id] = answer_alone(prompt, new)
        length = rng.randint(0, len(prompt) + len(wanted[row_id]) - 2)
        fate = rng.random()
        if fate < 0.08:
            device.guilty[row_id] = length
        elif fate < 0.16:
            device.poisoned[row_id] = length
        device.scheduler.submit(request(row_id, prompt, new))
        for _ in range(rng.choice([0, 0, 1, 3])):
            device.step()
        if rng.random() < 0.2:
            device.scheduler.cancel(rng.randint(0, row_id), "cancelled", device.now)
    device.run(600)
    assert set(device.ended) == set(wanted), "a row has not ended"
    for row_id, answer in wanted.items():
        check_end(device, row_id, answer)
    assert device.scheduler.pool.used == 0
    return device


def check_end(device: Device, row_id: int, answer: list[int]) -> None:
    event, got = device.ended[row_id], device.output.get(row_id, [])
    assert got == answer[: len(got)]
    if isinstance(event, FailedEvent):
        assert row_id in (device.guilty if event.error == "OutOfMemory" else device.poisoned)
        return
    assert event.output_tokens == len(got)
    assert event.cached_tokens < event.prompt_tokens
    if event.finish_reason != "cancelled":
        assert row_id not in device.guilty
        assert row_id not in device.poisoned
        assert got == answer
        assert event.finish_reason == ("stop" if answer[-1] == EOS else "length")


def test_ten_thousand_histories_end_with_the_answers_that_rows_have_alone():
    seen = Counter()
    for seed in range(10_000):
        try:
            device = play(random.Random(seed))
        except Exception as error:
            raise AssertionError(f"history {seed}") from error
        seen["preempted"] += device.scheduler.preemptions
        seen["accepted"] += device.scheduler.drafts.accepted
        for event in device.ended.values():
            seen[event.error if isinstance(event, FailedEvent) else event.finish_reason] += 1
            seen["cached"] += isinstance(event, FinishedEvent) and event.cached_tokens
    assert min(seen[what] for what in ("preempted", "accepted", "cached", "stop", "length", "cancelled")) > 500, seen
    assert min(seen["OutOfMemory"], seen["NonFinite"]) > 500, seen


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


def test_of_rows_that_arrive_together_the_longest_answers_go_first_and_later_ones_do_not_pass_them():
    device = make(max_batch=1, eos_token_ids=[])
    for row_id, new in enumerate([2, 4, 3, 4]):
        device.scheduler.submit(request(row_id, [1, row_id], new))
    device.step()
    device.scheduler.submit(request(4, [1, 4], 5))
    device.run()
    assert list(device.ended) == [1, 3, 2, 0, 4]


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


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("page_tokens", "pages"), [(4, 40), (64, 6)])
def test_of_one_prompt_the_first_is_computed_and_the_others_share_it(ahead, page_tokens, pages):
    device = make(ahead, pages=pages, page_tokens=page_tokens, max_length=64, max_batch=6, max_step_tokens=16)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8] * 5 + [2]
    other = [3] * 30
    for row_id, text in enumerate([prompt, prompt, prompt, prompt, other, [*prompt[:8], *other]]):
        device.scheduler.submit(request(row_id, text, 3, ignore_eos=True))
    most = 0
    while device.scheduler.busy or device.flying:
        device.step()
        most = max(most, device.scheduler.pool.used)
    cached = {row_id: event.cached_tokens for row_id, event in device.ended.items()}
    assert [cached[row_id] for row_id in range(5)] == [0, 40, 40, 40, 0]
    assert device.started.index(4) < device.started.index(1)  # who shares nothing does not wait
    assert device.started.index(5) < device.started.index(1)  # nor does one that shares little
    assert most <= 36  # without sharing they would hold 62
    for row_id in range(4):
        assert device.output[row_id] == device.output[0]


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


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_row_that_breaks_a_step_fails_alone(ahead):
    device = make(ahead, max_step_tokens=64)
    device.guilty[2] = 3
    for row_id in range(4):
        device.scheduler.submit(request(row_id, [row_id + 1] * 5, 4, ignore_eos=True))
    device.run()
    assert isinstance(device.ended[2], FailedEvent)
    assert device.ended[2].error == "OutOfMemory"
    for row_id in (0, 1, 3):
        sequence = [row_id + 1] * 5
        for _ in range(4):
            sequence.append(next_token(tuple(sequence)))
        assert device.output[row_id] == sequence[5:]


def test_a_stream_gets_a_token_in_every_step_beside_a_long_prompt():
    device = make(pages=60, max_length=200, max_step_tokens=8, eos_token_ids=[])
    device.scheduler.submit(request(0, [1, 2], 40))
    device.step()
    device.scheduler.submit(request(1, [3] * 150, 2))
    for count in range(2, 22):
        device.step()
        assert len(device.output[0]) == count
    assert device.scheduler.running == 2
    assert 1 not in device.output


def test_a_short_request_does_not_wait_for_the_long_prompt_before_it():
    device = make(pages=200, max_length=200, max_step_tokens=16, eos_token_ids=[])
    for row_id, length in enumerate([160, 160, 4]):
        device.scheduler.submit(request(row_id, [1 + row_id] * length, 2))
    steps = 0
    while 2 not in device.ended:
        device.step()
        steps += 1
    assert steps <= 4  # the prompts before it need 20
    device.run()


def test_a_long_prompt_without_others_fills_its_steps():
    device = make(pages=60, max_length=200, max_step_tokens=16)
    device.scheduler.submit(request(0, [1] * 33, 2))
    plan = device.scheduler.schedule(0.0)
    assert plan
    assert plan.counts == [16]


def whole_slots(**changes) -> Device:
    return make(**({"pages": 4, "page_tokens": 64, "max_length": 64, "max_step_tokens": 64} | changes))


def test_where_a_page_is_a_slot_all_of_them_run_at_once():
    device = whole_slots(pages=8, max_batch=8, eos_token_ids=[])
    for row_id in range(8):
        device.scheduler.submit(request(row_id, [1, 2], 20))
    device.step()
    assert device.scheduler.running == 8


def test_a_conversation_goes_on_in_its_slot():
    device = whole_slots(eos_token_ids=[])
    prompt = [1, 2, 3] * 7
    device.scheduler.submit(request(0, prompt, 4))
    device.run()
    device.scheduler.submit(request(1, [8, 8], 4))
    device.run()
    turn = prompt + device.output[0] + [2, 2]
    device.scheduler.submit(request(2, turn, 4))
    device.run()
    assert [event.cached_tokens for event in device.ended.values()] == [0, 0, 24]  # the last token's are not there


def test_a_long_conversation_is_copied_from_and_not_written_over_for_its_first_words():
    device = whole_slots(eos_token_ids=[])
    system = [1, 2, 3, 4] * 5
    for row_id, prompt in enumerate([system + [5] * 30, [*system, 6], system + [5] * 31]):
        device.scheduler.submit(request(row_id, prompt, 2))
        device.run()
    assert [event.cached_tokens for event in device.ended.values()] == [0, 20, 50]


def test_a_running_row_lends_the_beginning_that_it_has_computed():
    device = whole_slots(eos_token_ids=[])
    system = [1, 2, 3, 4] * 5
    device.scheduler.submit(request(0, [*system, 5], 20))
    device.step()
    device.scheduler.submit(request(1, [*system, 6], 2))
    device.scheduler.submit(request(2, [1, 2, 3, 4], 2))  # too short for a copy
    plan = device.scheduler.schedule(5.0)
    assert plan
    assert plan.copies == [(plan.rows[0].pages[0], plan.admitted[0].pages[0], 20)]
    device.flying.append((plan, device.launch(plan)))
    device.run()
    assert device.ended[1].cached_tokens == 20
    assert device.ended[2].cached_tokens == 0


def test_the_end_of_a_row_leaves_its_memory_to_the_step_in_flight():
    device = make(1, max_batch=2, max_step_tokens=64)
    device.scheduler.submit(request(0, [1] * 4, 8, ignore_eos=True))
    device.step()
    device.scheduler.cancel(0, "cancelled", 1.0)
    assert device.scheduler.pool.used > 0
    device.step()
    assert device.scheduler.pool.used == 0
    assert set(device.ended) == {0}
