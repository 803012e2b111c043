"""Benchmarks of text-to-image: equal work, times by part, compared pictures, and what tables and charts say of them."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from miinb import commands, load_runs
from miinb.bench import charts, published, report, thumbnails
from miinb.bench.display import spread_table
from miinb.bench.image_measures import note_differences
from miinb.bench.picture_prompts import MOST, picture_prompts
from miinb.bench.pixels import difference, pixels_of, psnr_words
from miinb.bench.records import Record, Runs
from miinb.bench.runner import bench, compare
from miinb.errors import InvalidValue, MiinbError
from miinb.image_difference import psnr_db
from tests.bench.stand_in import Painting, Predicting, StandIn

QUIET: Any = lambda *_: None  # noqa: E731


@pytest.fixture(scope="module")
def runs() -> Runs:
    """Two arms at two batches; the pictures of odd seeds differ by 3."""
    arms = [Painting("baseline", token_s=0.004), Painting(off=3, token_s=0.001)]
    fields = {"num_images_per_prompt": [1, 2], "requests": 6, "warmup": 1, "num_inference_steps": 5, "price": 2.5}
    return compare(arms, **fields, width=48, progress=QUIET)


def test_both_arms_do_the_same_work_and_no_seed_comes_twice() -> None:
    arms = [Painting("baseline"), Painting()]
    compare(
        arms,
        ["a cat", "the moon"],
        num_images_per_prompt=(1, 3),
        requests=4,
        warmup=1,
        num_inference_steps=2,
        guidance_scale=4,
        negative_prompt="rain",
        seed=7,
        progress=QUIET,
    )
    assert arms[0].calls == arms[1].calls
    assert arms[0].prompts == arms[1].prompts == ["a cat", "a cat", "the moon", "a cat", "the moon"] * 2
    first, second = arms[0].calls[:5], arms[0].calls[5:]
    assert [call["seed"] for call in first] == [7, 8, 9, 10, 11]
    assert [call["seed"] for call in second] == [7, 10, 13, 16, 19]
    asked = {"num_inference_steps": 2, "guidance_scale": 4.0, "negative_prompt": "rain"}
    assert all(asked.items() <= call.items() and "height" not in call for call in arms[0].calls)


def test_a_request_has_its_parts_and_a_point_its_rates(runs: Runs) -> None:
    rows = runs.requests[~runs.requests["warmup"]]
    assert set(rows["batch_size"]) == set(rows["images"]) == {1, 2}
    assert (rows["width_px"] == 48).all()
    assert (rows["height_px"] == 32).all()
    assert ((rows["image_s"] - rows["e2e_s"] / rows["images"]).abs() < 1e-12).all()
    assert ((rows["model_s"] - rows["text_encode_s"] - rows["steps_s"] - rows["vae_s"]).abs() < 1e-12).all()
    assert ((rows["vae_s"] - 0.0003).abs() < 1e-12).all()
    assert rows[["ttft_s", "output_tokens", "preprocess_s"]].isna().all().all()
    summary = runs.summary.set_index(["arm", "batch_size"])
    row = summary.loc["baseline", 2]
    assert row["step_p50_s"] == pytest.approx(0.004)
    assert row["steps_per_s"] == pytest.approx(250)
    assert row["img_s"] == pytest.approx(2 * row["req_s"])
    assert row["usd_per_1k_images"] == pytest.approx(2.5 / 3.6 / row["img_s"])
    assert (row["steps"], row["guidance"], row["n"], row["n_failed"]) == (5, 7.5, 6, 0)
    one = rows[(rows["arm"] == "baseline") & (rows["batch_size"] == 2)]
    assert row["overhead"] == pytest.approx((one["e2e_s"] / one["model_s"] - 1).median())
    assert math.isnan(row["e2e_p90_s"])  # 6 requests


def test_overhead_is_told_only_where_nothing_waits() -> None:
    slow = {"token_s": 0.001, "most": 2}
    together = bench(Painting(**slow), concurrency=2, requests=4, num_inference_steps=2, progress=QUIET)
    assert together.summary["overhead"].isna().all()
    assert (together.requests["concurrency"] == 2).all()
    larger = bench(
        Painting(**slow), num_images_per_prompt=5, requests=2, warmup=0, num_inference_steps=2, progress=QUIET
    )
    assert larger.summary["overhead"].isna().all()
    assert larger.requests["vae_s"].iloc[0] == pytest.approx(0.0003)  # of the last batch, of one


def test_pictures_are_compared_by_seed(runs: Runs) -> None:
    summary = runs.summary.set_index(["arm", "batch_size"])
    row = summary.loc["optimized", 2]
    assert row["max_abs_diff"] == 3
    assert row["psnr_db"] == pytest.approx(psnr_db(9.0), abs=0.5)
    assert (row["n_compared"], row["outputs_equal"], row["equal_share"]) == (6, False, 0.5)
    table = runs.differences
    assert len(table) == 6 + 12
    assert set(table["arm"]) == {"optimized"}
    assert (table["max_abs_diff"] == table["seed"].mod(2) * 3).all()
    assert table.loc[table["seed"].mod(2) == 0, "psnr_db"].eq(math.inf).all()
    same = compare([Painting("baseline"), Painting()], requests=2, num_inference_steps=1, progress=QUIET)
    assert same.summary["outputs_equal"].iloc[1]
    assert "identical" in repr(same)
    unlike = compare(
        [Painting("baseline"), Painting(side=16)], requests=2, warmup=0, num_inference_steps=1, progress=QUIET
    )
    assert "not one size" in repr(unlike)
    assert "other sizes" in repr(unlike)
    unchecked = compare([Painting("baseline"), Painting()], requests=1, check="none", progress=QUIET)
    assert unchecked.differences.empty


def test_each_arm_at_its_own_best_batch(runs: Runs) -> None:
    (row,) = (one for _, one in runs.compare(best=True).iterrows())
    best = runs.summary.loc[runs.summary.groupby("arm")["img_s"].idxmax()].set_index("arm")
    assert row["batch_size"] == best.loc["optimized", "batch_size"]
    assert row["baseline_batch_size"] == best.loc["baseline", "batch_size"]
    assert row["speedup_lo"] <= row["speedup"] <= row["speedup_hi"]
    pairs = runs.compare()
    assert list(pairs["batch_size"]) == [1, 2]
    assert (pairs["throughput_ratio"] > 1).all()
    assert pairs["cost_ratio"].to_numpy() == pytest.approx(pairs["throughput_ratio"].to_numpy())
    with pytest.raises(InvalidValue, match="best"):
        bench(StandIn(), requests=1, progress=QUIET).compare(best=True)
    with pytest.raises(InvalidValue, match="no arm"):
        runs.compare("nobody", best=True)


def test_small_pictures_of_both_arms_are_kept_beside_a_run(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.save(tmp_path)
    (folder,) = tmp_path.iterdir()
    files = sorted(file.name for file in (folder / "pictures").iterdir())
    assert len(files) == 8
    assert files[0] == "00-baseline.webp"
    assert 'webp":' not in (folder / "env.json").read_text().replace(".webp", "")
    again = load_runs(tmp_path)
    (env,), (loaded,) = runs.env.values(), again.env.values()
    assert loaded["pictures"] == env["pictures"]
    shown = list(thumbnails.pictures_in(loaded))
    seeds = [[facts["seed"] for facts, _ in shown if facts["arm"] == arm] for arm in ("baseline", "optimized")]
    assert seeds[0] == seeds[1] == [1, 2, 3, 4]
    assert shown[0][1].shape == (32, 48, 3)
    assert shown[0][0]["prompt"] == picture_prompts(64)[0]
    monkeypatch.setattr(report, "KINDS", ("memory",))
    page = again.report(tmp_path / "report.html").read_text()
    assert "base64" not in page.partition("Environment and workload")[2]
    assert "images/s" in page
    assert "at its own" in page
    assert "dB PSNR" in page
    alone = bench(Painting(side=400), num_images_per_prompt=6, requests=1, num_inference_steps=1, progress=QUIET)
    (env,) = alone.env.values()
    assert len(env["pictures"]) == thumbnails.MOST
    assert all(len(one["webp"]) < 2 * thumbnails.MOST_BYTES for one in env["pictures"])
    assert next(thumbnails.pictures_in(env))[1].shape == (thumbnails.SIDE, thumbnails.SIDE, 3)


@pytest.mark.parametrize(
    "pictures",
    [
        None,
        "x",
        [1],
        [{"arm": "baseline", "file": "../env.json"}],
        [{"arm": "baseline", "file": "/etc/hostname"}],
        [{"arm": "baseline", "file": "gone.webp"}],
        [{"arm": "baseline", "webp": "§"}],
        [{"arm": "baseline", "webp": base64.b64encode(b"RIFF0000WEBPnothing").decode()}],
    ],
)
def test_pictures_that_cannot_be_read_are_left_out(runs: Runs, tmp_path: Path, pictures: Any) -> None:
    runs.save(tmp_path)
    (folder,) = tmp_path.iterdir()
    facts = json.loads((folder / "env.json").read_text())
    (folder / "env.json").write_text(json.dumps({**facts, "pictures": pictures}))
    again = load_runs(tmp_path)
    assert not [*thumbnails.pictures_in(next(iter(again.env.values())))]
    assert charts.images(again).get_title(loc="left") == "Images per second"
    again.save(tmp_path / "once more")


def test_charts_have_units_of_images_and_show_the_pictures(runs: Runs) -> None:
    ax = charts.images(runs)
    words = charts.alt_text(ax)
    assert "48 x 32 · 5 steps · guidance 7.5" in words
    assert words.count("images/s") == 4
    assert words.count("an image") >= 4
    assert "Below the bars, 4 pictures of each arm: baseline, optimized" in words
    assert "at most 3 of 255, PSNR 3" in words
    drawn = [artist for artist in ax.artists if artist.get_gid() == "miinb-picture"]
    assert len(drawn) == 8
    assert len(ax.patches) == 4
    assert not charts.images(runs, pictures=False).artists
    assert charts.fitting(runs) == "images"
    assert "images/s" in charts.alt_text(charts.throughput(runs))
    assert "a thousand images" in charts.cost(runs).get_title(loc="left")
    assert charts.frontier(runs).get_ylabel() == "Images per second"
    assert charts.batch_scaling(runs).get_xlabel() == "Batch size (log axis)"
    labels = [text.get_text() for text in charts.time_split(runs).get_legend().get_texts()]
    assert labels == ["queue", "text encoder", "steps", "VAE decoder", "transport and client"]  # no file took time
    assert "KV cache" not in [text.get_text() for text in charts.memory(runs).get_legend().get_texts()]
    assert "Time per image" in charts.alt_text(charts.latency(runs, metric="image_s"))
    for kind in ("quality", "parallel_scaling", "waterfall"):
        with pytest.raises(InvalidValue):
            charts.draw(kind, runs)


def test_pictures_find_room_in_axes_of_others(runs: Runs) -> None:
    from matplotlib.figure import Figure

    for size, there in (((12, 5), True), ((3, 2), False)):
        left, right = Figure(figsize=size).subplots(1, 2)
        charts.images(runs, ax=left)
        charts.latency(runs, ax=right)
        assert bool(left.artists) == there
        left.figure.canvas.draw()


def test_the_table_has_what_images_have(runs: Runs) -> None:
    shown = repr(runs)
    head = shown.splitlines()[1].split()
    assert {"batch", "s/image", "ms/step", "overhead", "images/s", "pictures"} <= set(head)
    assert list(spread_table(runs.summary)["batch"]) == ["1", "1", "2", "2"]
    assert not {"TTFT", "texts", "tokens/s"} & set(head)
    assert "2 images a request" in runs.cost().answer or "1 images a request" in runs.cost().answer


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"new_tokens": 3}, "new_tokens: not for text-to-image"),
        ({"prompt_tokens": 3}, "prompt_tokens: not for text-to-image"),
        ({"batch_size": 3}, "batch_size: not for text-to-image"),
        ({"slo": "ttft=1"}, "ttft means nothing"),
        ({"height": 30}, "multiple of 8"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images_per_prompt": [1, 65]}, "num_images_per_prompt"),
        ({"num_images_per_prompt": [2, 2]}, "twice"),
        ({"num_images_per_prompt": []}, "empty"),
        ({"num_images_per_prompt": [1, 2], "sweep": True}, "one number"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"negative_prompt": "x", "guidance_scale": 1}, "negative_prompt"),
        ({"prompts": [{"question": "a", "context": "b"}]}, "takes texts"),
    ],
)
def test_what_pictures_cannot_have_is_refused_before_anything_is_sent(fields: dict[str, Any], says: str) -> None:
    session = Painting()
    with pytest.raises(InvalidValue, match=says):
        bench(session, progress=QUIET, **fields)
    assert not session.calls


def test_a_scheduler_that_an_arm_has_not_is_refused_before_anything_is_sent() -> None:
    arms = [Painting("baseline"), Painting()]
    arms[1].schedulers = ("DDIMScheduler", "EulerAncestralDiscreteScheduler")  # the other tells none
    for name, meant in (("DDIMSchedule", "Did you mean DDIMScheduler? "), ("Nonsense", "")):
        with pytest.raises(InvalidValue, match=f"scheduler: '{name}' is none for the model of optimized") as refused:
            compare(arms, scheduler=name, progress=QUIET)
        assert refused.value.hint == f"{meant}There are: DDIMScheduler, EulerAncestralDiscreteScheduler."
    with pytest.raises(InvalidValue, match="'Euler a' is called EulerAncestralDiscreteScheduler here"):
        compare(arms, scheduler="Euler a", progress=QUIET)
    assert not arms[0].calls
    compare(arms, requests=1, warmup=0, num_inference_steps=1, scheduler="DDIMScheduler", progress=QUIET)
    assert arms[1].calls[0]["scheduler"] == "DDIMScheduler"


def test_other_tasks_have_no_pictures_and_are_not_compared_with_them() -> None:
    for session in (StandIn(), Predicting()):
        with pytest.raises(InvalidValue, match="num_inference_steps: not for"):
            bench(session, ["a"], num_inference_steps=3)
        with pytest.raises(InvalidValue, match="one task"):
            compare([Painting(name="p"), session], ["a"])


def test_lines_are_of_one_batch_where_loads_differ_too() -> None:
    arms = [Painting("baseline", token_s=0.002), Painting()]
    crossed = compare(
        arms, num_images_per_prompt=[1, 2], concurrency=[1, 2], requests=2, num_inference_steps=1, progress=QUIET
    )
    for kind, options in (("frontier", {}), ("batch_scaling", {"by": "concurrency"})):
        ax = charts.draw(kind, crossed, **options)
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert names == ["baseline, batch 1", "baseline, batch 2", "optimized, batch 1", "optimized, batch 2"]
    names = [text.get_text() for text in charts.batch_scaling(crossed).get_legend().get_texts()]
    assert names[-1] == "optimized, concurrency 2"


def test_the_command_has_the_same_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Benched(Painting):
        state = "ready"

        def bench(self, **fields: Any) -> Runs:
            return bench(self, progress=QUIET, **fields)

    session = Benched()
    context = commands.Context(prog="miinb", sessions={session.name: session})
    command = commands.find("bench")
    words = ["-d", session.name, "--num-images-per-prompt", "1,2", "--num-inference-steps", "3", "--width", "40"]
    words += ["--guidance-scale", "2", "--negative-prompt", "rain", "--requests", "1", "--save", str(tmp_path)]
    commands.execute(context, command, commands.parse(command, words, prog="miinb"))
    assert str(tmp_path) in capsys.readouterr().out
    assert {call["num_images_per_prompt"] for call in session.calls} == {1, 2}
    asked = {"num_inference_steps": 3, "width": 40, "guidance_scale": 2.0, "negative_prompt": "rain"}
    assert all(asked.items() <= call.items() for call in session.calls)
    assert set(load_runs(tmp_path).summary["batch_size"]) == {1, 2}


def test_failures_are_counted_and_arrivals_and_sweeps_work() -> None:
    failing = bench(Painting(fail_every=3), requests=6, warmup=0, num_inference_steps=1, progress=QUIET)
    row = failing.summary.iloc[0]
    assert (row["n"], row["n_failed"], row["failures"]) == (4, 2, "MiinbError 2")
    with pytest.raises(MiinbError, match="Every request"):
        bench(Painting(fail_every=1), requests=2, warmup=0, progress=QUIET)
    open_loop = bench(Painting(), rate=200, requests=4, warmup=0, num_inference_steps=1, progress=QUIET)
    assert (open_loop.requests["rate_rps"] == 200).all()
    assert "batch 1, 200 requests/s" in charts.alt_text(charts.images(open_loop))
    swept = bench(Painting(token_s=0.005), sweep=True, sweep_limit=2, requests=4, num_inference_steps=1, progress=QUIET)
    assert list(swept.summary["concurrency"]) == [1, 2]


def test_stop_ends_pictures_that_are_being_made() -> None:
    session, stop = Painting(token_s=1.0), threading.Event()
    threading.Timer(0.3, stop.set).start()
    stopped = bench(session, num_inference_steps=50, requests=4, concurrency=2, warmup=0, stop=stop, progress=QUIET)
    assert list(stopped.requests["status"]) == ["cancelled", "cancelled"]
    assert (stopped.requests["e2e_s"] < 30).all()
    assert next(iter(stopped.env.values()))["interrupted"]


def test_published_times_stand_beside_stable_diffusion_1(runs: Runs) -> None:
    requests = runs.requests.copy()
    requests["model"] = "stable-diffusion-1.5-shape"
    requests.attrs = runs.requests.attrs
    both = published.beside(requests[requests["batch_size"] == 1])
    mii = both[both["arm"].str.endswith("(2022)")].set_index("arm")
    assert mii.loc["baseline (2022)", "image_p50_s"] == pytest.approx(2.32)
    assert mii.loc["MII public (2022)", "img_s"] == pytest.approx(1 / 1.28)
    words = charts.alt_text(charts.images(both))
    assert "1.81x" in words.replace("1.8x", "1.81x")
    assert "A100-80GB" in words
    with pytest.raises(InvalidValue, match="published no figure"):
        published.beside(runs)


def test_differences_of_pixels() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert difference(black, white) == (255.0**2, 255)
    assert psnr_db(255.0**2) == 0
    assert psnr_words(psnr_db(0)) == "identical"
    assert math.isnan(psnr_db(math.nan))
    one_off = black.copy()
    one_off[0, 0, 0] = 1
    assert psnr_db(difference(black, one_off)[0]) == pytest.approx(48.13 + 10 * math.log10(48), abs=0.01)
    with pytest.raises(ValueError, match="pictures of"):
        difference(black, black[:2])
    record = Record("r", 0, "a")
    assert not note_differences(record, [black, black], [black, one_off])
    assert (record.max_abs_diff, record.equal_share) == ([0, 1], 0.5)
    buffer = io.BytesIO()
    Image.fromarray(white).save(buffer, "PNG")
    assert (pixels_of(buffer.getvalue()) == white).all()


def test_built_in_prompts_are_all_different_and_of_the_seed() -> None:
    every = picture_prompts(10 * MOST)
    assert len(set(every)) == len(every) == MOST
    assert picture_prompts(64, 1) == picture_prompts(64, 1) != picture_prompts(64, 2)
    given = bench(Painting(), pd.DataFrame({"prompt": ["x", "y"]}), requests=2, warmup=0, progress=QUIET)
    assert sorted(given.requests["prompt_id"]) == ["p0", "p1"]
