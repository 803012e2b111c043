from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from miinb.bench import charts, presets
from miinb.bench.floor import token_bytes
from miinb.bench.headline import __main__ as command
from miinb.bench.headline import arms, figures, floors, isolation, profile
from miinb.bench.headline.book import Book
from miinb.bench.headline.isolation import Worker
from miinb.bench.headline.suites import ARMS, DEFAULT_SUITES, TINY, Choice, Job, Sizes, jobs, workload
from miinb.bench.headline.table import table
from miinb.bench.headline.trace import Measured
from miinb.bench.records import Record, load_runs
from miinb.errors import InvalidValue, MiinbError
from miinb.models import inspect

RATES = floors.Rates(1e9, 1e12)
SUITES = ("decode", "throughput", "ragged")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("presets")
    return {name: str(presets.write(name, place / name, **presets.tiny(name))) for name in ("gpt2", "llama-8b")}


def job(folders: dict[str, str], arm: str, *suites: str, **changes: Any) -> Job:
    sizes = dataclasses.replace(TINY, **changes)
    workloads = tuple(workload(suite, sizes) for suite in suites)
    return Job("llama-8b", folders["llama-8b"], ARMS[arm], "cpu", "fp32", workloads)


@pytest.mark.parametrize("arm", ["optimized", "baseline"])
def test_an_arm_runs_every_workload_with_equal_work(arm: str, folders: dict[str, str]) -> None:
    found = {measured.suite: measured for measured in arms.run_job(job(folders, arm, *SUITES), RATES)}
    assert {name: measured.error for name, measured in found.items()} == dict.fromkeys(SUITES, "")
    decode = [row for row in found["decode"].records if not row["warmup"]]
    assert [row["output_tokens"] for row in decode] == [TINY.new_tokens] * TINY.repeats
    assert all(0 < row["ttft_s"] < row["e2e_s"] and row["tpot_s"] > 0 for row in decode)
    first = [row for row in found["throughput"].records if row["block"] == 0]
    assert len(first) == TINY.requests == first[0]["concurrency"]
    assert found["throughput"].facts["output_tok_s"] > 0
    wanted = workload("ragged", TINY)
    sample = wanted.lengths if arm == "optimized" else wanted.sorted_sample()
    rows = [row for row in found["ragged"].records if row["block"] == 0]
    assert [(row["prompt_tokens"], row["output_tokens"]) for row in rows] == list(sample)
    assert found["decode"].facts["floor_s"] > 0


def test_the_arm_with_an_fp8_cache(folders: dict[str, str]) -> None:
    plain, lossy = (
        next(iter(arms.run_job(job(folders, arm, "ragged", repeats=1), RATES)))
        for arm in ("optimized", "optimized, lossy fp8 cache")
    )
    assert lossy.error == ""
    assert lossy.facts["kv_cache_bytes"] < 0.4 * plain.facts["kv_cache_bytes"]
    assert lossy.facts["floor_tok_s"] > plain.facts["floor_tok_s"]


def test_the_baseline_counts_its_faster_static_batch(folders: dict[str, str]) -> None:
    (found,) = arms.run_job(job(folders, "baseline", "throughput", batches=(1,)), RATES)
    tried = found.facts["tried_tok_s"]
    assert set(tried) == {"batch 4", "batch 1"}
    assert found.facts["output_tok_s"] == max(tried.values())


def test_continuous_batching_of_transformers_answers_all(folders: dict[str, str]) -> None:
    (found,) = arms.run_job(job(folders, "baseline-continuous", "ragged", repeats=1), RATES)
    assert not found.error
    lengths = [(row["prompt_tokens"], row["output_tokens"]) for row in found.records]
    assert lengths == list(workload("ragged", TINY).sorted_sample())


@pytest.mark.parametrize("arm", ["optimized", "baseline"])
def test_a_pass_that_takes_too_long_is_cut_and_says_so(arm: str, folders: dict[str, str]) -> None:
    (found,) = arms.run_job(job(folders, arm, "ragged", limit_s=1e-9, repeats=1), RATES)
    assert not found.error
    assert {row["status"] for row in found.records} == {"cancelled"}
    assert "unfinished" in found.facts["cut"]


def test_a_checkpoint_is_written_and_loaded_for_the_memory_suite(folders: dict[str, str]) -> None:
    with_files = dataclasses.replace(job(folders, "optimized", "memory"), checkpoint=True)
    (found,) = arms.run_job(with_files, RATES)
    assert not found.error
    assert inspect(Path(folders["llama-8b"] + "-checkpoint")).files
    assert found.facts["kv_cache_bytes"] == found.facts["kv_planned_bytes"]


def test_what_runs_else_than_the_arm_is_a_failure(tmp_path: Path) -> None:
    folder = presets.write("gpt2", tmp_path, **presets.tiny("gpt2"))
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"], "multi_query": False}
    (folder / "config.json").write_text(json.dumps(values))
    wanted = Job("odd", str(folder), ARMS["optimized"], "cpu", "fp32", (workload("decode", TINY),))
    with pytest.raises(MiinbError, match="plain transformers run it"):
        list(arms.run_job(wanted, RATES))


def test_floors() -> None:
    folder_of = {"tie_word_embeddings": False, "vocab_size": 10, "hidden_size": 4}
    model = dataclasses.make_dataclass("Model", ["config", "vocab_size", "hidden_size", "family", "parameters"])
    untied = model(folder_of, 10, 4, "llama", 400)
    assert token_bytes(untied, 800.0) == 800 - 80
    positions = model({"n_positions": 20}, 10, 4, "gpt2", 400)
    assert token_bytes(positions, 400.0) == 400 - 80
    assert floors.one_row_s(untied, 800.0, floors.Rates(720.0, 1.0)) == 1.0


def test_the_sample_of_the_baseline_has_the_lengths_of_all() -> None:
    ragged = workload("ragged", Sizes())
    sample = ragged.sorted_sample()
    assert len(ragged.lengths) == 256
    assert len(sample) == 64
    news = [new for _, new in sample]
    assert news == sorted(news, reverse=True)
    mean = sum(new for _, new in ragged.lengths) / 256
    assert sum(news) / 64 == pytest.approx(mean, rel=0.02)
    assert all(100 <= length <= 1024 for pair in ragged.lengths for length in pair)
    assert ragged.prompts(sample, 500, 0) == ragged.prompts(sample, 500, 0) != ragged.prompts(sample, 500, 1)


def test_an_arm_loads_once_for_all_suites_and_costly_arms_come_last() -> None:
    choice = Choice(["decode", "throughput", "ragged", "server"], "cuda", "bf16")
    folders = dict.fromkeys(presets.PRESETS, "")
    found = jobs(choice, folders)
    (optimized,) = [j for j in found if (j.model, j.arm.label) == ("llama-8b", "optimized")]
    assert [w.suite for w in optimized.workloads] == ["decode", "throughput", "ragged"]
    assert [j.arm.turn for j in found] == sorted(j.arm.turn for j in found)
    assert {j.model for j in found if j.arm.served} == {"gpt2", "llama-8b"}
    assert not any(j.arm.kv_dtype == "fp8" for j in found)
    lossy = jobs(dataclasses.replace(choice, kv_dtype="fp8", arms=["optimized"], models=["llama-8b"]), folders)
    assert [(j.arm.label, len(j.workloads)) for j in lossy] == [("optimized", 3), ("optimized, lossy fp8 cache", 3)]
    cpu = jobs(Choice(["cpu"], "cuda", "bf16", models=["gpt2"]), folders)
    assert {(j.arm.label, j.dtype, j.device) for j in cpu} >= {
        (f"optimized {dtype}", dtype, "cpu") for dtype in ("int8", "int4")
    }


def test_a_failed_arm_is_a_row_and_a_note_and_the_others_stay(tmp_path: Path, folders: dict[str, str]) -> None:
    book = Book({"rates": {}}, tmp_path)
    fine, broken = job(folders, "optimized", "decode"), job(folders, "baseline", "decode")
    (measured,) = arms.run_job(fine, RATES)
    book.add(fine, measured, {"requests": 1})
    book.add(broken, Measured("decode", error="It broke."), {"requests": 1})
    book.leave_out(job(folders, "baseline-best", "decode"), "no time")
    saved = load_runs(tmp_path)
    rows = saved.requests
    assert rows[rows["arm"] == "baseline"][["status", "error"]].to_numpy().tolist() == [["error", "It broke."]]
    assert len(rows[rows["arm"] == "optimized"]) == len(measured.records)
    (env,) = saved.env.values()
    assert env["warnings"] == ["baseline: It broke", "baseline-best left out: no time"]
    text = table(saved)
    assert "failed" in text
    assert "note: llama-8b: baseline-best left out: no time" in text


def synthetic(tmp_path: Path, suite: str, gpu: str) -> Book:
    """A book of invented figures, one model, three arms of which one failed."""
    book = Book({"rates": {}, "host": {"gpus": [{"name": gpu}], "driver": "1"}}, tmp_path)
    wanted = workload(suite, Sizes())
    for arm, seconds in (("optimized", 0.005), ("baseline", 0.03), ("baseline-best", 0.0)):
        rows = [
            dataclasses.asdict(Record("", -1, arm, model="llama-8b", dtype="bf16", tpot_s=seconds, e2e_s=1, t_rel_s=0))
        ]
        facts = {"floor_s": 0.004, "floor_tok_s": 400.0, "output_tok_s": 1 / seconds if seconds else 0}
        found = Measured(suite, rows, facts) if seconds else Measured(suite, error="No compiler.")
        book.add(Job("llama-8b", "", ARMS[arm], "cuda", "bf16", (wanted,)), found, wanted.about())
    return book


@pytest.mark.parametrize("suite", ["decode", "throughput", "ragged", "cpu"])
def test_a_chart_has_ratio_share_of_the_floor_and_what_failed(suite: str, tmp_path: Path) -> None:
    figure = figures.draw(synthetic(tmp_path, suite, "NVIDIA H100 80GB HBM3").runs())[suite]
    text = charts.alt_text(figure)
    share = "50%" if suite in ("throughput", "ragged") else "80%"
    assert f"6.0x  ·  {share} of floor" in text
    words = " ".join(part.get_text() for ax in figure.axes for part in ax.texts)
    assert "baseline-best: No compiler." in words
    assert ("not in this run" in words) == (suite != "cpu")
    figure.canvas.draw()
    for part in (part for ax in figure.axes for part in [*ax.texts, ax.title]):
        box = part.get_window_extent()
        assert box.x0 >= 0, part.get_text()
        assert box.x1 <= figure.bbox.x1 + 1, part.get_text()
        assert box.y0 >= 0, part.get_text()


def test_published_figures_stand_beside_the_same_machine_and_work_alone(tmp_path: Path) -> None:
    figure = figures.draw(synthetic(tmp_path, "decode", "NVIDIA H200").runs())["decode"]
    assert "vLLM" not in charts.alt_text(figure)
    assert figures.write(tmp_path) == [tmp_path / "decode.png"]
    with pytest.raises(InvalidValue, match="nothing that the headline draws"):
        figures.draw(synthetic(tmp_path, "memory", "NVIDIA H100").runs())


def test_what_cannot_be_loaded_is_an_error_of_its_own_process(folders: dict[str, str]) -> None:
    worker = Worker()
    missing = dataclasses.replace(job(folders, "optimized", "decode"), folder="/nowhere/llama")
    with pytest.raises(MiinbError, match="/nowhere/llama"):
        list(worker.run(missing, RATES))
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not [child for child in children if isolation.__name__ in child.cmdline()]


REPORTER = """
import os
import sys

from miinb.bench.headline.trace import Measured

def run_job(job, rates):
    if job.model == "ends":
        sys.exit(3)
    yield Measured(job.model, facts={"spins": os.environ["GOMP_SPINCOUNT"]})
"""
#: As a user writes it: without `if __name__ == "__main__"`.
SCRIPT = """
from miinb.bench.headline.isolation import Worker
from miinb.bench.headline.suites import ARMS, Job
from miinb.errors import MiinbError

print("begun")
worker = Worker("reporter")
for model in ("m", "ends", "m"):
    try:
        print([found.suite for found in worker.run(Job(model, "", ARMS["optimized"], "cpu", "fp32", ()))])
    except MiinbError as error:
        print(error)
worker.close()
"""


def with_reporter(folder: Path) -> str:
    """A path for modules that has the reporter too."""
    (folder / "reporter.py").write_text(REPORTER)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_a_script_is_run_once_whatever_ends_in_the_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": with_reporter(tmp_path)}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == ["begun", "['m']", "The process died (exit status 3).", "['m']"]
    assert not done.stderr


def test_an_arm_waits_for_its_threads_as_a_rank_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", with_reporter(tmp_path))
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    worker = Worker("reporter")
    try:
        (found,) = worker.run(job(folders, "optimized", "decode"))
    finally:
        worker.close()
    assert found.facts == {"spins": "1000"}


def test_the_command_measures_the_engine_and_its_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = ["--suite", "server", "ragged", "--models", "llama-8b", "--arms", "optimized", "served"]
    command.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), *what])
    text = capsys.readouterr().out
    assert "the server adds" in text
    runs = load_runs(tmp_path)
    assert sorted(env["suite"] for env in runs.env.values()) == ["decode", "ragged"]
    assert set(runs.summary["arm"]) == {"optimized", "served"}
    assert all(math.isfinite(value) for value in runs.summary["tpot_p50_s"])


def test_a_profile_names_the_operators_of_every_kind_of_step(capsys: pytest.CaptureFixture[str]) -> None:
    profile.main(
        ["gpt2", "--tiny", "--rows", "1", "3", "--context", "20", "--steps", "4", "--dtype", "fp32", "--device", "cpu"]
    )
    out = capsys.readouterr().out
    kinds = [line.partition(":")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert kinds[-3:] == ["decode, 1 rows of 20 tokens", "decode, 3 rows of 20 tokens", "prompts of 20 tokens"]
    assert out.count("paged_attention") == 3


def test_quantized_arms_are_compared_with_the_plain_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--suite", "quantized", "--models", "llama-8b"])
    runs = load_runs(tmp_path)
    assert {row["arm"]: row["dtype"] for _, row in runs.summary.iterrows()} == {
        "optimized": "fp32",
        "optimized int8": "int8",
        "optimized int4": "int4",
    }
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("llama-8b")]
    assert [sum(word.endswith("x") for word in row) for row in rows] == [0, 2, 2], "ratios to the first"
    found = jobs(Choice(["quantized"], "cuda", "bf16"), dict.fromkeys(presets.PRESETS, ""))
    assert {j.model for j in found} == {"gpt-j-6b", "llama-8b", "gpt-neox-20b"}
    assert [j.dtype for j in found if j.model == "gpt-j-6b"] == ["bf16", "int8", "int4", "fp8"]
    assert "quantized" not in DEFAULT_SUITES["cuda"]
