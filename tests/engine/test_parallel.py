"""Ranks as real processes: the tokens of one, each reading its slices alone, whatever fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from miinb import models
from miinb.engine import shared_memory
from miinb.engine.policies import POLICIES
from tests.engine.conftest import build
from tests.kernels.all_reduce_rank import write_boards

SCRIPT = Path(__file__).with_name("rank_process.py")
#: Odd vocabularies, few key/value heads, and what each family splits in its own way. 101 tokens are 56 and 45.
CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_head": 4},
    "gptj": {},
    "bloom": {},
    "llama": {},
    "llama-tied-mqa": {},
    "opt": {},
    "opt-350m": {},
    "gpt_neox": {},
}
#: Halves that are whole groups of 64 columns: int8 rounds them as one rank does.
WIDE = {"intermediate_size": 256, "head_dim": 32}
FAULTS = ("ahead", "bf16", "nan-0", "nan-1", "memory-1", "memory-0", "death-1")


def run_ranks(
    folder: Path, all_reduce: str, passes: list[str], port: str, *, ranks: int = 2, script: Path = SCRIPT
) -> list[dict[str, Any]]:
    """What each rank saw of every pass."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": port, "PYTHONPATH": os.pathsep.join(sys.path)}
    folder.mkdir(exist_ok=True)
    if all_reduce == "boards":
        env["TRITON_INTERPRET"] = "1"
        write_boards(ranks, folder)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(ranks), str(folder), all_reduce, *passes],
            env=env,
            stderr=(folder / f"rank-{rank}.log").open("w"),
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    try:
        processes[0].wait(240)
        for process in processes[1:]:
            process.wait(20)
    except subprocess.TimeoutExpired:
        logs = [(folder / f"rank-{rank}.log").read_text()[-1500:] for rank in range(ranks)]
        pytest.fail("the ranks hang:\n" + "\n".join(logs))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 0, (folder / "rank-0.log").read_text()[-3000:]
    results = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return [{key.rpartition("/")[2]: value for key, value in one.items()} for one in results]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks saw of every family and every fault: one pair of processes for all."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, changes in CHANGES.items():
        build(name, folder / name, changes)
    build("llama", folder / "wide", WIDE)
    passes = [f"{folder / name}=none" for name in CHANGES] + [
        f"{folder / 'wide'}={dtype}" for dtype in ("int8", "int4")
    ]
    passes += [f"{folder / 'llama'}={fault}" for fault in FAULTS]
    return run_ranks(folder / "run", "gloo", passes, "29871")


@pytest.mark.parametrize("name", CHANGES)
def test_two_ranks_give_the_tokens_of_one(pair: list[dict[str, Any]], name: str) -> None:
    seen = pair[0][f"{name}=none"]
    assert pair[0]["kind"] == "gloo"
    assert [len(row) for row in seen["alone"]] == [48, 48, 48, 48, 20, 20]
    assert seen["together"] == seen["alone"]
    assert len({tuple(row) for row in seen["alone"]}) == 6
    assert seen["accepted"] > 0  # the fourth row guesses, and its tokens are the same


def test_two_ranks_that_launch_ahead_and_guess_give_the_tokens_of_one(pair: list[dict[str, Any]]) -> None:
    assert pair[0]["llama=ahead"]["together"] == pair[0]["llama=none"]["alone"]
    assert pair[0]["llama=ahead"]["accepted"] > 0


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_two_ranks_round_as_one_does(pair: list[dict[str, Any]], dtype: str) -> None:
    seen = pair[0][f"wide={dtype}"]
    assert seen["together"] == seen["alone"]
    matrices = 0
    for name, size in seen["shapes"].items():
        read = [rank[f"wide={dtype}"]["read"][name.removeprefix("model.")] for rank in pair]
        assert sum(read) == size if "_proj" in name else max(read) <= size, name
        matrices += "_proj" in name
    assert matrices == 21


def test_two_ranks_answer_in_bf16(pair: list[dict[str, Any]]) -> None:
    seen = pair[0]["llama=bf16"]
    assert [row[:4] for row in seen["together"]] == [row[:4] for row in seen["alone"]]  # sums round differently
    assert [len(row) for row in seen["together"]] == [48, 48, 48, 48, 20, 20]


@pytest.mark.parametrize("fault", ["nan-0", "nan-1"])
def test_nan_on_one_rank_fails_its_request_and_the_others_go_on(pair: list[dict[str, Any]], fault: str) -> None:
    seen = pair[0][f"llama={fault}"]
    assert seen["together"] == seen["again"] == [["NonFinite"], *seen["alone"][1:]]


@pytest.mark.parametrize("name", CHANGES)
def test_each_rank_reads_its_slices_alone(pair: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[f"{name}=none"]["read"] for rank in pair)
    policy = POLICIES[name.split("-")[0]]
    split = {
        f"{module.format(i=layer)}.weight": source.split
        for source in policy.weights.values()
        for module in source.modules
        for layer in range(3)
    }
    matrices = 0
    for tensor, size in pair[0][f"{name}=none"]["shapes"].items():
        short = tensor.removeprefix(policy.prefix)
        if short not in first or short not in split:
            continue  # a tied head, biases
        if split[short] is None or (name == "llama-tied-mqa" and short.endswith(("k_proj.weight", "v_proj.weight"))):
            assert first[short] == second[short] == size, short  # norms, embeddings, the one key/value head
        else:
            assert first[short] + second[short] == size, short
            assert abs(first[short] - second[short]) <= size // 8, short
            matrices += 1
    assert matrices >= 10


#: Fewer key/value heads than four ranks, in projections of their own and in fused ones; their number.
FEW = {"llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "phi3": 2, "gemma2": 2, "falcon": 1, "gpt_bigcode": 1}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The models' folder, and what four ranks saw of each."""
    folder = tmp_path_factory.mktemp("four")
    for name in FEW:
        build(name, folder / name, {"n_head": 4} if name == "gpt_bigcode" else None)
    passes = [f"{folder / name}=none" for name in FEW]
    return folder, run_ranks(folder / "run", "gloo", passes, "29874", ranks=4)


@pytest.mark.parametrize("name", FEW)
def test_ranks_share_copies_of_few_key_value_heads(four: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    folder, ranks = four
    model = models.inspect(folder / name)
    assert model.spec is not None
    assert (model.spec.heads, model.spec.kv_heads) == (4, FEW[name])
    seen = [rank[f"{name}=none"] for rank in ranks]
    assert seen[0]["together"] == seen[0]["alone"]
    assert len({tuple(row) for row in seen[0]["alone"]}) == 6
    for rank in seen:
        assert rank["cache"] == model.kv_bytes_per_token("fp32", 4) == 2 * 3 * model.spec.head_size * 4
        # The last rank has fewer tokens of the vocabulary, and the first one's biases are not halved.
        assert rank["weights"] == pytest.approx(model.weights_bytes("fp32", 4), rel=0.06)
        matrices = 0
        for tensor, size in seen[0]["shapes"].items():
            short = tensor.removeprefix(POLICIES[name].prefix)
            if short.endswith((".k_proj.weight", ".v_proj.weight")):
                assert rank["read"][short] == size // FEW[name], short
            elif short.endswith((".qkv_proj.weight", ".c_attn.weight", ".query_key_value.weight")):
                assert rank["read"][short] == size * 3 // (4 + 2 * FEW[name]), short  # a head's query, key and value
            else:
                continue
            matrices += 1
        assert matrices in (3, 6)


@pytest.mark.parametrize("fault", ["memory-1", "memory-0"])
def test_a_rank_without_memory_fails_its_request_and_the_others_go_on(pair: list[dict[str, Any]], fault: str) -> None:
    seen = pair[0][f"llama={fault}"]
    assert seen["together"] == [*seen["alone"][:2], ["OutOfMemory"]]
    assert seen["again"] == seen["alone"]


def test_the_death_of_a_follower_is_noticed_at_once(pair: list[dict[str, Any]]) -> None:
    seen = pair[0]["llama=death-1"]
    assert seen["lost"]
    assert seen["lost_s"] < 20
    assert "llama=death-1" not in pair[1]


def test_sums_as_linked_gpus_make_them_give_the_same_though_a_rank_fails(tmp_path: Path) -> None:
    """One kernel for a sum and its norm; a rank that fails takes part with plain sums. (Interpreted, so one pass.)"""
    pytest.importorskip("triton")
    build("llama", tmp_path / "llama")
    results = run_ranks(tmp_path / "run", "boards", [f"{tmp_path / 'llama'}=memory-1"], "29873")
    seen = results[0]["llama=memory-1"]
    assert seen["together"] == [*seen["alone"][:2], ["OutOfMemory"]]
    assert seen["again"] == seen["alone"]
    assert results[0]["sums"] == results[1]["sums"] > 500


@pytest.mark.skipif(not shared_memory._built().exists(), reason="DeepSpeed's operator is not compiled here")
def test_shared_memory_gives_the_same_and_leaves_nothing(tmp_path: Path) -> None:
    build("llama", tmp_path / "llama")
    results = run_ranks(tmp_path / "run", "shared_memory", [f"{tmp_path / 'llama'}=none"], "29872")
    assert results[0]["kind"] == "shared memory"
    seen = results[0]["llama=none"]
    assert seen["together"] == seen["alone"]
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*_29872_*"))


def test_why_ranks_do_without_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "MiB free" in shared_memory.unusable(1 << 24)
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path / "none")
    assert "not writable" in shared_memory.unusable(2)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in shared_memory.unusable(2)


LEAVING = """
import atexit, sys, torch.distributed
from pathlib import Path
from miinb.engine.parallel import init_distributed
atexit.register(lambda: print("left", not torch.distributed.is_initialized()))
init_distributed(replica=0, rank=0, ranks=1, folder=Path(sys.argv[1]), device="cpu")
print("within", torch.distributed.is_initialized())
"""


def test_a_rank_alone_leaves_its_group_when_its_process_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "within True" in done.stdout
    assert "left True" in done.stdout


def test_leaving_does_not_wait_for_ever(tmp_path: Path) -> None:
    hanging = (
        LEAVING
        + """
import time
from miinb.engine.parallel import leave_group
torch.distributed.destroy_process_group = lambda: time.sleep(60)
leave_group(0.2)
"""
    )
    done = subprocess.run([sys.executable, "-c", hanging, str(tmp_path)], timeout=50, check=False)
    assert done.returncode == 1
