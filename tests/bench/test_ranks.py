import re
from pathlib import Path

import pytest

from miinb import load_runs
from miinb.bench import ranks


@pytest.mark.slow
def test_two_ranks_are_compared_with_one_on_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    counts = ["--prompt-tokens", "8", "--new-tokens", "6", "--requests", "2"]
    ranks.main(["--model", "llama-8b", "--tiny", "--all-reduce", "gloo", *counts, "--out", str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    assert re.search(r"2 ranks of one thread \(gloo\) are \d+\.\d\d times as fast as one", printed)
    runs = load_runs(tmp_path / "runs")
    assert runs.summary["arm"].tolist() == ["1 rank", "2 ranks"]
    assert runs.summary["equal_share"].tolist()[1] == 1.0
    assert ranks.ratio(runs) > 0
