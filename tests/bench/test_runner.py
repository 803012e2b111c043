from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from stand_in import Predicting, StandIn

from miinb.bench import charts, predicting, presets
from miinb.bench.gone import Gone
from miinb.bench.records import Record, Runs
from miinb.bench.runner import bench, compare
from miinb.bench.workload import configure
from miinb.config import BenchConfig
from miinb.errors import Cancelled, DeadlineExceeded, InvalidValue, MiinbError, Unavailable, UnknownOption


def test_one_row_a_request_with_equal_work() -> None:
    session = StandIn(token_s=0.001)
    runs = bench(session, requests=4, warmup=1, new_tokens=5, prompt_tokens=20, price=2.0, run="first", progress=_quiet)
    frame = runs.requests
    assert len(runs) == 1
    assert list(frame["warmup"]) == [True, False, False, False, False]
    assert {call["max_new_tokens"] for call in session.calls} == {5}
    assert all(call["min_new_tokens"] == 5 and call["ignore_eos"] for call in session.calls)
    assert len({call["seed"] for call in session.calls}) == 5
    assert set(frame["arm"]) == {"optimized"}
    assert frame["output_tokens"].eq(5).all()
    assert frame["finish_reason"].eq("length").all()
    assert (frame["ttft_s"] < frame["e2e_s"]).all()
    assert frame["tpot_s"].to_numpy() == pytest.approx(((frame["e2e_s"] - frame["ttft_s"]) / 4).to_numpy())
    row = runs.summary.iloc[0]
    assert (row["n"], row["n_failed"], row["n_warmup"]) == (4, 0, 1)
    assert row["usd_per_mtok"] == pytest.approx(2.0 / 3600 / row["output_tok_s"] * 1e6)
    assert row["name"] == "first"


def _quiet(done: int, total: int, record: Record) -> None:
    """Keeps the progress bar away."""


def test_arms_get_the_same_prompts_and_take_turns() -> None:
    slow, fast = StandIn("baseline", token_s=0.002), StandIn("optimized", token_s=0.0005)
    order: list[str] = []
    runs = compare(
        [slow, fast], requests=8, warmup=0, new_tokens=4, progress=lambda done, total, record: order.append(record.arm)
    )
    assert slow.prompts == fast.prompts
    assert len(set(slow.prompts)) == 8
    assert order == ["baseline"] * 4 + ["optimized"] * 8 + ["baseline"] * 4
    summary = runs.summary.set_index("arm")
    assert summary.loc["optimized", "outputs_equal"]
    assert summary.loc["optimized", "n_compared"] == 8
    assert summary.loc["optimized", "speedup"] > 1.2
    assert summary.loc["optimized", "speedup_lo"] <= summary.loc["optimized", "speedup"]
    assert summary.loc["baseline", "n_compared"] == 0


def test_different_answers_are_seen() -> None:
    runs = compare([StandIn("baseline"), StandIn(differs_from=6)], requests=2, warmup=1, new_tokens=8, progress=_quiet)
    row = runs.summary.set_index("arm").loc["optimized"]
    assert not row["outputs_equal"]
    assert row["equal_share"] == pytest.approx(0.75)
    assert row["n_equal"] == 0
    warm = runs.requests[runs.requests["warmup"]]
    assert warm["equal"].isna().all()
    assert "0 of 2" in repr(runs)


def test_close_measures_how_far_the_answers_agree() -> None:
    arms = [StandIn("baseline"), StandIn(differs_from=6)]
    runs = compare(arms, requests=2, warmup=0, new_tokens=8, check="close", progress=_quiet)
    row = runs.summary.set_index("arm").loc["optimized"]
    assert row["outputs_equal"] is None
    assert row["equal_share"] == pytest.approx(0.75)
    assert "first 75% of tokens" in repr(runs)


@pytest.mark.parametrize("fields", [{"check": "none"}, {"do_sample": True}])
def test_answers_that_are_not_comparable_are_not_compared(fields: dict[str, object]) -> None:
    runs = compare([StandIn("baseline"), StandIn()], requests=1, warmup=0, new_tokens=2, progress=_quiet, **fields)
    assert runs.summary["n_compared"].eq(0).all()


def test_concurrency_is_kept_and_never_exceeded() -> None:
    session = StandIn(token_s=0.004)
    runs = bench(session, requests=9, warmup=0, concurrency=[3], new_tokens=5, progress=_quiet)
    starts, ends = runs.requests["t_rel_s"], runs.requests["t_rel_s"] + runs.requests["e2e_s"]
    overlap = [int(((starts <= at) & (ends > at)).sum()) for at in starts]
    assert max(overlap) == 3


def test_open_loop_counts_from_the_planned_arrival() -> None:
    session = StandIn(token_s=0.002)
    runs = bench(session, requests=6, warmup=1, rate=[100.0], new_tokens=3, progress=_quiet)
    rows = runs.requests[~runs.requests["warmup"]].sort_values("t_rel_s")
    assert rows["t_rel_s"].is_unique
    assert rows["concurrency"].isna().all()
    assert rows["rate_rps"].eq(100.0).all()
    assert (rows["e2e_s"] >= 0.006).all()


def test_failures_are_rows_and_are_counted() -> None:
    runs = bench(StandIn(fail_every=3), requests=6, warmup=0, new_tokens=2, progress=_quiet)
    assert list(runs.requests["status"]).count("error") == 2
    assert "MiinbError: It broke." in set(runs.requests["error"])
    assert runs.summary.iloc[0]["n_failed"] == 2
    assert runs.summary.iloc[0]["n"] == 4
    late = StandIn(fail_every=2, error=DeadlineExceeded("too late"))
    assert set(bench(late, requests=2, warmup=0, new_tokens=2, progress=_quiet).requests["status"]) == {"ok", "timeout"}


def test_a_benchmark_where_all_fails_raises_with_the_cause() -> None:
    with pytest.raises(MiinbError, match=r"Every request.*It broke"):
        bench(StandIn(fail_every=1), requests=2, warmup=0, new_tokens=2, progress=_quiet)


def test_an_interrupt_keeps_the_rows_and_cancels_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    import miinb.bench.runner as runner

    session, done = StandIn(token_s=0.001), threading.Event()
    real_wait = runner.wait

    def wait(futures: object, timeout: float | None = None) -> object:
        if done.wait(0.01) and timeout == 0.2:
            session.token_s = 30.0
            done.clear()
            time.sleep(0.05)
            raise KeyboardInterrupt
        return real_wait(futures, timeout=0.01)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "wait", wait)

    def progress(count: int, total: int, record: Record) -> None:
        if count == 3:
            done.set()

    start = time.perf_counter()
    runs = bench(session, requests=50, warmup=0, new_tokens=3, progress=progress)
    assert time.perf_counter() - start < 10
    assert 3 <= len(runs.requests) < 50
    assert (runs.requests["status"] == "ok").sum() >= 3
    env = next(iter(runs.env.values()))
    assert env["interrupted"]
    assert "interrupted" in env["warnings"][0]


def test_a_mapping_names_the_arms() -> None:
    runs = compare({"old": StandIn(name="a"), "new": StandIn("baseline", name="b")}, requests=1, progress=_quiet)
    assert list(runs.summary["arm"]) == ["old", "new"]
    assert runs.summary["n_compared"].tolist() == [0, 1]


def test_labels_of_arms() -> None:
    best = StandIn("baseline", name="tuned")
    best.config = best.config.model_copy(update={"options": best.config.options.model_copy(update={"compile": True})})
    twins = [StandIn(name="a"), StandIn(name="b"), best]
    runs = compare(twins, requests=1, warmup=0, new_tokens=2, progress=_quiet)
    assert list(dict.fromkeys(runs.summary["arm"])) == ["a", "b", "baseline-best"]
    with pytest.raises(InvalidValue, match="twice"):
        compare([StandIn(), StandIn()], progress=_quiet)
    with pytest.raises(InvalidValue, match="at least one"):
        compare([], progress=_quiet)


def test_wrong_fields_are_refused_before_anything_is_sent() -> None:
    session = StandIn()
    with pytest.raises(UnknownOption, match="concurrency"):
        bench(session, concurency=2)
    with pytest.raises(InvalidValue, match="exclude"):
        bench(session, concurrency=2, rate=1.0)
    with pytest.raises(InvalidValue, match="in flight"):
        bench(session, concurrency=8, requests=2)
    with pytest.raises(InvalidValue, match="sampled"):
        bench(session, do_sample=True, check="exact")
    with pytest.raises(InvalidValue, match="column"):
        bench(session, pd.DataFrame({"a": ["x"], "b": ["y"]}))
    session.task = "image-classification"
    with pytest.raises(InvalidValue, match="not benchmarked"):
        bench(session)
    assert not session.calls


def test_a_configuration_object_is_taken_as_it_is() -> None:
    session = StandIn()
    config = BenchConfig.parse({"prompts": ["one", "two"], "requests": 2, "warmup": 0, "new_tokens": 2})
    runs = bench(session, config, progress=_quiet)
    assert session.prompts == ["one", "two"]
    assert list(runs.requests["prompt_id"]) == ["p0", "p1"]


def test_encoder_tasks_are_predict_calls_counted_in_texts_and_tokens(tmp_path: Path) -> None:
    folder = presets.write("bert-base", tmp_path / "tokenizer", **presets.tiny("bert-base"))
    assert folder.is_dir()
    arms = [
        Predicting("baseline", token_s=0.004, folder=str(tmp_path)),
        Predicting(token_s=0.001, folder=str(tmp_path)),
    ]
    runs = compare(arms, requests=4, warmup=1, prompt_tokens=12, batch_size=3, price=1.0, progress=_quiet)
    rows = runs.requests[~runs.requests["warmup"]]
    assert rows["batch_size"].eq(3).all()
    assert rows["prompt_tokens"].eq(36).all()
    assert rows[["ttft_s", "tpot_s", "output_tokens"]].isna().all().all()
    assert rows[["queue_s", "preprocess_s", "model_s", "postprocess_s"]].eq([0.001, 0.002, 0.003, 0.004]).all().all()
    assert [call["inputs"] for call in arms[0].calls] == [call["inputs"] for call in arms[1].calls]
    row = runs.summary.set_index("arm").loc["optimized"]
    assert row["seq_s"] == pytest.approx(3 * row["req_s"])
    assert row["output_tok_s"] == row["total_tok_s"] == pytest.approx(12 * row["seq_s"])
    assert row["usd_per_mtok"] == pytest.approx(1 / 3600 / row["output_tok_s"] * 1e6)
    assert row["outputs_equal"]
    shown = repr(runs)
    assert "texts/s" in shown
    assert "TTFT" not in shown
    words = charts.alt_text(charts.throughput(runs))
    assert "texts/s" in words
    assert "all 4 answers are the same as baseline's" in words
    assert "text-classification · 36 tokens a request" in charts.alt_text(charts.latency(runs))


def test_other_labels_are_seen_and_prompts_go_in_batches() -> None:
    texts = ["good", "bad", "fine", "so"]
    arms = [Predicting("baseline"), Predicting(differs="bad")]
    runs = compare(arms, texts, warmup=0, batch_size=2, requests=2, progress=_quiet)
    assert arms[0].calls == [{"inputs": ["good", "bad"]}, {"inputs": ["fine", "so"]}]
    mine = runs.requests.query("arm == 'optimized'").sort_values("prompt_id")
    assert mine["equal"].tolist() == [False, True]
    assert mine["equal_share"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"new_tokens": 3}, "new_tokens: not for text-classification"),
        ({"prompts": [{"question": "a", "context": "b"}]}, "text-classification takes texts"),
        ({}, "tokenizer is not on this machine"),
    ],
)
def test_what_an_encoder_task_would_ignore_is_refused(fields: dict[str, Any], says: str) -> None:
    session = Predicting()
    with pytest.raises(InvalidValue, match=says):
        bench(session, progress=_quiet, **fields)
    with pytest.raises(InvalidValue, match="batch_size: not for text-generation"):
        bench(StandIn(), batch_size=2)
    with pytest.raises(InvalidValue, match="one task"):
        compare([session, StandIn(name="other")], ["a"])
    assert not session.calls


def test_questions_are_taken_as_inputs() -> None:
    pair = {"question": "who?", "context": "me"}
    for workload in (pair, [pair], pd.DataFrame([pair])):
        assert configure(workload).prompts == [pair]


def test_inputs_are_no_longer_than_the_model_takes_unless_asked_for() -> None:
    assert predicting.fitted(BenchConfig.parse({}), 64).prompt_tokens == 64
    assert predicting.fitted(BenchConfig.parse({}), 0) == BenchConfig.parse({})
    for fields in ({"prompt_tokens": 100}, {"prompts": ["a"]}):
        assert predicting.fitted(BenchConfig.parse(fields), 64) == BenchConfig.parse(fields)


@pytest.mark.parametrize("name", ["progress", "on_point"])
def test_a_callback_that_raises_costs_no_run(name: str) -> None:
    calls: list[object] = []

    def broken(*given: object) -> None:
        calls.append(given)
        raise ValueError("no such bar")

    with pytest.warns(UserWarning, match=f"{name} raised ValueError: no such bar. It is called no more"):
        runs = bench(StandIn(), concurrency=[1, 2], requests=3, new_tokens=2, warmup=0, **{name: broken})
    assert len(calls) == 1
    assert len(runs.requests) == 6


def test_each_point_is_told_with_the_run_so_far() -> None:
    seen: list[Runs] = []
    whole = bench(StandIn(), concurrency=[1, 2, 3], requests=3, new_tokens=2, warmup=1, on_point=seen.append)
    assert [len(runs.summary) for runs in seen] == [1, 2, 3]
    assert seen[-1].summary["seq_s"].equals(whole.summary["seq_s"])
    assert not seen[0].env[next(iter(seen[0].env))]["interrupted"]


def test_stop_ends_the_run_and_keeps_what_was_measured() -> None:
    stop = threading.Event()

    def after_two(done: int, total: int, record: Record) -> None:
        if done == 2:
            stop.set()

    runs = bench(StandIn(), requests=50, new_tokens=2, warmup=0, progress=after_two, stop=stop)
    (env,) = runs.env.values()
    assert env["interrupted"]
    assert env["done"] == len(runs.requests) < env["total"] == 50
    assert "interrupted after 2 of 50 requests" in env["warnings"]


def test_stop_ends_a_stream_that_runs() -> None:
    stop = threading.Event()
    slow = StandIn(token_s=0.01)
    threading.Timer(0.3, stop.set).start()
    runs = bench(slow, requests=4, new_tokens=2000, warmup=0, progress=lambda *_: None, stop=stop)
    assert set(runs.requests["status"]) == {"cancelled"}


def test_stop_before_the_first_request() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        bench(StandIn(), requests=4, new_tokens=2, progress=lambda *_: None, stop=stop)


@pytest.mark.parametrize("load", [{"concurrency": [4]}, {"rate": [200.0, 300.0]}, {"sweep": "concurrency"}])
def test_an_arm_whose_deployment_is_gone_is_asked_no_more(load: dict[str, Any]) -> None:
    lost, other = StandIn(name="lost", dies_after=10), StandIn(name="other")
    requests = {} if "sweep" in load else {"requests": 60}
    fields = {"new_tokens": 2, "warmup": 0, "check": "none", **requests, **load}
    runs = compare([lost, other], progress=_quiet, **fields)
    (env,) = runs.env.values()
    failed = int((runs.requests["status"] == "error").sum())
    assert 8 <= failed < 20
    assert len(lost.calls) == 10 + failed
    assert set(runs.requests[runs.requests["status"] == "error"]["arm"]) == {"lost"}
    assert len(other.calls) >= len(lost.calls)
    assert env["gone"] == ["lost"]
    assert not env["interrupted"]
    assert "lost: ended early" in env["warnings"][-2]
    assert repr(runs).splitlines()[-1] == f"note: {failed} of {env['done']} requests failed"
    if "sweep" in load:
        assert env["saturation"]["lost"]["why"] == "gone"


def test_a_run_ends_with_its_last_deployment() -> None:
    far = 1e-3  # of the arrivals after the end nobody waits for
    runs = bench(StandIn(dies_after=3), requests=400, new_tokens=2, warmup=0, rate=[20.0, far], progress=_quiet)
    assert len(runs.requests) < 20


def test_a_replica_that_comes_back_ends_nothing() -> None:
    session = StandIn(fail_every=2, error=Unavailable("The replica that ran this request is gone."))
    runs = bench(session, requests=60, new_tokens=2, warmup=0, concurrency=[2], progress=_quiet)
    assert len(runs.requests) == 60


def test_requests_that_fail_together_are_one_failure() -> None:
    seen = Gone()

    def failed(began: float) -> Record:
        record = Record(run_id="r", seq=0, arm="a", session="s", t_rel_s=began, e2e_s=1.0)
        record.status, record.error = "error", "Unavailable: The replica is gone."
        return record

    assert not any(seen.seen(failed(0.0)) for _ in range(32))
    assert [seen.seen(failed(1.0 + number)) for number in range(8)] == [False] * 7 + [True]


def test_a_run_asks_for_no_prompts_of_an_earlier_one_unless_their_seed_is_given() -> None:
    session = StandIn(caches=True)
    more = {"concurrency": [1, 2], "requests": 4, "warmup": 0, "new_tokens": 2, "progress": _quiet}
    first, again = bench(session, prompt_tokens="20-60", **more), bench(session, prompt_tokens="20-60", **more)
    assert len(set(session.prompts)) == 16
    lengths = [list(run.requests.sort_values("prompt_id")["prompt_tokens"]) for run in (first, again)]
    assert lengths[0] == lengths[1], "these are of the seed"
    assert not [text for runs in (first, again) for env in runs.env.values() for text in env["warnings"]]
    (env,) = first.env.values()
    seed = env["workload"]["prompt_seed"]
    repeated = bench(session, prompt_tokens="20-60", prompt_seed=seed, **more)
    assert sorted(session.prompts[16:]) == sorted(session.prompts[:8])
    bench(session, prompt_tokens="20-60", prompt_seed=None, **more)
    assert len(set(session.prompts)) == 24
    with pytest.raises(InvalidValue, match="prompt_seed: prompts were given"):
        bench(session, prompts=["a"], prompt_seed=3, requests=1, warmup=0, new_tokens=2, progress=_quiet)
    (env,) = repeated.env.values()
    assert [text.partition(":")[0] for text in env["warnings"]] == [f"optimized at concurrency {n}" for n in (1, 2)]
    assert all("100% of the prompt tokens came from the prefix cache" in text for text in env["warnings"])
    assert "note: optimized at concurrency 1: 100%" in repr(repeated)
    bench(session, seed=0, **more)
    bench(session, seed=0, **more)
    assert sorted(session.prompts[-8:]) == sorted(session.prompts[-16:-8]), (
        "a seed that is given is that of the prompts too"
    )
    given = bench(session, ["a b c d e f"] * 4, warmup=0, requests=4, new_tokens=2, progress=_quiet)
    (env,) = given.env.values()
    assert env["warnings"] == ["prompts repeat: a prefix cache can help"]


def test_a_temperature_without_a_draw_is_refused() -> None:
    session = StandIn()
    with pytest.raises(InvalidValue, match="temperature: acts only with do_sample=True"):
        bench(session, temperature=0.2, progress=_quiet)
    assert not session.calls
    runs = bench(session, temperature=0.2, do_sample=True, requests=1, warmup=0, new_tokens=2, progress=_quiet)
    assert len(runs.requests) == 1
    assert session.calls[0]["temperature"] == 0.2
