from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from stand_in import Predicting, StandIn

from miinb.bench import lengths
from miinb.bench.arms import label
from miinb.bench.prompts import prompts_of
from miinb.bench.runner import bench, compare
from miinb.bench.workload import Endless, configure, points
from miinb.config import BenchConfig
from miinb.errors import InvalidValue
from miinb.messages import Plan


def quiet(*_: object) -> None:
    """Keeps the progress bar away."""


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"prompt": "one"}\n\n{"prompt": "two", "id": 3}\n', ["one", "two"]),
        ("a.jsonl", '"one"\n{"text": "two\\nlines"}', ["one", "two\nlines"]),
        ("a.jsonl", '{"question": "who?", "context": "me"}', [{"question": "who?", "context": "me"}]),
        ("a.csv", 'id,prompt\n1,"a, b"\n2,"c\nd"\n', ["a, b", "c\nd"]),
        ("a.csv", "\ufeffprompt\nx\n", ["x"]),
        ("a.csv", "context,question\nme,who?\n", [{"question": "who?", "context": "me"}]),
        ("a.txt", "one\n\n  two\n", ["one", "  two"]),
    ],
)
def test_prompts_of_files_keep_their_order(tmp_path: Path, name: str, text: str, expected: list[object]) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert prompts_of(path) == prompts_of(str(path)) == expected
    assert configure(path).prompts == configure(None, {"prompts": path}).prompts == expected


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prom', "line 2 of .* is not JSON"),
        ("a.jsonl", "[1]", "neither a text nor an object"),
        ("a.jsonl", '{"a": 1, "b": 2}', "no column is named 'prompt'"),
        ("a.jsonl", '{"prompt": null}', "is empty"),
        ("a.csv", "a,b\n1,2\n", "no column is named 'prompt'"),
        ("a.csv", "prompt,b\n1\n", "row 2 of .* has 1 cells, not 2"),
        ("a.csv", "prompt,b\n,2\n", "prompt 0 .* is empty"),
        ("a.csv", "", "no column"),
        ("a.csv", "prompt\n", "has no prompt"),
        ("a.txt", "\n \n", "has no prompt"),
        ("a.yaml", "x", "is none of"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidValue, match=says):
        prompts_of(path)


def test_a_file_that_is_not_there_is_no_prompt() -> None:
    with pytest.raises(InvalidValue, match="cannot be read: No such file"):
        configure("no-such-file.jsonl")
    assert configure("Read the file a.csv").prompts == ["Read the file a.csv"]


def test_frames_and_series() -> None:
    frame = pd.DataFrame({"id": [2, 1], "prompt": ["b", "a"]}, index=[7, 3])
    assert configure(frame).prompts == configure(frame["prompt"]).prompts == ["b", "a"]
    assert configure(np.array(["x", "y"])).prompts == ["x", "y"]
    with pytest.raises(InvalidValue, match=r"prompt 1 .* is empty"):
        configure(pd.Series(["a", None]))
    with pytest.raises(InvalidValue, match="cannot take prompts from int"):
        configure(3)


def test_lengths_are_drawn_from_the_seed_and_are_the_same_at_every_load() -> None:
    fields = {"prompt_tokens": "20-200", "new_tokens": (3, 9), "concurrency": [1, 4], "requests": 40, "seed": 5}
    first, second = points(configure(None, fields))
    jobs = [[job for block in point.blocks for job in block] for point in (first, second)]
    assert [job.new_tokens for job in jobs[0]] == [job.new_tokens for job in jobs[1]]
    assert {job.new_tokens for job in jobs[0]} == set(range(3, 10))
    words = [len(job.prompt.split()) for job in jobs[0]]
    assert words == [len(job.prompt.split()) for job in jobs[1]]
    assert min(words) >= 15  # 0.75 words a token
    assert max(words) <= 150
    assert len(set(words)) > 20
    assert points(configure(None, fields)) == [first, second]
    other = points(configure(None, fields | {"seed": 6}))
    assert [job.new_tokens for job in other[0].blocks[0]] != [job.new_tokens for job in first.blocks[0]]


def test_arms_get_the_same_lengths_and_each_answer_its_own() -> None:
    arms = [StandIn("baseline"), StandIn()]
    runs = compare(arms, new_tokens="2-6", requests=12, warmup=0, progress=quiet)
    assert sorted(c["max_new_tokens"] for c in arms[0].calls) == sorted(c["max_new_tokens"] for c in arms[1].calls)
    assert (runs.requests["output_tokens"] == runs.requests["asked_tokens"]).all()
    assert runs.requests["output_tokens"].nunique() > 2
    (env,) = runs.env.values()
    assert env["warnings"] == []
    assert runs.summary["outputs_equal"].iloc[1]


@pytest.mark.parametrize("wrong", ["512-64", "a-b", "1-2-3", "", 0, -1, 1.5, True, (1, 2, 3), [5, 2], None, "0-4"])
def test_wrong_lengths_are_refused(wrong: object) -> None:
    for name in ("prompt_tokens", "new_tokens"):
        with pytest.raises(InvalidValue, match=name):
            BenchConfig.parse({name: wrong})


def test_lengths_in_their_forms() -> None:
    for form in ("64-512", (64, 512), [64, 512], np.array([64, 512])):
        config = BenchConfig.parse({"prompt_tokens": form})
        assert config.prompt_tokens == (64, 512)
        assert BenchConfig.from_json(config.to_json()) == config
    assert (
        BenchConfig.parse({"new_tokens": "7"}).new_tokens == BenchConfig.parse({"new_tokens": (7, 7)}).new_tokens == 7
    )


class Short(StandIn):
    """A session whose context is short."""

    def plan(self):
        return dataclasses.replace(super().plan(), max_length=100)


def test_what_does_not_fit_the_context_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Short()
    with pytest.raises(InvalidValue, match=r"prompts of 60 tokens and 50 new ones do not fit .* \(100 tokens\)"):
        bench(session, prompt_tokens="10-60", new_tokens="1-50", progress=quiet)
    monkeypatch.setattr("miinb.bench.generating.tokenizer_offsets", lambda folder: lambda text: [(0, 1)] * len(text))
    with pytest.raises(InvalidValue, match=r"prompts\[1\]: 96 tokens and 5 new ones") as failure:
        bench(session, ["a" * 95, "b" * 96], new_tokens=5, progress=quiet)
    assert "a prompt may have 95" in failure.value.hint
    assert not session.calls
    bench(session, ["a" * 95], new_tokens=5, warmup=0, progress=quiet)


class ShortPredicting(Predicting):
    """An encoder's session whose context is short."""

    def plan(self) -> Plan:
        return dataclasses.replace(StandIn.plan(self), max_length=100)


def test_encoders_have_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    session = ShortPredicting()
    count = lambda folder: lambda text, second=None: [(0, 1)] * len(text)  # noqa: E731
    monkeypatch.setattr("miinb.bench.predicting.tokenizer_offsets", count)
    with pytest.raises(InvalidValue, match=r"prompts\[1\]: 101 tokens do not fit .* \(100 tokens\)") as failure:
        bench(session, ["a" * 100, "b" * 101], warmup=0, progress=quiet)
    assert failure.value.hint == "At most 100 tokens."
    assert not session.calls
    bench(session, ["a" * 100], warmup=0, progress=quiet)
    pairs = [{"question": "who?", "context": "x" * 500}]  # read in windows
    lengths.check(configure(pairs), label([session]), lambda text, second=None: [(0, 1)] * 500, encodes=True)


def test_by_the_clock_both_arms_take_the_same_jobs() -> None:
    arms = [StandIn("baseline", token_s=0.004), StandIn(token_s=0.001)]
    runs = compare(arms, duration_s=0.1, concurrency=2, new_tokens=2, warmup=1, progress=quiet)
    fewer, more = sorted((set(arm.prompts) for arm in arms), key=len)
    assert len(fewer) >= 4  # the warm-up, and at least one of each worker
    assert fewer <= more
    rows = runs.requests[~runs.requests["warmup"]]
    assert rows["prompt_id"].groupby(rows["arm"]).nunique().eq(rows.groupby("arm").size()).all()
    assert runs.summary.set_index("arm").loc["optimized", "n_compared"] > 0


def test_an_open_loop_by_the_clock_has_the_arrivals_of_that_time() -> None:
    (point,) = points(configure("hi", {"rate": 100.0, "duration_s": 10.0}))
    (block,) = point.blocks
    assert not isinstance(block, Endless)
    assert 900 < len(block) < 1100
    assert block[-1].offset_s < 10.0
    assert len(points(configure("hi", {"rate": 0.001, "duration_s": 1.0}))[0].blocks[0]) == 1  # at least one


def test_passes_have_new_prompts_and_take_turns() -> None:
    order: list[tuple[str, int]] = []
    arms = [StandIn("baseline"), StandIn()]
    runs = compare(
        arms,
        requests=2,
        repeat=3,
        warmup=0,
        new_tokens=2,
        progress=lambda done, total, record: order.append((record.arm, record.pass_no)),
    )
    assert order[::2] == [
        *(("baseline", 0), ("optimized", 0), ("optimized", 1), ("baseline", 1), ("baseline", 2), ("optimized", 2))
    ]
    assert len(set(arms[0].prompts)) == 6
    assert runs.summary["passes"].eq(3).all()
    given = bench(StandIn(), ["a", "b"], repeat=2, warmup=0, requests=2, new_tokens=2, progress=quiet)
    assert list(given.requests["prompt_id"]) == ["p0", "p1", "p0", "p1"]


@pytest.mark.parametrize(("name", "head"), [("p.txt", ""), ("p.csv", "prompt\n")])
def test_a_prompt_may_hold_what_is_a_line_end_elsewhere(tmp_path: Path, name: str, head: str) -> None:
    (tmp_path / name).write_text(f"{head}one\u2028two\nthree\x0cfour\n", encoding="utf-8")
    assert prompts_of(tmp_path / name) == ["one\u2028two", "three\x0cfour"]
