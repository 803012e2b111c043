from __future__ import annotations

import re
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from panel_checks import check_controls, count_traffic, html_of, nothing_left, until

import miinb
from miinb.errors import MiinbError
from miinb.notebook.bench_panel import ALONE, BenchPanel
from miinb.notebook.panels import panel
from tests.bench.stand_in import Painting, Predicting, StandIn

Make = Callable[..., BenchPanel]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[BenchPanel] = []

    def one(session: Any, *others: Any) -> BenchPanel:
        known = {each.name: each for each in (session, *others)}
        monkeypatch.setitem(vars(miinb), "deployments", lambda: [each.status() for each in known.values()])
        monkeypatch.setitem(vars(miinb), "attach", known.__getitem__)
        made.append(panel(session, "bench"))
        made[-1].workload.new_tokens.value = "2"
        return made[-1]

    yield one
    for shown in made:
        shown.close()


def measured(shown: BenchPanel) -> None:
    shown.run.click()
    assert shown.wait(60)


def test_a_run_has_its_table_its_chart_and_its_file(make: Make, tmp_path: Path) -> None:
    session = StandIn(token_s=0.001)
    shown = make(session)
    shown.workload.loads.value = "1, 2"
    shown.workload.requests.value = "3"
    shown.workload.price.value = "2.5"
    shown.workload.prompt_tokens.value = "16"
    tables: list[str] = []
    shown.output.observe(lambda change: tables.append(change["new"]), "value")
    measured(shown)
    assert "Done: 10 of 10 requests" in shown.status.value
    assert shown.bar.value == shown.bar.max == 10
    assert shown.runs is not None
    assert list(shown.runs.summary["concurrency"]) == [1, 2]
    (env,) = shown.runs.env.values()
    assert env["workload"]["price"] == 2.5
    assert env["workload"]["prompt_tokens"] == 16
    assert len([html for html in tables if "miinb-runs" in html]) >= 2  # each point
    image = re.search(r'<img class="miinb-chart" alt="([^"]+)"[^>]*base64,([^"]+)"', shown.output.value)
    assert image
    assert b64decode(image[2]).startswith(b"\x89PNG")
    assert "tokens/s" in image[1]
    assert "summary.csv" in shown.files.value
    shown.pin()
    assert "miinb-runs" in shown.snapshot().html
    assert "TTFT ms" in shown.snapshot().text
    shown.folder.value = str(tmp_path / "kept")
    shown.saving.click()
    assert shown.wait(10)
    assert "Saved to" in shown.status.value
    assert len(miinb.load_runs(tmp_path / "kept").requests) == 10
    (tmp_path / "file").write_text("mine")
    shown.folder.value = str(tmp_path / "file" / "kept")
    shown.saving.click()
    assert shown.wait(10)
    assert "InvalidValue" in shown.status.value
    assert "file/kept cannot be written: Not a directory." in shown.status.value


def test_rates_seed_and_requests_reach_the_workload(make: Make) -> None:
    shown = make(StandIn())
    shown.workload.load.value = "rate"
    shown.workload.loads.value = "50, 100"
    shown.workload.seed.value = 7
    measured(shown)
    assert shown.runs is not None
    (env,) = shown.runs.env.values()
    assert env["workload"]["rate"] == [50.0, 100.0]
    assert env["workload"]["seed"] == 7


def test_own_prompts(make: Make) -> None:
    session = StandIn()
    shown = make(session)
    shown.workload.loads.value, shown.workload.requests.value, shown.workload.warmup.value = "1", "4", 0
    shown.workload.prompt_tokens.value = "77"  # not of one's own prompts
    shown.workload.prompts.value = "one cat\n\ntwo dogs\n"
    measured(shown)
    assert shown.runs is not None, shown.status.value
    assert shown.runs.requests["prompt_id"].nunique() == 2
    (env,) = shown.runs.env.values()
    assert env["workload"]["prompts"]


def test_a_sweep_with_objectives_and_ranges(make: Make) -> None:
    shown = make(StandIn(token_s=0.001))
    shown.workload.sweep.value = True
    shown.workload.slo.value = "e2e=0.000001"
    shown.workload.prompt_tokens.value, shown.workload.new_tokens.value = "4-8", "1-2"
    measured(shown)
    assert re.search(r"Done: \d+ requests in", shown.status.value)
    assert shown.bar.value == shown.bar.max > 0
    assert shown.runs is not None
    (env,) = shown.runs.env.values()
    assert env["workload"]["sweep"]
    assert shown.runs.summary["slo_share"].iloc[0] == 0.0
    shown.workload.slo.value = "speed=1"
    shown.run.click()
    assert shown.wait(10)
    assert "speed" in shown.status.value


def test_cancel_keeps_what_was_measured(make: Make) -> None:
    session = StandIn(token_s=0.02)
    shown = make(session)
    shown.workload.loads.value = "1"
    shown.workload.requests.value = "500"
    shown.run.click()
    until(lambda: shown.bar.value >= 3)
    assert " of 502 requests · about " in shown.status.value
    assert shown.run.disabled
    assert shown.workload.seed.disabled
    shown.halt.click()
    assert shown.wait(20)
    assert "Cancelled: " in shown.status.value
    assert shown.runs is not None
    assert 3 <= len(shown.runs.requests) < 500
    assert not shown.run.disabled


def test_a_run_stays_until_the_next_one_has_its_first_point(make: Make) -> None:
    shown = make(StandIn())
    shown.workload.loads.value = "1"
    measured(shown)
    first, table = shown.runs, shown.output.value
    assert first is not None
    shown.workload.slo.value = "speed=1"  # found wrong by the worker
    measured(shown)
    assert "speed" in shown.status.value
    assert (shown.runs, shown.output.value) == (first, table)
    assert not shown.saving.disabled
    shown.workload.slo.value = ""
    measured(shown)
    assert shown.runs is not first


def test_a_deployment_that_has_ended_is_told(make: Make) -> None:
    shown = make(StandIn(dies_after=5))
    shown.workload.loads.value = "1"
    shown.workload.requests.value = "60"
    measured(shown)
    assert "Ended early: 14 of 62 requests (9 failed) in " in shown.status.value
    assert "9 of 14 requests failed" in shown.output.value


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("loads", "1,many", "loads: &#x27;1,many&#x27; cannot be read. Write it like 1,4,16."),
        ("loads", "", "cannot be read"),
        ("requests", "<b>", "requests: &#x27;&lt;b&gt;&#x27; cannot be read"),
        ("price", "cheap", "price: &#x27;cheap&#x27;"),
        ("requests", "1", "1 requests cannot keep 4 in flight"),
    ],
)
def test_wrong_fields_are_said(make: Make, field: str, text: str, words: str) -> None:
    shown = make(StandIn())
    getattr(shown.workload, field).value = text
    measured(shown)
    assert words in shown.status.value
    assert not shown.run.disabled
    shown.pin()
    assert "nothing to pin" in shown.status.value
    shown.save()
    assert "no run to save" in shown.status.value


def test_encoders_have_a_batch_size_and_no_new_tokens(make: Make) -> None:
    session = Predicting(name="labels")
    shown = make(session, StandIn(name="stories"))
    assert shown.workload.new_tokens.layout.display == "none"
    assert shown.workload.batch_size.layout.display == ""
    shown.workload.batch_size.value = 3
    shown.workload.loads.value = "1"
    session_calls = session.calls
    shown._sessions["labels"] = session
    measured(shown)
    assert "tokenizer is not on this machine" in shown.status.value
    assert not session_calls
    shown.deployment.value = "stories"
    assert shown.workload.new_tokens.layout.display == ""


def test_two_deployments_do_the_same_work(make: Make) -> None:
    shown = make(StandIn("baseline"), StandIn("optimized"), Predicting(name="labels"))
    assert shown.beside.options == (ALONE, "optimized")
    shown.beside.value = "optimized"
    shown.workload.loads.value = "1"
    measured(shown)
    assert shown.runs is not None
    assert list(shown.runs.summary["arm"]) == ["baseline", "optimized"]
    assert "speed-up" in shown.output.value


def test_pictures_have_fields_of_their_own_and_their_chart(make: Make) -> None:
    baseline, session = Painting("baseline"), Painting()
    shown = make(baseline, session, StandIn(name="stories"))
    fields = shown.workload
    assert fields.num_images_per_prompt.layout.display == ""
    assert {fields.prompt_tokens.layout.display, fields.new_tokens.layout.display} == {"none"}
    shown.beside.value = "optimized"
    assert "stories" not in shown.beside.options
    fields.num_images_per_prompt.value, fields.num_inference_steps.value = "1, 2", "3"
    fields.width.value, fields.loads.value, fields.requests.value = "40", "1", "2"
    measured(shown)
    assert "Done" in shown.status.value
    asked = {"num_inference_steps": 3, "guidance_scale": 7.5, "width": 40}
    assert all(asked.items() <= call.items() and "height" not in call for call in session.calls)
    assert "Images per second" in shown.output.value
    assert "pictures of each arm" in shown.output.value
    fields.num_inference_steps.value = "many"
    shown.run.click()
    assert "num_inference_steps: &#x27;many&#x27; cannot be read" in shown.status.value
    shown.deployment.value = "stories"
    assert fields.num_images_per_prompt.layout.display == "none"


def test_errors_are_a_line_and_no_markup(make: Make) -> None:
    probe = "<img src=x onerror=alert(1)>"
    shown = make(StandIn(name=probe, fail_every=1, error=MiinbError(probe)))
    measured(shown)
    assert "Every request of the benchmark failed" in shown.status.value
    assert "&lt;img" in shown.status.value
    assert "<img" not in html_of(shown)
    shown = make(StandIn(name=probe, fail_every=4, error=MiinbError(probe)), StandIn(name="other"))
    shown.beside.value = "other"  # of one engine: the arms have the names of their deployments
    measured(shown)
    assert "&lt;img" in shown.output.value
    assert shown.output.value.count("<img") == shown.output.value.count('<img class="miinb-chart"') == 1


def test_updates_are_few(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = make(StandIn())
    shown.workload.loads.value = "1"
    shown.workload.requests.value = "400"
    sent = count_traffic(monkeypatch)
    measured(shown)
    assert len(sent) < 120
    assert sum(sent) < 400_000  # the chart is a picture


def test_controls_are_named(make: Make) -> None:
    shown = make(StandIn())
    check_controls(shown, 21)
    assert "Nothing measured yet" in shown.snapshot().html


def test_close_ends_what_runs_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = StandIn(token_s=0.02)
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [session.status()])
    with nothing_left():
        shown = panel(session, "bench")
        shown.run.click()
        until(lambda: session.calls)
        shown.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("miinb-bench")]
