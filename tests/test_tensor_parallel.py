"""A session over two ranks, from end to end: the answers of one, and a life after a rank's death."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import transformers

import miinb
from miinb import Session
from miinb.errors import InvalidValue, Unavailable
from miinb.server.watchdog import IDLE_S
from tests.engine.test_baseline import save_bert

TINY = Path(miinb.__file__).parent / "demo" / "tiny"
ENCODER_OPTIONS = {"all_reduce": "gloo", "threads": 1}
OPTIONS = {**ENCODER_OPTIONS, "speculative": "prompt_lookup"}


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_two_ranks_serve_and_come_back_after_one_was_killed_and_after_one_was_stopped() -> None:
    prompts = ["Once upon a time", "The dog"]
    repetitive = {"max_new_tokens": 40, "ignore_eos": True, "logit_bias": {260: 12.0, 331: 11.0}}
    with Session(TINY, device="cpu", dtype="fp32", max_batch=4) as one:
        greedy = one.generate(prompts, max_new_tokens=24).texts
        repeated = one.generate(prompts[0], **repetitive).text
        drawn = one.generate(prompts, max_new_tokens=16, do_sample=True, temperature=1.5, seed=3).texts
    with Session(TINY, device="cpu", dtype="fp32", max_batch=4, tensor_parallel=2, options=OPTIONS) as two:
        assert [(rank.rank, rank.state) for rank in two.status().ranks] == [(0, "ready"), (1, "ready")]
        assert any("gloo" in line.choice for line in two.plan().lines if line.what == "all-reduce")
        assert two.generate(prompts, max_new_tokens=24).texts == greedy
        assert two.generate(prompts, max_new_tokens=16, do_sample=True, temperature=1.5, seed=3).texts == drawn
        guessed = two.generate(prompts[0], **repetitive)
        assert guessed.text == repeated
        assert guessed.usage.accepted_tokens > 0
        for fault, words in ((signal.SIGKILL, "Rank 1 of replica 0 ended"), (signal.SIGSTOP, "it hangs and is killed")):
            lose_a_follower(two, fault)
            assert words in two.logs(200)
            assert two.generate(prompts, max_new_tokens=24).texts == greedy


@pytest.mark.parametrize("way", ["gloo", pytest.param("shared_memory", marks=pytest.mark.slow)])
def test_two_deployments_of_two_ranks_at_once_do_not_mix(way: str) -> None:
    """DeepSpeed names its shared memory after an address and a port: each replica of each deployment has its own."""
    prompts = [f"The {animal}" for animal in ("dog", "cat", "bird", "fox", "bear", "mouse")]
    options = {"all_reduce": way, "threads": 1}
    with Session(TINY, device="cpu", dtype="fp32", max_batch=4) as one:
        alone = [one.generate(prompt, max_new_tokens=24).text for prompt in prompts]
    start = partial(Session, TINY, device="cpu", dtype="fp32", max_batch=4, tensor_parallel=2, options=options)
    with start() as first, start() as second, ThreadPoolExecutor(2) as pool:
        for session in (first, second):
            line = next(line for line in session.plan().lines if line.what == "all-reduce")
            assert way.replace("_", " ") in line.choice, line
        for _ in range(3):
            asked = [(session, prompt) for prompt in prompts for session in (first, second)]
            texts = list(pool.map(lambda pair: pair[0].generate(pair[1], max_new_tokens=24).text, asked))
            assert texts[0::2] == alone
            assert texts[1::2] == alone
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"))


def lose_a_follower(two: Session, fault: signal.Signals) -> None:
    """Its requests fail, at the latest when the watchdog says so, and other ranks come."""
    before = {rank.pid for rank in two.status().ranks}
    stream = two.stream("Once", max_new_tokens=400, ignore_eos=True)
    next(stream)
    began = time.monotonic()
    os.kill(max(two.status().ranks, key=lambda rank: rank.rank).pid, fault)
    with pytest.raises(Unavailable):
        list(stream)
    assert time.monotonic() - began < IDLE_S + 20
    _await_others(two, before)


def _await_others(two: Session, before: set[int]) -> None:
    """Until other ranks than those serve."""
    deadline = time.monotonic() + 120
    while True:
        status = two.status()  # one look: the state before a death goes with ranks after it nowhere
        if status.state == "ready" and status.ranks and not before & {rank.pid for rank in status.ranks}:
            break
        assert time.monotonic() < deadline, two.logs()
        time.sleep(0.2)
    assert not any(psutil.pid_exists(pid) for pid in before)


def test_two_ranks_of_an_encoder_serve_and_come_back(tmp_path: Path) -> None:
    folder = save_bert(transformers.BertForMaskedLM, tmp_path)
    texts = ["deep [MASK] is great", "[MASK] is"]
    with Session(folder, device="cpu", dtype="fp32") as one:
        wanted = one.predict(texts, top_k=3)
    with Session(folder, device="cpu", dtype="fp32", tensor_parallel=2, options=ENCODER_OPTIONS) as two:
        lines = {line.what: f"{line.choice}: {line.reason}" for line in two.plan().lines}
        assert lines["engine"].startswith("optimized")
        assert lines["tensor_parallel"].startswith("2 ranks: 1 of 2 attention heads each")
        _check_fills(two.predict(texts, top_k=3), wanted)
        before = {rank.pid for rank in two.status().ranks}
        os.kill(max(two.status().ranks, key=lambda rank: rank.rank).pid, signal.SIGKILL)
        _await_others(two, before)
        assert "Rank 1 of replica 0 ended" in two.logs(200)
        _check_fills(two.predict(texts, top_k=3), wanted)


def _check_fills(found: Any, wanted: Any) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert [fill.token for fill in ours] == [fill.token for fill in theirs]
        assert [fill.score for fill in ours] == pytest.approx([fill.score for fill in theirs], rel=1e-4)


def test_what_does_not_divide_is_refused_before_anything_starts() -> None:
    with pytest.raises(InvalidValue, match="4 attention heads") as caught:
        Session(TINY, device="cpu", tensor_parallel=3)
    assert "1, 2, 4" in caught.value.hint


@pytest.mark.slow
def test_transformers_models_are_split_by_autotp_and_come_back_as_well() -> None:
    plain = {"device": "cpu", "dtype": "fp32", "max_batch": 4, "engine": "baseline"}
    options = {"all_reduce": "gloo", "threads": 1}
    prompts = ["Once upon a time", "The dog"]
    with Session(TINY, **plain) as one:
        greedy = one.generate(prompts, max_new_tokens=24).texts
        drawn = one.generate(prompts, max_new_tokens=16, do_sample=True, temperature=1.5, seed=3).texts
    with Session(TINY, **plain, tensor_parallel=2, options=options) as two:
        assert "2 ranks, DeepSpeed AutoTP" in str(two.plan())
        assert two.generate(prompts, max_new_tokens=24).texts == greedy
        assert two.generate(prompts, max_new_tokens=16, do_sample=True, temperature=1.5, seed=3).texts == drawn
        stream = two.stream("Once", max_new_tokens=400, ignore_eos=True)
        next(stream)
        stream.cancel()
        assert two.generate(prompts, max_new_tokens=24).texts == greedy
        for fault, words in ((signal.SIGKILL, "Rank 1 of replica 0 ended"), (signal.SIGSTOP, "it hangs and is killed")):
            lose_a_follower(two, fault)
            assert words in two.logs(200)
            assert two.generate(prompts, max_new_tokens=24).texts == greedy
