"""Charts of frames that users made: drawn, or refused in words."""

from __future__ import annotations

import math
import warnings

import pandas as pd
import pytest
from matplotlib.figure import Figure

from miinb.bench import charts
from miinb.bench.charts.style import new_axes, plain_log_ticks
from miinb.commands.keeping import CHARTS
from miinb.errors import InvalidValue
from tests.bench.test_records import make

FRAMES = {
    "requests": {"arm": ["a", "b"], "e2e_s": [1.0, 2.0]},
    "no arm": {"e2e_s": [1.0, 2.0]},
    "an arm is missing": {"arm": ["a", None], "e2e_s": [1.0, 2.0]},
    "a number for an arm": {"arm": ["a", 5], "e2e_s": [1.0, 2.0]},
    "a time is text": {"arm": ["a", "b"], "e2e_s": ["x", 2.0]},
    "endless": {"arm": ["a", "b"], "e2e_s": [math.inf, 2.0]},
    "summary": {"arm": ["a", "b", "c"], "e2e_p50_s": [1.0, 2.0, 3.0]},
    "empty": {"arm": [], "e2e_s": []},
    "else": {"x": [1]},
}


@pytest.mark.parametrize("kind", [kind for kind in CHARTS if kind != "images"])
def test_any_frame_is_drawn_or_refused(kind: str) -> None:
    for name, columns in FRAMES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                chart = charts.draw(kind, pd.DataFrame(columns))
                charts.png(chart)
            except InvalidValue:
                drawn = False
            else:
                drawn = True
        if name in ("no arm", "an arm is missing", "a time is text", "empty", "else"):
            assert not drawn, name
        if kind == "latency" and name in ("requests", "summary", "endless", "a number for an arm"):
            assert drawn, name


@pytest.mark.parametrize(("slow", "ticks"), [(1.1, 4), (2.5, 3), (400.0, 3)])
def test_a_logarithmic_axis_has_some_ticks(slow: float, ticks: int) -> None:
    frame = pd.DataFrame({"arm": ["a", "b"], "e2e_p50_s": [1.0, slow], "output_tok_s": [9.0, 5.0]})
    chart = charts.frontier(frame)
    low, high = chart.get_xlim()
    shown = [label.get_text() for at, label in zip(chart.get_xticks(), chart.get_xticklabels(), strict=True)]
    assert len(shown) >= ticks
    assert all(low <= at <= high for at in chart.get_xticks())


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.024, 2.4, "0.05 0.1 0.2 0.5 1 2"),
        (0.25, 95.0, "0.5 1 2 5 10 20 50"),
        (0.008, 4.5, "0.01 0.03 0.1 0.3 1 3"),
        (0.3, 40_000.0, "1 10 100 1,000 10,000"),
        (7.0, 36.0, "12 18 24 30 36"),
    ],
)
def test_a_logarithmic_axis_has_numbers_from_end_to_end(low: float, high: float, ticks: str) -> None:
    ax = new_axes(None, 3)
    plain_log_ticks(ax, low, high)
    assert " ".join(label.get_text() for label in ax.get_xticklabels()) == ticks


def test_a_logarithmic_axis_has_room_for_whiskers() -> None:
    times = [*[0.01] * 12, *[1.0] * 76, *[90.0] * 12]
    ax = charts.latency(pd.DataFrame({"arm": "a", "e2e_s": times}), log=True)
    low, high = ax.get_xlim()
    assert low < 0.01
    assert high > 90 * 2  # the label stands behind the whisker


def test_what_is_no_axes_and_no_column_is_said() -> None:
    frame = pd.DataFrame(FRAMES["requests"])
    for ax in (Figure(), [1]):
        with pytest.raises(InvalidValue, match="is no matplotlib Axes"):
            charts.latency(frame, ax=ax)
    with pytest.raises(InvalidValue, match="is no name of a column"):
        charts.latency(frame, by=["arm", "dtype"])
    twice = pd.DataFrame({"arm": ["a", "b", "c"] * 2, "e2e_p50_s": [1.0] * 6, "concurrency": [1] * 3 + [8] * 3})
    with pytest.raises(InvalidValue, match="concurrency == 8"):
        charts.waterfall(twice)


def test_a_caption_has_the_share_of_cached_tokens_of_all_loads_together() -> None:
    from miinb.bench.charts import frames

    summary = make().summary
    summary = pd.concat([summary.assign(cached_share=0.0, n=30), summary.assign(cached_share=0.8, n=10)])
    (line,) = [line for line in frames.caption(summary, "") if "prefix cache" in line]
    assert "20% of the prompt tokens" in line


def test_a_hint_names_an_option_that_the_chart_has() -> None:
    with pytest.raises(InvalidValue, match="no option 'foo'") as failure:
        charts.draw("latency", make(), foo=1)
    assert failure.value.hint == f"Known: {', '.join(sorted(charts.options_of('latency')))}."


@pytest.mark.parametrize("slo_s", [-1, 0, math.nan, math.inf])
def test_an_objective_is_a_time(slo_s: float) -> None:
    with pytest.raises(InvalidValue, match=r"slo_s: .* is no time above 0"):
        charts.frontier(make(), slo_s=slo_s)
