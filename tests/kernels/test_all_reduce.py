"""The sum over ranks, each in a process of its own under Triton's interpreter: see `all_reduce_rank.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from miinb.kernels import reference
from miinb.kernels.all_reduce import PROGRAMS, Boards, boards_bytes
from tests.kernels import all_reduce_rank
from tests.kernels.checking import same

PROGRAM = Path(all_reduce_rank.__file__)


def run(ranks: int, folder: Path) -> list[dict[str, Any]]:
    all_reduce_rank.write_boards(ranks, folder)
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(ranks), str(folder)],
            env=environment,
            stderr=(folder / f"rank-{rank}.log").open("w"),
        )
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(200) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * ranks, (folder / "rank-0.log").read_text()[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(ranks)]


def wanted(number: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm's output and the sum, which the norm reads as it was rounded, if it is kept; else the output twice."""
    given = all_reduce_rank.inputs(number, 0)
    dtype = given["x"].dtype
    total = sum(all_reduce_rank.inputs(number, rank)["x"].double() for rank in range(ranks))
    if given["residual"] is not None:
        total = total + given["residual"].double()
    if not given["keep"]:
        weight, bias = given["weight"].double(), given["bias"].double()
        y = reference.layer_norm(total, weight, bias, all_reduce_rank.EPS)[0]
        return y, y
    total = total.to(dtype)
    if given["weight"] is None:
        return total, total
    if given["centered"]:
        return reference.layer_norm(total, given["weight"], given["bias"], all_reduce_rank.EPS)[0], total
    return reference.rms_norm(total, given["weight"], all_reduce_rank.EPS)[0], total


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_the_same_sums(tmp_path: Path, ranks: int) -> None:
    results = run(ranks, tmp_path)
    count = all_reduce_rank.PASSES * len(all_reduce_rank.MESSAGES)
    assert [len(result["outputs"]) for result in results] == [count] * ranks
    for result in results:
        assert result["epochs"].tolist() == [count + 1] * PROGRAMS  # also those that no launch had
        parts = [all_reduce_rank.inputs(0, rank)["x"] for rank in range(ranks)]
        same(result["mixed"], torch.stack(parts).sum(0))
    for number in range(count):
        for found, expected in zip(results[0]["outputs"][number], wanted(number, ranks), strict=True):
            same(found, expected)
        for other in results[1:]:
            for mine, theirs in zip(results[0]["outputs"][number], other["outputs"][number], strict=True):
                assert torch.equal(mine, theirs), f"message {number}"


def test_a_message_fits_up_to_the_limit() -> None:
    boards = Boards(torch.zeros(2, dtype=torch.int64), torch.zeros(PROGRAMS, dtype=torch.int64), 0, 1 << 15, 1 << 9, 4)
    assert boards.fits(torch.empty(4, 4096, dtype=torch.bfloat16))
    assert not boards.fits(torch.empty(5, 4096, dtype=torch.bfloat16))
    assert not boards.fits(torch.empty(3, 4096))
    assert boards_bytes(2, 1 << 15, 1 << 9) % 16 == 0
