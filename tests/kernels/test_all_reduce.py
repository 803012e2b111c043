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
from miinb.kernels import best_of_ranks, reference
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
        messages = count + all_reduce_rank.PASSES + 1  # sums, choices, the last
        assert result["epochs"].tolist() == [messages] * PROGRAMS  # also those that no launch had
        parts = [all_reduce_rank.inputs(0, rank)["x"] for rank in range(ranks)]
        same(result["mixed"], torch.stack(parts).sum(0))
    for number in range(count):
        for found, expected in zip(results[0]["outputs"][number], wanted(number, ranks), strict=True):
            same(found, expected)
        for other in results[1:]:
            for mine, theirs in zip(results[0]["outputs"][number], other["outputs"][number], strict=True):
                assert torch.equal(mine, theirs), f"message {number}"

    for number, (ids, finite) in enumerate(results[0]["chosen"]):
        expected_ids, expected_finite = chosen(number, ranks)
        assert torch.equal(finite, expected_finite)
        assert torch.equal(ids[finite], expected_ids[finite])
        for other in results[1:]:
            assert torch.equal(ids, other["chosen"][number][0])
            assert torch.equal(finite, other["chosen"][number][1])


def chosen(number: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest of the tokens with the largest logits, and whether these are finite."""
    parts = [all_reduce_rank.candidates(number, rank) for rank in range(ranks)]
    values = torch.stack([value for value, _ in parts])
    tokens = torch.stack([ids + rank * all_reduce_rank.VOCABULARY for rank, (_, ids) in enumerate(parts)])
    best = values.amax(0)
    return tokens.masked_fill(values != best, 1 << 30).amin(0), best.isfinite()


def test_a_message_fits_up_to_the_limit() -> None:
    boards = Boards(torch.zeros(2, dtype=torch.int64), torch.zeros(PROGRAMS, dtype=torch.int64), 0, 1 << 15, 1 << 9, 4)
    assert boards.fits(torch.empty(4, 4096, dtype=torch.bfloat16))
    assert not boards.fits(torch.empty(5, 4096, dtype=torch.bfloat16))
    assert not boards.fits(torch.empty(3, 4096))
    assert boards_bytes(2, 1 << 15, 1 << 9) % 16 == 0
    assert best_of_ranks.fits(64, boards)
    assert not best_of_ranks.fits(65, boards)
