"""Encoders on several ranks, as real processes: the answers of one, each reading its slices alone, whatever fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miinb import models
from miinb.engine.compute import in_step
from miinb.engine.encode_followers import read_step, write_step
from miinb.engine.encode_queue import Bounds, EncodeQueue, EncodeStep, make_job
from miinb.engine.encoder_inputs import EncoderInputs, Sizes
from miinb.engine.encoder_weights import load_encoder_weights
from miinb.engine.parallel import Group, PeerLost
from miinb.engine.policies import ENCODERS
from miinb.engine.reduction import Reduction
from miinb.engine.weights import weights_bytes
from tests.engine import tiny_encoders
from tests.engine.encoder_rank_process import REQUESTS, answers, request_of
from tests.engine.test_autotp import alone
from tests.engine.test_parallel import run_ranks

SCRIPT = Path(__file__).with_name("encoder_rank_process.py")
#: A head for each of two ranks, at least.
NAMES = [name for name, (_, values) in tiny_encoders.CONFIGS.items() if values.get("num_attention_heads") != 1]
TASKS = [(name, task) for name in ("bert", "electra") for task in tiny_encoders.HEADS if task != "feature-extraction"]
MODELS = [*((name, "feature-extraction") for name in NAMES), *TASKS]
TAGGER = ("bert", "token-classification")
#: Halves that are whole groups of 64 columns: int8 rounds them as one rank does.
WIDE = {"hidden_size": 256, "intermediate_size": 512}
FAULTS = ("memory-0", "memory-1", "ahead-1", "poison-0", "poison-1", "late-1", "nan-1", "parity-1", "death-1")
STEPS = {"max_step_tokens": 32, "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    for name, task in MODELS:
        tiny_encoders.build(name, task, folder / f"{name}-{task}")
    tiny_encoders.build("bert", "fill-mask", folder / "wide-fill-mask", WIDE)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[dict[str, Any]]:
    """What both ranks saw: one pair of processes for all."""
    passes = [f"{folder / f'{name}-{task}'}={task}=none" for name, task in MODELS]
    tagger = f"{folder / 'bert-token-classification'}=token-classification"
    passes += [f"{tagger}={dtype}=" + json.dumps({"dtype": dtype}) for dtype in ("bf16", "int8")]
    passes += [f"{folder / 'wide-fill-mask'}=fill-mask=int8=" + json.dumps({"dtype": "int8"})]
    passes += [f"{tagger}={fault}" for fault in ("graphs", *FAULTS)]
    return run_ranks(folder / "run", "gloo", passes, "29875", script=SCRIPT)


def same(ours: Any, theirs: dict[int, Any], tolerance: float = 1e-5, rows: Any = None) -> None:
    """The answers agree within a part of the largest value, and name the same labels or tokens."""
    for row in range(len(REQUESTS)) if rows is None else rows:
        (values, ids), (wanted, named) = ours[str(row)], theirs[row]
        assert ids == named
        error = np.abs(np.array(values) - np.array(wanted)).max()
        assert error <= tolerance * np.abs(np.array(wanted)).max(), row


def one_rank(folder: Path, name: str, task: str, **fields: Any) -> dict[int, Any]:
    given = {"task": task, "options": STEPS, **fields}
    return answers(alone(folder / f"{name}-{task}", folder / "state", **given))


@pytest.mark.parametrize(("name", "task"), MODELS)
def test_two_ranks_give_the_answers_of_one(pair: list[dict[str, Any]], folder: Path, name: str, task: str) -> None:
    seen = pair[0][f"{name}-{task}={task}=none"]
    wanted = one_rank(folder, name, task)
    assert len(wanted) == len(REQUESTS)
    same(seen["answers"], wanted)
    same(seen["again"], wanted)
    assert seen["plan"]["all-reduce"] == "gloo: asked for"
    assert seen["plan"]["parity"].startswith("passed")


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.03), ("int8", 0.05)])
def test_two_ranks_answer_in_other_dtypes(
    pair: list[dict[str, Any]], folder: Path, dtype: str, tolerance: float
) -> None:
    wanted = one_rank(folder, "bert", "token-classification")
    same(pair[0][f"bert-token-classification=token-classification={dtype}"]["answers"], wanted, tolerance)


def test_two_ranks_round_as_one_does(pair: list[dict[str, Any]], folder: Path) -> None:
    wanted = one_rank(folder, "wide", "fill-mask", dtype="int8")
    same(pair[0]["wide-fill-mask=fill-mask=int8"]["answers"], wanted, 1e-3)


def test_two_ranks_pad_steps_to_the_same_graphs(pair: list[dict[str, Any]], folder: Path) -> None:
    seen = tagged(pair, "graphs")
    same(seen["answers"], one_rank(folder, "bert", "token-classification"))
    assert seen["replays"] == tagged(pair[::-1], "graphs")["replays"] >= 10  # the longest text has no graph


def test_sums_as_linked_gpus_make_them_give_the_same_though_a_rank_fails(folder: Path) -> None:
    """One kernel for a sum and its norm; a rank that fails takes part with plain sums. (Interpreted, so one pass.)"""
    pytest.importorskip("triton")
    passes = [f"{folder / 'bert-token-classification'}=token-classification=memory-1"]
    results = run_ranks(folder / "boards", "boards", passes, "29877", script=SCRIPT)
    (seen, other), wanted = (tagged([one], "memory-1") for one in results), one_rank(folder, *TAGGER)
    same(seen["answers"], wanted)
    same(seen["again"], wanted)
    assert seen["sums"] == other["sums"] > 20


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_reads_its_slices_alone(pair: list[dict[str, Any]], folder: Path, name: str) -> None:
    first, second = (rank[f"{name}-feature-extraction=feature-extraction=none"] for rank in pair)
    model = models.inspect(folder / f"{name}-feature-extraction").serving("feature-extraction")
    assert model.encoder is not None
    weights = ENCODERS[model.family].weights
    split = {
        f"{module.format(i=layer)}.weight": source.split
        for source in weights.values()
        for module in source.modules
        for layer in range(2)
    }
    biases = {
        f"{module.format(i=layer)}.bias"
        for part in ("out", "down")
        for module in weights[part].modules
        for layer in range(2)
    }
    halved = 0
    for tensor, entry in model.tensors.items():
        if tensor in biases:
            assert first["read"][tensor] == entry.elements
            assert tensor not in second["read"], "it is added once"
        elif split.get(tensor):
            assert first["read"][tensor] == second["read"][tensor] == entry.elements // 2, tensor
            halved += 1
    assert halved == 2 * 6
    for rank in range(2):
        loaded = load_encoder_weights(
            model, ENCODERS[model.family], model.encoder, dtype="fp32", device=torch.device("cpu"), rank=rank, ranks=2
        )
        once = rank * 4 * sum(model.tensors[name].elements for name in biases)
        assert weights_bytes(loaded) == model.weights_bytes("fp32", 2) - once


def tagged(pair: list[dict[str, Any]], fault: str) -> Any:
    return pair[0][f"bert-token-classification=token-classification={fault}"]


@pytest.mark.parametrize("fault", ["memory-0", "memory-1", "ahead-1", "late-1"])
def test_a_rank_that_fails_within_a_step_costs_no_answer(pair: list[dict[str, Any]], folder: Path, fault: str) -> None:
    seen, wanted = tagged(pair, fault), one_rank(folder, "bert", "token-classification")
    same(seen["answers"], wanted)
    same(seen["again"], wanted)
    smaller = [warning for warning in seen["warnings"] if "Steps are limited" in warning]
    assert len(smaller) == (fault != "late-1")


@pytest.mark.parametrize("fault", ["poison-0", "poison-1"])
def test_who_makes_a_rank_fail_fails_alone(pair: list[dict[str, Any]], folder: Path, fault: str) -> None:
    seen, wanted = tagged(pair, fault), one_rank(folder, "bert", "token-classification")
    for found in (seen["answers"], seen["again"]):
        assert found["3"] == "MiinbError"
        same(found, wanted, rows=range(3))


def test_nan_on_one_rank_is_told(pair: list[dict[str, Any]]) -> None:
    assert set(tagged(pair, "nan-1")["answers"].values()) == {"NonFinite"}


def test_a_failed_check_of_one_rank_lets_all_fall_back(pair: list[dict[str, Any]], folder: Path) -> None:
    seen = tagged(pair, "parity-1")
    assert seen["plan"]["tensor_parallel"].startswith("2 ranks, DeepSpeed AutoTP")
    assert "differ from their reference on another rank" in seen["warnings"][0]
    same(seen["answers"], one_rank(folder, "bert", "token-classification"))


def test_the_death_of_a_follower_is_told_at_once(pair: list[dict[str, Any]]) -> None:
    seen = tagged(pair, "death-1")
    assert seen["lost"]
    assert seen["lost_s"] < 20
    assert set(seen["answers"].values()) == {"Unavailable"}
    assert "bert-token-classification=token-classification=death-1" not in pair[1]


def test_four_ranks_give_the_answers_of_one(folder: Path) -> None:
    passes = [f"{folder / f'{name}-feature-extraction'}=feature-extraction=none" for name in ("bert", "xlm-roberta")]
    seen = run_ranks(folder / "four", "gloo", passes, "29876", ranks=4, script=SCRIPT)[0]
    for name in ("bert", "xlm-roberta"):
        found = seen[f"{name}-feature-extraction=feature-extraction=none"]
        same(found["answers"], one_rank(folder, name, "feature-extraction"))


@pytest.mark.parametrize("captured", [False, True])
def test_a_rank_that_cannot_end_a_failed_step_is_lost(captured: bool) -> None:
    inputs, told = EncoderInputs(64, torch.device("cpu")), []
    inputs.graphs = [Sizes(32, 32, 8, 32)]
    inputs.write(whole_step(row=0 if captured else 2))
    assert inputs.captured == captured

    def stand_in() -> None:
        raise RuntimeError("nor this")

    with (
        pytest.raises(PeerLost, match="captured" if captured else "could not be ended"),
        in_step(Group(0, 2), captured=lambda: inputs.captured, on_error=told.append, stand_in=stand_in),
    ):
        raise ValueError("a fault")
    assert len(told) == (not captured), "one launch: the others hear of it as the replica ends"


def whole_step(row: int) -> EncodeStep:
    queue = EncodeQueue(Bounds(48, 101, 2, 64))
    queue.jobs = [make_job(request_of(row, "token-classification"), Reduction("token-classification"), queue.bounds)]
    step = queue.next_step()
    assert step is not None
    return step


@pytest.mark.parametrize("typed", [False, True])
def test_a_step_crosses_as_it_is(typed: bool) -> None:
    queue = EncodeQueue(Bounds(48, 101, 3 if typed else 0, 32))
    queue.jobs = [make_job(request_of(row, "fill-mask"), Reduction("fill-mask"), queue.bounds) for row in (0, 1)]
    for number in range(1, 4):
        step = queue.next_step()
        assert step is not None
        told, there = read_step(write_step(number, step))
        assert (told, there.longest, there.type_ids is None) == (number, step.longest, not typed)
        for field in ("token_ids", "lengths", "starts", "rows", *(["type_ids"] if typed else [])):
            np.testing.assert_array_equal(getattr(there, field), getattr(step, field), field)
