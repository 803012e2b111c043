from __future__ import annotations

import math
from typing import Any

import pytest
from stand_in import StandIn

from miinb.bench import cost
from miinb.bench.objectives import met_rows
from miinb.bench.records import Runs
from miinb.bench.runner import bench
from miinb.bench.summary import failure_kinds
from miinb.config import BenchConfig
from miinb.errors import InvalidValue


def make(times: dict[str, list[float]], *, arm_facts: dict[str, Any] | None = None, **workload: Any) -> Runs:
    """One request after the other: `times` are the seconds by arm, NaN a failed one. TTFT is a tenth, 11 tokens."""
    rows = []
    slo = workload.get("slo") or {}
    for arm, seconds in times.items():
        at = 0.0
        for number, e2e in enumerate(seconds):
            failed = math.isnan(e2e)
            taken = 1.0 if failed else e2e
            rows.append(
                {
                    "run_id": "r",
                    "seq": len(rows),
                    "arm": arm,
                    "engine": arm,
                    "model": "m",
                    "dtype": "bf16",
                    "task": "text-generation",
                    "concurrency": 1,
                    "prompt_tokens": 5,
                    "t_rel_s": at,
                    "e2e_s": taken,
                    "output_tokens": math.nan if failed else 11,
                    "ttft_s": math.nan if failed else e2e / 10,
                    "tpot_s": math.nan if failed else e2e * 0.9 / 10,
                    "status": "error" if failed else "ok",
                    "error": "QueueFull: no place" if failed else None,
                    "slo_met": (not failed and e2e <= slo["e2e"]) if slo else None,
                    "itl_s": None if failed else [e2e * 0.09] * 10,
                    "prompt_id": f"p{number}",
                }
            )
            at += taken
    env = {"run_id": "r", "workload": {"price": None, **workload}, "arms": arm_facts or {}}
    return Runs(rows, {"r": env})


def test_goodput_counts_what_met_every_objective() -> None:
    row = make({"a": [1.0, 2.0, 3.0, 4.0]}, slo={"e2e": 2.0}).summary.iloc[0]
    assert row["slo_share"] == 0.5
    assert row["goodput_req_s"] == pytest.approx(2 / 10)
    assert row["req_s"] == pytest.approx(4 / 10)


def test_failed_requests_miss_the_objectives() -> None:
    row = make({"a": [1.0, math.nan, math.nan, 1.0]}, slo={"e2e": 2.0}).summary.iloc[0]
    assert (row["n"], row["n_failed"], row["failures"]) == (2, 2, "QueueFull 2")
    assert row["slo_share"] == 0.5
    assert row["goodput_req_s"] == pytest.approx(2 / 4)


def test_without_objectives_there_is_no_goodput() -> None:
    row = make({"a": [1.0]}).summary.iloc[0]
    assert math.isnan(row["slo_share"])
    assert math.isnan(row["goodput_req_s"])


def test_what_a_request_does_not_have_it_cannot_miss() -> None:
    runs = make({"a": [1.0, 1.0, math.nan]})
    runs.requests.loc[0, "tpot_s"] = math.nan
    assert list(met_rows(runs.requests, {"tpot": 0.01})) == [True, False, False]
    assert list(met_rows(runs.requests, {"tpot": 0.09, "ttft": 0.1, "e2e": 1.0})) == [True, True, False]


def test_the_runner_judges_each_request() -> None:
    runs = bench(StandIn(fail_every=4), slo="e2e=60", requests=8, warmup=1, new_tokens=2, progress=lambda *_: None)
    warm = runs.requests["warmup"]
    assert runs.requests[warm]["slo_met"].isna().all()
    rest = runs.requests[~warm]
    assert list(rest["slo_met"]) == list(rest["status"] == "ok")
    row = runs.summary.iloc[0]
    assert row["slo_share"] == 0.75
    assert "SLO met" in repr(runs)
    assert "objectives: total at most 60 s" in repr(runs)
    assert "2 (MiinbError 2)" in repr(runs)


@pytest.mark.parametrize(
    ("slo", "says"),
    [
        ("tftt=1", "no objective 'tftt'"),
        ({"itl": 0.1}, "no objective 'itl'"),
        ("ttft=0", "above 0"),
        ("ttft=-1", "above 0"),
        ("ttft=nan", "above 0"),
        ("ttft", "above 0"),
        ("", "give limits"),
        ({}, "give limits"),
        (3, "give limits"),
        ({"e2e": True}, "above 0"),
    ],
)
def test_wrong_objectives_are_refused(slo: object, says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        BenchConfig.parse({"slo": slo})


def test_the_near_objective_is_named() -> None:
    for name, hint in (("tftt", "Did you mean 'ttft'?"), ("e2el", "Use e2e.")):
        with pytest.raises(InvalidValue) as failure:
            BenchConfig.parse({"slo": {name: 1}})
        assert failure.value.hint == hint
    assert BenchConfig.parse({"slo": "ttft=.5, e2e_s=2"}).slo == {"ttft": 0.5, "e2e": 2.0}


def test_kinds_of_failures() -> None:
    assert failure_kinds([]) == ""
    assert failure_kinds(["A: x", "B: y", "A: z", None]) == "A 2, B 1, unknown 1"


@pytest.mark.parametrize(("n", "known"), [(0, 0), (1, 1), (19, 2), (20, 3), (99, 3), (100, 4)])
def test_percentiles_of_few_samples_are_left_empty(n: int, known: int) -> None:
    runs = make({"a": [1.0] * n, "other": [2.0]})
    table = runs.percentiles
    mine = table[(table["arm"] == "a") & (table["measure"] == "e2e_s")]
    assert int(mine[["p50", "p90", "p95", "p99"]].notna().sum().sum()) == known
    assert "p99 100" in table.attrs["few"]
    assert ("ITL" in table.attrs["few"]) is ("itl_s" in set(table["measure"]))


def test_percentiles_are_numpy_s_and_gaps_are_those_of_all_requests() -> None:
    runs = make({"a": [float(i) for i in range(1, 101)]})
    row = runs.summary.iloc[0]
    assert row["e2e_p50_s"] == pytest.approx(50.5)
    assert row["e2e_p90_s"] == pytest.approx(90.1)
    assert row["e2e_p95_s"] == pytest.approx(95.05)
    assert row["e2e_p99_s"] == pytest.approx(99.01)
    assert row["n_gaps"] == 1000
    assert row["itl_p50_s"] == pytest.approx(50.5 * 0.09)
    assert make({"a": [1.0]}).summary.iloc[0]["n_gaps"] == 10


def test_passes_give_medians_and_their_spread() -> None:
    runs = make({"a": [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]})
    runs.requests["pass_no"] = [0, 0, 1, 1, 2, 2]
    runs.requests["block"] = [0, 0, 1, 1, 2, 2]
    row = runs.summary.iloc[0]
    assert (row["passes"], row["n"]) == (3, 6)
    assert row["req_s"] == pytest.approx(0.5)  # of 1, 0.5 and 0.25
    assert row["req_s_spread"] == pytest.approx((1 - 0.25) / 0.5)
    assert row["e2e_p50_s"] == 2.0
    assert row["e2e_p50_s_spread"] == pytest.approx(1.5)
    assert row["e2e_max_s"] == 4.0
    assert "±75.0%" in repr(runs)


GPU = {"a": {"n_gpus": 2}, "b": {"n_gpus": 1}}


def test_the_cheapest_under_a_limit() -> None:
    runs = make({"a": [1.0] * 10, "b": [1.5] * 10}, arm_facts=GPU, price=3.6)
    table = runs.cost()
    assert list(table["arm"]) == ["b", "a"]  # 2 GPUs are dearer than 1.5 times the time
    assert list(table["cheapest"]) == [True, False]
    assert table["cost_usd"].tolist() == pytest.approx([3.6 / 3600 / (11 / 1.5) * 1e6, 3.6 * 2 / 3600 / 11 * 1e6])
    assert table.answer.startswith("Cheapest: b (bf16, 1 GPU) at concurrency 1, $136 per million output tokens")
    fast = runs.cost("e2e=1.2")
    assert fast.iloc[0]["arm"] == "a"
    assert list(fast["within"]) == [True, False]
    assert "Cheapest with total at most 1.2 s for 90% of the requests: a (bf16, 2 GPUs)" in fast.answer
    assert "misses the limits" in repr(fast)
    none = runs.cost({"e2e": 0.5})
    assert not none["cheapest"].any()
    assert none.answer.startswith("No measured load meets total at most 500 ms")
    assert "the nearest is a (bf16, 2 GPUs)" in none.answer  # both miss it always: the faster one


def test_a_share_may_miss() -> None:
    runs = make({"a": [1.0] * 9 + [9.0]}, price=1.0)
    assert runs.cost("e2e=2")["within"].all()
    assert not runs.cost("e2e=2", attain=0.95)["within"].any()
    for wrong in ({"attain": 0}, {"attain": 1.5}, {"price": -1.0}, {"price": math.nan}):
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            runs.cost(**wrong)  # type: ignore[arg-type]


def test_a_price_is_never_built_in() -> None:
    runs = make({"a": [1.0] * 3, "b": [2.0] * 3})
    table = cost.table(runs)
    assert table["cost_usd"].isna().all()
    assert "no price was given" in table.answer
    assert "runs.cost(price=2.5)" in table.answer
    assert not table["cheapest"].any()
    assert list(table["fastest"]) == [True, False]
    assert "fastest per GPU" in repr(table)
    assert "cheapest  " not in repr(table)
    assert "Most throughput per GPU: a " in table.answer
    assert cost.table(runs.requests, price=3.6)["cost_usd"].iloc[0] == pytest.approx(3.6 / 3600 / 11 * 1e6)
    assert runs.requests.attrs["env"]["r"]["workload"]["price"] is None  # the runs stay as they are


def test_nothing_measured_has_no_cost() -> None:
    with pytest.raises(InvalidValue, match="no request succeeded"):
        make({"a": [math.nan]}).cost()


def test_encoder_tasks_cost_by_the_thousand_texts() -> None:
    runs = make({"a": [1.0] * 4}, price=3.6)
    runs.requests["task"], runs.requests["batch_size"] = "text-classification", 8.0
    table = runs.cost()
    assert table["per"].iloc[0] == "thousand texts"
    assert table["cost_usd"].iloc[0] == pytest.approx(3.6 / 3600 / 8 * 1e3)


def test_images_cost_by_the_thousand() -> None:
    runs = make({"a": [2.0] * 4}, price=3.6)
    runs.requests["task"], runs.requests["images"] = "text-to-image", 1.0
    assert runs.cost()["cost_usd"].iloc[0] == pytest.approx(3.6 / 3600 / 0.5 * 1e3)


PLANS = {  # dtype, GPUs: tokens a second of one request, and how that grows with the load
    ("bf16", 1): 40.0,
    ("bf16", 2): 70.0,
    ("bf16", 4): 110.0,
    ("int8", 1): 66.0,
    ("int8", 2): 120.0,
}


def plans(price: float | None) -> Runs:
    """Plans of several precisions and numbers of GPUs at loads of 1, 4 and 16; more in flight is more throughput."""
    found = []
    for (dtype, gpus), speed in PLANS.items():
        run_id = f"{dtype}-{gpus}"
        rows = []
        for point, load in enumerate((1, 4, 16)):
            e2e = 11 / speed * load**0.5
            for number in range(16):
                times = {"e2e_s": e2e, "ttft_s": e2e / 10, "tpot_s": e2e * 0.9 / 10, "t_rel_s": number // load * e2e}
                plan = {"arm": "optimized", "dtype": dtype, "tp": gpus, "task": "text-generation", "model": "m"}
                where = {"run_id": run_id, "seq": len(rows), "point": point, "concurrency": load}
                rows.append({**where, **plan, **times, "prompt_tokens": 5, "output_tokens": 11})
        env = {"run_id": run_id, "workload": {"price": price}, "arms": {"optimized": {"n_gpus": gpus}}}
        found.append(Runs(rows, {run_id: env}))
    merged = found[0]
    for more in found[1:]:
        merged = merged + more
    return merged


def test_which_gpu_count_and_precision_is_the_cheapest_within_a_limit() -> None:
    runs = plans(price=2.0)
    anything = runs.cost()
    assert anything.answer.startswith("Cheapest: optimized (int8, 1 GPU) at concurrency 16, $")
    # 0.4 s at most: int8 on one GPU only up to 4 in flight (0.33 s), on two up to 16 (0.37 s), bf16 on four up to 16
    table = runs.cost("e2e=0.4")
    assert table.answer.startswith(
        "Cheapest with total at most 400 ms for 90% of the requests: optimized (int8, 2 GPUs) at concurrency 16, $"
    )
    best = table.iloc[0]
    assert (best["dtype"], best["n_gpus"], best["cheapest"]) == ("int8", 2, True)
    assert best["cost_usd"] == pytest.approx(2.0 * 2 / 3600 / (16 * 11 / (11 / 120 * 4)) * 1e6)
    assert table["cheapest"].sum() == 1
    assert runs.requests[runs.requests["dtype"] == "bf16"].pipe(cost.table, "e2e=0.4").answer.count("bf16, 4 GPUs") == 1
    assert "plan" in repr(table)
    unpriced = plans(price=None).cost("e2e=0.4")
    assert not unpriced["cheapest"].any()
    assert unpriced.answer.startswith("Most throughput per GPU with total at most 400 ms")
    assert "(int8, 2 GPUs)" in unpriced.answer


def test_what_has_no_price_is_not_cheaper_than_what_has_one() -> None:
    priced, unpriced = make({"a": [2.0] * 3}, price=3.6), make({"b": [1.0] * 3})
    unpriced.requests["run_id"] = "r2"
    both = priced + Runs(unpriced.requests.to_dict("records"), {"r2": {"workload": {"price": None}}})
    table = both.cost()
    assert list(table["arm"]) == ["a", "b"]
    assert list(table["cheapest"]) == [True, False]
    assert table.answer.endswith("Of 1 of 2 rows no price is known.")
    assert both.cost(price=3.6).iloc[0]["arm"] == "b"


def test_replicas_and_machines_without_gpus_are_told() -> None:
    runs = make({"a": [1.0] * 3, "b": [2.0] * 3}, arm_facts={"a": {"n_gpus": 2}}, price=1.0)
    runs.requests["replicas"] = [2, 2, 2, 1, 1, 1]
    table = cost.table(runs.requests)
    assert "a (bf16, 2 GPUs, 2 replicas)" in repr(table)
    assert table.answer.endswith("A machine without a GPU is priced as one GPU.")
