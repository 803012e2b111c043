from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from miinb.bench.cost import usd_per_1k_images, usd_per_mtok
from miinb.bench.environment import environment, hardware_words
from miinb.bench.records import DEFINITIONS, REQUEST_COLUMNS, Runs, load_runs
from miinb.bench.speedup import ratio_of_medians, speedup
from miinb.bench.store import append_rows
from miinb.bench.summary import percentile, ratio_text, verdict
from miinb.errors import InvalidValue, MiinbError


def make(
    run_id: str = "r1", *, n: int = 5, arms: tuple[str, ...] = ("baseline", "optimized"), e2e: float = 2.0
) -> Runs:
    rows = []
    for which, arm in enumerate(arms):
        for i in range(n):
            seconds = e2e / (1 + which)
            rows.append(
                {
                    "run_id": run_id,
                    "seq": len(rows),
                    "arm": arm,
                    "model": "m",
                    "dtype": "fp32",
                    "engine": arm,
                    "concurrency": 1,
                    "prompt_id": f"p{i}",
                    "prompt_tokens": 10,
                    "output_tokens": 20,
                    "t_rel_s": i * seconds,
                    "ttft_s": seconds / 5,
                    "tpot_s": seconds / 25,
                    "e2e_s": seconds,
                    "t_submit": "2026-01-31T14:25:01.000+00:00",
                    "queue_s": 0.01,
                    "model_s": seconds * 0.9,
                }
            )
    env = {"run_id": run_id, "name": None, "created": "2026-01-31", "workload": {"price": None}, "arms": {}}
    return Runs(rows, {run_id: env})


def test_the_frame_has_the_whole_schema_and_its_definitions() -> None:
    frame = make().requests
    assert tuple(frame.columns) == REQUEST_COLUMNS
    assert frame.attrs["definitions"] == DEFINITIONS
    assert isinstance(frame["t_submit"].dtype, pd.DatetimeTZDtype)
    assert "env" in make().summary.attrs


def test_summary_counts_rates_and_percentiles() -> None:
    row = make().summary.set_index("arm").loc["baseline"]
    assert row["n"] == 5
    assert row["duration_s"] == pytest.approx(10.0)
    assert row["output_tok_s"] == pytest.approx(10.0)
    assert row["total_tok_s"] == pytest.approx(15.0)
    assert row["e2e_p50_s"] == pytest.approx(2.0)
    assert math.isnan(row["e2e_p95_s"])
    assert math.isnan(row["usd_per_mtok"])


def test_warmup_and_failures_stay_out_of_the_numbers() -> None:
    runs = make()
    runs.requests.loc[0, ["warmup", "e2e_s"]] = [True, 99.0]
    runs.requests.loc[1, ["status", "e2e_s"]] = ["error", 99.0]
    row = runs.summary.set_index("arm").loc["baseline"]
    assert (row["n"], row["n_failed"], row["n_warmup"]) == (3, 1, 1)
    assert row["e2e_max_s"] == pytest.approx(2.0)


@pytest.mark.parametrize(("q", "fewest"), [(50, 1), (90, 10), (95, 20), (5, 20), (99, 100)])
def test_percentiles_need_enough_samples(q: int, fewest: int) -> None:
    assert math.isnan(percentile(pd.Series(np.ones(fewest - 1), dtype=float), q))
    assert percentile(pd.Series(np.ones(fewest)), q) == 1.0


def test_speedup_and_its_interval() -> None:
    rng = np.random.default_rng(1)
    slow, fast = 2 + 0.1 * rng.standard_normal(40), 1 + 0.1 * rng.standard_normal(40)
    ratio, low, high = ratio_of_medians([slow], [fast])
    assert low < ratio < high
    assert 1.8 < low < 2.0 < high < 2.2
    assert ratio_of_medians([slow], [fast]) == (ratio, low, high)
    assert math.isnan(ratio_of_medians([slow[:2]], [fast[:2]])[1])
    together = np.repeat([1.0, 2.0, 4.0], 8)  # three batches of eight: the interval knows three times, not 24
    assert ratio_of_medians([together], [np.ones(24)], block=8)[1:] == (1.0, 4.0)
    assert math.isnan(ratio_of_medians([together[:8]], [np.ones(8)], block=8)[1])
    assert all(math.isnan(value) for value in ratio_of_medians([slow], []))


def test_the_speedup_of_several_passes_is_that_of_their_medians() -> None:
    slow, fast = [np.array([1.0, 1.0, 9.0]), np.array([3.0, 3.0, 3.0])], [np.ones(3), np.ones(3)]
    ratio, low, high = ratio_of_medians(slow, fast)
    assert ratio == 2.0  # of the medians 1 and 3; all six together have 3
    assert low <= ratio <= high


def test_arms_of_different_machines_have_no_ratio() -> None:
    first, second = make("a", arms=("baseline",)), make("b", arms=("optimized",), e2e=1.0)
    for env, cpu in ((first.env["a"], "one"), (second.env["b"], "one")):
        env["host"] = {"cpu": {"model": cpu, "cores": 2}}
    assert (first + second).summary["speedup"].iloc[1] == pytest.approx(2.0)
    second.env["b"]["host"] = {"cpu": {"model": "another", "cores": 2}}
    assert math.isnan((first + second).summary["speedup"].iloc[1])


def queue(rng: np.random.Generator, load: float, count: int) -> pd.DataFrame:
    """Requests of one server that arrive at random and take a second each."""
    arrivals, end, times = np.cumsum(rng.exponential(1 / load, count)), 0.0, []
    for at in arrivals:
        end = max(end, at) + 1.0
        times.append(end - at)
    return pd.DataFrame({"e2e_s": times, "seq": range(count), "pass_no": 0})


@pytest.mark.parametrize(("load", "misses"), [(0.3, 12), (0.7, 24), (0.95, 12)])
def test_equal_queues_are_seldom_told_apart(load: float, misses: int) -> None:
    rng, missed, unknown = np.random.default_rng(2), 0, 0
    for _ in range(100):
        slow, fast = queue(rng, load, 150), queue(rng, load, 150)
        _, low, high = speedup(slow, fast, concurrency=math.nan, rate=load)
        unknown += math.isnan(low)
        missed += low > 1 or high < 1
    assert missed <= misses  # with single requests as blocks: 7, 40 and 70
    assert unknown == 0 if load < 0.5 else unknown < 100


def test_verdicts_say_slower_in_words() -> None:
    assert verdict(5.66, 5.1, 6.0) == "5.7x faster"
    assert verdict(0.9, 0.85, 0.95) == "0.90x: slower"
    assert verdict(1.02, 0.97, 1.08) == "1.02x: no difference shown"
    assert verdict(0.99, 0.89, 1.28) == "0.99x: no difference shown"
    assert verdict(0.97) == "0.97x: no difference shown"
    assert verdict(1.04) == "1.04x: no difference shown"
    assert verdict(0.94) == "0.94x: slower"
    assert verdict(1.06) == "1.06x faster"
    assert verdict(math.nan) == "not comparable"
    assert ratio_text(41.3) == "41x"


def test_compare_names_arms() -> None:
    table = make().compare()
    assert list(table["arm"]) == ["optimized"]
    assert table.loc[0, "speedup"] == pytest.approx(2.0)
    assert table.loc[0, "throughput_ratio"] == pytest.approx(2.0)
    assert make().compare(baseline="optimized").loc[0, "verdict"] == "0.50x: slower"
    with pytest.raises(InvalidValue, match="no arm 'basline'") as failure:
        make().compare(baseline="basline")
    assert failure.value.hint == "Did you mean 'baseline'?"


def test_runs_of_single_arms_are_compared_with_each_other() -> None:
    both = make("a", arms=("baseline",)) + make("b", arms=("optimized",), e2e=1.0)
    assert len(both) == 2
    assert both.compare().loc[0, "speedup"] == pytest.approx(2.0)
    assert len(both + both) == 2
    assert len((both + both).requests) == len(both.requests)
    assert len(both.select("a").requests) == 5


def test_save_and_load_give_the_same_runs(tmp_path: Path) -> None:
    runs = make("a") + make("b")
    runs.save(tmp_path)
    runs.save(tmp_path)  # nothing twice
    back = load_runs(tmp_path)
    assert len(back) == 2
    pd.testing.assert_frame_equal(
        back.requests.reset_index(drop=True), runs.requests.reset_index(drop=True), check_dtype=False
    )
    assert back.env == json.loads(json.dumps(runs.env))
    assert len(load_runs(tmp_path / "a")) == 1


def test_lines_that_are_no_requests_are_left_out(tmp_path: Path) -> None:
    runs = make("a")
    runs.save(tmp_path)
    good = json.loads((tmp_path / "a" / "requests.jsonl").read_text().splitlines()[0])
    odd = [{"a": 1}, {**good, "arm": 5}, {**good, "e2e_s": "x"}, {**good, "t_submit": "noon"}, {**good, "t_submit": 7}]
    with open(tmp_path / "a" / "requests.jsonl", "a") as file:
        file.writelines(json.dumps({**row, "seq": 1000 + i}) + "\n" for i, row in enumerate(odd))
    with pytest.warns(UserWarning, match=r"requests.jsonl: 5 line\(s\) left out that are no requests"):
        back = load_runs(tmp_path)
    assert len(back.requests) == len(runs.requests)


@pytest.mark.parametrize("damage", ["{", "[1]", "\x00", '{"arms": 5}'])
def test_runs_are_read_without_an_environment_that_is_damaged(tmp_path: Path, damage: str) -> None:
    runs = make("a")
    runs.save(tmp_path / "folder")
    (tmp_path / "folder" / "a" / "env.json").write_text(damage)
    file = runs.to_jsonl(tmp_path / "runs.jsonl")
    file.with_name("runs.jsonl.meta.json").write_text(damage if damage[-1] != "}" else "{")
    for path in (tmp_path / "folder", file):
        with pytest.warns(UserWarning, match="read without their environment"):
            back = load_runs(path)
        assert len(back.requests) == len(runs.requests)
        assert len(back.summary) == len(runs.summary)
        assert "a" in repr(back)


def test_a_line_that_a_crash_cut_is_left_out_and_writing_goes_on(tmp_path: Path) -> None:
    make("a").save(tmp_path)
    with open(tmp_path / "a" / "requests.jsonl", "a") as file:
        file.write('{"run_id": "a", "se')
    with pytest.warns(UserWarning, match="1 incomplete line"):
        assert len(load_runs(tmp_path).requests) == 10
    append_rows(tmp_path / "a" / "requests.jsonl", [{"run_id": "a", "seq": 10, "arm": "optimized"}])
    with pytest.warns(UserWarning, match="incomplete"):
        assert len(load_runs(tmp_path).requests) == 11


def test_nothing_to_load_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="no saved runs"):
        load_runs(tmp_path)


def test_csv_has_its_meaning_beside_it(tmp_path: Path) -> None:
    path = make().to_csv(tmp_path / "runs.csv")
    assert len(pd.read_csv(path)) == 10
    meta = json.loads((tmp_path / "runs.csv.meta.json").read_text())
    assert meta["definitions"]["tpot_s"] == DEFINITIONS["tpot_s"]


def test_parquet_or_a_clear_error(tmp_path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        with pytest.raises(MiinbError, match="pyarrow"):
            make().to_parquet(tmp_path / "runs.parquet")
    else:
        assert len(pd.read_parquet(make().to_parquet(tmp_path / "runs.parquet"))) == 10


def test_cost_is_never_guessed() -> None:
    assert usd_per_mtok(1000.0, 3.6, 2) == pytest.approx(2.0)
    assert usd_per_1k_images(1.0, 3.6) == pytest.approx(1.0)
    assert math.isnan(usd_per_mtok(1000.0, None))
    assert math.isnan(usd_per_mtok(0.0, 3.6))


def test_displays_escape_what_models_and_users_write() -> None:
    runs = make(arms=("baseline", "<img src=x onerror=alert(1)>"))
    assert "<img" not in runs._repr_html_()
    assert "&lt;img" in runs._repr_html_()
    text = repr(runs)
    assert "tokens/s" in text
    assert "2.0x" in text


def test_the_environment_names_the_machine_without_torch() -> None:
    facts = environment()
    assert {"miinb", "torch"} <= set(facts["versions"])
    assert facts["cpu"]["cores"] >= 1
    assert facts["cpu"]["model"]
    assert hardware_words({**facts, "gpus": []}).endswith("no GPU")
    two = {"gpus": [{"name": "NVIDIA H100"}, {"name": "NVIDIA H100"}], "driver": "570.1"}
    assert hardware_words(two) == "2 x NVIDIA H100, driver 570.1"
    json.dumps(facts)


def test_a_report_is_one_file(tmp_path: Path) -> None:
    text = make(n=3, arms=("baseline",)).report(tmp_path / "report.html").read_text()
    assert text.count("<img alt=") >= 3
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
