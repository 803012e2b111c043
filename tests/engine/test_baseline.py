"""The baseline executors against transformers called by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers

from miinb.config import DeploymentConfig, GenerationParams
from miinb.engine import caches
from miinb.engine.baseline import BatchExecutor, load_baseline
from miinb.engine.caches import measure_caches
from miinb.errors import InvalidRequest, MissingHead, PromptTooLong, QueueFull, UnsupportedModel
from miinb.messages import (
    EncodeRequest,
    EngineInfo,
    FailedEvent,
    FinishedEvent,
    Plan,
    SequenceRequest,
    TokensEvent,
)
from miinb.models import inspect

VOCAB = 120
EOS = 2
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "deep",
    "speed",
    "is",
    "the",
    "great",
    "##est",
    "a",
    "model",
    ".",
]


def save_bert(cls, folder: Path, **config) -> Path:
    torch.manual_seed(0)
    cls(
        transformers.BertConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            **config,
        )
    ).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def info_of(task: str = "text-generation", **changes) -> EngineInfo:
    values = {
        "replica": 0, "model": "m", "task": task, "engine": "baseline", "dtype": "fp32", "device": "cpu",
        "vocab_size": VOCAB, "max_length": 64, "max_batch": 4, "eos_token_ids": (EOS,), "tokenizer_folder": "",
        "plan": Plan("baseline", "cpu", "fp32"),
    }  # fmt: skip
    return EngineInfo(**(values | changes))


def load(folder: Path, task: str = "text-generation", config: dict | None = None, **changes):
    settings = DeploymentConfig.parse({"model": str(folder), "task": task, "engine": "baseline", **(config or {})})
    phases: list = []
    executor = load_baseline(inspect(folder), settings, info_of(task, **changes), phases.append)
    assert [phase.name for phase in phases][:2] == ["load", "load"]
    return executor


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            eos_token_id=EOS,
        )
    )
    with torch.no_grad():
        model.lm_head.weight *= 40  # far from ties, so that padding cannot turn a choice
    model.generation_config.temperature = 0.3  # what a checkpoint brings must not act unasked
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def executor(llama) -> BatchExecutor:
    return load(llama)


def request(row_id: int, prompt: list[int], new: int = 6, **params) -> SequenceRequest:
    return SequenceRequest(
        row_id, prompt, GenerationParams(**({"seed": 1, "max_new_tokens": new} | params)), time.monotonic()
    )


def run(executor, poll=lambda: None) -> dict[int, list]:
    events: dict[int, list] = {}
    for _ in range(100):
        if not executor.busy:
            return events
        executor.step(lambda event: events.setdefault(event.row_id, []).append(event), poll)
    pytest.fail("the executor does not come to an end")


def tokens(events: list) -> list[int]:
    return [token for event in events if isinstance(event, TokensEvent) for token in event.token_ids]


PROMPTS = [[5, 6, 7, 8], [9] * 11, [3]]


def test_greedy_rows_equal_transformers_in_one_batch(llama, executor):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    for row_id, prompt in enumerate(PROMPTS):
        executor.submit(request(row_id, prompt, 8 + row_id))
    events = run(executor)
    assert executor.status()["batches"] == 1
    for row_id, prompt in enumerate(PROMPTS):
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=8 + row_id, do_sample=False, eos_token_id=EOS, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert tokens(events[row_id]) == wanted
        end = events[row_id][-1]
        assert isinstance(end, FinishedEvent)
        assert end.finish_reason == ("stop" if wanted[-1] == EOS else "length")
        assert (end.prompt_tokens, end.output_tokens) == (len(prompt), len(wanted))


@pytest.mark.parametrize(("ignore_eos", "batches"), [(True, 1), (False, 3)])
def test_a_load_of_many_lengths_shares_its_batches(executor, ignore_eos, batches):
    for row_id, prompt in enumerate(PROMPTS):  # as a benchmark asks for exact lengths
        executor.submit(request(row_id, prompt, 4 + row_id, min_new_tokens=4 + row_id, ignore_eos=ignore_eos))
    events = run(executor)
    assert executor.status()["batches"] == batches  # where a row may end by itself, its least length is its own
    assert [len(tokens(events[row_id])) for row_id in range(3)] == [4, 5, 6]


def test_draws_depend_on_the_seed_and_not_on_the_batch(executor):
    params = {"do_sample": True, "temperature": 40.0, "top_k": 50, "ignore_eos": True}
    alone = []
    for row_id, prompt in enumerate(PROMPTS):
        executor.submit(request(row_id, prompt, 9, **params, seed=row_id))
        alone.append(tokens(run(executor)[row_id]))
    for row_id, prompt in enumerate(PROMPTS):
        executor.submit(request(row_id, prompt, 9, **params, seed=row_id))
    events = run(executor)
    assert executor.status()["batches"] == 4
    assert [tokens(events[row_id]) for row_id in range(3)] == alone
    executor.submit(request(0, PROMPTS[0], 9, **params, seed=77))
    assert tokens(run(executor)[0]) != alone[0]


def test_parameters_act_as_in_transformers(llama, executor):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    params = {"repetition_penalty": 1.8, "min_new_tokens": 4}
    executor.submit(request(0, PROMPTS[0], 9, **params, logprobs=3))
    executor.submit(request(1, PROMPTS[0], 9, presence_penalty=2.0, frequency_penalty=1.0, logit_bias={7: 1e4}))
    executor.submit(request(2, PROMPTS[0], 2, eos_token_id=list(range(VOCAB))))
    events = run(executor)
    wanted = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=9, do_sample=False, eos_token_id=EOS, pad_token_id=0, **params
    )
    assert tokens(events[0]) == wanted[0, len(PROMPTS[0]) :].tolist()
    first = events[0][0].logprobs[0]
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(-1)
    assert [token for token, _ in first.top] == logits.topk(3).indices.tolist()
    assert first.logprob == pytest.approx(float(logits[first.token_id]), abs=1e-4)
    assert set(tokens(events[1])) == {7}
    assert len(tokens(events[2])) == 1
    assert events[2][-1].finish_reason == "stop"


def test_cancels_are_heard_between_steps_and_the_others_go_on(executor):
    executor.submit(request(0, PROMPTS[0], 40, ignore_eos=True))
    executor.submit(request(1, PROMPTS[1], 12, ignore_eos=True))
    executor.submit(request(2, PROMPTS[1], 12, do_sample=True))
    polls = []

    def poll():
        polls.append(1)
        if len(polls) == 3:
            executor.cancel(0, "cancelled")
            executor.cancel(2, "cancelled")

    events = run(executor, poll)
    assert events[0][-1].finish_reason == "cancelled"
    assert len(tokens(events[0])) == 3
    assert len(tokens(events[1])) == 12
    assert len(polls) == 12  # the batch ended with its last living row
    assert [type(event) for event in events[2]] == [FinishedEvent]


def test_rows_that_cannot_be_served_fail_alone(executor):
    with pytest.raises(PromptTooLong):
        executor.submit(request(0, [5] * 60, 20))
    with pytest.raises(InvalidRequest):
        executor.submit(request(0, [VOCAB], 2))
    with pytest.raises(InvalidRequest, match="serves text-generation"):
        executor.encode(EncodeRequest(0, [5], [1], 0.0))
    late = SequenceRequest(1, [5], GenerationParams(max_new_tokens=1), 0.0, deadline=time.monotonic() - 1)
    executor.submit(late)
    executor.submit(request(2, [5], 1))
    events = run(executor)
    assert isinstance(events[1][0], FailedEvent)
    assert events[1][0].error == "DeadlineExceeded"
    assert isinstance(events[2][-1], FinishedEvent)


def test_nan_and_exceptions_end_their_rows_only(llama, executor):
    with torch.no_grad():
        executor.model.model.embed_tokens.weight[13] = torch.nan
    executor.submit(request(0, [5, 13], 4))
    executor.submit(request(1, [5, 6], 4, ignore_eos=True))
    events = run(executor)
    assert [event.error for event in events[0]] == ["NonFinite"]
    assert len(tokens(events[1])) == 4
    handle = executor.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("at /root/x")))
    executor.submit(request(2, [5], 4))
    failed = run(executor)[2][0]
    assert isinstance(failed, FailedEvent)
    assert "/root" not in failed.message
    handle.remove()
    executor.submit(request(3, [5], 4))
    assert isinstance(run(executor)[3][-1], FinishedEvent)


def test_a_full_queue_refuses(llama):
    executor = load(llama, config={"options": {"max_queue": 1}})
    executor.submit(request(0, [5], 1))
    with pytest.raises(QueueFull):
        executor.submit(request(1, [5], 1))
    executor.cancel(0, "cancelled")
    executor.submit(request(1, [5], 1))
    assert set(run(executor)) == {0, 1}


@pytest.mark.parametrize(
    "params",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": -1.0, "early_stopping": True},
        {"num_beams": 2, "repetition_penalty": 1.4, "min_new_tokens": 5},
    ],
)
def test_beam_search_is_transformers_own(llama, executor, params):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    eos = [EOS, *range(90, VOCAB)]  # likely enough to end some beams
    n = params.get("num_return_sequences", 1)
    for place, prompt in enumerate(PROMPTS):
        for index in range(n):
            request_ = request(place * n + index, prompt, 12, **params, eos_token_id=eos)
            executor.submit(dataclasses.replace(request_, index=index))
    events, reasons = run(executor), set()
    for place, prompt in enumerate(PROMPTS):
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0, **params
        )
        for index in range(n):
            got = events[place * n + index]
            answer = wanted[index, len(prompt) :].tolist()
            ends = [i for i, token in enumerate(answer) if token in eos]
            assert tokens(got) == (answer[: ends[0] + 1] if ends else answer)
            assert got[-1].finish_reason == ("stop" if ends else "length")
            reasons.add(got[-1].finish_reason)
    assert "stop" in reasons


def test_a_beam_search_is_cancelled_and_its_nan_is_told(executor):
    executor.submit(request(0, PROMPTS[0], 40, num_beams=2, ignore_eos=True))
    polls = []

    def poll():
        polls.append(1)
        if len(polls) == 3:
            executor.cancel(0, "cancelled")

    events = run(executor, poll)
    assert [event.finish_reason for event in events[0]] == ["cancelled"]
    assert len(polls) == 3
    with torch.no_grad():
        executor.model.model.embed_tokens.weight[13] = torch.nan
    executor.submit(request(1, [5, 13], 4, num_beams=2))
    assert [event.error for event in run(executor)[1]] == ["NonFinite"]


def test_a_static_cache_gives_the_same_tokens(llama, executor):
    static = BatchExecutor(executor.model, executor.info, max_queue=8, cache="static cache")
    answers = []
    for one in (executor, static):
        for row_id, prompt in enumerate(PROMPTS):
            one.submit(request(row_id, prompt, 10, ignore_eos=True))
        events = run(one)
        answers.append([tokens(events[row_id]) for row_id in range(3)])
    assert answers[0] == answers[1]


def test_the_best_cache_is_measured_and_a_failing_one_left_out(llama, monkeypatch):
    monkeypatch.delitem(caches.CACHES, "static cache, compiled")
    monkeypatch.setitem(caches.CACHES, "static cache", {"cache_implementation": "no such cache"})
    executor = load(llama, config={"options": {"compile": True}})
    assert executor.cache == "dynamic cache"
    (line,) = [line for line in executor.info.plan.lines if line.what == "cache"]
    assert "static cache failed (ValueError)" in line.reason


@pytest.mark.slow
def test_the_compiled_cache_runs(llama, executor):
    times = measure_caches(executor.model, VOCAB, 64)
    assert all(not time.reason for time in times.values()), times


@pytest.mark.parametrize(("step", "batch"), [(1, 1), (4, 1), (4, 2)])
def test_a_cache_that_fails_while_serving_is_left_without_a_failed_request(llama, executor, monkeypatch, step, batch):
    static = BatchExecutor(executor.model, executor.info, max_queue=8, cache="static cache")
    drawn = {"do_sample": True, "temperature": 1.5, "ignore_eos": True}
    for row in range(batch):
        executor.submit(request(row, PROMPTS[row], 8, seed=row, **drawn))
        static.submit(request(row, PROMPTS[row], 8, seed=row, **drawn))
    steps = []

    def breaks(*_):
        steps.append(0)
        if len(steps) == step:
            raise RuntimeError("no such cache")

    hook = executor.model.register_forward_pre_hook(breaks)
    got = run(static)
    hook.remove()
    wanted = run(executor)
    for row in range(batch):
        assert tokens(got[row]) == tokens(wanted[row])
        assert got[row][-1].finish_reason == "length"
    assert static.cache == static.batch_cache == "dynamic cache"
    assert "The static cache failed on a batch" in static.info.plan.warnings[0]
    assert static.info.plan.lines[-1].choice == "dynamic cache"


def test_dummy_weights_need_no_checkpoint(llama, tmp_path):
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    config = DeploymentConfig.parse({"model": str(tmp_path), "engine": "baseline", "load_format": "dummy"})
    executor = load_baseline(inspect(tmp_path, load_format="dummy"), config, info_of(), lambda phase: None)
    executor.submit(request(0, [5, 6], 3, ignore_eos=True))
    assert len(tokens(run(executor)[0])) == 3


def test_a_soft_cap_is_not_left_out(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": 5.0}))
    config = DeploymentConfig.parse({"model": str(tmp_path), "engine": "baseline", "load_format": "dummy"})
    executor = load_baseline(inspect(tmp_path, load_format="dummy"), config, info_of(), lambda phase: None)
    assert "attention eager" in executor.info.plan.lines[0].reason  # sdpa has no cap, and old transformers take it


def test_what_transformers_cannot_make_is_the_model_s_fault(llama, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "odd", "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"cannot make the model of .*odd"):
        load_baseline(
            inspect(folder),
            DeploymentConfig(model=str(folder), engine="baseline"),
            info_of("text-generation"),
            lambda phase: None,
        )


def test_a_missing_head_or_task_is_named(tmp_path):
    folder = save_bert(transformers.BertModel, tmp_path)
    with pytest.raises(MissingHead, match="classifier"):
        load_baseline(
            inspect(folder),
            DeploymentConfig(model=str(folder), engine="baseline"),
            info_of("text-classification"),
            lambda phase: None,
        )
    with pytest.raises((UnsupportedModel, MissingHead)):
        load_baseline(
            inspect(folder),
            DeploymentConfig(model=str(folder), engine="baseline"),
            info_of("question-answering"),
            lambda phase: None,
        )
