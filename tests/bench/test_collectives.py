"""The comparison of sums over ranks, as far as it goes without GPUs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from miinb import hardware
from miinb.bench import collectives
from miinb.errors import RankFailed

TIMES = {"nccl_eager": 40.0, "nccl": 15.0, "nccl_norm": 18.0, "ours": 5.0, "ours_norm": 6.0}
RESULT: dict[str, Any] = {
    "environment": {"gpus": [{"name": "G"}] * 2, "driver": "1"},
    "ranks": 2,
    "checked": 100,
    "nccl": "2.28.9",
    "seconds": 31.4,
    "checks": [{"rows": 1, "hidden": 4096, "wrong": 0, "apart": 0, "norm_error": 0.004}],
    "times": [
        {"rows": 1, "hidden": 4096, "bytes": 8192, "used": True, **TIMES},
        {"rows": 256, "hidden": 8192, "bytes": 4 << 20, "used": False, **TIMES},
    ],
}


def test_the_table_says_what_was_faster_and_whether_it_was_right() -> None:
    lines = collectives.table(RESULT).splitlines()
    assert lines[1].split() == ["1", "4096", "8", "|", "40.0", "15.0", "5.0", "3.0x", "|", "18.0", "6.0", "3.0x"]
    assert lines[2].endswith("(the engine takes NCCL)")
    assert lines[3] == "Microseconds, 2 ranks, bf16; 2 x G, driver 1, NCCL 2.28.9."
    assert lines[4] == "100 messages checked: all right, and alike on all ranks. 31 s."


@pytest.mark.parametrize(("field", "value"), [("wrong", 1), ("apart", 2), ("norm_error", 0.5)])
def test_a_wrong_sum_is_told(field: str, value: float) -> None:
    result = copy.deepcopy(RESULT)
    result["checks"][0][field] = value
    assert not collectives.right(result)
    assert "WRONG" in collectives.table(result)


def test_a_rank_that_fails_ends_all_and_its_log_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RankFailed, match=r"Rank \d failed") as caught:
        collectives.measure(2)
    assert "Traceback" in caught.value.message


def test_fewer_than_two_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.detect().gpus == ()
    with pytest.raises(SystemExit):
        collectives.main(["--out", str(tmp_path / "out.json")])
    assert "0 can be seen" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
