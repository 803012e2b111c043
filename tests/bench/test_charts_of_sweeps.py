from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_charts import TWO, make, words
from test_charts_of_quality import judged

from miinb.bench import charts
from miinb.bench.records import Runs

STEPS = {"baseline": 2.0, "fused": 1.5, "graphs": 0.6, "lookup": 0.65, "int8": 0.4}


def swept(loads: tuple[int, ...] = (1, 2, 4, 8)) -> Runs:
    runs = make(TWO, loads=loads)
    found = {"kind": "concurrency", "point": 2, "load": 4, "why": "throughput", "reason": "throughput +1.0%"}
    runs.env["r1"]["saturation"] = {"optimized": found, "baseline": {**found, "why": "limit"}}
    runs.env["r1"]["workload"]["slo"] = {"e2e": 1.0, "ttft": 0.3}
    runs.requests.attrs["env"] = runs.env
    return runs


def rings(ax: object) -> list[tuple[float, float]]:
    lines = [line for line in ax.lines if line.get_markersize() == 13]  # type: ignore[attr-defined]
    return [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def test_the_frontier_marks_saturation_and_the_objective_of_the_runs() -> None:
    runs = swept()
    ax = charts.frontier(runs)
    row = runs.summary[(runs.summary["arm"] == "optimized") & (runs.summary["concurrency"] == 4)].iloc[0]
    (ring,) = rings(ax)
    assert ring == pytest.approx((row["e2e_p50_s"], row["tok_s_per_gpu"]))
    assert "objective 1.00 s" in words(ax)
    assert "a ring marks where the arm is saturated" in words(ax)
    assert "concurrency 4 (saturated)" in charts.alt_text(ax)
    assert "objective 300 ms" in words(charts.frontier(runs, metric="ttft_s"))
    assert "objective" not in words(charts.frontier(runs, metric="tpot_s"))
    assert "objective 2.00 s" in words(charts.frontier(runs, slo_s=2.0))
    assert not rings(charts.frontier(make(TWO, loads=(1, 4))))


def test_labels_of_near_points_do_not_cover_each_other() -> None:
    runs = swept((1, 2, 4, 8))
    runs.requests["e2e_s"] = 1.0
    runs.requests["t_rel_s"] = 0.0
    ax = charts.frontier(runs)
    ax.figure.canvas.draw()
    labels = [text for text in ax.texts if text.get_text() in ("1", "2", "4", "8")]
    boxes = [label.get_window_extent() for label in labels]
    assert labels
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_the_waterfall_goes_down_to_its_floor() -> None:
    runs = make(STEPS)
    ax = charts.waterfall(runs, floor_s=0.25)
    assert "floor 0.250 s" in words(ax)
    assert "dashed: the least that the hardware allows" in words(ax)
    ends = [(round(bar.get_x(), 3), round(bar.get_x() + bar.get_width(), 3)) for bar in ax.patches if bar.get_width()]
    assert ends == [(0, 2.0), (1.5, 2.0), (0.6, 1.5), (0.6, 0.65), (0, 0.4), (0.4, 0.65)]
    assert "0.650 s (+0.050 s)" in words(ax)
    assert "0.400 s (-0.250 s)  ·  5.0x in all" in words(ax)
    assert "floor" not in words(charts.waterfall(runs))
    runs.env["r1"]["arms"] = {"int8": {"floor_s": 0.01}}  # seconds a token, of 20
    runs.requests.attrs["env"] = runs.env
    assert "floor 0.200 s" in words(charts.waterfall(Runs(runs.requests.to_dict("records"), runs.env)))


def test_a_distribution_of_many_loads_shows_some_and_says_so() -> None:
    runs = make(TWO, loads=(1, 2, 4, 8, 16, 32, 64))
    ax = charts.ecdf(runs)
    assert len(ax.get_legend().get_texts()) == 8
    assert "4 of 7 loads are drawn" in words(ax)
    assert ax.get_xscale() == "linear"
    runs.requests.loc[::3, "e2e_s"] = 100.0
    wide = charts.ecdf(runs)
    assert wide.get_xscale() == "log"
    assert "log axis" in wide.get_xlabel()


def test_every_kind_takes_any_frame_and_the_axes_that_it_is_given() -> None:
    runs = judged(make(STEPS, images=1.0))
    many = make(TWO, loads=(1, 4))
    more = make(TWO, run_id="r2")
    more.requests["tp"] = 2
    frames = dict.fromkeys(charts.KINDS, runs) | {"batch_scaling": many, "parallel_scaling": make(TWO) + more}
    for kind, found in frames.items():
        forms = [found, found.requests] + ([] if kind in ("ecdf", "time_split") else [found.summary])
        for form in forms:
            ax = Figure().add_subplot()
            assert charts.draw(kind, form, ax=ax) is ax, kind
            assert charts.alt_text(ax)


def test_captions_stay_inside_the_figure() -> None:
    runs = swept((1, 2, 4, 8, 16))
    cpu = {"model": "Intel(R) Xeon(R) Processor W", "cores": 128, "flags": ["AVX512-BF16", "AMX-BF16", "AMX-INT8"]}
    runs.env["r1"]["host"] = {"cpu": cpu, "gpus": [], "versions": {"torch": "2.13.0+cpu", "transformers": "5.24.0"}}
    ax = charts.frontier(Runs(runs.requests.to_dict("records"), runs.env))
    ax.figure.canvas.draw()
    (caption,) = [text for text in ax.texts if text.get_gid() == "miinb-caption"]
    assert caption.get_window_extent().x1 <= ax.figure.bbox.x1


def test_one_request_and_failures_alone() -> None:
    one = make({"optimized": 1.0}, n=1)
    for kind in ("latency", "throughput", "ecdf", "frontier", "time_split"):
        assert charts.alt_text(charts.draw(kind, one))
    one.requests["status"] = "error"
    failed = Runs(one.requests.to_dict("records"), one.env)
    assert "error" not in repr(failed)
    assert failed.summary.iloc[0]["n_failed"] == 1
    assert np.isnan(failed.summary.iloc[0]["req_s"])
    assert failed.percentiles.empty


def test_runs_that_are_drawn_together_are_called_by_their_names() -> None:
    first, second = make(TWO, loads=(1, 2)), make(TWO, loads=(1, 2), run_id="r2")
    first.env["r1"]["name"], second.env["r2"]["name"] = "calm", "busy"
    both = Runs(first.requests.to_dict("records"), first.env) + Runs(second.requests.to_dict("records"), second.env)
    names = [f"{arm}, {run}" for arm in TWO for run in ("calm", "busy")]
    for ax in (charts.frontier(both), charts.batch_scaling(both)):
        assert sorted(text.get_text() for text in ax.get_legend().get_texts()) == sorted(names)
    memory = charts.memory(both)
    assert sorted(text.get_text() for text in memory.get_yticklabels()) == sorted(names)
    both.env["r2"]["name"] = "calm"
    alike = charts.frontier(Runs(both.requests.to_dict("records"), both.env))
    assert "optimized, calm r2" in [text.get_text() for text in alike.get_legend().get_texts()]


def test_times_far_apart_are_dots_on_a_log_axis_unless_bars_are_wanted() -> None:
    runs = make({"baseline": 100.0, "optimized": 0.001})
    for draw in (charts.latency, charts.throughput):
        assert draw(runs).get_xscale() == "log"
        assert len(draw(runs, log=False).patches) == 2
        assert draw(make({"baseline": 100.0, "optimized": 1.0})).get_xscale() == "linear"


def test_a_label_stands_behind_all_parts_of_its_bar() -> None:
    runs = make(TWO)
    runs.requests["queue_s"] = 1.0  # overlaps with the model's time
    ax = charts.time_split(Runs(runs.requests.to_dict("records"), runs.env))
    ends = {round(bar.get_y() + 0.4, 2): bar.get_x() + bar.get_width() for bar in ax.patches}
    labels = {round(text.xy[1], 2): text.xy[0] for text in ax.texts if text.get_gid() == "miinb-value"}
    assert labels == pytest.approx(ends)
    assert min(ends.values()) > 1.4


def test_arms_differ_in_more_than_color() -> None:
    runs = make({"baseline": 2.0, "baseline-best": 1.5, "one": 1.0, "two": 0.9, "three": 0.8}, loads=(1, 4))
    for ax in (charts.frontier(runs), charts.batch_scaling(runs)):
        lines = [line for line in ax.lines if not line.get_label().startswith("_")]
        looks = {(line.get_marker(), line.get_linestyle()) for line in lines}
        assert len(looks) == 5
    (ax,) = [charts.ecdf(runs.requests[runs.requests["concurrency"] == 1])]
    assert len({(h.get_marker(), h.get_linestyle()) for h in ax.get_legend().legend_handles}) == 5


def test_labels_at_the_ends_of_lines_do_not_cover_each_other() -> None:
    ax = charts.batch_scaling(make({f"arm {i}": 1.0 + i / 100 for i in range(6)}, loads=(1, 4)))
    ax.figure.canvas.draw()
    labels = [text.get_window_extent() for text in ax.texts if "x of 4x)" in text.get_text() and text.get_visible()]
    assert len(labels) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[i + 1 :])


def test_a_row_is_named_by_its_own_dtype() -> None:
    both = make({"optimized": 2.0}, dtypes=("fp32",)) + make({"optimized": 1.0}, dtypes=("bf16",), run_id="r2")
    names = [label.get_text() for label in charts.latency(both).get_yticklabels()]
    assert names == ["optimized (fp32)", "optimized (bf16)"]
    assert [t.get_text() for t in charts.frontier(both).get_legend().get_texts()] == [
        "optimized (fp32), r1",
        "optimized (bf16), r2",
    ]
