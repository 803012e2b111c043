"""Sums through the memory of linked GPUs: which way a message goes, when ranks do without, and on GPUs the sums."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import miinb
from miinb import Session
from miinb.config import DeploymentConfig, EngineOptions
from miinb.engine import symmetric
from miinb.engine.compile import NoPeers
from miinb.engine.parallel import Group, set_environment
from miinb.engine.ranks import Ranks
from miinb.engine.recording import compiling_for, recording
from miinb.messages import Plan
from tests.engine.conftest import build
from tests.test_tensor_parallel import lose_a_follower

SCRIPT = Path(__file__).with_name("reduce_cuda.py")
TINY = Path(miinb.__file__).parent / "demo" / "tiny"


class Sums(NoPeers):
    """Counts the sums that do not go through the boards."""

    others = 0

    def _sum(self, x: Tensor) -> Tensor:
        self.others += 1
        return x


def meta(rows: int, hidden: int = 4096) -> Tensor:
    return torch.empty(rows, hidden, dtype=torch.bfloat16, device="meta")


def launched(group: Group, rows: int) -> tuple[list[str], bool]:
    """The kernels of a sum and of a sum with its norm, and whether the latter was done."""
    with compiling_for((9, 0)), recording() as kernels:
        group.all_reduce(meta(rows))
        both = group.reduce_norm(meta(rows), meta(rows), meta(1)[0], None, 1e-5, centered=False)
    return [kernel.name for kernel in kernels], both is not None


def test_small_messages_go_through_the_boards_and_large_ones_do_not() -> None:
    group = Sums(2, EngineOptions())
    assert launched(group, 1) == (["pushed_sum", "pushed_sum"], True)
    assert launched(group, 16) == (["pushed_sum", "pushed_sum"], True)  # 128 KiB, the most that is pushed
    assert launched(group, 17) == (["_reduce", "_reduce"], True)
    assert launched(group, 256) == (["_reduce", "_reduce"], True)  # 2 MiB, the most
    assert (group.reductions, group.others) == (8, 0)
    assert launched(group, 257) == ([], False)
    assert (group.reductions, group.others) == (9, 1)


def test_where_there_are_no_boards_every_message_goes_by_nccl() -> None:
    group = Sums(2, EngineOptions(all_reduce="nccl"))
    assert launched(group, 1) == ([], False)
    assert (group.reductions, group.others) == (1, 1)


def test_more_ranks_have_smaller_messages() -> None:
    assert [symmetric.most_bytes(ranks) for ranks in (2, 3, 4, 8)] == [2 << 20, 512 << 10, 512 << 10, 256 << 10]
    assert launched(Sums(8, EngineOptions()), 33) == ([], False)


def test_ranks_leave_multicast_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_NVLS_ENABLE", symmetric.NO_MULTICAST, "TORCH_SYMMMEM"):
        monkeypatch.setenv(name, "other")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what else is set is put back
    set_environment(rank=0, ranks=2, device="cuda")
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"
    assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    assert os.environ["TORCH_SYMMMEM"] == "CUDA"


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What the driver says of two linked GPUs."""
    monkeypatch.setattr(symmetric, "use_triton", lambda x: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setenv(symmetric.NO_MULTICAST, "1")
    return monkeypatch


def test_what_keeps_ranks_from_each_others_memory(linked: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert symmetric.unusable(2, device) == ""
    assert "GPU of its own" in symmetric.unusable(3, device)
    linked.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) != (1, 0))
    assert symmetric.unusable(2, device) == "GPU 1 cannot read the memory of GPU 0"
    linked.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    linked.setenv(symmetric.NO_MULTICAST, "0")
    assert "TORCH_SYMM_MEM_DISABLE_MULTICAST is not 1" in symmetric.unusable(2, device)
    linked.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "older than Ampere" in symmetric.unusable(2, device)


class Disagreeing(Group):
    """A rank whose peer answers no to the n-th question."""

    def __init__(self, no_at: int) -> None:
        super().__init__(0, 2, "nccl")
        self.no_at, self.asked = no_at, 0

    def least(self, value: int, device: torch.device) -> int:
        self.asked += 1
        return 0 if self.asked == self.no_at else value


def test_ranks_do_without_together(linked: pytest.MonkeyPatch) -> None:
    group = Disagreeing(1)
    assert "another rank cannot read" in symmetric.connect(group, torch.device("cpu"))
    assert (group.boards, group.asked) == (None, 1)
    group = Disagreeing(9)  # this build of PyTorch has no GPUs: the memory cannot be had
    assert "PyTorch gives no symmetric memory" in symmetric.connect(group, torch.device("cpu"))
    assert (group.boards, group.asked) == (None, 2)


def test_the_plan_says_how_sums_go_and_why() -> None:
    device, plan = torch.device("cpu"), Plan("", "", "")

    def line(group: Group, asked: str) -> tuple[str, str]:
        config = DeploymentConfig.parse({"model": "m", "tensor_parallel": 2, "options": {"all_reduce": asked}})
        ranks = Ranks(0, group, reason="asked for" if asked == "nccl" else "2 GPUs")
        ranks.connect(config, device)
        (found,) = ranks.describe(plan).lines
        return found.choice, found.reason

    assert line(Disagreeing(9), "nccl") == ("nccl", "asked for")
    assert line(Disagreeing(9), "auto") == ("nccl", "2 GPUs: there is no Triton")  # of a tensor of the CPU
    ranks = Ranks(0, NoPeers(2, EngineOptions()), reason="2 linked GPUs")
    (found,) = ranks.describe(plan).lines
    assert found.choice == "symmetric memory up to 2.10 MB, nccl above"


def needs_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")


@pytest.mark.gpu
def test_sums_of_two_gpus(tmp_path: Path) -> None:
    needs_gpus()
    env = {**os.environ, "MASTER_PORT": "29874", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", str(tmp_path)],
            env=env,
            stderr=(tmp_path / f"rank-{rank}.log").open("w"),
        )
        for rank in range(2)
    ]
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], (tmp_path / "rank-0.log").read_text()[-3000:]
    for rank in range(2):
        seen: dict[str, Any] = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        if seen["why"]:
            pytest.skip(seen["why"])
        assert (seen["large"], seen["large sum"]) == (True, 2.0)
        assert seen["eager"]["wrong"] == seen["eager"]["apart"] == 0.0
        assert seen["eager"]["norm"] < 1e-2
        assert seen["eager"]["nccl"] < 1e-2
        assert set(seen["replayed"].values()) == {0.0}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_gpus_give_the_tokens_of_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_gpus()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    sizes = {"llama": {"hidden_size": 64, "head_dim": 16}, "gpt2": {"n_embd": 64, "n_head": 4}}
    folder = tmp_path / name
    vocab_size = json.loads((TINY / "config.json").read_text())["vocab_size"]
    build(name, folder, sizes[name] | {"vocab_size": vocab_size})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((TINY / file).read_bytes())
    prompts = ["Once upon a time", "The dog", "A"]
    settings: dict[str, Any] = {"max_new_tokens": 48, "ignore_eos": True}
    fields: dict[str, Any] = {"device": "cuda", "dtype": "fp32", "max_batch": 4, "max_length": 96}
    with Session(folder, **fields) as one:
        wanted = one.generate(prompts, **settings).texts
    with Session(folder, **fields, tensor_parallel=2) as two:
        (line,) = [line for line in two.plan().lines if line.what == "all-reduce"]
        assert "symmetric memory" in line.choice, line.reason
        assert two.generate(prompts, **settings).texts == wanted
        assert two.generate(prompts[1], **settings).texts == wanted[1:2]
    with Session(folder, **fields, tensor_parallel=2, options={"all_reduce": "nccl"}) as plain:
        assert plain.generate(prompts, **settings).texts == wanted


@pytest.mark.gpu
def test_a_rank_that_waits_in_a_kernel_ends_with_its_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_gpus()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Session(TINY, device="cuda", dtype="fp32", max_batch=4, tensor_parallel=2) as two:
        assert "symmetric memory" in str(two.plan())
        wanted = two.generate("Once upon a time", max_new_tokens=24).text
        for fault, words in ((signal.SIGKILL, "Rank 1 of replica 0 ended"), (signal.SIGSTOP, "it hangs and is killed")):
            lose_a_follower(two, fault)
            assert words in two.logs(200)
            assert two.generate("Once upon a time", max_new_tokens=24).text == wanted
