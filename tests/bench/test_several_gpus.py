"""The comparison of one GPU with two, as far as it goes without GPUs."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import miinb
from miinb.bench import several_gpus
from miinb.bench.killing import Death
from miinb.errors import OutOfMemory


class Told:
    """What the words are made of."""

    def __init__(self, env: dict[str, Any], **columns: list[Any]) -> None:
        self.summary = pd.DataFrame(columns)
        self.env = {"run": env}


ARMS = {"arm": ["1 rank", "2 ranks", "Hugging Face"], "tpot_p50_s": [0.004, 0.002, 0.010]}


def test_where_one_does_not_start_the_others_end() -> None:
    ended = []

    class Open:
        def __enter__(self) -> Open:
            return self

        def __exit__(self, *_: object) -> None:
            ended.append(self)

    def fail() -> Any:
        raise OutOfMemory("Too large.", hint="Take int8.")

    starts: Any = {"one": Open, "two": fail, "three": Open}
    with pytest.raises(OutOfMemory, match="Too large"), ExitStack() as stack:
        several_gpus.started(stack, starts)
    assert len(ended) == 2
    with ExitStack() as stack:
        assert list(several_gpus.started(stack, {"one": starts["one"]})) == ["one"]
        assert len(ended) == 2


def test_ranks_are_compared_with_the_faster_way_of_hugging_face() -> None:
    runs: Any = Told({"all_reduce": "symmetric memory", "device_map_token_s": 0.008}, **ARMS)
    assert list(several_gpus.split_words(runs)) == [
        "1 rank 4.000 ms/token, 2 ranks 2.000 (2.00x; sums: symmetric memory)",
        "Hugging Face 10.000 on one, device_map='auto' 8.000: 2 ranks are 4.00x the faster",
    ]


def test_a_device_map_that_failed_is_told_and_leaves_the_other() -> None:
    runs: Any = Told({"all_reduce": "gloo", "device_map_error": "no memory"}, **ARMS)
    assert list(several_gpus.split_words(runs))[1].endswith("device_map='auto' no memory: 2 ranks are 5.00x the faster")


def test_replicas_are_compared_by_their_tokens_a_second() -> None:
    columns = {"arm": ["1 replica", "2 replicas"], "output_tok_s": [1000.0, 1950.0], "concurrency": [256, 256]}
    runs: Any = Told({}, **columns)
    (line,) = several_gpus.replicas_words(runs)
    assert line == "256 requests in flight: 1,000 tokens/s by 1 replica, 1,950 by 2 (1.95x)"


def test_what_a_death_cost_is_told() -> None:
    lines = list(Death(4, {"Unavailable: gone.": 4}, 5.25, 0, 32 << 30).words())
    assert lines[0] == "4 streams complete, 4 failed: Unavailable: gone."
    assert "5.2 s" in lines[1]
    assert lines[2].startswith("after stop 0 bytes of 34")
    assert next(iter(Death(8, {}, 1.0, 0, 0).words())) == "8 streams complete, none failed"


RIGHT = several_gpus.Equality(8, 8, 64), Death(4, {"Unavailable: gone.": 4}, 5.0, 0, 32 << 30)
WRONG = several_gpus.Equality(7, 8, 64), Death(0, {"Unavailable: gone.": 8}, float("inf"), 0, 32 << 30)


def test_what_is_no_run_is_stored(tmp_path: Path) -> None:
    for outcome in RIGHT:
        assert list(several_gpus._kept(lambda outcome=outcome: outcome, "a", tmp_path / "new")) == [*outcome.words()]
    equality, death = map(json.loads, (tmp_path / "new/outcomes.jsonl").read_text().splitlines())
    assert (equality["what"], equality["equal"], equality["prompts"], equality["tokens"]) == ("equality", 8, 8, 64)
    assert (death["what"], death["complete"], death["back_s"]) == ("death", 4, 5.0)
    assert equality["right"]
    assert death["right"]
    assert death["environment"]["versions"]["torch"]


@pytest.mark.parametrize("outcome", WRONG)
def test_what_is_wrong_is_told_stored_and_an_error(
    outcome: several_gpus.Equality | Death, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not several_gpus._say("a row", lambda: several_gpus._kept(lambda: outcome, "a", tmp_path))
    told = capsys.readouterr().out
    assert "7 of 8" in told or "was not back after 180 s" in told
    assert f"failed: MiinbError: {outcome.wrong}" in told
    (line,) = (tmp_path / "outcomes.jsonl").read_text().splitlines()
    assert json.loads(line)["right"] is False


def test_what_was_measured_is_told_where_it_cannot_be_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outcomes.jsonl").mkdir()
    assert not several_gpus._say("a row", lambda: several_gpus._kept(lambda: RIGHT[0], "a", tmp_path))
    told = capsys.readouterr().out
    assert "8 of 8 prompts" in told
    assert "outcomes.jsonl cannot be written: Is a directory" in told


def test_a_row_that_fails_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> list[str]:
        raise OutOfMemory("Too large.", hint="Take int8.")

    assert not several_gpus._say("a row", fail)
    assert re.search(r"a row  \[0 s\]\n  failed: OutOfMemory: Too large\.", capsys.readouterr().out)


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        several_gpus.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "file")])
    assert ended.value.code == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_it_fails_where_a_row_failed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(place: several_gpus.Place) -> several_gpus.Equality:
        raise OutOfMemory("Too large.")

    monkeypatch.setattr(several_gpus, "equal", fail)
    with pytest.raises(SystemExit, match="failed: greedy tokens"):
        several_gpus.main(["--tiny", "--device", "cpu", "--rows", "equal"])


@pytest.mark.slow
def test_every_row_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several_gpus.main(
        ["--tiny", "--device", "cpu", "--dtype", "fp32", "--models", "llama-8b", "--out", str(tmp_path / "runs")]
    )
    told = capsys.readouterr().out
    assert "8 of 8 prompts" in told
    assert re.search(r"1 rank \d+\.\d+ ms/token, 2 ranks", told)
    assert "4 streams complete, 4 failed: Unavailable" in told
    arms = set(miinb.load_runs(tmp_path / "runs").summary["arm"])
    assert arms == {"1 rank", "2 ranks", "Hugging Face", "1 replica", "2 replicas"}
    assert set(miinb.load_runs(tmp_path / "runs").summary["model"]) == {"tiny-llama-8b"}
    assert {path.name for path in (tmp_path / "runs").glob("*.png")} == {
        "split-tiny-llama-8b.png",
        "replicas-tiny-llama-8b.png",
    }
    stored = [json.loads(line) for line in (tmp_path / "runs/outcomes.jsonl").read_text().splitlines()]
    assert [(one["what"], one["model"]) for one in stored] == [("equality", "tiny"), ("death", "tiny-llama-8b")]
