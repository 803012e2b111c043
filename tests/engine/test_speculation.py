"""Prompt lookup and slots that are reused, through the real decoder on a CPU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from miinb import models
from miinb.config import EngineOptions, GenerationParams
from miinb.engine.decoder import Decoder, Operators
from miinb.engine.executor import StepExecutor
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.lookup import PromptLookup
from miinb.engine.policies import POLICIES
from miinb.engine.weights import DTYPES, load_weights
from miinb.kernels.cpu import CpuKernels
from miinb.messages import EngineInfo, FinishedEvent, Plan, SequenceRequest, TokensEvent

CPU = torch.device("cpu")
RNG = random.Random(3)
REPETITIVE = [RNG.choices(range(3, 101), k=6) * 6, [7, 8] * 15, [5] * 20]
BIAS = dict.fromkeys((5, 7, 8), 20.0)  # answers of few tokens repeat themselves
RANDOM = [RNG.choices(range(3, 101), k=length) for length in (1, 2, 9, 40)]


@pytest.mark.parametrize(
    ("tokens", "most", "wanted"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 2, [4, 9]),
        ([1, 2, 3, 4, 5, 2, 3, 6, 1, 2, 3], 3, [4, 5, 2]),  # three equal tokens before two later ones
        ([8, 3, 4, 5, 9, 3, 4], 1, [5]),
        ([5, 5, 5], 4, [5, 5, 5, 5]),
        ([1, 2, 1, 2, 1], 5, [2, 1, 2, 1, 2]),
        ([1 << 8, 1, 1 << 8], 3, []),  # equal bytes between two tokens are no equal tokens
        ([1, 2, 3, 4], 3, []),
        ([1], 3, []),
    ],
)
def test_what_followed_the_same_tokens_before_is_proposed(tokens: list[int], most: int, wanted: list[int]) -> None:
    assert PromptLookup().propose(tokens, most) == wanted


def test_a_proposal_is_the_same_whether_the_text_came_at_once_or_token_by_token() -> None:
    text = RNG.choices(range(3), k=200)
    lookup = PromptLookup()
    for end in range(1, len(text)):
        assert lookup.propose(text[:end], 4) == PromptLookup().propose(text[:end], 4)


def load(folder: Path, dtype: str, **options: Any) -> StepExecutor:
    info = models.inspect(folder)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    kernels = CpuKernels(DTYPES[dtype])
    kernels.limit = 1 << 30  # the library alone: it rounds alike in every batch
    ops = Operators(**{name: getattr(kernels, name) for name in Operators._fields})
    decoder = Decoder(spec, load_weights(info, policy, spec, dtype=dtype, device=CPU), ops=ops)
    cache = KVCache(spec, CacheSize(4, 128, 128, 4, 0), DTYPES[dtype], CPU)
    engine = EngineInfo(
        replica=0, model="", task="text-generation", engine="optimized", dtype="", device="cpu",
        vocab_size=spec.vocab_size, max_length=128, max_batch=4, eos_token_ids=(2,), tokenizer_folder="",
        plan=Plan("optimized", "cpu", ""),
    )  # fmt: skip
    return StepExecutor(info=engine, decoder=decoder, cache=cache, options=EngineOptions(**options))


def answers(executor: StepExecutor, prompts: list[list[int]], **params: Any) -> tuple[list[Any], list[FinishedEvent]]:
    """Each prompt's (token, logprob) pairs, and the ends."""
    out: list[list[Any]] = [[] for _ in prompts]
    ends: list[FinishedEvent] = []

    def take(event: object) -> None:
        if isinstance(event, TokensEvent):
            out[event.row_id] += [(entry.token_id, entry.logprob) for entry in event.logprobs]
        elif isinstance(event, FinishedEvent):
            ends.append(event)

    for row, prompt in enumerate(prompts):
        given = GenerationParams.parse({"max_new_tokens": 40, "logprobs": 0, "seed": row} | params)
        executor.submit(SequenceRequest(row, prompt, given, time.monotonic()))
    while executor.busy:
        executor.step(take, lambda: None)
    assert len(ends) == len(prompts)
    return out, ends


@pytest.mark.parametrize(("name", "dtype"), [("llama", "fp32"), ("gpt2", "bf16")])
def test_speculation_is_exact_to_the_bit(tiny: Callable[[str], tuple[Any, Path]], name: str, dtype: str) -> None:
    folder = tiny(name)[1]
    plain = load(folder, dtype, prefix_cache=False)
    guessing = load(folder, dtype, prefix_cache=False, speculative="prompt_lookup")
    accepted = 0
    for params in ({}, {"min_new_tokens": 30, "logit_bias": BIAS}, {"do_sample": True, "logit_bias": BIAS}):
        wanted, _ = answers(plain, REPETITIVE + RANDOM, **params)
        got, ends = answers(guessing, REPETITIVE + RANDOM, **params)
        assert got == wanted
        accepted += sum(end.accepted_tokens for end in ends)
    assert accepted > 50


def test_a_prompt_that_goes_on_from_another_is_answered_as_if_it_were_the_first(
    tiny: Callable[[str], tuple[Any, Path]],
) -> None:
    folder = tiny("llama")[1]
    fresh = load(folder, "fp32", prefix_cache=False)
    reusing = load(folder, "fp32")
    system = RANDOM[3]
    turns = [[*system, 9], [*system, 9, 8, 7], [*system[:30], 4, 4], RANDOM[2], [*system, 9, 8, 7, 6]]
    for prompts in (turns[:1], turns[1:3], turns[3:], turns):
        wanted, _ = answers(fresh, prompts)
        got, ends = answers(reusing, prompts)
        assert [[token for token, _ in row] for row in got] == [[token for token, _ in row] for row in wanted]
    assert sum(end.cached_tokens for end in ends) > 100
