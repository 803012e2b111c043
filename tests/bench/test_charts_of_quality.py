from __future__ import annotations

import copy
import math
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from test_charts import make, words

from miinb.bench import charts
from miinb.bench.records import Runs
from miinb.errors import InvalidValue

#: An arm's seconds, change of perplexity, and bytes.
ARMS = {
    "bf16": (2.0, 0.0, 16e9),
    "fp8": (1.2, 0.002, 8.1e9),
    "int8": (1.15, -0.0012, 8.3e9),
    "int4": (0.8, 0.016, 4.6e9),
}


def judged(runs: Runs, changes: dict[str, float] | None = None, sizes: dict[str, float] | None = None) -> Runs:
    """Runs with an invented perplexity of each arm; the first is what others are compared with."""
    env = copy.deepcopy(runs.env)
    for facts in env.values():
        reference = next(iter(facts["arms"]))
        facts["workload"] |= {"text": "a text", "text_tokens": 5200, "window": 512, "reference": reference}
        for i, arm in enumerate(facts["arms"]):
            change = (changes or {}).get(arm, 0.01 * i)
            found = {"perplexity": 20 * (1 + change), "perplexity_change": change, "same_next": 1 - abs(change)}
            for end, width in (("lo", -0.001), ("hi", 0.001)):
                found[f"perplexity_change_{end}"] = change + width * (arm != reference)
            facts["arms"][arm] = {**facts["arms"][arm], **found, **({"weights_bytes": sizes[arm]} if sizes else {})}
    return Runs(runs.requests.to_dict("records"), env)


def measured(arms: dict[str, tuple[float, float, float]] = ARMS, **fields: Any) -> Runs:
    seconds, changes, sizes = ({arm: row[i] for arm, row in arms.items()} for i in range(3))
    runs = make(seconds, n=4, **{"dtypes": tuple(arms), "equal": None, "equal_share": math.nan, **fields})
    return judged(runs, changes, sizes)


def points(ax: Any) -> list[tuple[float, float]]:
    return [tuple(line.get_xydata()[0]) for line in ax.lines if line.get_markersize() == 8.5]


def entries(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_point_an_arm_with_cost_gain_and_size() -> None:
    runs = measured()
    ax = charts.quality(runs)
    speeds = [1 / value for value in runs.summary["tpot_p50_s"]]
    assert points(ax) == [
        (pytest.approx(speed), pytest.approx(100 * change))
        for speed, (_, change, _) in zip(speeds, ARMS.values(), strict=True)
    ]
    assert entries(ax) == [
        "int8 may lose 0.5%",
        "bf16\nperplexity 20.0 · 16.0 GB",
        "fp8\n+0.20% · 1.67x · 8.10 GB",
        "int8\n-0.12% · 1.74x · 8.30 GB",
        "int4\n+1.6% · 2.5x · 4.60 GB",
    ]
    assert {"bf16", "fp8", "int8", "int4"} <= {text.get_text() for text in ax.texts}
    assert "int4: " in charts.alt_text(ax)
    assert "tokens/s, +1.6%, 2.5x, 4.60 GB" in charts.alt_text(ax)
    text = words(ax).replace("\n", " ")
    assert "Perplexity of a text, 5,200 tokens in windows of 512" in text
    assert "Likeliest next token as unquantized: fp8 99.8%, int8 99.9%, int4 98.4% of the text's places." in text
    assert "not compared" not in text


def test_the_band_is_what_int8_may_lose_and_intervals_are_drawn() -> None:
    ax = charts.quality(measured())
    (band,) = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert (band.get_y(), band.get_height()) == (0, 0.5)
    spans = [tuple(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 2 and line.get_xdata()[0] > 1]
    assert spans == [pytest.approx((0.1, 0.3)), pytest.approx((-0.22, -0.02)), pytest.approx((1.5, 1.7))]
    low, high = ax.get_ylim()
    assert low < -0.22
    assert high > 1.7
    assert ax.get_xlim()[0] == 0


def test_one_arm_and_arms_that_failed() -> None:
    assert points(charts.quality(measured({"bf16": ARMS["bf16"]}))) == [(pytest.approx(19 / 1.6), 0)]
    runs = measured()
    rows, env = runs.requests.to_dict("records"), runs.env
    for row in rows:
        if row["arm"] == "int8":
            row |= {"status": "error", "error": "It broke."}
    env["r1"]["arms"]["int8"] = {"error": "It broke."}
    env["r1"]["warnings"] = ["int8: It broke"]
    ax = charts.quality(Runs(rows, env))
    assert len(points(ax)) == 3
    assert "int8 at concurrency 1: all 4 requests failed" in words(ax)
    assert "Note: int8: It broke." in words(ax)


def test_an_arm_without_a_reference_is_refused_and_one_without_perplexity_left_out() -> None:
    runs = measured()
    for facts in runs.env["r1"]["arms"].values():
        del facts["perplexity_change"]
    with pytest.raises(InvalidValue, match="no perplexity_change") as failure:
        charts.quality(Runs(runs.requests.to_dict("records"), runs.env))
    assert "unquantized arm failed" in failure.value.hint
    some = measured()
    del some.env["r1"]["arms"]["fp8"]["perplexity_change"]
    assert "fp8: no perplexity to compare with" in words(
        charts.quality(Runs(some.requests.to_dict("records"), some.env))
    )
    with pytest.raises(InvalidValue):
        charts.quality(make({"baseline": 1.0}))


def test_models_side_by_side_each_against_its_own() -> None:
    other = {arm: (2 * seconds, 2 * change, size) for arm, (seconds, change, size) in ARMS.items()}
    ax = charts.quality(measured() + measured(other, run_id="r2", model="someone/big"))
    assert entries(ax)[4::4] == ["int4, small\n+1.6% · 2.5x · 4.60 GB", "int4, big\n+3.2% · 2.5x · 4.60 GB"]


def test_names_of_any_length_leave_room_and_stay_apart() -> None:
    long = "an-arm-with-a-name-of-more-than-sixty-characters-that-goes-on-and-on"
    arms = {"bf16": ARMS["bf16"], **{f"{long}{i}": (1 - i / 1e3, 0.01, 1e9) for i in range(9)}}
    ax = charts.quality(measured(arms))
    ax.figure.canvas.draw()
    assert ax.get_window_extent().width > 0.35 * ax.figure.bbox.width
    drawn = [text for text in ax.texts if text.get_visible() and text.get_gid() != "miinb-caption"]
    boxes = [text.get_window_extent() for text in drawn if text.get_text().startswith(("bf16", "an-arm"))]
    assert len(boxes) > 2
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    legend = ax.get_legend().get_window_extent()
    assert legend.x1 <= ax.figure.bbox.x1 + 1
    assert legend.height <= ax.figure.bbox.height


def test_a_summary_that_a_user_made_is_drawn() -> None:
    frame = pd.DataFrame(
        {"arm": ["a", "b"], "e2e_p50_s": 1.0, "tpot_p50_s": [0.1, 0.05], "perplexity_change": [0, 0.1]}
    )
    ax = charts.quality(frame, ax=Figure().add_subplot())
    assert points(ax) == [(10, 0), (20, pytest.approx(10))]
    assert entries(ax)[1:] == ["a\n+0.00%", "b\n+10.0%"]


def test_a_label_is_inside_the_plot_however_slow_its_arm() -> None:
    ax = charts.quality(measured({"bf16": ARMS["bf16"], "int4": (100.0, 0.3, 1e9)}))
    ax.figure.canvas.draw()
    (label,) = [text for text in ax.texts if text.get_text() == "int4"]
    assert label.get_window_extent().x0 >= ax.get_window_extent().x0
