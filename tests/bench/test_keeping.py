from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from stand_in import StandIn
from test_records import make

import miinb
from miinb import commands
from miinb.bench import charts, runner
from miinb.commands.context import Context
from miinb.commands.settings import Settings
from miinb.errors import InvalidValue, MiinbError


def do(context: Context, *words: str, body: str | None = None) -> Any:
    command = commands.find(words[0])
    return commands.execute(context, command, commands.parse(command, words[1:], prog=context.prog), body)


@pytest.fixture
def context() -> Context:
    return Context(prog="%mii", runs={"a": make("a"), "b": make("b")})


def test_runs_are_listed_shown_merged_and_dropped(context: Context) -> None:
    assert [row[0] for row in do(context, "runs").rows] == ["a", "b"]
    assert do(context, "runs", "show", "a") is context.runs["a"]
    assert len(do(context, "runs", "show", "a", "b")) == 2
    assert len(do(context, "runs", "merge", "a", "b")) == 2
    assert list(context.runs) == ["a", "b", "a+b"]
    do(context, "runs", "drop", "a", "b")
    assert list(context.runs) == ["a+b"]
    with pytest.raises(InvalidValue, match="no run 'c'"):
        do(context, "runs", "drop", "c")
    with pytest.raises(InvalidValue, match="two runs or more"):
        do(context, "runs", "merge", "a+b")


def test_runs_are_saved_and_found_again(context: Context, tmp_path: Path) -> None:
    do(context, "runs", "save", "a", "b", "--to", str(tmp_path))
    other = Context(prog="miinb")
    assert [row[0] for row in do(other, "runs", "--load", str(tmp_path)).rows] == ["a", "b"]
    assert len(do(other, "runs", "show", "b", "--load", str(tmp_path))) == 1
    assert len(do(other, "runs", "load", "mine", "--to", str(tmp_path))) == 2
    assert len(do(other, "runs", "load", str(tmp_path))) == 2
    assert len(do(other, "runs", "load", "again", str(tmp_path))) == 2
    assert list(other.runs) == ["mine", tmp_path.stem, "again"]
    with pytest.raises(InvalidValue, match="no runs here") as failure:
        do(Context(prog="miinb"), "runs", "show")
    assert "--save FOLDER" in failure.value.hint


@pytest.mark.parametrize(("name", "read"), [("x.jsonl", lambda p: pd.read_json(p, lines=True)), ("x.csv", pd.read_csv)])
def test_runs_are_exported(context: Context, tmp_path: Path, name: str, read: Any) -> None:
    do(context, "runs", "export", "a", "b", "--to", str(tmp_path / name))
    assert len(read(tmp_path / name)) == 20
    assert set(json.loads((tmp_path / f"{name}.meta.json").read_text())["env"]) == {"a", "b"}
    with pytest.raises(InvalidValue, match="which format"):
        do(context, "runs", "export", "--to", str(tmp_path / "x.xlsx"))


def test_json_lines_are_read_back(tmp_path: Path) -> None:
    runs = make("a") + make("b")
    back = miinb.load_runs(runs.to_jsonl(tmp_path / "runs.jsonl"))
    pd.testing.assert_frame_equal(back.requests, runs.requests.reset_index(drop=True), check_dtype=False)
    assert back.env == json.loads(json.dumps(runs.env))
    (tmp_path / "runs.jsonl.meta.json").unlink()
    assert len(miinb.load_runs(tmp_path / "runs.jsonl")) == 2
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    for path in (tmp_path / "other.jsonl", runs.to_csv(tmp_path / "runs.csv")):
        with pytest.raises(InvalidValue):
            miinb.load_runs(path)


def test_the_answer_on_cost_is_a_command(context: Context) -> None:
    table = do(context, "runs", "cost", "a", "--slo", "e2e=1.5", "--price", "3.6", "--attain", "1")
    assert table.answer.startswith("Cheapest with total at most 1.5 s for 100% of the requests: optimized")
    context.settings = commands.Settings(price_usd_per_gpu_hour=2.0)
    assert "$" in do(context, "runs", "cost").answer
    with pytest.raises(InvalidValue, match="no objective 'e2f'"):
        do(context, "runs", "cost", "--slo", "e2f=1")


def test_a_bench_by_command_with_all_that_is_new(tmp_path: Path) -> None:
    session = StandIn(name="one")
    session.state = "ready"
    session.bench = lambda **fields: runner.bench(session, progress=lambda *_: None, **fields)
    context = Context(prog="%mii", sessions={"one": session})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "first"}\n{"prompt": "second"}\n')
    words = ["bench", "-d", "one", "--prompts", str(prompts), "--new-tokens", "2-4", "--repeat", "2", "--warmup", "0"]
    words += ["--slo", "e2e=60", "--requests", "2", "--run", "mine", "--save", str(tmp_path / "kept")]
    runs = do(context, *words, "--report", str(tmp_path / "report.html"))
    assert session.prompts == ["first", "second"] * 2
    assert runs.summary.iloc[0]["slo_share"] == 1.0
    assert miinb.load_runs(tmp_path / "kept").select("mine").requests["itl_s"].notna().all()
    assert "SLO met" in (tmp_path / "report.html").read_text()
    with pytest.raises(InvalidValue, match="in the cell and in a file"):
        do(context, *words, body="hello")
    do(context, "bench", "-d", "one", "--sweep", "concurrency", "--sweep-limit", "1", "--new-tokens", "2")
    assert list(context.runs) == ["mine", "run-2"]


def test_plots_take_a_metric_and_a_folder(context: Context, tmp_path: Path) -> None:
    context.runs["a"].save(tmp_path / "kept")
    target = tmp_path / "chart.svg"
    do(
        Context(prog="miinb"),
        "plot",
        "latency",
        "--load",
        str(tmp_path / "kept"),
        "--metric",
        "ttft_s",
        "--save",
        str(target),
    )
    assert "first token" in target.read_text()
    with pytest.raises(InvalidValue, match="memory has no metric"):
        do(context, "plot", "memory", "--metric", "ttft_s")


def test_plots_are_grouped_and_have_log_axes(context: Context) -> None:
    figure = do(context, "plot", "throughput", "--run", "a,b", "--by", "run", "--log", "--metric", "req_s")
    (ax,) = figure.axes
    assert ax.get_xlabel() == "Requests per second (log axis)"
    assert [text.get_text() for text in ax.texts if text.get_fontsize() == 8.5] == ["a", "b"]
    assert do(context, "plot", "frontier", "--no-log").axes[0].get_xscale() == "linear"
    with pytest.raises(InvalidValue, match="waterfall has no by") as failure:
        do(context, "plot", "waterfall", "--by", "dtype")
    assert "throughput" in failure.value.hint
    with pytest.raises(InvalidValue, match="'dtipe' is none of"):
        do(context, "plot", "latency", "--by", "dtipe")


class Shown:
    def __init__(self) -> None:
        self.things: list[Any] = []

    def show(self, thing: Any, *, markdown: bool = False) -> None:
        self.things.append(thing)


def test_a_bench_draws_the_chart_that_fits(measured: StandIn) -> None:
    context = Context(prog="%mii", sessions={"one": measured}, screen=Shown())  # type: ignore[arg-type]
    runs = do(context, *BENCH, "--plot", "--concurrency", "1,2")
    (figure,) = context.screen.things  # type: ignore[attr-defined]
    assert "Throughput against latency" in charts.alt_text(figure)
    assert len(runs.summary) == 2
    assert "image/png" in figure._repr_mimebundle_()[0]
    with pytest.raises(InvalidValue, match="needs a notebook"):
        do(Context(prog="miinb", sessions={"one": measured}), *BENCH, "--plot")
    assert len(measured.calls) == 4


def test_two_deployments_are_compared_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = {"one": StandIn("baseline", name="one"), "two": StandIn(name="two")}
    for session in sessions.values():
        session.state = "ready"  # type: ignore[attr-defined]
    monkeypatch.setitem(vars(miinb), "compare", lambda both, **f: runner.compare(both, progress=lambda *_: None, **f))
    context = Context(prog="%mii", sessions=sessions, screen=Shown())  # type: ignore[arg-type]
    do(context, "compare", "one", "two", *BENCH[3:], "--plot")
    (figure,) = context.screen.things  # type: ignore[attr-defined]
    assert "baseline: " in charts.alt_text(figure)


def test_a_report_begins_with_its_answers_and_escapes_what_models_say(tmp_path: Path) -> None:
    runs = make("a", n=3)
    runs.env["a"]["workload"]["price"] = 2.0
    runs.env["a"]["arms"] = {"optimized": {"model": "<script>alert(1)</script>", "load_s": 1.5, "peak_mem_bytes": 5e8}}
    runs.env["a"]["name"] = "<b>mine</b>"
    runs.requests.loc[0, ["status", "error"]] = ["error", "<img src=x>: <script>"]
    text = runs.report(tmp_path / "report.html").read_text()
    assert "optimized: 2.0x faster" in text
    assert "Cheapest: optimized" in text
    assert "500 MB" in text
    assert "<script" not in text
    assert "<b>mine" not in text
    assert "<img src=x" not in text
    assert text.index("faster") < text.index("<table")


def test_a_report_of_failures_alone_is_still_a_report(tmp_path: Path) -> None:
    runs = make("a", n=2)
    runs.requests["status"], runs.requests["error"] = "error", "QueueFull: no place"
    runs.env["a"]["workload"] = {"price": 1.0, "slo": {"e2e": 1.0}}
    runs.requests["slo_met"] = False
    text = runs.report(tmp_path / "report.html").read_text()
    assert "2 (QueueFull 2)" in text
    assert "Cheapest" not in text


@pytest.fixture
def measured() -> StandIn:
    session = StandIn(name="one")
    session.state = "ready"
    session.bench = lambda **fields: runner.bench(session, progress=lambda *_: None, **fields)
    return session


BENCH = ("bench", "-d", "one", "--requests", "2", "--new-tokens", "2", "--warmup", "0")


@pytest.mark.parametrize(
    "words",
    [("--save", "{file}"), ("--report", "{file}/x.html"), ("--report", "{folder}"), ("--report", "x.pdf")],
)
def test_nothing_is_measured_that_cannot_be_kept(measured: StandIn, tmp_path: Path, words: tuple[str, str]) -> None:
    (tmp_path / "file").write_text("mine")
    path = words[1].format(file=tmp_path / "file", folder=tmp_path)
    context = Context(prog="miinb", sessions={"one": measured})
    with pytest.raises(InvalidValue, match=rf"{path}.*(cannot be written: |is not known)"):
        do(context, *BENCH, words[0], path)
    assert not measured.calls
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_report_is_html(measured: StandIn, tmp_path: Path) -> None:
    runs = measured.bench(requests=2, new_tokens=2, warmup=0)
    with pytest.raises(InvalidValue, match=r"x.pdf: the ending '.pdf' is not known") as refused:
        runs.report(tmp_path / "x.pdf")
    assert "Use .html or .htm." in refused.value.hint
    assert not list(tmp_path.iterdir())
    assert runs.report(tmp_path / "new" / "x.HTM").exists()


def test_a_run_that_could_not_be_written_is_shown(
    measured: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    context = Context(prog="miinb", sessions={"one": measured})
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(MiinbError, match=r"report.html cannot be written: No space left") as failure:
            do(context, *BENCH, "--report", str(tmp_path / "report.html"))
    assert "FOLDER" not in failure.value.hint
    assert "tokens/s" in capsys.readouterr().out
    assert list(context.runs) == ["run-1"]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_half_of_a_run(
    measured: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, rows: object) -> None:
        path.write_text('{"run_id"')
        raise OSError(28, "No space left on device")

    context = Context(prog="miinb", sessions={"one": measured})
    with monkeypatch.context() as patch:
        patch.setattr("miinb.bench.store.append_rows", full)
        with pytest.raises(MiinbError, match=r"cannot be written: No space left"):
            do(context, *BENCH, "--save", str(tmp_path))
    assert not list(tmp_path.iterdir())
    do(context, "runs", "save", "--to", str(tmp_path))
    (kept,) = tmp_path.iterdir()
    size = (kept / "requests.jsonl").stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr("miinb.bench.store.append_rows", full)
        with pytest.raises(MiinbError):
            do(context, "runs", "save", "--to", str(tmp_path))
    assert kept.is_dir()  # a folder that was there before stays, whatever happens
    assert size


def test_folders_are_made_and_what_cannot_be_is_said(context: Context, tmp_path: Path) -> None:
    do(context, "runs", "report", "a", "--to", str(tmp_path / "new" / "report.html"))
    do(context, "runs", "export", "a", "--to", str(tmp_path / "more" / "a.csv"))
    assert (tmp_path / "new" / "report.html").is_file()
    (tmp_path / "file").write_text("mine")
    below = str(tmp_path / "file" / "x")
    for words in (
        ("runs", "save", "a", "--to", below),
        ("runs", "report", "a", "--to", f"{below}.html"),
        ("runs", "export", "a", "--to", f"{below}.csv"),
        ("runs", "export", "a", "--to", f"{below}.jsonl"),
        ("plot", "latency", "--run", "a", "--save", f"{below}.png"),
    ):
        with pytest.raises(InvalidValue, match=r"file/x.* cannot be written: Not a directory"):
            do(context, *words)
    with pytest.raises(InvalidValue, match=r"a\.xyz: there are no charts of the kind 'xyz'") as failure:
        do(context, "plot", "latency", "--run", "a", "--save", str(tmp_path / "a.xyz"))
    assert ".svg" in failure.value.hint


def test_what_is_kept_in_a_folder_alone_is_not_dropped(context: Context, tmp_path: Path) -> None:
    context.runs["a"].save(tmp_path)
    other = Context(settings=Settings(run_dir=str(tmp_path)))
    for words in ([], ["a"]):
        with pytest.raises(InvalidValue, match="what is saved is not in memory"):
            do(other, "runs", "drop", *words)
