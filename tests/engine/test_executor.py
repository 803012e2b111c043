"""The step executor over a stand-in decoder whose answers show what every step read from the cache."""

from __future__ import annotations

import time

import pytest
import torch

from miinb.config import EngineOptions, GenerationParams
from miinb.engine.executor import StepExecutor
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.spec import DecoderSpec
from miinb.errors import InvalidRequest, PromptTooLong
from miinb.messages import EngineInfo, FailedEvent, FinishedEvent, Plan, SequenceRequest, TokensEvent

VOCAB = 61
EOS = 0


class ContextDecoder:
    """A stand-in with the decoder's interface: its cache holds token ids, its logits are a function of all of them.

    Attributes:
        broken: called with each batch; may raise, or change the logits.
    """

    def __init__(self, vocab: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(vocab, vocab, generator=generator)
        self.broken = lambda batch, logits: logits
        self.batches: list[int] = []

    def logits_of(self, ids: torch.Tensor) -> torch.Tensor:
        weights = torch.cos(torch.arange(len(ids)) * 1.7)
        return (self.table[ids.long()] * weights[:, None]).sum(0)

    def forward(self, batch, cache) -> torch.Tensor:
        self.batches.append(len(batch.lengths))
        memory = cache.k[0].view(-1)
        memory[batch.slots] = batch.token_ids.to(memory.dtype)
        wanted = set(batch.logit_rows.tolist())
        out = []
        for row, length in enumerate(batch.lengths.tolist()):
            last = int(batch.query_start[row + 1]) - 1
            assert int(batch.positions[last]) == length - 1
            if last in wanted:
                pages = batch.block_table[row, : -(-length // cache.page_tokens)].long()
                out.append(self.logits_of(cache.k[0][pages].flatten()[:length]))
        return self.broken(batch, torch.stack(out))

    def greedy(self, batch, cache):
        logits = self.forward(batch, cache)
        return logits.argmax(-1), torch.isfinite(logits.amax(-1))

    def answer(self, prompt: list[int], new: int) -> list[int]:
        ids = list(prompt)
        for _ in range(new):
            ids.append(int(self.logits_of(torch.tensor(ids)).argmax()))
            if ids[-1] == EOS:
                break
        return ids[len(prompt) :]


def make(
    decoder: ContextDecoder | None = None,
    *,
    pages=24,
    page_tokens=4,
    max_batch=4,
    max_length=48,
    ahead=False,
    **options,
) -> StepExecutor:
    spec = DecoderSpec(
        vocab_size=VOCAB, hidden_size=1, layers=1, heads=1, kv_heads=1, head_size=1, inner_size=1, scale=1.0,
        max_length=max_length, norm="rms", eps=1e-5, activation="silu",
    )  # fmt: skip
    size = CacheSize(pages, page_tokens, max_length, max_batch, pages * page_tokens * 8)
    info = EngineInfo(
        replica=0, model="m", task="text-generation", engine="optimized", dtype="fp32", device="cpu",
        vocab_size=VOCAB, max_length=max_length, max_batch=max_batch, eos_token_ids=(EOS,), tokenizer_folder="",
        plan=Plan("optimized", "cpu", "fp32"),
    )  # fmt: skip
    return StepExecutor(
        info=info,
        decoder=decoder or ContextDecoder(),
        cache=KVCache(spec, size, torch.float32, torch.device("cpu")),
        options=EngineOptions(**({"max_step_tokens": 16} | options)),
        launch_ahead=ahead,
    )


def request(row_id: int, prompt: list[int], new: int = 6, **params) -> SequenceRequest:
    return SequenceRequest(
        row_id, prompt, GenerationParams(**({"seed": 1, "max_new_tokens": new} | params)), time.monotonic()
    )


def run(executor: StepExecutor, steps: int = 400, between=None) -> dict[int, list]:
    events: dict[int, list] = {}
    for step in range(steps):
        if not executor.busy:
            return events
        executor.step(lambda event: events.setdefault(event.row_id, []).append(event), lambda: None)
        executor.scheduler.check()
        if between:
            between(step)
    pytest.fail("the executor does not come to an end")


def tokens(events: list) -> list[int]:
    return [token for event in events if isinstance(event, TokensEvent) for token in event.token_ids]


PROMPTS = [[1, 2, 3], [4] * 21, [7], [9, 8, 7, 6, 5, 4, 3, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 9]]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("pages", "page_tokens"), [(24, 4), (12, 4), (4, 48)])
def test_rows_answer_together_as_alone(ahead, pages, page_tokens):
    executor = make(pages=pages, page_tokens=page_tokens, ahead=ahead)
    decoder = ContextDecoder()
    for row_id, prompt in enumerate(PROMPTS):
        executor.submit(request(row_id, prompt, 4 + 5 * row_id % 17))
    events = run(executor)
    for row_id, prompt in enumerate(PROMPTS):
        wanted = decoder.answer(prompt, 4 + 5 * row_id % 17)
        assert tokens(events[row_id]) == wanted
        end = events[row_id][-1]
        assert isinstance(end, FinishedEvent)
        assert (end.prompt_tokens, end.output_tokens) == (len(prompt), len(wanted))
        assert end.queue_s >= 0
        assert end.model_s >= end.prefill_s >= 0
    assert executor.status()["kv_pages_used"] == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_sampled_rows_draw_alike_in_any_batch_and_with_or_without_launch_ahead(ahead):
    params = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.3, "min_new_tokens": 3, "logprobs": 2}
    wanted = {}
    for row_id, prompt in enumerate(PROMPTS):
        executor = make(pages=48)
        executor.submit(request(row_id, prompt, 9, **params, seed=row_id))
        wanted[row_id] = run(executor)[row_id]
    executor = make(pages=14, ahead=ahead)
    for row_id, prompt in enumerate(PROMPTS):
        executor.submit(request(row_id, prompt, 9, **params, seed=row_id))
    events = run(executor)
    for row_id, alone in wanted.items():
        assert tokens(events[row_id]) == tokens(alone)
        first = events[row_id][0].logprobs[0]
        assert first.token_id == tokens(alone)[0]
        assert len(first.top) == 2
    assert len({tuple(tokens(alone)) for alone in wanted.values()}) > 3


@pytest.mark.parametrize("ahead", [False, True])
def test_a_cancelled_row_ends_between_steps_and_the_next_takes_its_slot(ahead):
    executor = make(max_batch=1, ahead=ahead)
    executor.submit(request(0, [1, 2], 40, ignore_eos=True))
    executor.submit(request(1, [3], 2, ignore_eos=True))
    events = run(executor, between=lambda step: executor.cancel(0, "cancelled") if step == 5 else None)
    assert events[0][-1].finish_reason == "cancelled"
    assert len(tokens(events[0])) == events[0][-1].output_tokens <= 6
    assert tokens(events[1]) == ContextDecoder().answer([3], 2)


@pytest.mark.parametrize("ahead", [False, True])
def test_nan_fails_its_row_alone_and_leaves_no_nan_in_the_cache(ahead):
    decoder = ContextDecoder()

    def poison(batch, logits):
        for i, place in enumerate(batch.logit_rows.tolist()):
            if int(batch.token_ids[place]) == 13:
                logits[i] = torch.nan
        return logits

    decoder.broken = poison
    executor = make(decoder, ahead=ahead)
    executor.submit(request(0, [1, 2, 3], 8))
    executor.submit(request(1, [5, 13], 8))
    events = run(executor)
    assert [type(event) for event in events[1]] == [FailedEvent]
    assert events[1][0].error == "NonFinite"
    assert tokens(events[0]) == ContextDecoder().answer([1, 2, 3], 8)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("secret /path")])
def test_a_step_that_raises_fails_the_new_prompts_and_the_others_go_on(ahead, error):
    decoder = ContextDecoder()
    executor = make(decoder, ahead=ahead)
    executor.submit(request(0, [1, 2, 3], 12, ignore_eos=True))

    def fall(batch, logits):
        if batch.max_query > 4:
            raise error
        return logits

    decoder.broken = fall
    events = run(executor, between=lambda step: executor.submit(request(1, [6] * 7, 3)) if step == 3 else None)
    assert [type(event) for event in events[1]] == [FailedEvent]
    assert "/path" not in events[1][0].message
    assert events[1][0].error == ("OutOfMemory" if isinstance(error, torch.OutOfMemoryError) else "MiinbError")
    ids = [1, 2, 3]
    for _ in range(12):
        ids.append(int(decoder.logits_of(torch.tensor(ids)).argmax()))
    assert tokens(events[0]) == ids[3:]


def test_a_decode_step_that_raises_fails_its_rows_and_the_next_prompt_is_served():
    decoder = ContextDecoder()
    executor = make(decoder)
    calls = []

    def fall(batch, logits):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("once")
        return logits

    decoder.broken = fall
    executor.submit(request(0, [1, 2], 9, ignore_eos=True))
    assert isinstance(run(executor)[0][-1], FailedEvent)
    executor.submit(request(1, [1, 2], 3, ignore_eos=True))
    assert isinstance(run(executor)[1][-1], FinishedEvent)


def test_what_cannot_be_served_is_refused_at_once():
    executor = make()
    with pytest.raises(PromptTooLong):
        executor.submit(request(0, [1] * 40, 20))
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        executor.submit(request(0, [1, VOCAB], 2))
    with pytest.raises(InvalidRequest, match="logit_bias"):
        executor.submit(request(0, [1], 2, logit_bias={VOCAB: 1.0}))
    with pytest.raises(InvalidRequest, match="num_beams"):
        executor.submit(request(0, [5], num_beams=2))
    with pytest.raises(InvalidRequest, match="eos_token_id"):
        executor.submit(request(0, [1], 2, eos_token_id=[-1]))
    assert not executor.busy


def test_equal_prefixes_are_computed_once():
    executor = make(page_tokens=4)
    for row_id in range(2):
        executor.submit(request(row_id, [1, 2, 3, 4, 5, 6, 7, 8, 9], 2, ignore_eos=True))
        events = run(executor)
    assert events[1][-1].cached_tokens == 8
    assert tokens(events[1]) == ContextDecoder().answer([1, 2, 3, 4, 5, 6, 7, 8, 9], 2)


class RepeatingDecoder(ContextDecoder):
    """Its answers repeat themselves, with a change now and then: drafts are accepted, in part, and refused."""

    def logits_of(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().logits_of(ids)
        if len(ids) > 5 and int(ids.sum()) % 5:
            logits[int(ids[-5])] += 30.0
        return logits


LOOKUP = {"speculative": "prompt_lookup"}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"ignore_eos": True},
        {"min_new_tokens": 11, "logprobs": 2},
        {"do_sample": True, "temperature": 3.0},
        {"logit_bias": {7: 4.0}},
        {"repetition_penalty": 1.2},
    ],
)
@pytest.mark.parametrize(("pages", "page_tokens"), [(48, 4), (14, 4), (4, 48)])
def test_speculation_changes_no_token(ahead, params, pages, page_tokens):
    def answers(**options):
        executor = make(RepeatingDecoder(), pages=pages, page_tokens=page_tokens, ahead=ahead, **options)
        for row_id, prompt in enumerate(PROMPTS):
            executor.submit(request(row_id, prompt, 18, **params, seed=row_id))
        return run(executor), executor.status()

    wanted, _ = answers()
    got, status = answers(**LOOKUP)
    for row_id in wanted:
        assert tokens(got[row_id]) == tokens(wanted[row_id])
        one, other = got[row_id][-1], wanted[row_id][-1]
        assert (one.finish_reason, one.output_tokens) == (other.finish_reason, other.output_tokens)
        for mine, plain in zip(got[row_id][:-1], wanted[row_id][:-1], strict=True):
            assert [entry.token_id for entry in mine.logprobs] == [entry.token_id for entry in plain.logprobs]
            assert [entry.logprob for entry in mine.logprobs] == pytest.approx([e.logprob for e in plain.logprobs])
    ends = [events[-1] for events in got.values()]
    assert status["draft_tokens"] == sum(end.draft_tokens for end in ends)
    assert status["accepted_tokens"] == sum(end.accepted_tokens for end in ends)
    if "repetition_penalty" in params:
        assert status["draft_tokens"] == 0
    else:
        assert status["draft_tokens"] > status["accepted_tokens"] > 0


def test_speculation_takes_fewer_steps_and_can_be_off_for_a_request():
    def steps(**params):
        executor = make(RepeatingDecoder(), max_batch=1, **LOOKUP)
        executor.submit(request(0, [1, 2, 3, 4, 5] * 4, 24, ignore_eos=True, **params))
        run(executor)
        return executor.status()["steps"]

    assert steps(speculative=False) == 25  # two for the prompt
    assert steps() < 20


def test_a_speculating_row_is_cancelled_between_steps():
    executor = make(RepeatingDecoder(), ahead=True, **LOOKUP)
    executor.submit(request(0, [1, 2, 3, 4, 5] * 3, 30, ignore_eos=True))
    events = run(executor, between=lambda step: executor.cancel(0, "stop") if step == 3 else None)
    assert events[0][-1].finish_reason == "stop"
    assert events[0][-1].output_tokens == len(tokens(events[0])) < 30


def test_a_slot_goes_on_from_the_prompt_before_with_equal_tokens():
    plain = make(pages=4, page_tokens=48, prefix_cache=False)
    reusing = make(pages=4, page_tokens=48)
    system = [5, 6, 7, 8] * 5
    turns = [[*system, 1], [*system, 2], [*system, 1, 9, 9], [*system, 3, 1], [4, 4], [*system, 1, 9, 8]]
    answers = []
    for executor in (plain, reusing):
        for row_id, prompt in enumerate(turns):
            executor.submit(request(row_id, prompt, 6, ignore_eos=True))
            if row_id == 2:
                for _ in range(2):  # those after it come while it runs
                    executor.step(lambda event: None, lambda: None)
        answers.append(run(executor))
    cached = [sum(events[-1].cached_tokens for events in found.values()) for found in answers]
    assert cached[0] == 0
    assert cached[1] >= 40
    for row_id in answers[0]:
        assert tokens(answers[0][row_id])[-3:] == tokens(answers[1][row_id])[-3:]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("page_tokens", [4, 48])
def test_four_samples_of_one_prompt_share_it_and_are_those_of_each_alone(ahead, page_tokens):
    prompt = [1, 2, 3, 4, 5, 6, 7] * 4
    found = []
    for sharing in (False, True):
        executor = make(pages=44 if page_tokens == 4 else 4, page_tokens=page_tokens, ahead=ahead, prefix_cache=sharing)
        for row_id in range(4):
            executor.submit(request(row_id, prompt, 8, do_sample=True, temperature=3.0, seed=row_id, ignore_eos=True))
        found.append(run(executor))
        assert executor.status()["kv_pages_used"] == 0
    assert len({tuple(tokens(events)) for events in found[0].values()}) == 4
    assert [tokens(found[1][row]) for row in range(4)] == [tokens(found[0][row]) for row in range(4)]
    shared = 24 if page_tokens == 4 else 27
    assert [found[1][row][-1].cached_tokens for row in range(4)] == [0, shared, shared, shared]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_prompt_is_reused_after_its_row_was_cancelled(ahead):
    executor, prompt = make(ahead=ahead), [1, 2, 3, 4, 5, 6, 7] * 3
    executor.submit(request(0, prompt, 20, ignore_eos=True))
    run(executor, between=lambda step: executor.cancel(0, "cancelled") if step == 4 else None)
    executor.submit(request(1, prompt, 6))
    events = run(executor)
    assert events[1][-1].cached_tokens == 20
    assert tokens(events[1]) == ContextDecoder().answer(prompt, 6)


@pytest.mark.parametrize("ahead", [False, True])
def test_memory_that_ends_in_the_middle_of_a_batch_fails_its_row_alone(ahead):
    decoder = ContextDecoder()

    def fall(batch, logits):
        if 60 in batch.token_ids.tolist():
            raise torch.OutOfMemoryError("no memory")
        return logits

    decoder.broken = fall
    executor = make(decoder, ahead=ahead)
    for row_id, prompt in enumerate([[1, 2, 3], [4, 60, 5], [6] * 9]):
        executor.submit(request(row_id, prompt, 8))
    events = run(executor)
    assert [type(event) for event in events[1]] == [FailedEvent]
    assert events[1][0].error == "OutOfMemory"
    for row_id, prompt in ((0, [1, 2, 3]), (2, [6] * 9)):
        assert tokens(events[row_id]) == ContextDecoder().answer(prompt, 8)
    assert executor.status()["kv_pages_used"] == 0


def test_prompts_that_no_context_holds_and_empty_ones_are_refused_and_the_others_go_on():
    executor = make()
    executor.submit(request(0, [1, 2, 3], 8))
    with pytest.raises(PromptTooLong, match="100000 prompt tokens"):
        executor.submit(request(1, [1] * 100_000, 8))
    with pytest.raises(InvalidRequest, match="no tokens"):
        executor.submit(request(2, [], 8))
    assert tokens(run(executor)[0]) == ContextDecoder().answer([1, 2, 3], 8)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_cancelled_row_gives_its_pages_back_at_the_next_step(ahead):
    executor = make(ahead=ahead)
    executor.submit(request(0, [1] * 16, 30, ignore_eos=True))
    executor.submit(request(1, [2, 3], 30, ignore_eos=True))
    for _ in range(3):
        executor.step(lambda event: None, lambda: None)
    before = executor.status()["kv_pages_used"]
    executor.cancel(0, "cancelled")
    executor.step(lambda event: None, lambda: None)
    assert executor.status()["kv_pages_used"] <= before - 4
    executor.cancel(1, "cancelled")
    run(executor)
