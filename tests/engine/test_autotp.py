"""DeepSpeed's AutoTP on two ranks, as two real processes: the answers of one, whatever fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from miinb import splitting
from miinb.config import DeploymentConfig
from miinb.engine.loading import load_executor
from miinb.engine.tokenizer_files import _stand_in
from tests.engine.autotp_process import REQUESTS, answers, predictions
from tests.engine.test_baseline import save_bert

SCRIPT = Path(__file__).with_name("autotp_process.py")
BASE = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WINDOW = BASE | {"head_dim": 12, "sliding_window": 8}
OTHER_NAMES: dict[str, dict[str, Any]] = {
    "mpt": {"n_layers": 2, "d_model": 48, "n_heads": 4, "max_seq_len": 128},
    "codegen": {"n_layer": 2, "n_embd": 48, "n_head": 8, "rotary_dim": 4, "n_positions": 128},
    "gptj": {"n_layer": 2, "n_embd": 48, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
    "gpt_neo": BASE
    | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 7},
    "opt": BASE | {"ffn_dim": 72, "word_embed_proj_dim": 48},
    "xglm": {"d_model": 48, "ffn_dim": 72, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128},
    "falcon": BASE | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "cohere2": WINDOW,
    "stablelm": BASE | {"partial_rotary_factor": 0.5},
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "glm", "glm4"), WINDOW),
}
#: What every suite runs; the other families are slow.
USUAL = ("olmo", "granite", "mpt", "llama")


def save(family: str, folder: Path, **changes: Any) -> None:
    """A tiny model with random weights, far from ties, and a tokenizer."""
    torch.manual_seed(3)
    values = OTHER_NAMES.get(family, BASE) | {"vocab_size": 101, "tie_word_embeddings": False} | changes
    config = transformers.AutoConfig.for_model(family, **values, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    _stand_in(101, folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")


def run_ranks(folder: Path, passes: list[str], port: str, limit_s: float = 200) -> list[dict[str, Any]]:
    """What both ranks saw of every pass."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder), *passes],
            env=env | {"PYTHONPATH": str(SCRIPT.parents[2])},
            stderr=(folder / f"rank-{rank}.log").open("w"),
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    logs = [folder / f"rank-{rank}.log" for rank in range(2)]
    try:
        processes[0].wait(limit_s)
        processes[1].wait(20)
    except subprocess.TimeoutExpired:
        pytest.fail("the ranks hang:\n" + "\n".join(log.read_text()[-1500:] for log in logs))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 0, "\n".join(log.read_text()[-3000:] for log in logs)
    seen = [folder / f"rank-{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in seen]


def alone(folder: Path, state: Path, **fields: Any) -> Any:
    """The executor of one rank."""
    state.mkdir(exist_ok=True)
    given = {"model": str(folder), "device": "cpu", "options": {"threads": 1}} | fields
    return load_executor(
        DeploymentConfig.parse(given), replica=0, rank=0, gpus=None, folder=state, report=lambda phase: None
    )


BASELINE = {"engine": "baseline", "options": {"all_reduce": "gloo", "threads": 1}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autotp")
    for family in USUAL:
        save(family, folder / family)
    (folder / "bert").mkdir()
    save_bert(transformers.BertForSequenceClassification, folder / "bert", num_labels=3)
    return folder


@pytest.fixture(scope="module")
def pair(folders: Path) -> list[dict[str, Any]]:
    """What both ranks saw: one pair of processes for all."""
    given = json.dumps(BASELINE)
    passes = [f"{folders / 'olmo'}=none", f"{folders / 'granite'}=none", f"{folders / 'mpt'}=none"]
    passes += [f"{folders / 'llama'}=none={given}", f"{folders / 'bert'}=none={given}"]
    passes += [f"{folders / 'llama'}=parity"]  # the optimized engine, until its check fails
    passes += [f"{folders / 'olmo'}={fault}" for fault in ("all", "lead", "death")]
    return run_ranks(folders / "run", passes, "29873")


@pytest.mark.parametrize("family", USUAL)
def test_two_ranks_give_the_answers_of_one(pair: list[dict[str, Any]], folders: Path, family: str) -> None:
    seen = pair[0][f"{family}=none"]
    one = alone(folders / family, folders / "state", engine="baseline")
    wanted = answers(one, REQUESTS)
    assert [len(row) for row in wanted] == [65, 65, 65, 25, 5, 9]
    assert seen["answers"] == wanted
    assert seen["canceled"] == [*wanted[0][:5], "cancelled"]
    assert seen["again"] == [*wanted[0][:8], "length"]
    assert seen["plan"]["tensor_parallel"].startswith("2 ranks, DeepSpeed AutoTP: outputs within ")
    assert seen["plan"]["all-reduce"].startswith("gloo")
    assert seen["weights"] < 0.8 * one.info.plan.weights_bytes


def test_an_encoder_is_split_too(pair: list[dict[str, Any]], folders: Path) -> None:
    wanted = predictions(alone(folders / "bert", folders / "state"))
    assert len(wanted) == 6
    assert pair[0]["bert=none"]["answers"] == pytest.approx(wanted, abs=1e-5)
    assert pair[0]["bert=none"]["plan"]["tensor_parallel"].startswith("2 ranks, DeepSpeed AutoTP")


def test_a_failed_check_of_one_rank_lets_all_fall_back(pair: list[dict[str, Any]]) -> None:
    seen = pair[0]["llama=parity"]
    assert seen["plan"]["tensor_parallel"].startswith("2 ranks, DeepSpeed AutoTP")
    assert "differ from their reference on another rank" in seen["warnings"][0]
    assert seen["answers"] == [pair[0]["llama=none"]["again"]]


@pytest.mark.parametrize(("fault", "error"), [("all", "OutOfMemory"), ("lead", "MiinbError")])
def test_what_ends_a_batch_ends_it_on_all_ranks(pair: list[dict[str, Any]], fault: str, error: str) -> None:
    seen = pair[0][f"olmo={fault}"]
    assert [row[-1] for row in seen["answers"]] == [error] * 3
    assert seen["again"] == pair[0]["olmo=none"]["again"]
    assert "lost" not in seen


def test_a_rank_that_was_killed_is_told(pair: list[dict[str, Any]]) -> None:
    seen = pair[0]["olmo=death"]
    assert seen["lost"].startswith("PeerLost")
    assert [row[-1] for row in seen["answers"]] == ["Unavailable"] * 3
    assert "olmo=death" not in pair[1]


SLOW = [family for family in splitting.DECODERS if family not in USUAL]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_family_of_the_list_gives_the_answers_of_one_rank(tmp_path: Path) -> None:
    given = json.dumps(BASELINE)
    wanted = {}
    for family in SLOW:
        (tmp_path / family).mkdir()
        save(family, tmp_path / family)
        wanted[family] = answers(alone(tmp_path / family, tmp_path / "state", **BASELINE), REQUESTS)
    passes = [f"{tmp_path / family}=none={given}" for family in SLOW]
    seen = run_ranks(tmp_path / "run", passes, "29879", limit_s=800)[0]
    assert {family for family in SLOW if seen[f"{family}=none"]["answers"] != wanted[family]} == set()


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_replica_with_its_error(folders: Path) -> None:
    seen = run_ranks(folders / "alone", [f"{folders / 'olmo'}=alone"], "29877")[0]["olmo=alone"]
    assert [row[-1] for row in seen["answers"]] == ["OutOfMemory"] * 3
    assert seen["lost"].startswith("PeerLost")
