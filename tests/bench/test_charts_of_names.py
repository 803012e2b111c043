from __future__ import annotations

import warnings
from typing import Any

import pytest
from matplotlib.text import Text
from test_charts import make, words
from test_charts_of_quality import judged

from miinb.bench import charts

LONG = "an-arm-with-a-name-of-more-than-sixty-characters-that-goes-on-and-on"
KINDS = ["latency", "throughput", "cost", "memory", "frontier", "ecdf", "batch_scaling", "time_split"]


def legend(kind: str, *arms: str) -> list[str]:
    runs = make({arm: 1.0 + i for i, arm in enumerate(arms)}, loads=(1, 4))
    ax = charts.draw(kind, runs.requests[runs.requests["concurrency"] == 1] if kind == "ecdf" else runs)
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("kind", ["frontier", "ecdf", "batch_scaling"])
def test_a_legend_has_arms_of_any_name(kind: str) -> None:
    assert [text.lstrip("\u200b") for text in legend(kind, "_private", "", "plain")] == [
        "_private",
        "(no name)",
        "plain",
    ]


@pytest.mark.parametrize("kind", ["frontier", "ecdf", "batch_scaling"])
def test_long_names_are_shortened_and_stay_apart(kind: str) -> None:
    one, other = legend(kind, LONG, LONG.replace("sixty", "fifty"))
    assert one == "an-arm-with-a-na…at-goes-on-and-on"[:16] + "…" + LONG[-15:]
    assert other == f"{one} #2"


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_of_a_chart_has_control_characters(kind: str) -> None:
    runs = make({"baseline": 2.0, "red\x1b[31m": 1.0, "turned\u202eemag": 0.5}, loads=(1, 4))
    runs.env["r1"] |= {"warnings": ["w\x1b[0m"], "name": "n\u202e"}
    ax = charts.draw(kind, runs + make({"baseline": 2.0}, loads=(1, 4), run_id="r2"))
    shown = words(ax) + charts.alt_text(ax) + "".join(text.get_text() for text in ax.get_yticklabels())
    shown += "".join(text.get_text() for text in ax.get_legend().get_texts()) if ax.get_legend() else ""
    assert "red\ufffd[31m" in shown
    assert not {"\x1b", "\u202e"} & set(shown)


@pytest.mark.parametrize("kind", KINDS)
def test_long_names_leave_room_for_the_chart(kind: str) -> None:
    ax = charts.draw(kind, make({"baseline": 2.0, LONG: 1.0}, loads=(1, 4)))
    ax.figure.canvas.draw()
    assert ax.get_window_extent().width > 0.35 * ax.figure.bbox.width
    for text in (*ax.get_yticklabels(), *(text for text in ax.texts if text.get_visible())):
        box = text.get_window_extent()
        assert ax.figure.bbox.x0 - 1 <= box.x0, text
        assert box.x1 <= ax.figure.bbox.x1 + 1, text


HOSTILE = (
    "a$b$c",
    "$5 vs $6",
    "x_{1}^2 \\frac",
    "two\nlines",
    "\U0001f680 \u4e2d\u6587",
    "\u05e9\u05dc\u05d5\u05dd",
    "9" * 300,
)


def texts_of(ax: Any) -> list[Any]:
    """Every text that is drawn, however deep it lies."""
    return [text for text in ax.figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("kind", [*KINDS, "waterfall", "quality"])
def test_names_and_prices_are_no_formulas_and_their_characters_no_warning(kind: str) -> None:
    arms = {"baseline": 2.0, **dict.fromkeys(HOSTILE, 1.0)}
    loads = (1,) if kind in ("waterfall", "quality") else (1, 4)
    runs = judged(make(arms, loads=loads, model="own$er/m$o$del", n=4))
    runs.env["r1"] |= {"name": "r$u$n", "warnings": ["it was $1 and $2"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = charts.draw(kind, runs)
        assert "a$b$c" in charts.svg(ax)  # in its description
    with_dollars = [text for text in texts_of(ax) if text.get_text().count("$") > 1]
    assert any("a$b$c" in text.get_text() for text in with_dollars)
    assert kind == "memory" or any("it was $1 and $2" in text.get_text() for text in with_dollars)
    assert not [text for text in with_dollars if text.get_parse_math()]


def test_two_prices_are_read_as_they_are_written() -> None:
    both = make({"baseline": 2.0}, price=5.0) + make({"optimized": 1.0}, price=6.0, run_id="r2")
    (caption,) = [text for text in charts.cost(both).texts if text.get_gid() == "miinb-caption"]
    assert "at $5 and $6 a machine-hour" in caption.get_text()
    assert not caption.get_parse_math()
