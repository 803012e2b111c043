from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from miinb.bench import charts
from miinb.bench.charts.style import near_ticks, new_axes
from miinb.bench.records import Runs
from miinb.errors import InvalidValue


def make(
    arms: dict[str, float],
    *,
    loads: tuple[int, ...] = (1,),
    n: int = 24,
    price: float | None = 2.0,
    dtypes: tuple[str, ...] = (),
    equal: bool = True,
    run_id: str = "r1",
    **fields: Any,
) -> Runs:
    rows: list[dict[str, Any]] = []
    spread = np.linspace(0.9, 1.1, n)
    for point, load in enumerate(loads):
        for which, (arm, seconds) in enumerate(arms.items()):
            for i in range(n):
                e2e = seconds * spread[i] * (1 + 0.1 * point)
                reference = arm == "baseline"
                rows.append(
                    {
                        "run_id": run_id,
                        "seq": len(rows),
                        "arm": arm,
                        "model": "someone/small",
                        "engine": arm,
                        "dtype": dtypes[which] if dtypes else "fp32",
                        "concurrency": load,
                        "point": point,
                        "prompt_tokens": 10,
                        "output_tokens": 20,
                        "t_rel_s": (i // load) * e2e,
                        "prompt_id": f"p{i}",
                        "ttft_s": e2e / 5,
                        "tpot_s": e2e * 0.8 / 19,
                        "e2e_s": e2e,
                        "queue_s": 0.001,
                        "preprocess_s": 0.001,
                        "model_s": e2e * 0.9,
                        "postprocess_s": 0.001,
                        "equal": None if reference else equal,
                        "equal_share": float("nan") if reference else (1.0 if equal else 0.5),
                        **fields,
                    }
                )
    host = {"cpu": {"model": "Some CPU", "cores": 2, "flags": ["AVX2"]}, "gpus": [], "versions": {"torch": "2.13.0"}}
    facts = {"n_gpus": 0, "weights_bytes": 1 << 28, "kv_cache_bytes": 1 << 27, "peak_mem_bytes": 1 << 29}
    env = {"run_id": run_id, "workload": {"price": price}, "host": host, "arms": dict.fromkeys(arms, facts)}
    return Runs(rows, {run_id: env})


TWO = {"baseline": 2.0, "optimized": 0.5}


def words(ax: Any) -> str:
    return " ".join(text.get_text() for text in ax.texts)


def widths(ax: Any) -> list[float]:
    return [round(float(bar.get_width()), 6) for bar in ax.patches]


def test_latency_bars_start_at_zero_with_ratio_whiskers_and_truth() -> None:
    ax = charts.latency(make(TWO))
    assert widths(ax) == [2.0, 0.5]
    assert all(bar.get_x() == 0 for bar in ax.patches)
    assert ax.get_xlim()[0] == 0
    text = words(ax)
    assert "4.0x" in text
    assert "whiskers p5 to p95; n = 24" in text
    assert "0 failed" in text
    assert "all 24 answers are the same text as baseline's" in text
    assert "Some CPU, 2 cores, AVX2, no GPU · torch 2.13.0 · run r1" in text
    assert ax.patches[0].get_hatch()
    assert not ax.patches[1].get_hatch()


def test_below_a_second_the_axis_is_in_milliseconds() -> None:
    ax = charts.latency(make({"baseline": 0.2, "optimized": 0.1}))
    assert widths(ax) == [200.0, 100.0]
    assert ax.get_xlabel() == "milliseconds"


def test_a_loss_is_said_in_words_and_other_dtypes_are_named() -> None:
    ax = charts.latency(make({"baseline": 0.2, "optimized": 0.4}, dtypes=("fp32", "bf16"), n=8, equal=False))
    text = words(ax)
    assert "0.50x: slower" in text
    assert "smallest to largest (below 20 requests)" in text
    assert "0 of 8 answers are the same text as baseline's; on average the first 50% of the tokens are equal" in text
    assert [label.get_text() for label in ax.get_yticklabels()] == ["baseline (fp32)", "optimized (bf16)"]


def test_throughput_and_cost() -> None:
    runs = make(TWO)
    assert "4.0x" in words(charts.throughput(runs))
    ax = charts.cost(runs)
    assert "$" in words(ax)
    assert "at $2 a machine-hour (given by the user)" in words(ax)
    with pytest.raises(InvalidValue) as failure:
        charts.cost(make(TWO, price=None))
    assert "price" in failure.value.hint


def test_costs_far_apart_are_dots_on_a_log_axis() -> None:
    ax = charts.cost(make({"baseline": 100.0, "optimized": 1.0}))
    assert ax.get_xscale() == "log"
    assert not ax.patches


def test_time_split_adds_up_to_the_whole() -> None:
    runs = make(TWO)
    ax = charts.time_split(runs)
    ends = {round(bar.get_y(), 2): bar.get_x() + bar.get_width() for bar in ax.patches}
    assert sorted(ends.values()) == pytest.approx([0.5, 2.0])
    with pytest.raises(InvalidValue, match="no single requests"):
        charts.time_split(runs.summary)
    parts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert parts == ["queue", "tokenize", "model", "detokenize", "transport and client"]
    ax = charts.time_split(make(TWO, queue_s=0.0, postprocess_s=None))  # in one process nothing waits
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["tokenize", "model", "transport and client"]


def test_groups_of_bars_by_load() -> None:
    ax = charts.latency(make(TWO, loads=(1, 4)))
    assert len(ax.patches) == 4
    assert "concurrency 1" in words(ax)
    assert "concurrency 4" in words(ax)


def test_scaling_has_its_ideal_line_and_frontier_its_loads() -> None:
    runs = make(TWO, loads=(1, 4, 8))
    ax = charts.batch_scaling(runs)
    assert list(ax.lines[0].get_xdata()) == [1, 4, 8]
    ideal = ax.lines[1].get_ydata()
    assert ideal[-1] == pytest.approx(8 * ideal[0])
    frontier = charts.frontier(runs, slo_s=1.0)
    assert "objective 1.00 s" in words(frontier)
    assert frontier.get_xscale() == "log"
    with pytest.raises(InvalidValue, match="one load only"):
        charts.batch_scaling(make(TWO))
    with pytest.raises(InvalidValue, match="same tensor_parallel"):
        charts.parallel_scaling(runs)


def test_labels_of_lines_that_begin_together_stay_above_the_axis_and_beside_it() -> None:
    ax = charts.batch_scaling(make({f"arm {i}": 1e-6 * (1 + i / 100) for i in range(6)}, loads=(1, 4, 16)))
    ax.figure.canvas.draw()
    labels = [text for text in ax.texts if re.fullmatch(r"[\d,]+", text.get_text())]
    assert len(labels) == 6
    inside = ax.get_window_extent()
    for label in labels:
        box = label.get_window_extent()
        assert inside.x0 <= box.x0
        assert inside.y0 <= box.y0


def test_one_load_that_was_measured_is_drawn_without_a_warning() -> None:
    summary = make(TWO, loads=(1, 4)).summary
    summary.loc[summary["concurrency"] == 4, "output_tok_s"] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = charts.batch_scaling(summary)
    assert list(ax.lines[0].get_xdata()) == [1]


def test_a_logarithmic_axis_always_has_several_numbers() -> None:
    """13,205 and 22,607 lie beside one power of two."""
    ax = new_axes(None, 3)
    ax.plot([1, 2], [13205, 22607])
    ax.set_yscale("log", base=2)
    near_ticks(ax.yaxis)
    low, high = ax.get_ylim()
    assert len([tick for tick in ax.get_yticks() if low <= tick <= high]) >= 4
    wide = new_axes(None, 3)
    wide.set_ylim(1, 1024)
    wide.set_yscale("log", base=2)
    before = list(wide.get_yticks())
    near_ticks(wide.yaxis)
    assert list(wide.get_yticks()) == before


def test_parallel_scaling_over_runs() -> None:
    one, two = make({"optimized": 2.0}), make({"optimized": 1.2}, tp=2, run_id="r2")
    ax = charts.parallel_scaling(one + two)
    assert list(ax.lines[0].get_xdata()) == [1, 2]
    assert "tokens/s, 1.67x of 2x" in charts.alt_text(ax)
    first, last = re.search(r"([\d.]+) ([\d.]+) \(1\.67x of 2x\)", words(ax)).groups()
    assert float(last) == pytest.approx(float(first) * 5 / 3, rel=0.01)


def test_arms_that_differ_in_their_devices_are_points_of_one_line() -> None:
    plain, one, two = make({"Hugging Face": 4.0}), make({"1 rank": 2.0}), make({"2 ranks": 1.2}, tp=2)
    for runs, engine in ((plain, "baseline"), (one, "optimized"), (two, "optimized")):
        runs.requests["engine"] = engine
    rows = [row for runs in (plain, one, two) for row in runs.requests.to_dict("records")]
    ax = charts.parallel_scaling(Runs(rows, one.env), by="tp")
    assert sorted(len(line.get_xdata()) for line in ax.lines) == [1, 1, 2, 2]  # each with its ideal one
    for row in rows:
        row["dtype"] = "int8" if row["arm"] == "2 ranks" else "bf16"
    ax = charts.parallel_scaling(Runs(rows, one.env), by="tp")
    assert {len(line.get_xdata()) for line in ax.lines} == {1}


def test_ecdf_ends_at_one_and_marks_what_has_enough_samples() -> None:
    ax = charts.ecdf(make(TWO, n=24), metric="ttft_s")
    assert ax.lines[0].get_ydata()[-1] == 1.0
    assert "p99" not in charts.alt_text(ax)
    assert "p95" in charts.alt_text(ax)
    assert "p99" in charts.alt_text(charts.ecdf(make(TWO, n=100)))


def test_waterfall_memory_and_images() -> None:
    ax = charts.waterfall(make({"baseline": 2.0, "fused": 1.0, "optimized": 0.5}))
    assert [width for width in widths(ax) if width] == [
        2.0,
        1.0,
        0.5,
        0.5,
    ]
    assert "537 MB" in words(charts.memory(make(TWO)))
    with pytest.raises(InvalidValue, match="three or more arms"):
        charts.waterfall(make(TWO))
    with pytest.raises(InvalidValue, match="images"):
        charts.images(make(TWO))
    assert len(charts.images(make(TWO, images=1.0)).patches) == 2


def test_given_axes_are_used_and_nothing_global_changes() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    assert charts.latency(make(TWO), ax=left) is left
    assert charts.throughput(make(TWO).summary, ax=right) is right
    figure.savefig("/dev/null", format="png")
    assert dict(matplotlib.rcParams) == before


def test_charts_do_without_pyplot() -> None:
    probe = (
        "import sys; from miinb.bench import charts; print(*(m in sys.modules for m in ('torch', 'matplotlib.pyplot')))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.split() == ["False", "False"]


def test_a_chart_shows_and_tells_itself(tmp_path: Path) -> None:
    ax = charts.latency(make(TWO))
    data, metadata = ax._repr_mimebundle_()
    assert data["text/plain"] == charts.alt_text(ax) == metadata["image/png"]["alt"]
    assert "baseline: 2.00 s; optimized: 0.500 s  ·  4.0x" in charts.alt_text(ax)
    assert charts.png(ax).startswith(b"\x89PNG")
    assert "<svg" in charts.svg(ax)
    assert ax.figure._repr_mimebundle_()[1] == metadata
    for ending in ("png", "svg", "pdf"):
        assert charts.save(ax, tmp_path / f"chart.{ending}").stat().st_size > 1000


def test_no_text_is_cut_off_or_overlaps_another() -> None:
    runs = make({"baseline": 2.0, "baseline-best": 1.2, "optimized": 2.4}, loads=(1, 4), dtypes=("fp16",) * 3, n=8)
    for kind in ("latency", "throughput", "cost", "time_split", "frontier", "batch_scaling", "ecdf"):
        ax = charts.draw(kind, runs)
        ax.figure.canvas.draw()
        canvas = ax.figure.bbox
        texts = [*(text for text in ax.texts if text.get_visible()), ax.title, ax.xaxis.label]
        if ax.get_yscale() == "linear":  # labels of ticks outside a logarithmic view exist, but are not drawn
            texts += ax.get_yticklabels()
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        for text, box in boxes:
            assert canvas.x0 <= box.x0, (kind, text)
            assert box.x1 <= canvas.x1 + 1, (kind, text)
            assert canvas.y0 <= box.y0, (kind, text)
            assert box.y1 <= canvas.y1 + 1, (kind, text)
        long = [(text, box) for text, box in boxes if len(text) > 4]
        for i, (text, box) in enumerate(long):
            for other, other_box in long[i + 1 :]:
                assert not box.overlaps(other_box), (kind, text, other)


def test_unknown_names_get_the_near_one() -> None:
    with pytest.raises(InvalidValue) as failure:
        charts.draw("latancy", make(TWO))
    assert "latency" in failure.value.hint
    with pytest.raises(InvalidValue) as failure:
        charts.latency(make(TWO), metric="e2e")
    assert "e2e_s" in failure.value.hint
    with pytest.raises(InvalidValue, match="cannot draw a list"):
        charts.latency([1])
