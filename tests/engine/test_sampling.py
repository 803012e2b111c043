"""Sampling against transformers' logits processors, and the promise that a row draws alike in any batch."""

from __future__ import annotations

import pytest
import torch

from miinb.config import GenerationParams
from miinb.engine import sampling
from miinb.engine.rows import Row
from miinb.engine.sampling import Landing, Needs, Sampler, read_logprobs
from miinb.kernels import reference, sample_cpu
from miinb.messages import SequenceRequest

transformers = pytest.importorskip("transformers")

VOCAB = 97
EOS = 5


def row(slot: int, prompt: list[int], new: list[int], **params) -> Row:
    made = Row(
        SequenceRequest(slot, prompt, GenerationParams(**({"seed": 7} | params)), 0.0), slot, frozenset({EOS, EOS + 1})
    )
    made.token_ids += new
    made.length = len(made.token_ids) + 1  # the scheduler counts the token to come
    made.slot = slot
    return made


def choose(rows: list[Row], logits: torch.Tensor, sampler: Sampler | None = None):
    sampler = sampler or Sampler(8, VOCAB, torch.device("cpu"))
    for one in rows:
        sampler.admit(one)
    slots = torch.tensor([one.slot for one in rows])
    lengths = [one.length - 1 for one in rows]
    return sampler.choose(logits, rows, lengths, torch.tensor(lengths), slots, sampler.needs(rows))


def reference_scores(one: Row, logits: torch.Tensor) -> torch.Tensor:
    """What transformers makes of one row's logits."""
    params = one.request.params
    processors = transformers.LogitsProcessorList()
    if params.logit_bias:
        bias = {(token,): value for token, value in params.logit_bias.items()}
        processors.append(transformers.SequenceBiasLogitsProcessor(bias))
    if params.repetition_penalty != 1.0:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_new_tokens:
        processors.append(
            transformers.MinNewTokensLengthLogitsProcessor(one.prompt_tokens, params.min_new_tokens, sorted(one.eos))
        )
    if params.do_sample:
        processors.append(transformers.TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            processors.append(transformers.TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            processors.append(transformers.TopPLogitsWarper(params.top_p))
        if params.min_p:
            processors.append(transformers.MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([one.token_ids]), logits[None].float().clone())[0]


GREEDY = [
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"logit_bias": {3: 4.5, 9: -6.0}},
    {"min_new_tokens": 4},
    {"repetition_penalty": 1.3, "logit_bias": {4: 3.0}, "min_new_tokens": 9},
]
SAMPLED = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.6, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2, "min_new_tokens": 7},
]


def test_greedy_rows_equal_transformers_alone_and_together():
    torch.manual_seed(0)
    rows = [row(i, [1, 2, 3, 40 + i], [10, 3], **params) for i, params in enumerate(GREEDY)]
    logits = torch.randn(len(rows), VOCAB) * 2
    logits[:, EOS] = 5.0  # the ban on ending must show
    together = choose(rows, logits).token_ids.tolist()
    for i, one in enumerate(rows):
        wanted = int(reference_scores(one, logits[i]).argmax())
        assert together[i] == wanted
        assert choose([one], logits[i : i + 1]).token_ids.tolist() == [wanted]


@pytest.mark.parametrize("params", SAMPLED)
def test_draws_have_the_distribution_of_transformers(params):
    torch.manual_seed(1)
    logits = torch.randn(VOCAB) * 2
    draws = 500
    sampler = Sampler(draws, VOCAB, torch.device("cpu"))
    rows = [row(i, [1, 2, 3], [4], do_sample=True, **params | {"seed": i}) for i in range(draws)]
    chosen = choose(rows, logits.expand(draws, -1), sampler).token_ids
    probabilities = reference_scores(rows[0], logits).softmax(-1)
    assert chi_square(chosen, probabilities) > 1e-3


def chi_square(chosen: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The p-value of drawn tokens under their probabilities; rare tokens count as one, impossible ones fail."""
    assert probabilities[chosen].min() > 0  # only tokens that transformers keeps
    seen = torch.bincount(chosen, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(chosen)
    rare = expected < 5
    seen = torch.cat((seen[~rare], seen[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    seen, expected = seen[expected > 0], expected[expected > 0]
    statistic = float(((seen - expected) ** 2 / expected).sum())
    if len(seen) == 1:
        return 1.0
    half = torch.tensor([(len(seen) - 1) / 2]).double()
    return float(torch.special.gammaincc(half, torch.tensor([statistic / 2]).double()))


@pytest.mark.parametrize("seed", range(8))
def test_random_parameters_leave_the_scores_of_transformers(seed, monkeypatch):
    """Of 1500 draws, only tokens that transformers' processors keep come, as often as they say."""
    monkeypatch.setattr(sampling, "sample", reference.sample)  # all rows at once
    random = torch.Generator().manual_seed(seed)

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=random))

    def some(count: int) -> list[int]:
        return torch.randint(0, VOCAB, (count,), generator=random).tolist()

    params = {
        "temperature": number(0.4, 2.0),
        "top_k": int(number(0, 40)),
        "top_p": number(0.3, 1.0),
        "min_p": number(0.0, 0.1),
        "repetition_penalty": number(0.6, 1.8),
        "logit_bias": {token: number(-4, 4) for token in some(5)},
        "min_new_tokens": int(number(0, 6)),
    }
    prompt, new = some(6), some(2)
    logits = torch.randn(VOCAB, generator=random) * 2
    draws = 1500
    sampler = Sampler(draws, VOCAB, torch.device("cpu"))
    rows = [row(i, prompt, new, do_sample=True, **params | {"seed": 10_000 * seed + i}) for i in range(draws)]
    wanted = reference_scores(rows[0], logits)
    chosen = choose(rows, logits.expand(draws, -1), sampler).token_ids
    assert chi_square(chosen, wanted.softmax(-1)) > 1e-3
    greedy_row = row(0, prompt, new, **{key: params[key] for key in ("repetition_penalty", "logit_bias")})
    wanted = reference_scores(greedy_row, logits)
    assert choose([greedy_row], logits[None]).token_ids.tolist() == [int(wanted.argmax())]


@pytest.mark.parametrize("presence", [-1.0, 0.0, 1.5])
@pytest.mark.parametrize("frequency", [-0.5, 0.0, 0.7])
def test_presence_and_frequency_are_subtracted_as_defined(presence, frequency):
    """logit - frequency * count - presence * (count > 0), counts of the new tokens (OpenAI's definition)."""
    torch.manual_seed(5)
    logits = torch.randn(1, VOCAB)
    new = [3, 3, 3, 9, 11, 11]
    one = row(0, [9, 20], new, presence_penalty=presence, frequency_penalty=frequency)
    wanted = logits[0].clone()
    for token in set(new):
        wanted[token] -= frequency * new.count(token) + presence
    sampler = Sampler(2, VOCAB, torch.device("cpu"))
    sampler.admit(one)
    scores = logits.clone()
    sampler._penalize(scores, torch.tensor([0]))
    torch.testing.assert_close(scores[0], wanted)


CASES = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "top-k": {"top_k": 6},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "all": {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("draw", [reference.sample, sample_cpu.sample], ids=["reference", "cpu"])
def test_operators_draw_by_the_distribution(draw, case):
    draws = 4000 if draw is reference.sample else 300  # row by row
    vocab, params = 23, CASES[case]
    torch.manual_seed(11)
    logits = torch.randn(vocab) * 1.5
    seeds, places = torch.arange(draws) % 40, torch.arange(draws) // 40  # both make the noise
    columns = [
        torch.full((draws,), params.get(name, default))
        for name, default in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    ]
    chosen, finite = draw(logits.expand(draws, -1).contiguous(), seeds, places, *columns)
    assert bool(finite.all())
    one = row(0, [1], [], do_sample=True, **params)
    assert chi_square(chosen, reference_scores(one, logits).softmax(-1)) > 1e-3


def test_a_draw_depends_on_seed_and_position_only():
    torch.manual_seed(2)
    logits = torch.randn(4, VOCAB)
    rows = [
        row(0, [1, 2], [], do_sample=True, seed=11),
        row(1, [1, 2, 3], [], do_sample=True, seed=11),
        row(2, [1, 2], [], do_sample=True, seed=12, top_k=9),
        row(3, [1, 2], []),
    ]
    together = choose(rows, logits).token_ids.tolist()
    alone = [choose([one], logits[i : i + 1]).token_ids.item() for i, one in enumerate(rows)]
    assert together == alone
    assert choose(rows[::-1], logits.flip(0)).token_ids.tolist() == alone[::-1]
    assert alone[3] == int(logits[3].argmax())

    def draw(seed: int, length: int) -> int:
        return choose([row(0, [9] * length, [], do_sample=True, seed=seed)], logits[:1]).token_ids.item()

    assert len({draw(seed, 3) for seed in range(20)}) > 5
    assert len({draw(11, length) for length in range(1, 20)}) > 5


def test_presence_and_frequency_count_new_tokens_only_and_as_they_come():
    logits = torch.zeros(1, VOCAB)
    logits[0, 20], logits[0, 21], logits[0, 22] = 3.0, 2.0, 1.5
    one = row(0, [20, 21, 22], [20], presence_penalty=0.4, frequency_penalty=0.5)
    sampler = Sampler(2, VOCAB, torch.device("cpu"))
    sampler.admit(one)
    picked = []
    for _ in range(4):
        length = one.length - 1
        chosen = sampler.choose(
            logits, [one], [length], torch.tensor([length]), torch.tensor([0]), sampler.needs([one])
        )
        picked.append(int(chosen.token_ids))
        one.token_ids.append(picked[-1])
        one.length += 1
    # 20 starts at 3.0 - 0.9; then the largest of what the counts leave
    assert picked == [20, 21, 20, 22]


def test_a_row_that_is_not_finite_is_flagged_alone():
    rows = [row(0, [1], []), row(1, [1], [], do_sample=True), row(2, [1], []), row(3, [1], [])]
    logits = torch.randn(4, VOCAB)
    logits[1, 4] = torch.nan
    logits[2, 4] = torch.inf
    assert choose(rows, logits).finite.tolist() == [True, False, False, True]
    greedy_rows = [rows[0], rows[2], rows[3]]
    assert choose(greedy_rows, logits[[0, 1, 3]]).finite.tolist() == [True, False, True]


def test_logprobs_are_the_model_s_own():
    torch.manual_seed(3)
    logits = torch.randn(3, VOCAB)
    rows = [
        row(0, [1], [], logprobs=2, repetition_penalty=1.5),
        row(1, [1], []),
        row(2, [1], [], logprobs=0, do_sample=True),
    ]
    chosen = choose(rows, logits)
    found = read_logprobs(chosen, rows)
    wanted = logits.log_softmax(-1)
    assert set(found) == {0, 2}
    assert found[0].logprob == pytest.approx(wanted[0, found[0].token_id].item())
    assert [token_id for token_id, _ in found[0].top] == wanted[0].topk(2).indices.tolist()
    assert found[2].top == ()


def test_a_row_that_comes_back_after_preemption_is_counted_anew():
    logits = torch.zeros(1, VOCAB)
    logits[0, 20], logits[0, 21] = 1.0, 0.9
    sampler = Sampler(2, VOCAB, torch.device("cpu"))
    first = row(0, [1], [20, 20], frequency_penalty=2.0)
    other = row(0, [1], [], frequency_penalty=2.0)
    assert choose([first], logits, sampler).token_ids.item() == 21
    assert choose([other], logits, sampler).token_ids.item() == 20


def test_greedy_rows_need_nothing():
    sampler = Sampler(2, VOCAB, torch.device("cpu"))
    one = row(0, [1], [])
    sampler.admit(one)
    assert sampler.needs([one]) == Needs.NOTHING


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    device = torch.device("cuda", 0)
    sampler, landing = Sampler(8, VOCAB, device), Landing(8, device)
    rows = [
        row(0, [1, 2], [3], repetition_penalty=1.2, frequency_penalty=0.5, logprobs=3, min_new_tokens=4),
        row(1, [4], [], do_sample=True, top_k=7, top_p=0.8, logit_bias={4: 1.0}),
    ]
    logits = torch.randn(2, VOCAB, device=device)
    positions, slots = torch.tensor([3, 1], device=device), torch.tensor([0, 1], device=device)

    def step(rows):
        for one in rows:
            sampler.admit(one)
        return landing.receive(sampler.choose(logits, rows, [3, 1], positions, slots, sampler.needs(rows)))

    step(rows)  # compiles, and makes the counters
    others = [row(0, [7, 8], [9], presence_penalty=0.2, logprobs=5), row(1, [6], [], do_sample=True, top_p=0.5)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = step(others)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    found = read_logprobs(chosen, others)
    wanted = logits.log_softmax(-1)[0].topk(5)
    assert [token for token, _ in found[0].top] == wanted.indices.tolist()
    assert found[0].logprob == pytest.approx(float(logits.log_softmax(-1)[0, found[0].token_id]), abs=1e-5)
