"""What charts are grouped by, their axes, and what they measure."""

from __future__ import annotations

from typing import Any

import pytest
from test_charts import TWO, make, widths, words

from miinb.bench import charts
from miinb.bench.charts import measures, names, scaling
from miinb.bench.records import Runs
from miinb.commands import keeping
from miinb.errors import InvalidValue


def two_dtypes(loads: tuple[int, ...] = (1, 4)) -> Runs:
    """One arm in two runs of different precision, twice as fast in the second."""
    return make({"optimized": 2.0}, loads=loads, dtypes=("fp32",)) + make(
        {"optimized": 1.0}, loads=loads, dtypes=("bf16",), run_id="r2"
    )


def labels(ax: Any) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_bars_are_grouped_by_a_column_and_say_the_rest() -> None:
    ax = charts.latency(two_dtypes(), by="dtype")
    assert labels(ax) == ["optimized, concurrency 1", "optimized, concurrency 4"] * 2
    headings = [text.get_text() for text in ax.texts if text.get_fontsize() == 8.5]
    assert headings == ["fp32", "bf16"]
    assert widths(ax) == [2.0, 2.2, 1.0, 1.1]


def test_groups_of_numbers_stand_in_their_order() -> None:
    ax = charts.throughput(make(TWO, loads=(16, 2)), by="concurrency")
    headings = [text.get_text() for text in ax.texts if text.get_fontsize() == 8.5]
    assert headings == ["concurrency 2", "concurrency 16"]


def test_ratios_are_to_the_same_load_whatever_bars_are_grouped_by() -> None:
    runs = make(TWO, loads=(1, 4))
    ax = charts.latency(runs, by="arm")
    assert labels(ax) == [f"{arm}, concurrency {load}" for arm in TWO for load in (1, 4)]
    values = [text.get_text().rpartition(" ")[2] for text in ax.texts if text.get_gid() == "miinb-value"]
    assert values == ["s", "s", "4.0x", "4.0x"]


@pytest.mark.parametrize("kind", ["frontier", "ecdf"])
def test_lines_are_told_apart_by_a_column_in_the_place_of_the_run(kind: str) -> None:
    runs = two_dtypes(loads=(1, 4) if kind == "frontier" else (1,))
    assert legend(charts.draw(kind, runs, by="dtype")) == ["optimized, fp32", "optimized, bf16"]
    assert legend(charts.draw(kind, runs))[0].endswith("r1")
    assert legend(charts.draw(kind, runs, by="arm")) == legend(charts.draw(kind, runs))


def test_throughput_scales_with_what_is_asked() -> None:
    runs = make(TWO, loads=(1, 4, 8))
    runs.requests["batch_size"] = runs.requests["concurrency"] * 2
    rows = Runs(runs.requests.to_dict("records"), runs.env)
    assert charts.batch_scaling(rows).get_xlabel() == "Batch size (log axis)"
    assert charts.batch_scaling(rows, by="concurrency", log=False).get_xlabel() == "Requests in flight"
    with pytest.raises(InvalidValue, match="does not scale with 'dtype'"):
        charts.batch_scaling(rows, by="dtype")
    with pytest.raises(InvalidValue, match="one load only"):
        charts.batch_scaling(rows, by="rate_rps")
    devices = make({"optimized": 2.0}, tp=1) + make({"optimized": 1.2}, tp=2, run_id="r2")
    assert list(charts.parallel_scaling(devices, by="tp").lines[0].get_xdata()) == [1, 2]
    with pytest.raises(InvalidValue, match="same replicas"):
        charts.parallel_scaling(devices, by="replicas")


@pytest.mark.parametrize("kind", ["latency", "throughput", "cost", "ecdf", "frontier", "time_split"])
def test_what_charts_are_not_grouped_by_is_refused_with_what_they_are(kind: str) -> None:
    with pytest.raises(InvalidValue, match="not grouped by 'dtipe'") as failure:
        charts.draw(kind, make(TWO), by="dtipe")
    assert "dtype" in failure.value.hint
    with pytest.raises(InvalidValue, match="have no rate_rps"):
        charts.draw(kind, make(TWO), by="rate_rps")


@pytest.mark.parametrize(
    ("kind", "option"), [("memory", "by"), ("waterfall", "by"), ("waterfall", "log"), ("memory", "metric")]
)
def test_an_option_that_a_chart_has_not_is_refused_with_those_that_have_it(kind: str, option: str) -> None:
    with pytest.raises(InvalidValue, match=rf"charts.{kind} has no {option}") as failure:
        charts.draw(kind, make(TWO), **{option: True})
    assert "latency" in failure.value.hint
    with pytest.raises(InvalidValue, match="no option 'metrik'") as failure:
        charts.draw("latency", make(TWO), metrik="e2e_s")
    assert "metric" in failure.value.hint


@pytest.mark.parametrize("kind", ["latency", "throughput", "cost", "ecdf"])
def test_a_log_axis_has_no_bars(kind: str) -> None:
    ax = charts.draw(kind, make({"baseline": 3.0, "optimized": 2.0}), log=True)
    assert ax.get_xscale() == "log"
    assert "log axis" in ax.get_xlabel()
    assert not ax.patches
    linear = charts.draw(kind, make({"baseline": 100.0, "optimized": 1.0}), log=False)
    assert linear.get_xscale() == "linear"
    assert "log" not in linear.get_xlabel()


def test_the_frontier_is_drawn_on_a_linear_axis_too() -> None:
    ax = charts.frontier(make(TWO, loads=(1, 4)), log=False)
    assert (ax.get_xscale(), ax.get_xlim()[0]) == ("linear", 0)


def test_a_zero_is_not_drawn_on_a_log_axis() -> None:
    runs = make(TWO, loads=(1, 4))
    runs.requests["slo_met"] = runs.requests["arm"] == "optimized"
    runs = Runs(runs.requests.to_dict("records"), runs.env)
    assert widths(charts.throughput(runs, metric="goodput_req_s"))[0] == 0.0
    with pytest.raises(InvalidValue, match="a value is 0"):
        charts.throughput(runs, metric="goodput_req_s", log=True)
    runs.requests["tpot_s"] = 0.0
    assert charts.frontier(runs.requests, metric="tpot_s").get_xscale() == "linear"
    for kind in ("frontier", "ecdf"):
        with pytest.raises(InvalidValue, match="a time is 0"):
            charts.draw(kind, runs.requests, metric="tpot_s", log=True)


def test_free_machines_cost_nothing() -> None:
    assert widths(charts.cost(make(TWO, price=0.0))) == [0.0, 0.0]


def test_every_metric_is_drawn_with_its_unit() -> None:
    runs = make(TWO, itl_s=[0.01, 0.02], images=1.0, image_s=0.5)
    for metric in measures.METRICS:
        for kind in ("latency", "ecdf", "frontier"):
            ax = charts.draw(kind, runs, metric=metric)
            assert measures.METRICS[metric].lower() in (charts.alt_text(ax) + ax.get_xlabel()).lower()
    assert charts.ecdf(runs, metric="itl_s").get_ylabel() == "Share of gaps"
    ax = charts.throughput(runs, metric="total_tok_s")
    assert ax.get_xlabel() == "Prompt and output tokens per second"
    assert widths(ax)[0] == pytest.approx(runs.summary["total_tok_s"].iloc[0], rel=1e-5)
    assert "images/s" in words(charts.throughput(runs, metric="img_s"))
    scaled = charts.batch_scaling(make(TWO, loads=(1, 4)), metric="req_s")
    assert scaled.get_ylabel() == "Requests per second (log axis)"
    for kind, metric in (("throughput", "e2e_s"), ("cost", "req_s"), ("latency", "img_s"), ("batch_scaling", "x")):
        with pytest.raises(InvalidValue, match=f"metric: there is no .*'{metric}'"):
            charts.draw(kind, make(TWO, loads=(1, 4)), metric=metric)


def test_encoders_scale_in_texts() -> None:
    runs = make(TWO, loads=(1, 4), task="text-classification", batch_size=8)
    assert charts.batch_scaling(runs).get_ylabel() == "Texts per second (log axis)"
    assert charts.frontier(runs).get_ylabel() == "Texts per second"
    assert "million" not in charts.cost(runs, metric="usd_per_1k_texts").get_xlabel()


def test_axes_are_used_whatever_the_options() -> None:
    from matplotlib.figure import Figure

    for kind in ("latency", "throughput", "cost", "ecdf", "frontier", "batch_scaling"):
        by = {"batch_scaling": "concurrency"}.get(kind, "dtype")
        ax = Figure().add_subplot()
        assert charts.draw(kind, make(TWO, loads=(1, 4)), ax=ax, by=by, log=True) is ax


def test_the_words_of_the_command_are_those_of_the_charts() -> None:
    assert set(keeping.METRICS) == {*measures.METRICS, *measures.RATES, *measures.COSTS}
    assert set(keeping.GROUPS) == {*names.BY, *scaling.LOADS, *scaling.DEVICES}


def test_the_fitting_chart() -> None:
    assert charts.fitting(make(TWO)) == "latency"
    assert charts.fitting(make(TWO, loads=(1, 4))) == "frontier"
    assert charts.fitting(make(TWO, images=1.0)) == "images"
