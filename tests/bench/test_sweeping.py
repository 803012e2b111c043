from __future__ import annotations

import math

import pytest
from stand_in import Predicting, StandIn

from miinb.bench.runner import bench, compare
from miinb.bench.sweeping import Sweep, saturation_words
from miinb.errors import InvalidValue, MiinbError


def run(sweep: Sweep, curves: dict[str, list[float]], shares: dict[str, list[float]] | None = None) -> list[float]:
    """Feed a sweep with throughputs by point; the loads that it asked for."""
    loads = []
    for point, load in enumerate(sweep.loads()):
        loads.append(load)
        for arm, curve in curves.items():
            sweep.seen(arm, point, load, curve[point], (shares or {}).get(arm, [math.nan] * 20)[point])
    return loads


def test_a_sweep_stops_where_throughput_gains_less_than_five_percent() -> None:
    sweep = Sweep("concurrency", 1, 256, ["a"])
    assert run(sweep, {"a": [100, 200, 300, 314, 9999]}) == [1, 2, 4, 8]
    assert sweep.saturation["a"] == {
        "kind": "concurrency",
        "point": 2,
        "load": 4,
        "why": "throughput",
        "reason": "throughput +4.7% at concurrency 8",
    }
    assert saturation_words("a", sweep.saturation["a"]).startswith("a: saturated at concurrency 4 (throughput +4.7%")


def test_exactly_five_percent_is_still_worth_it() -> None:
    sweep = Sweep("concurrency", 1, 4, ["a"])
    assert run(sweep, {"a": [100.0, 105.1, 111.0]}) == [1, 2, 4]
    assert sweep.saturation["a"]["why"] == "limit"


def test_all_arms_get_the_same_points_until_the_last_one_is_saturated() -> None:
    sweep = Sweep("concurrency", 2, 1000, ["slow", "fast"])
    loads = run(sweep, {"slow": [10, 10, 11, 11.5, 12], "fast": [10, 20, 40, 80, 80]})
    assert loads == [2, 4, 8, 16, 32]
    assert sweep.saturation["slow"]["load"] == 2  # less than 5 % for each doubling after it
    assert sweep.saturation["fast"]["load"] == 16


def test_a_load_that_was_bad_luck_is_seen_by_those_after_it() -> None:
    sweep = Sweep("concurrency", 1, 1000, ["slow", "fast"])
    loads = run(sweep, {"slow": [10, 9, 30, 30, 30], "fast": [10, 20, 40, 80, 80]})
    assert loads == [1, 2, 4, 8, 16]
    assert (sweep.saturation["slow"]["load"], sweep.saturation["slow"]["point"]) == (4, 2)
    assert sweep.saturation["slow"]["reason"] == "throughput +0.0% at concurrency 8"


def test_missed_objectives_and_failures_saturate_too() -> None:
    sweep = Sweep("rate", 1.0, 64, ["a", "b", "c"])
    shares = {"a": [1.0, 0.5, 0.49], "c": [0.2, 0.2, 0.2]}
    run(sweep, {"a": [10, 20, 40], "b": [10, math.nan, 0], "c": [10, 20, 40]}, shares)
    assert (sweep.saturation["a"]["load"], sweep.saturation["a"]["why"]) == (2, "slo")
    assert sweep.saturation["a"]["reason"] == "49% of the requests met the objectives at 4 requests/s"
    assert (sweep.saturation["b"]["load"], sweep.saturation["b"]["why"]) == (1, "failed")
    assert sweep.saturation["c"]["load"] is None
    assert "from the first load on" in saturation_words("c", sweep.saturation["c"])


def test_a_limit_ends_a_sweep_that_is_not_saturated() -> None:
    sweep = Sweep("concurrency", 1, 6, ["a"])
    assert run(sweep, {"a": [1, 2, 4]}) == [1, 2, 4]
    assert saturation_words("a", sweep.saturation["a"]) == "a: not saturated at concurrency 4, the sweep's limit"


def test_a_sweep_of_two_sessions_marks_its_points() -> None:
    # No session takes longer than an objective that nothing can meet: both stop at the first load.
    arms = [StandIn("baseline"), StandIn()]
    runs = compare(arms, sweep=True, slo={"e2e": 1e-9}, new_tokens=2, warmup=0, progress=lambda *_: None)
    assert set(runs.summary["concurrency"]) == {1}
    assert not runs.summary["saturated"].any()
    (env,) = runs.env.values()
    assert env["saturation"]["optimized"]["why"] == "slo"
    assert env["total"] is None
    assert "saturated from the first load on" in repr(runs)
    again = bench(arms[1], sweep="concurrency", sweep_limit=4, new_tokens=2, warmup=0, progress=lambda *_: None)
    (env,) = again.env.values()
    found = env["saturation"]["optimized"]
    marked = again.summary[again.summary["saturated"] == True]  # noqa: E712
    assert list(marked["concurrency"]) == ([] if found["why"] == "limit" else [found["load"]])
    assert list(again.summary["n"])[:1] == [16]


def test_a_sweep_where_all_fails_says_what_failed() -> None:
    with pytest.raises(MiinbError, match=r"MiinbError 16"):
        bench(StandIn(fail_every=1), sweep=True, new_tokens=2, warmup=0, progress=lambda *_: None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sweep": True, "concurrency": [1, 2]}, "finds its loads itself"),
        ({"sweep": "concurrency", "rate": 2.0}, "not in a sweep"),
        ({"sweep": "rate", "concurrency": 2}, "not in a sweep"),
        ({"sweep": True, "concurrency": 8, "sweep_limit": 4}, "below the first load"),
        ({"sweep_limit": 4}, "acts only with"),
        ({"sweep": "speed"}, "sweep: "),
        ({"duration_s": 1.0, "requests": 4}, "exclude each other"),
        ({"slo": "ttft=1"}, "ttft means nothing for text-classification"),
    ],
)
def test_what_excludes_each_other_is_refused(fields: dict[str, object], says: str) -> None:
    session = Predicting() if "slo" in fields else StandIn()
    with pytest.raises(InvalidValue, match=says):
        bench(session, progress=lambda *_: None, **fields)
    assert not session.calls
