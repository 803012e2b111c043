"""The measurements of encoders: what runs, equal work, compared answers, and one tiny run of every suite."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from miinb.bench import charts, encoder_tokenizers, presets, published
from miinb.bench.encoders import __main__ as command
from miinb.bench.encoders import arms, checkpoints, figures
from miinb.bench.encoders.answers import Answer, compare
from miinb.bench.encoders.clients import processes_for
from miinb.bench.encoders.inputs import Inputs
from miinb.bench.encoders.pipelines import Pipe
from miinb.bench.encoders.predictions import answer_of
from miinb.bench.encoders.suites import ARMS, HEADS, QUICK, SUITES, TINY, Choice, Job, jobs, mixed_lengths, workload
from miinb.bench.encoders.table import table
from miinb.bench.headline.book import Book
from miinb.bench.headline.floors import Rates
from miinb.bench.headline.trace import Measured
from miinb.bench.records import Record, Runs, load_runs
from miinb.errors import InvalidValue
from miinb.predictions import Fill, Label

FAMILIES = {"bert-base": "bert", "roberta-large": "roberta", "distilbert-base": "distilbert"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("presets")
    return {name: presets.write(name, place / name, **presets.tiny(name)) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_made_up_tokenizers_are_of_the_family_and_of_the_size(name: str, folders: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    assert len(tokenizer) == presets.tiny(name)["vocab_size"]
    bert = FAMILIES[name] != "roberta"
    found = tokenizer("water and stone " + tokenizer.mask_token, "winter")
    words = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert words.count("[SEP]" if bert else "</s>") == (2 if bert else 3)
    assert tokenizer.mask_token_id in found["input_ids"]
    assert tokenizer.unk_token not in words
    assert ("token_type_ids" in found) == (FAMILIES[name] == "bert")
    assert set(encoder_tokenizers.KINDS) == set(FAMILIES.values())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("task", HEADS)
def test_inputs_have_the_asked_length_and_the_same_seed_gives_the_same(
    name: str, task: str, folders: dict[str, Path]
) -> None:
    maker = Inputs(folders[name], task)
    sequences = maker.sequences((16, 9), 1)
    assert [len(one.token_ids) for one in sequences] == [16, 9]
    assert sequences == maker.sequences((16, 9), 1) != maker.sequences((16, 9), 2)
    assert all(not one.type_ids or len(one.type_ids) == len(one.token_ids) for one in sequences)
    assert bool(sequences[0].type_ids) == (task == "question-answering" and FAMILIES[name] == "bert")
    assert (sequences[0].mask is not None) == (task == "fill-mask")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    (text,) = maker.texts((24,), 1)
    given = (text["question"], text["context"]) if task == "question-answering" else (text,)
    assert len(tokenizer(*given)["input_ids"]) == pytest.approx(24, abs=3)
    if task == "fill-mask":
        assert text.count(tokenizer.mask_token) == 1


def test_mixed_lengths_have_their_mean_and_their_longest() -> None:
    lengths = mixed_lengths(4096, 128, 0.4, 0)
    assert max(lengths) == 128
    assert min(lengths) >= 4
    assert sum(lengths) / len(lengths) == pytest.approx(0.4 * 128, abs=0.1)
    assert lengths == mixed_lengths(4096, 128, 0.4, 0) != mixed_lengths(4096, 128, 0.4, 1)


def test_a_model_is_loaded_once_an_arm_and_baselines_go_first() -> None:
    suites = ("latency", "throughput", "mixed", "served", "clients")
    found = jobs(Choice(suites, "cuda", "fp16"), "/place")
    once = [(job.model, job.task, job.arm) for job in found]
    assert len(set(once)) == len(once)
    (engine,) = [
        job for job in found if (job.model, job.task, job.arm.kind) == ("bert-base", "text-classification", "engine")
    ]
    assert [one.suite for one in engine.workloads] == ["latency", "throughput", "mixed"]
    assert [job.arm.turn for job in found] == sorted(job.arm.turn for job in found)
    assert {job.task for job in found} == set(HEADS)
    quick = jobs(Choice(suites, "cuda", "fp16", QUICK, quick=True), "/place")
    assert len([job for job in quick if job.arm.kind == "compiled"]) == 3  # one a model, one of throughput
    assert {job.folder for job in quick} == {f"/place/{job.model}-{job.task}-fp16" for job in quick}
    cpu = jobs(Choice(("cpu", "embeddings"), "cuda", "fp16"), "/place")
    assert {job.device for job in cpu} == {"cpu"}
    assert {job.arm.label for job in cpu} >= {"baseline", "optimized fp32", "optimized bf16", "optimized int8"}
    only = jobs(Choice(("latency",), "cuda", "fp16", models=["minilm"], tasks=["fill-mask"], arms=["optimized"]), "/p")
    assert [(job.model, job.task, job.arm.label) for job in only] == [("minilm", "fill-mask", "optimized")]


def test_client_processes_leave_cores_to_the_server() -> None:
    assert [processes_for(64, cores) for cores in (1, 2, 16, 128)] == [1, 1, 8, 8]
    assert processes_for(2, 16) == 2


def test_answers_are_compared_by_their_choices_and_their_numbers() -> None:
    rows = [{"prompt_id": str(n), "warmup": n < 0, "status": "ok"} for n in (-1, 0, 1, 2)]
    truth = {
        "0": [Answer((1,), (0.5, 1.0))],
        "1": [Answer((1, 2), (1.0,)), Answer((3, 4), (2.0,))],
        "-1": [Answer((), ())],
    }
    mine = {"0": [Answer((1,), (0.5, 1.1))], "1": [Answer((1, 2), (1.0,)), Answer((3, 5), (2.0,))]}
    facts = compare(rows, mine, truth)
    assert [row.get("equal") for row in rows] == [None, True, False, None]
    assert rows[2]["equal_share"] == 0.75
    assert facts == {"value_error": pytest.approx(0.1)}
    embedding = [{"prompt_id": "0", "warmup": False, "status": "ok"}]
    facts = compare(embedding, {"0": [Answer((), (1.0, 0.001))]}, {"0": [Answer((), (1.0, 0.0))]})
    assert embedding[0]["equal"]
    assert facts["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_predictions_of_both_sides_are_the_same_answer() -> None:
    mine = answer_of("fill-mask", [Fill("water", 0.4, 7, "a b"), Fill("stone", 0.2, 9, "a c")])
    theirs = [{"token": 7, "token_str": "water", "score": 0.4}, {"token": 9, "token_str": "stone", "score": 0.2}]
    assert mine == answer_of("fill-mask", theirs) == Answer(((7,),), (0.4, 0.2))
    assert (
        answer_of("text-classification", [Label("A", 0.9)]).share(
            answer_of("text-classification", [{"label": "B", "score": 0.9}])
        )
        == 0.0
    )
    assert answer_of("token-classification", []).share(answer_of("token-classification", [])) == 1.0


def job(arm: str, suite: str, **changes: Any) -> Job:
    (found,) = [one for one in ARMS[suite] if one.label == arm]
    made = Job("bert-base", "text-classification", "", found, "cpu", "fp32", (workload(suite, TINY, "cpu"),))
    return dataclasses.replace(made, **changes)


def book(place: Path, suite: str, seconds: dict[str, float], gpu: str = "") -> Book:
    """A book of invented figures; 0 seconds is an arm that failed."""
    host = {"host": {"gpus": [{"name": gpu}], "driver": "1"}} if gpu else {}
    made = Book({"rates": {}, **host}, place)
    for arm, each in seconds.items():
        one = job(arm, suite)
        rows = [
            dataclasses.asdict(
                Record("", -1, arm, task=one.task, model=one.model, dtype="fp16", e2e_s=each, t_rel_s=n, block=n)
            )
            | {"prompt_tokens": 128, "batch_size": 1, "prompt_id": str(n), "model_s": each * 0.8, "concurrency": 1}
            | {"queue_s": 0.0, "preprocess_s": each * 0.1, "postprocess_s": each * 0.05}
            for n in range(4)
        ]
        answers = {str(n): [Answer((1,), (1.0,))] for n in range(4)}
        found = (
            Measured(suite, rows, {"floor_s": 0.001}, "", answers) if each else Measured(suite, error="No compiler.")
        )
        made.add(one, found, one.workloads[0].about())
    return made


@pytest.mark.parametrize("suite", SUITES)
def test_the_table_has_ratios_the_floor_and_the_comparison(suite: str, tmp_path: Path) -> None:
    labels = [arm.label for arm in ARMS[suite]]
    optimized = next(label for label in labels if label.startswith("optimized"))
    seconds = dict.fromkeys(labels, 0.01) | {optimized: 0.002}
    text = table(book(tmp_path, suite, seconds).runs())
    line = next(line for line in text.splitlines() if f" {optimized} " in line)
    assert "5.0x" in line
    assert "50%" in line
    assert line.split()[-2] == "yes"
    assert "bert-base" in line


@pytest.mark.parametrize("suite", SUITES)
def test_a_chart_has_ratios_the_comparison_and_no_text_outside(suite: str, tmp_path: Path) -> None:
    labels = [arm.label for arm in ARMS[suite]]
    optimized = next(label for label in labels if label.startswith("optimized"))
    drawn = figures.draw(book(tmp_path, suite, dict.fromkeys(labels, 0.01) | {optimized: 0.002}, gpu="A100").runs())
    assert set(drawn) == ({"served", "end_to_end_bert"} if suite == "served" else {suite})
    for figure in drawn.values():
        assert "5.0x" in charts.alt_text(figure)
        words = " ".join(text.get_text() for ax in figure.axes for text in ax.texts)
        assert "the same" in words
        assert "A100" in words
        figure.canvas.draw()
        for text in (text for ax in figure.axes for text in [*ax.texts, ax.title]):
            box = text.get_window_extent()
            assert box.x0 >= 0, text.get_text()
            assert box.x1 <= figure.bbox.x1 + 1, text.get_text()
            assert box.y0 >= 0, text.get_text()
    (path, *_) = figures.write(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_published_times_stand_beside_served_ones_of_the_same_shape_and_task(tmp_path: Path) -> None:
    runs = book(tmp_path, "served", {"baseline": 0.01, "optimized": 0.002}).runs()
    text = charts.alt_text(figures.draw(runs, beside=True)["end_to_end_bert"])
    assert "MII public (2022): 1.47 ms  ·  5.1x  ·  0.970 ms in the model" in text
    assert "optimized: 2.00 ms  ·  5.0x  ·  1.60 ms in the model" in text
    assert "2022" not in charts.alt_text(figures.draw(runs)["end_to_end_bert"])
    with pytest.raises(InvalidValue, match="nothing of encoders"):
        figures.draw(Runs([], {}))
    names = {published.short_model(name).lower() for name in published.latency()["model"]}
    assert {published.short_model(name).lower() for name in published.ENCODERS.values()} <= names


def test_a_failed_arm_is_said_and_a_saved_run_reads_the_same(tmp_path: Path) -> None:
    seconds = {"baseline": 0.01, "optimized": 0.002, "baseline-best": 0.0}
    made = book(tmp_path, "latency", seconds)
    text = table(made.runs())
    assert "baseline-best: No compiler" in text
    assert "failed" in text
    again = load_runs(tmp_path)
    assert table(again) == text
    assert again.requests.query("arm == 'optimized'")["equal"].tolist() == [True] * 4
    (env,) = again.env.values()
    assert json.dumps(env["workload"]["tokens"]) == "[16, 16.0, 16]"


def test_the_command_runs_every_kind_of_arm_on_equal_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = ["--suite", "latency", "throughput", "mixed", "served", "clients", "--models", "bert-base"]
    which = ["--tasks", "text-classification", "--arms", "baseline", "baseline-sorted", "optimized"]
    command.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), *what, *which])
    out = capsys.readouterr().out
    assert "failed" not in out
    assert "asked by" in out
    runs = load_runs(tmp_path)
    assert sorted(env["suite"] for env in runs.env.values()) == ["clients", "latency", "mixed", "served", "throughput"]
    summary = runs.summary
    assert set(summary["n_failed"]) == {0}
    compared = summary[~summary["arm"].eq("baseline")]
    assert (compared["n_compared"] > 0).all()
    assert compared["outputs_equal"].all()
    works = runs.requests[~runs.requests["warmup"]].groupby(["run_id", "arm"])[["batch_size", "prompt_tokens"]].first()
    for _, rows in works.groupby("run_id"):
        assert len(rows.drop_duplicates()) == 1
    served = runs.requests[runs.requests["run_id"].map(lambda run: runs.env[run]["suite"]) == "served"]
    parts = served[["queue_s", "preprocess_s", "model_s", "postprocess_s"]].sum(axis=1)
    assert (parts <= served["e2e_s"]).all()
    command.main(["--charts", str(tmp_path)])
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {"clients", "latency", "mixed", "served", "throughput", "end_to_end_bert"}


@pytest.mark.parametrize("task", ["question-answering", "token-classification", "feature-extraction"])
def test_both_sides_answer_alike_in_process(task: str, tmp_path: Path) -> None:
    model, suite = ("minilm", "latency") if task == "feature-extraction" else ("roberta-large", "latency")
    wanted = (workload(suite, TINY, "cpu"),)
    found = {}
    for arm in ARMS[suite][:2]:
        made = Job(model, task, str(tmp_path / "checkpoint"), arm, "cpu", "fp32", wanted, tiny=True)
        (found[arm.label],) = arms.run_job(made, Rates(1e9, 1e12))
    assert {one.error for one in found.values()} == {""}
    facts = compare(found["optimized"].records, found["optimized"].answers, found["baseline"].answers)
    assert facts["value_error"] < 1e-4
    assert all(row["equal"] for row in found["optimized"].records if not row["warmup"])
    assert found["optimized"].facts["floor_s"] > 0


def test_a_question_is_answered_by_the_likeliest_span_of_the_context(tmp_path: Path) -> None:
    (arm, _) = ARMS["served"]
    made = Job("bert-base", "question-answering", str(tmp_path / "c"), arm, "cpu", "fp32", (), tiny=True)
    answer, call = Pipe(made, checkpoints.write(made))({"question": "where", "context": "water under the bridge"})
    assert "water under the bridge"[answer["start"] : answer["end"]] == answer["answer"] != ""
    assert 0 < answer["score"] <= 1
    assert 0 < call.preprocess_s < call.e2e_s
