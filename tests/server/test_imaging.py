"""Requests for pictures through the frontend: real processes and sockets, a rank without a model."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hashlib
import io
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miinb import errors, image_calls
from miinb.client import Client
from miinb.image_messages import ImagesProgress, ImagesRequest, PaintedEvent, PaintRequest, Source
from miinb.image_metadata import parameters_text
from miinb.image_params import ImageParams
from miinb.rpc.direct import Connections
from miinb.server.imaging import Imaging
from miinb.server.picture_files import facts, picture_file
from tests.frontend_process import FrontendProcess, make, wait_for


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontendProcess]:
    """A frontend with a stand-in that takes 10 ms a step."""
    process = make(tmp_path_factory.mktemp("images") / "frontend")
    process.rank(task="text-to-image", step_s=0.01)
    yield process
    process.close()


@pytest.fixture(params=["direct", "grpc"])
def client(
    frontend: FrontendProcess, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Client]:
    """A client that asks without gRPC, or through it alone."""
    with frontend.client() as client:
        if request.param == "grpc":
            client._direct = Connections(None)
        else:
            monkeypatch.setattr(client, "_generate_images", None)
        yield client


def test_pictures_come_in_order_with_seeds_times_and_progress(client: Client) -> None:
    told: list[ImagesProgress] = []
    parameters = {"num_inference_steps": 60, "seed": 7, "num_images_per_prompt": 3, "height": 16, "width": 24}
    result = client.generate_images("a cat", told.append, **parameters)
    assert result.seeds == (7, 8, 9)
    assert [image.size for image in result.images] == [(24, 16)] * 3
    assert [image.getpixel((0, 0)) for image in result.images] == [(seed,) * 3 for seed in (7, 8, 9)]
    timing = result.timing
    assert (timing.queue_s, timing.text_encode_s, timing.steps_s, timing.vae_s) == (0.5,) * 4
    assert timing.model_s == 1.5
    assert timing.e2e_s == pytest.approx(3 * timing.s_per_image)
    assert [one.step for one in told] == sorted(one.step for one in told)
    assert told[-1].total == 60
    assert 2 <= len(told) <= 2 + 60 * 0.01 / 0.2 + timing.e2e_s / 0.2  # five a second
    (row,) = result.rows
    assert (row["images"], row["steps"], row["width_px"], row["height_px"], row["status"]) == (3, 60, 24, 16, "ok")
    assert list(client.records["images"]) == [3]


def test_awaited_pictures_tell_their_progress(client: Client) -> None:
    told: list[ImagesProgress] = []
    result = asyncio.run(client.agenerate_images("a cat", on_progress=told.append, num_inference_steps=30, seed=7))
    assert result.seeds == (7,)
    assert told
    assert told[-1].total == 30


def test_a_list_of_prompts_keeps_its_order_and_names_who_failed(client: Client) -> None:
    threads = set()
    parameters = {"num_inference_steps": 50, "seed": 5, "num_images_per_prompt": 2}
    result = client.generate_images(["one", "two"], lambda _: threads.add(threading.current_thread()), **parameters)
    assert threads == {threading.main_thread()}
    assert result.prompts == ("one", "one", "two", "two")
    assert result.seeds == (5, 6, 5, 6)
    assert len(result.rows) == 2
    with pytest.raises(errors.InvalidRequest, match=r"prompts\[1\]"):
        client.generate_images(["one", 2])  # type: ignore[list-item]
    with pytest.raises(errors.InvalidRequest, match="empty"):
        client.generate_images([])


def test_a_drawn_seed_is_told_and_makes_the_picture_again(client: Client) -> None:
    first = client.generate_images("a", num_inference_steps=1)
    again = client.generate_images("a", num_inference_steps=1, seed=first.seeds[0])
    assert again.files == first.files
    assert client.generate_images("a", num_inference_steps=1).seeds != first.seeds


def test_a_request_waits_until_its_computing_begins(tmp_path: Path) -> None:
    """Not until its first step is done; of what has begun alone nothing is told."""
    frontend = make(tmp_path / "frontend")
    frontend.rank(task="text-to-image", step_s=30.0)
    told: list[ImagesProgress] = []

    def ask() -> None:
        with frontend.client() as client, contextlib.suppress(errors.MiinbError):
            client.generate_images("a", told.append, num_inference_steps=3)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    try:
        with frontend.client() as client:

            def counted() -> tuple[int, int]:
                counters = client.description()["counters"]
                return counters["in_flight"], counters["queued"]

            for number, asker in enumerate(askers, 1):  # the stand-in does a step of the first at once
                asker.start()
                wait_for(lambda: counted() == (number, 0), f"the beginning of request {number}", 8.0)  # noqa: B023
        wait_for(lambda: told, "the first request's step")
        assert [one.step for one in told] == [1]
    finally:
        frontend.close()
        for asker in askers:
            asker.join(10)


def test_previews_are_small_pictures_of_the_first(client: Client) -> None:
    told: list[ImagesProgress] = []
    client.generate_images("a", told.append, num_inference_steps=100, preview_steps=50, num_images_per_prompt=2)
    previews = [one.preview for one in told if one.preview]
    assert len(previews) == 2
    assert {(image.format, image.size) for image in map(Image.open, map(io.BytesIO, previews))} == {("JPEG", (4, 4))}


def test_files_keep_what_made_them(client: Client) -> None:
    prompt = "a café, 日本語 \0 <b>"
    parameters = {"num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "dogs", "seed": 4}
    png = client.generate_images(prompt, **parameters).images[0]
    assert png.format == "PNG"
    told = json.loads(png.info["miinb"])
    assert (told["prompt"], told["seed"], told["negative_prompt"], told["width"]) == (prompt, 4, "dogs", 16)
    assert png.info["parameters"].splitlines()[1:] == [
        "Negative prompt: dogs",
        f"Steps: 3, Sampler: PLMS, CFG scale: 2.0, Seed: 4, Size: 16x8, Model: stand-in, "
        f"Version: miinb {told['version']}",
    ]
    webp = client.generate_images(prompt, **parameters, image_format="webp").images[0]
    assert webp.format == "WEBP"
    assert json.loads(webp.getexif()[0x010E]) == told
    comment = webp.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + png.info["parameters"].encode("utf-16-be")


def test_a_folders_path_is_not_told() -> None:
    event = PaintedEvent(1, 8, 8, 3, False, "PNDMScheduler", {}, {}, bytes(192))
    request = ImagesRequest("p", ImageParams())
    assert facts(event, request, "/home/me/models/sd")["model"] == "sd"
    assert facts(event, request, "org/name")["model"] == "org/name"
    assert "Negative" not in parameters_text(facts(event, request, "m"))
    spaced = facts(dataclasses.replace(event, schedule="Karras"), request, "m")
    assert "Sampler: PLMS, Schedule type: Karras, CFG scale" in parameters_text(spaced)
    assert b"/home/me" not in picture_file(event, request, "/home/me/models/sd")


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def test_pictures_to_begin_from_reach_the_rank_as_pixels_of_the_work(client: Client, tmp_path: Path) -> None:
    photos = [noise(40, 27), noise(24, 16)]
    photos[0].save(tmp_path / "cat.png")
    given: list[Any] = [tmp_path / "cat.png", photos[1]]
    result = client.generate_images(["a", "b"], image=given, num_inference_steps=4, num_images_per_prompt=3, seed=1)
    expected = [photos[0].resize((40, 24), Image.Resampling.LANCZOS), photos[1]]
    for place, image in enumerate(result.images):
        assert np.array_equal(np.asarray(image), np.asarray(expected[place // 3]))
    mask = Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 8, 16))
    covered = client.generate_images("a", image=photos[1], mask_image=mask, num_inference_steps=1).images[0]
    assert np.array_equal(np.asarray(covered), np.asarray(mask.convert("RGB")))


def test_progress_counts_the_steps_that_a_strength_leaves(client: Client) -> None:
    told: list[ImagesProgress] = []
    result = client.generate_images("a", told.append, image=noise(16, 16), num_inference_steps=40, strength=0.51)
    assert (told[-1].step, told[-1].total) == (20, 20)
    assert result.rows[0]["steps"] == 20


def test_files_keep_what_they_were_made_from_but_not_the_picture(client: Client, tmp_path: Path) -> None:
    noise(24, 16).save(tmp_path / "my, cat.png")
    data = (tmp_path / "my, cat.png").read_bytes()
    options: dict[str, Any] = {"image": str(tmp_path / "my, cat.png"), "num_inference_steps": 5, "seed": 2}
    png: Any = client.generate_images("a", **options, strength=0.5).images[0]
    told = json.loads(png.info["miinb"])
    assert told["source"] == {"name": "my, cat.png", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert (told["strength"], told["mask"], told["num_inference_steps"]) == (0.5, False, 5)
    assert "Denoising strength: 0.5, Source hash: " + told["source"]["sha256"][:10] in png.info["parameters"]
    assert "my, cat" not in png.info["parameters"]
    mask = Image.new("1", (24, 16), 1)
    webp: Any = client.generate_images("a", **options, mask_image=mask, image_format="webp").images[0]
    again = json.loads(webp.getexif()[0x010E])
    assert (again["source"], again["strength"], again["mask"]) == (told["source"], 1.0, True)
    plain: Any = client.generate_images("a", num_inference_steps=1).images[0]
    assert {"source", "strength", "mask"}.isdisjoint(json.loads(plain.info["miinb"]))


def test_any_clients_files_are_checked_before_a_rank_hears_of_them(frontend: FrontendProcess, client: Client) -> None:
    """Requests as another program would send them."""
    good = io.BytesIO()
    noise(16, 16).save(good, "PNG")
    picture = Source("x", good.getvalue())
    wrong: list[tuple[ImagesRequest, str]] = [
        (ImagesRequest("a", ImageParams(), image=Source("x", b"junk")), "image: it is no PNG"),
        (ImagesRequest("a", ImageParams(), image=Source("x", b"")), "image: the file is empty"),
        (ImagesRequest("a", ImageParams(), image=picture, mask=Source("m", b"junk")), "mask_image: it is no PNG"),
        (ImagesRequest("a", ImageParams(), mask=picture), "mask_image: acts only with"),
        (ImagesRequest("a", ImageParams(strength=0.5)), "strength: acts only with"),
        (ImagesRequest("a", ImageParams(num_inference_steps=1), image=picture), "strength: of 1 steps 0.8 is none"),
    ]
    for request, words in wrong:
        with pytest.raises(errors.InvalidRequest, match=words):
            client._image_calls().run([request], 20.0)
    told: Any = client._image_calls().run([ImagesRequest("a", ImageParams(), image=picture)], 20.0)
    assert json.loads(told.images[0].info["miinb"])["strength"] == 0.8
    large = ImagesRequest("a", ImageParams(), image=Source("x", good.getvalue() + bytes(17 << 20)))
    with pytest.raises(errors.InvalidRequest, match="MiB"):
        client._image_calls().run([large], 20.0)
    assert frontend.running() == 0


def test_a_time_limit_ends_the_steps(frontend: FrontendProcess, client: Client) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        client.generate_images("a", num_inference_steps=1000, timeout_s=0.3)
    assert client.records["status"].iloc[-1] == "timeout"
    wait_for(lambda: frontend.running() == 0, "the end of the request")
    wait_for(lambda: frontend.told("cancel"), "the rank's being told")


def test_a_time_limit_holds_whatever_the_server_does(tmp_path: Path) -> None:
    """A rank that hears nothing, as within a step, and a frontend that does not either."""
    process = make(tmp_path)
    try:
        rank = process.rank(task="text-to-image")
        with process.client() as direct, process.client() as grpc:
            grpc._direct = Connections(None)
            for stopped in (rank, process.process):
                stopped.send_signal(signal.SIGSTOP)
                for client, prompts in itertools.product((direct, grpc), ("a", ["a", "b"])):
                    begin = time.monotonic()
                    with pytest.raises(errors.DeadlineExceeded):
                        client.generate_images(prompts, lambda progress: None, timeout_s=0.5)
                    assert 0.45 < time.monotonic() - begin < 5.0
                stopped.send_signal(signal.SIGCONT)
    finally:
        process.close()


def test_what_a_rank_still_computes_is_in_flight(tmp_path: Path) -> None:
    """Though nobody waits for it any more; once however many pictures it has."""
    process = make(tmp_path)
    try:
        rank = process.rank(task="text-to-image")
        with process.client() as client:
            rank.send_signal(signal.SIGSTOP)
            for _ in range(2):
                with pytest.raises(errors.DeadlineExceeded):
                    client.generate_images("a", timeout_s=0.3, num_images_per_prompt=4)
            assert process.running() == 0  # of those whose clients wait

            def in_flight() -> int:
                """As the supervisor is told next."""
                return next(
                    line["activity"]["in_flight"] for line in map(json.loads, process.status) if "activity" in line
                )

            wait_for(lambda: in_flight() == 2, "both")
            assert [in_flight(), in_flight()] == [2, 2]  # every second
            rank.send_signal(signal.SIGCONT)
            wait_for(lambda: in_flight() == 0, "the end of both")
    finally:
        process.close()


def test_canceling_ends_the_steps(frontend: FrontendProcess, client: Client) -> None:
    before = len(frontend.told("cancel"))

    async def leave() -> None:
        task = asyncio.ensure_future(client.agenerate_images(["a", "b"], num_inference_steps=1000))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    wait_for(lambda: frontend.running() == 0, "the end of the requests")
    wait_for(lambda: len(frontend.told("cancel")) == before + 2, "the rank's being told")


def test_the_stop_button_says_how_far_it_was(frontend: FrontendProcess, client: Client) -> None:
    timer = threading.Timer(0.6, lambda: signal.raise_signal(signal.SIGINT))

    def began(progress: ImagesProgress) -> None:
        if not timer.is_alive() and not timer.finished.is_set():
            timer.start()

    with pytest.raises(errors.Interrupted, match=r"stopped at step \d+ of 1000"):
        client.generate_images("a", began, num_inference_steps=1000)
    wait_for(lambda: frontend.running() == 0, "the end of the request")


def test_the_stop_button_keeps_the_pictures_of_a_list_that_are_done(
    frontend: FrontendProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_calls, "MAX_CALLS", 1)

    def press() -> None:
        wait_for(lambda: len(client.records) == 1 and frontend.running() == 1, "the second request")
        os.kill(os.getpid(), signal.SIGINT)

    gc.collect()  # an interrupt that meets the collector would be lost
    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(errors.Interrupted, match="with 2 of 6 pictures done; the deployment lives on") as stopped:
        client.generate_images(["a", "b", "c"], num_inference_steps=60, num_images_per_prompt=2, seed=4)
    thread.join(10)
    assert stopped.value.result.prompts == ("a", "a")
    assert stopped.value.result.seeds == (4, 5)
    assert stopped.value.result.images[0].size == (16, 8)
    assert client.records["status"].tolist() == ["ok", "cancelled"]
    wait_for(lambda: frontend.running() == 0, "the end of the request")


def test_a_rank_that_dies_fails_its_pictures_at_once(tmp_path: Path) -> None:
    process = make(tmp_path)
    try:
        rank = process.rank(task="text-to-image", step_s=0.01)
        with process.client() as client:
            failures: list[BaseException] = []

            def ask() -> None:
                try:
                    client.generate_images("a", num_inference_steps=1000, num_images_per_prompt=2)
                except errors.MiinbError as error:
                    failures.append(error)

            thread = threading.Thread(target=ask)
            thread.start()
            wait_for(lambda: process.running() == 1, "the request")
            time.sleep(0.1)
            rank.kill()
            thread.join(10)
            assert [type(error) for error in failures] == [errors.Unavailable]
            process.rank(task="text-to-image")
            assert len(client.generate_images("a", num_inference_steps=1).images) == 1
    finally:
        process.close()


def test_tasks_are_told_apart(client: Client, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match="text-to-image"):
        client.generate("a")
    with pytest.raises(errors.InvalidRequest, match="text-to-image"):
        client.predict("a")
    process = make(tmp_path)
    try:
        process.rank()
        with process.client() as texts, pytest.raises(errors.InvalidRequest, match="text-generation, not pictures"):
            texts.generate_images("a")
        with process.client() as texts:
            for name in ("image", "mask_image", "strength"):
                with pytest.raises(errors.InvalidRequest, match=f"{name} cannot be set") as refused:
                    texts.generate("a", **{name: 1})
                assert "text-to-image" in refused.value.hint
    finally:
        process.close()


def test_too_many_are_refused(tmp_path: Path) -> None:
    process = make(tmp_path, options={"max_queue": 1})
    try:
        process.rank(task="text-to-image", max_batch=2)
        with process.client() as client:
            with pytest.raises(errors.InvalidRequest, match="takes 3 at once, fewer than these 4"):
                client.generate_images("a", num_inference_steps=1, num_images_per_prompt=4)
            result: Any = client.generate_images("a", num_inference_steps=1, num_images_per_prompt=3)
            assert len(result.images) == 3
    finally:
        process.close()


def test_all_rows_of_a_request_but_the_last_say_that_more_come() -> None:
    """So that a rank that looks all the time does not begin with the first alone. And all say whose they are."""
    rows: list[PaintRequest] = []
    own: list[set[str]] = []
    info = SimpleNamespace(task="text-to-image", model="m")
    replica: Any = SimpleNamespace(info=info, submit=lambda row, sink: rows.append(row))
    numbers = itertools.count()

    async def pick(count: int) -> Any:
        return replica

    balancer: Any = SimpleNamespace(pick=pick, next_row_id=lambda: next(numbers))
    for count in (3, 1):
        rows.clear()
        asked = ImagesRequest("a cat", ImageParams(num_images_per_prompt=count))
        asyncio.run(Imaging.start(asked, balancer, t_submit=0.0, deadline=1.0))
        assert [row.more for row in rows] == [True] * (count - 1) + [False]
        own.append({row.request_id for row in rows})
    assert own[0] != own[1]
    rows.clear()
    asked = ImagesRequest("a cat", ImageParams(num_images_per_prompt=2), "the call's")
    asyncio.run(Imaging.start(asked, balancer, t_submit=0.0, deadline=1.0))
    assert [row.request_id for row in rows] == ["the call's"] * 2
