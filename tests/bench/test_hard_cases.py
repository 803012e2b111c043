"""Benchmarks of what does not go well: all fails, too short, too fast, interrupted, badly named, badly asked."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
from stand_in import Predicting, StandIn

from miinb.bench import charts
from miinb.bench.runner import bench, compare
from miinb.errors import Cancelled, DeadlineExceeded, InvalidValue, MiinbError

QUIET: dict[str, Any] = {"progress": lambda *_: None, "new_tokens": 2}


@pytest.mark.parametrize("load", [{"requests": 4}, {"requests": 4, "rate": 200.0}, {"sweep": True, "sweep_limit": 8}])
def test_all_requests_fail(load: dict[str, Any]) -> None:
    with pytest.raises(MiinbError, match=r"Every request of the benchmark failed \(DeadlineExceeded \d+\)") as failure:
        bench(StandIn(fail_every=1, error=DeadlineExceeded("Too late.")), **load, **QUIET)
    assert "Too late." in failure.value.hint


def test_one_of_two_arms_fails_and_the_other_is_shown_and_drawn() -> None:
    runs = compare([StandIn("baseline", fail_every=1), StandIn()], requests=4, warmup=0, **QUIET)
    assert list(runs.summary["n_failed"]) == [4, 0]
    assert "4 (MiinbError 4)" in repr(runs)
    assert math.isnan(runs.summary["speedup"].iloc[1])
    drawn = charts.alt_text(charts.draw(charts.fitting(runs), runs))
    assert "baseline at concurrency 1: all 4 requests failed" in drawn


@pytest.mark.parametrize("duration_s", [0.02, 1e-9])  # threads start later than the second one
@pytest.mark.parametrize("load", [{}, {"rate": 100.0}, {"concurrency": 2}])
def test_a_duration_shorter_than_a_request_waits_for_it(load: dict[str, Any], duration_s: float) -> None:
    row = bench(StandIn(token_s=0.05), duration_s=duration_s, warmup=0, **load, **QUIET).summary.iloc[0]
    assert row["n"] >= 1
    assert row["duration_s"] >= 0.1
    assert row["req_s"] <= row["n"] / 0.1


def test_the_first_arrival_is_not_waited_for_beyond_the_duration() -> None:
    row = bench(StandIn(), rate=0.001, duration_s=0.1, warmup=0, **QUIET).summary.iloc[0]
    assert row["n"] == 1
    assert row["duration_s"] < 60  # the first of this seed arrives after minutes


@pytest.mark.parametrize("load", [{"requests": 1_000_000}, {"rate": 250.0, "duration_s": 4000}])
def test_stop_ends_the_making_of_requests(load: dict[str, Any]) -> None:
    stop, session = threading.Event(), StandIn()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Cancelled, match="before its first request was done"):
        bench(session, **load, prompt_tokens=2000, warmup=0, stop=stop, **QUIET)
    assert not session.calls


def test_stop_before_the_clock_ends_the_making_of_requests() -> None:
    """A block by the clock: a warm-up tells that about 20,000 requests are needed."""
    stop, session = threading.Event(), StandIn()
    with pytest.raises(Cancelled, match="before its first request was done"):
        bench(session, duration_s=600, new_tokens=2, progress=lambda *_: stop.set(), stop=stop)
    assert len(session.calls) == 1


def test_a_rate_far_above_what_is_served_is_measured_as_it_arrives() -> None:
    row = bench(StandIn(token_s=0.05), rate=1000.0, requests=60, warmup=0, **QUIET).summary.iloc[0]
    assert row["n"] == 60
    assert row["e2e_p50_s"] >= 0.1
    assert row["req_s"] < 600  # 60 requests in 60 ms of arrivals and 100 ms of answering


def test_a_sweep_that_is_saturated_at_once_marks_its_first_load() -> None:
    class OneAtATime(StandIn):
        one = threading.Lock()

        def stream(self, prompt: str, **params: Any) -> Any:
            with self.one:
                time.sleep(0.3)  # of which what else a busy machine does is little
            return super().stream(prompt, **params)

    runs = bench(OneAtATime(), sweep=True, warmup=0, **QUIET)
    assert list(runs.summary["concurrency"]) == [1, 2]
    assert list(runs.summary["saturated"]) == [True, False]
    assert "saturated at concurrency 1" in repr(runs)
    assert "(saturated)" in charts.alt_text(charts.frontier(runs))


@pytest.mark.parametrize(
    "nothing",
    [[], (), pd.Series([], dtype=object), np.array([]), pd.DataFrame({"prompt": []}), {"prompts": []}, iter(())],
)
def test_no_prompts_are_refused(nothing: Any) -> None:
    session = StandIn()
    with pytest.raises(InvalidValue, match="the list is empty"):
        bench(session, nothing, **QUIET)
    assert not session.calls


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), "no column is named 'prompt'"),
        (pd.DataFrame(), "no column is named 'prompt'"),
        (pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "2 columns are named 'prompt'"),
        (pd.DataFrame({"prompt": ["x", math.nan]}), "prompt 1 .* is empty"),
        (pd.DataFrame({"prompt": ["x", pd.NA]}), "prompt 1 .* is empty"),
        (pd.DataFrame({"prompt": [["a"], "b"]}), "prompt 0 .* of type list"),
        (["x", None], "prompt 1 .* is empty"),
        (["x", math.nan], "prompt 1 .* is empty"),
        (["x", "  "], "prompt 1 .* is empty"),
        ("", "prompt 0 .* is empty"),
        (["x", 3], "prompt 1 .* of type int"),
        (["x", b"y"], "prompt 1 .* of type bytes"),
        (b"x", "cannot take prompts from bytes"),
        (5, "cannot take prompts from int"),
    ],
)
def test_what_is_no_prompt_is_named(wrong: Any, says: str) -> None:
    session = StandIn()
    with pytest.raises(InvalidValue, match=says):
        bench(session, wrong, **QUIET)
    assert not session.calls


@pytest.mark.parametrize("wrong", [None, 5, object()])
def test_what_is_no_session_is_named(wrong: Any) -> None:
    with pytest.raises(InvalidValue, match=r"sessions: .* is no running session"):
        compare([StandIn(), wrong], **QUIET)


def test_numbers_of_a_frame_are_texts() -> None:
    session = StandIn()
    bench(session, pd.DataFrame({"prompt": [1, 2]}), requests=2, warmup=0, **QUIET)
    assert session.prompts == ["1", "2"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"slo": "speed=1"}, "no objective 'speed'"),
        ({"slo": {}}, "give limits"),
        ({"concurrency": []}, "concurrency: the list is empty"),
        ({"rate": []}, "rate: the list is empty"),
        ({"concurrency": [2, 1, 2]}, "a load is there twice"),
        ({"rate": [0.0]}, "greater than 0"),
        ({"rate": [math.nan]}, "finite"),
        ({"duration_s": 0}, "greater than 0"),
        ({"rate": [10.0, 1e6], "duration_s": 3600}, r"3,600,000,000 requests would arrive in duration_s"),
    ],
)
def test_loads_and_limits_that_cannot_be_are_refused(fields: dict[str, Any], says: str) -> None:
    session = StandIn()
    with pytest.raises(InvalidValue, match=says):
        bench(session, **fields, **QUIET)
    assert not session.calls


def test_a_limit_that_a_task_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidValue, match="ttft means nothing for text-classification"):
        bench(Predicting(), ["a"], slo="ttft=1", progress=lambda *_: None)


def test_what_the_user_stopped_has_no_part_in_throughput() -> None:
    class Slowing(StandIn):
        """The last answer never ends, and the user stops it after a second."""

        def stream(self, prompt: str, **params: Any) -> Any:
            self.token_s = 0.02 if len(self.calls) < 4 else 30.0
            if len(self.calls) == 4:
                threading.Timer(0.5, stop.set).start()
            return super().stream(prompt, **params)

    stop = threading.Event()
    runs = bench(Slowing(), requests=8, warmup=0, stop=stop, **QUIET)
    row = runs.summary.iloc[0]
    assert (row["n"], row["n_cancelled"]) == (4, 1)
    assert row["duration_s"] < 0.4
    assert row["req_s"] > 10
    assert runs.env[row["run_id"]]["interrupted"]


def test_arms_are_told_apart_whatever_their_sessions_are_called() -> None:
    sessions = [StandIn(name="baseline"), StandIn("baseline", name="plain"), StandIn(name="other")]
    runs = compare(sessions, requests=2, warmup=0, **QUIET)
    assert list(runs.summary["arm"]) == ["optimized (baseline)", "baseline", "other"]
    assert list(runs.summary["n"]) == [2, 2, 2]
    assert list(runs.summary["engine"]) == ["optimized", "baseline", "optimized"]


@pytest.mark.parametrize("names", [("", "b"), (1, "1"), ("  ", "b")])
def test_arms_without_a_name_of_their_own_are_refused(names: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidValue, match="a name of its own"):
        compare({names[0]: StandIn(name="x"), names[1]: StandIn(name="y")}, **QUIET)
