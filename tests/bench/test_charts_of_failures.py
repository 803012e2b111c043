from __future__ import annotations

import pytest
from test_charts import TWO, make, words

from miinb.bench import charts
from miinb.bench.records import Runs
from miinb.errors import InvalidValue


def failing(arm: str, load: int, *, status: str = "error", loads: tuple[int, ...] = (1, 4, 8)) -> Runs:
    """Runs of which one arm has no answer at one load."""
    runs = make(TWO, loads=loads)
    mine = (runs.requests["arm"] == arm) & (runs.requests["concurrency"] == load)
    runs.requests.loc[mine, "status"] = status
    return Runs(runs.requests.to_dict("records"), runs.env)


@pytest.mark.parametrize("kind", ["latency", "throughput", "cost", "frontier", "ecdf", "batch_scaling", "time_split"])
def test_failures_of_a_point_that_is_left_out_are_counted_and_named(kind: str) -> None:
    text = words(charts.draw(kind, failing("optimized", 8))).replace("\n", " ")
    assert "24 failed" in text
    assert "Left out: optimized at concurrency 8: all 24 requests failed." in text


def test_failures_are_those_of_the_frame_that_is_drawn() -> None:
    runs = failing("optimized", 8)
    assert "24 failed" in words(charts.latency(runs.summary))
    part = runs.requests[runs.requests["concurrency"] != 8]
    assert "0 failed" in words(charts.latency(part))
    assert "Left out" not in words(charts.latency(part))


def test_requests_that_were_stopped_did_not_fail() -> None:
    text = words(charts.latency(failing("optimized", 8, status="cancelled"))).replace("\n", " ")
    assert "0 failed" in text
    assert "optimized at concurrency 8: all 24 requests were stopped" in text


def test_an_arm_without_answers_leaves_the_others_to_be_drawn() -> None:
    text = words(charts.latency(failing("baseline", 1, loads=(1,)))).replace("\n", " ")
    assert "baseline at concurrency 1: all 24 requests failed" in text


def test_compared_arms_are_drawn_without_their_reference() -> None:
    runs = make({"baseline": 2.0, "fused": 1.0, "optimized": 0.5})
    text = words(charts.latency(runs.requests[runs.requests["arm"] != "baseline"])).replace("\n", " ")
    assert "all 24 answers are the same text as the reference's" in text


def test_a_caption_names_some_of_many_points_that_are_left_out() -> None:
    runs = make({"baseline": 2.0, "optimized": 0.5}, loads=tuple(range(1, 11)), n=2)
    runs.requests.loc[runs.requests["arm"] == "optimized", "status"] = "error"
    text = words(charts.throughput(runs.requests)).replace("\n", " ")
    assert "20 failed" in text
    assert "and 4 more" in text


@pytest.mark.parametrize("kind", ["ecdf", "latency", "frontier"])
def test_an_arm_without_the_metric_is_left_out_by_name(kind: str) -> None:
    runs = make(TWO, loads=(1, 4))
    runs.requests.loc[runs.requests["arm"] == "baseline", "tpot_s"] = float("nan")
    ax = charts.draw(kind, runs.requests, metric="tpot_s")
    assert "Left out: baseline: no time per output token." in words(ax).replace("\n", " ")
    assert "baseline: " not in charts.alt_text(ax).replace("Left out: baseline", "")


@pytest.mark.parametrize("kind", ["ecdf", "latency", "frontier"])
def test_a_metric_that_no_arm_has_is_refused(kind: str) -> None:
    runs = make(TWO)
    runs.requests["tpot_s"] = float("nan")
    with pytest.raises(InvalidValue, match="tpot") as failure:
        charts.draw(kind, runs.requests, metric="tpot_s")
    assert "ttft_s" in failure.value.hint


@pytest.mark.parametrize("kind", ["ecdf", "latency", "frontier"])
def test_a_point_without_the_metric_is_left_out_by_name(kind: str) -> None:
    runs = make(TWO, loads=(1, 4, 8))
    point = (runs.requests["arm"] == "optimized") & (runs.requests["concurrency"] == 4)
    runs.requests.loc[point, "ttft_s"] = float("nan")
    text = words(charts.draw(kind, runs.requests, metric="ttft_s")).replace("\n", " ")
    assert "Left out: optimized at concurrency 4: no time to first token." in text


@pytest.mark.parametrize("kind", ["throughput", "frontier", "batch_scaling"])
def test_a_point_without_a_rate_is_left_out_by_name(kind: str) -> None:
    summary = make(TWO, loads=(1, 4, 8)).summary
    summary.loc[summary["concurrency"] == 8, "output_tok_s"] = float("nan")
    text = words(charts.draw(kind, summary)).replace("\n", " ")
    assert "Left out: baseline at concurrency 8: no output tokens per second; optimized at concurrency 8: no" in text


def test_arms_without_a_price_are_left_out_by_name() -> None:
    both = make({"baseline": 2.0}) + make({"optimized": 1.0}, price=None, run_id="r2")
    text = words(charts.cost(both)).replace("\n", " ")
    assert "Left out: optimized: no cost of a million tokens." in text
