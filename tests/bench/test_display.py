"""Tables of runs: what names cannot do to them, and what is said of runs that stand together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from stand_in import Painting, StandIn
from test_charts import TWO, make, words

import miinb
from miinb import commands
from miinb.bench import charts
from miinb.bench.display import narrow, notes
from miinb.bench.environment import differences
from miinb.bench.records import Runs
from miinb.bench.runner import bench
from miinb.commands.context import Context
from miinb.errors import InvalidValue

HOSTILE = "red\x1b[31m\nturned\u202e<img src=x onerror=alert(1)>\x07"
CLEAN = "red\ufffd[31m turned\ufffd<img src=x onerror=alert(1)>\ufffd"


def hostile() -> Runs:
    runs = make({"baseline": 2.0, HOSTILE: 1.0}, model=f"owner/{HOSTILE}", dtypes=("fp32", HOSTILE), loads=(1, 4))
    other = make({"baseline": 2.0}, run_id=HOSTILE, model="owner/other")
    other.env[HOSTILE]["name"] = HOSTILE
    runs.env["r1"] |= {"name": HOSTILE, "warnings": [HOSTILE]}
    runs.requests.loc[3, ["status", "error"]] = ["error", f"{HOSTILE}: x"]
    return Runs(runs.requests.to_dict("records"), runs.env) + other


def test_names_do_not_drive_a_terminal_or_break_a_table() -> None:
    runs = hostile()
    for text in (repr(runs), repr(runs.cost()), str(Context(runs={"a": runs}).run("a"))):
        assert CLEAN in text
        assert not {"\x1b", "\u202e", "\x07"} & set(text)
    assert len(repr(runs.cost()).splitlines()) == 1 + 5 + 1


def test_names_are_text_in_html(tmp_path: Path) -> None:
    runs = hostile()
    report = runs.report(tmp_path / "report.html").read_text()
    for page in (runs._repr_html_(), runs.cost()._repr_html_(), report):
        assert "<img src=x" not in page
        assert "red\ufffd[31m turned\ufffd&lt;img" in page
        assert not {"\x1b", "\x07"} & set(page)


def test_the_list_of_runs_has_a_line_for_each() -> None:
    command = commands.find("runs")
    values = commands.parse(command, ["list"], prog="miinb")
    table = commands.execute(Context(runs={HOSTILE: hostile()}), command, values)
    assert not {"\x1b", "\u202e"} & set(str(table))
    assert len(str(table).splitlines()) == 3


def test_the_answers_stand_before_the_times() -> None:
    columns = list(narrow(make(TWO, loads=(1, 4)).summary).columns)
    assert columns[:6] == ["arm", "dtype", "load", "speed-up", "same answers", "n"]


@pytest.mark.parametrize(
    ("seconds", "n", "loses"),
    [(2.06, 24, False), (2.4, 24, True), (2.06, 2, False), (2.4, 2, True)],  # two requests have no interval
)
def test_slower_is_what_the_interval_says(tmp_path: Path, seconds: float, n: int, loses: bool) -> None:
    runs = make({"baseline": 2.0, "optimized": seconds}, n=n)
    report = runs.report(tmp_path / "report.html").read_text()
    assert runs.summary["speedup_hi"].notna().any() == (n > 2)
    for text in (repr(runs), runs._repr_html_(), report, words(charts.latency(runs)), runs.compare().to_string()):
        assert ("slower" in text) == loses
        assert f"{2.0 / seconds:.2f}x" in text


def test_the_notes_say_of_what_speedups_are_and_against_which_arm() -> None:
    plain, ranks = make(TWO), make({"1 rank": 2.0, "2 ranks": 1.0}, run_id="r2")
    replicas = make({"1 replica": 2.0, "2 replicas": 1.0}, run_id="r3")
    assert "speed-up: of the median total time, against baseline" in notes(plain)
    assert "speed-up: of the median total time, against 1 rank" in notes(ranks)
    told = [line for line in notes(ranks + replicas) if line.startswith("speed-up")]
    assert told == [
        "speed-up: of the median total time, against 1 rank (run r2)",
        "speed-up: of the median total time, against 1 replica (run r3)",
    ]


def test_a_report_is_for_light_and_dark_and_asks_no_network(tmp_path: Path) -> None:
    text = make(TWO, loads=(1, 4)).report(tmp_path / "report.html").read_text()
    assert "prefers-color-scheme:dark" in text
    assert 'src="data:image/png;base64,' in text
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text


def elsewhere(run_id: str = "r2", *, torch: str = "2.13.0", cpu: str = "Some CPU", name: str | None = None) -> Runs:
    """A run of the arm "optimized" alone."""
    runs = make({"optimized": 0.5}, run_id=run_id)
    host = runs.env[run_id]["host"]
    runs.env[run_id] |= {
        "name": name,
        "host": {**host, "versions": {"torch": torch}, "cpu": {**host["cpu"], "model": cpu}},
    }
    return Runs(runs.requests.to_dict("records"), runs.env)


def test_runs_of_different_versions_or_machines_say_so() -> None:
    here = make({"baseline": 2.0})
    alike = here + elsewhere()
    assert not [line for line in notes(alike) if "Measured" in line]
    assert "Measured" not in words(charts.latency(alike))
    newer = here + elsewhere(torch="2.14.0", name="newer")
    line = "Measured with different versions: torch 2.13.0 (r1), torch 2.14.0 (newer)."
    assert f"note: {line}" in notes(newer)
    assert line in words(charts.latency(newer)).replace("\n", " ")
    assert "torch 2.13.0/2.14.0" in words(charts.latency(newer))
    moved = here + elsewhere(cpu="Other CPU")
    line = (
        "Measured on different machines: Some CPU, 2 cores, AVX2, no GPU (r1), Other CPU, 2 cores, AVX2, no GPU (r2)."
    )
    assert f"note: {line}" in notes(moved)
    assert line in words(charts.throughput(moved)).replace("\n", " ")
    one = moved.requests[moved.requests["run_id"] == "r1"]
    assert "Measured" not in words(charts.throughput(one))  # what is not drawn does not differ


def test_a_report_says_so_too(tmp_path: Path) -> None:
    both = make({"baseline": 2.0}) + elsewhere(torch="2.14.0")
    assert "Measured with different versions" in both.report(tmp_path / "report.html").read_text()


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert differences({"a": {}, "b": {"python": "3.12", "versions": {"torch": "2"}}}) == []
    assert differences({}) == []
    lines = differences({"a": {"versions": {"torch": "2"}}, "b": {"versions": {"torch": "2", "triton": "3"}}})
    assert lines == ["Measured with different versions: triton none (a), triton 3 (b)."]


def test_equal_names_keep_runs_apart(tmp_path: Path) -> None:
    both = elsewhere("r1", name="nightly") + elsewhere("r2", name="nightly")
    assert list(narrow(both.summary)["run"]) == ["nightly r1", "nightly r2"]
    assert "nightly r2" in repr(both.cost())
    both.save(tmp_path)
    back = miinb.load_runs(tmp_path)
    assert len(back) == 2
    assert len(back.requests) == len(both.requests)
    with pytest.raises(InvalidValue, match="2 runs are called 'nightly'") as failure:
        back.select("nightly")
    assert "r1, r2" in failure.value.hint
    assert len(back.select("r2").requests) == 24
    command = commands.find("runs")
    table = commands.execute(Context(), command, commands.parse(command, ["--load", str(tmp_path)], prog="miinb"))
    assert [row[0] for row in table.rows] == ["r1", "r2"]


def test_a_merge_loses_no_request_and_has_none_twice(tmp_path: Path) -> None:
    whole = elsewhere()
    first = Runs(whole.requests.iloc[:10].to_dict("records"), whole.env)
    last = Runs(whole.requests.iloc[8:].to_dict("records"), whole.env)
    assert sorted((first + last).requests["seq"]) == sorted(whole.requests["seq"])
    assert len((whole + whole).requests) == len(whole.requests)
    whole.save(tmp_path)
    shutil.copytree(tmp_path / "r2", tmp_path / "a copy")
    assert len(miinb.load_runs(tmp_path).requests) == len(whole.requests)


def test_a_name_that_is_taken_gets_a_number() -> None:
    context = Context()
    one, two, three = elsewhere("r1"), elsewhere("r2"), elsewhere("r3")
    assert [context.keep_run("mine", run) for run in (one, two)] == ["mine", "mine-2"]
    assert context.run("mine") is one
    assert [context.keep_run(None, run) for run in (one, two)] == ["run-3", "run-4"]
    context.runs.pop("mine")
    assert context.keep_run(None, three) == "run-5"  # not that of a run that is there


def test_a_run_is_written_below_its_folder_alone(tmp_path: Path) -> None:
    stolen = elsewhere("../stolen")
    with pytest.raises(InvalidValue, match="no name of a folder"):
        stolen.save(tmp_path / "kept")
    assert not (tmp_path / "stolen").exists()
    assert len(miinb.load_runs(stolen.to_jsonl(tmp_path / "x.jsonl"))) == 1
    assert json.loads((tmp_path / "x.jsonl.meta.json").read_text())["env"]


def test_a_text_table_of_several_tasks_is_blank_where_a_task_has_nothing() -> None:
    text = bench(StandIn(), requests=2, concurrency=[1, 2], warmup=1, new_tokens=2, price=1.0, progress=lambda *_: None)
    pictures = bench(
        Painting(), requests=1, num_images_per_prompt=[1, 2], num_inference_steps=2, price=1.0, progress=lambda *_: None
    )
    both = text + pictures
    for shown in (repr(both), repr(both.cost())):
        assert "nan" not in shown.lower()
    command = commands.find("runs")
    table = commands.execute(Context(runs={"text": text}), command, commands.parse(command, ["list"], prog="miinb"))
    assert table.rows[0][1] == (~text.requests["warmup"]).sum() < len(text.requests), "warm-ups do not count"
