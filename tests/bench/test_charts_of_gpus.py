from __future__ import annotations

from typing import Any

import pytest
from test_charts import TWO, make, widths, words

from miinb.bench import charts
from miinb.bench.records import Runs


def on_gpus(runs: Runs, **counts: int) -> Runs:
    """The runs as if each arm had run on so many GPUs."""
    for env in runs.env.values():
        env["arms"] = {arm: {**facts, "n_gpus": counts.get(arm, 0)} for arm, facts in env["arms"].items()}
    return Runs(runs.requests.to_dict("records"), runs.env)


def drawn(kind: str, ax: Any) -> float:
    """The throughput that is drawn of the arm "optimized"."""
    if kind == "frontier":
        return float(next(line for line in ax.lines if line.get_label() == "optimized").get_ydata()[0])
    return widths(ax)[1]


COLUMNS = {
    "throughput": ("output_tok_s", "tok_s_per_gpu"),
    "frontier": ("output_tok_s", "tok_s_per_gpu"),
    "images": ("img_s", "img_s_per_gpu"),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_throughput_is_per_gpu_where_all_arms_have_gpus_alone(kind: str) -> None:
    whole, a_gpu = COLUMNS[kind]
    for counts, column in (({"optimized": 4}, whole), ({"optimized": 4, "baseline": 1}, a_gpu), ({}, whole)):
        runs = on_gpus(make(TWO, images=1.0), **counts)
        ax = charts.draw(kind, runs)
        assert drawn(kind, ax) == pytest.approx(runs.summary[column].iloc[1], rel=1e-5), counts
        label = ax.get_ylabel() if kind == "frontier" else ax.get_xlabel()
        assert ("per GPU" in label) == (column == a_gpu), counts


def test_texts_of_encoders_are_per_gpu_where_all_arms_have_gpus_alone() -> None:
    runs = on_gpus(make(TWO, task="text-classification", batch_size=8), optimized=4)
    assert widths(charts.throughput(runs))[1] == pytest.approx(runs.summary["seq_s"].iloc[1], rel=1e-5)


def test_the_price_is_of_what_each_arm_has() -> None:
    assert "a machine-hour (of arms with GPUs a GPU-hour)" in words(charts.cost(on_gpus(make(TWO), optimized=4)))
    assert "at $2 a GPU-hour (given" in words(charts.cost(on_gpus(make(TWO), optimized=4, baseline=1)))


@pytest.mark.parametrize("kind", ["cost", "throughput"])
def test_bars_of_runs_on_other_numbers_of_gpus_say_how_many(kind: str) -> None:
    first, second, third = (on_gpus(make({"optimized": 2.0 / n}, run_id=f"r{n}"), optimized=n) for n in (1, 2, 4))
    ax = charts.draw(kind, first + second + third)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["optimized, 1 GPU", "optimized, 2 GPUs", "optimized, 4 GPUs"]
    assert "optimized, 4 GPUs: " in charts.alt_text(ax)
    alike = charts.draw(kind, on_gpus(make(TWO), optimized=2, baseline=2))
    assert [label.get_text() for label in alike.get_yticklabels()] == list(TWO)
    mixed = charts.draw(kind, on_gpus(make(TWO), optimized=2))
    assert [label.get_text() for label in mixed.get_yticklabels()] == ["baseline, no GPU", "optimized, 2 GPUs"]
