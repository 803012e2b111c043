"""Text to image from end to end: a session, its rank, a tiny pipeline; the pictures are diffusers' own."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import miinb
from miinb import Session, commands, registry
from miinb.deployment import Deployment
from miinb.errors import Interrupted, InvalidRequest, InvalidValue, MiinbError, QueueFull, Unavailable
from miinb.image_results import KEPT, ImageReply, ImageResult
from tests.frontend_process import wait_for
from tests.tiny_pipeline import SIZE, make_pipeline


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Session, Any]]:
    folder = tmp_path_factory.mktemp("images")
    pipe = make_pipeline(folder)
    with Session(folder / "model", device="cpu", options={"threads": 1}, max_batch=4) as session:
        yield session, pipe


def direct(pipe: Any, prompt: str, seed: int, **options: Any) -> np.ndarray:
    (image,) = pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), **options).images
    return np.asarray(image).astype(int)


def difference(image: Any, expected: np.ndarray) -> int:
    return int(np.abs(np.asarray(image).astype(int) - expected).max())


def test_pictures_are_those_of_diffusers(served: tuple[Session, Any]) -> None:
    session, pipe = served
    options = {"num_inference_steps": 5, "guidance_scale": 6.0, "negative_prompt": "blue"}
    result = session.generate("a red cat", seed=3, num_images_per_prompt=3, **options)
    assert isinstance(result, ImageResult)
    assert result.seeds == (3, 4, 5)
    for seed, image in zip(result.seeds, result.images, strict=True):
        assert image.size == (SIZE, SIZE)
        assert difference(image, direct(pipe, "a red cat", seed, **options)) <= 1
    assert result.finish_reasons == ("stop",) * 3
    assert result.timing.steps_s > 0
    assert result.timing.e2e_s >= result.timing.steps_s
    assert session.engine == "optimized"
    assert "passed" in str(session.plan())
    assert list(result.frame["images"]) == [3]


@pytest.mark.slow
def test_the_baseline_gives_the_same_pictures(served: tuple[Session, Any], tmp_path: Path) -> None:
    served[1].save_pretrained(tmp_path / "model", safe_serialization=True)
    prompts, options = ["a cat", "the moon"], {"num_inference_steps": 4, "seed": 5, "guidance_scale": 7.5}
    with Session(tmp_path / "model", device="cpu", engine="baseline", options={"threads": 1}) as session:
        assert session.engine == "baseline"
        plain: Any = session.generate(prompts, **options)
    ours: Any = served[0].generate(prompts, **options)
    for image, expected in zip(ours.images, plain.images, strict=True):
        error = np.square(np.asarray(image, float) - np.asarray(expected, float)).mean()
        assert 10 * np.log10(255**2 / max(error, 1e-9)) > 50


def test_requests_at_once_share_batches_and_keep_their_pictures(served: tuple[Session, Any]) -> None:
    session, pipe = served
    prompts = ["a cat", "the moon", "", "a fox on the moon"]
    options = {"num_inference_steps": 4, "width": 24, "height": 40}
    result = session.generate(prompts, seed=1, **options)
    for prompt, image in zip(prompts, result.images, strict=True):
        assert difference(image, direct(pipe, prompt, 1, **options)) <= 1
    assert session.generate("a", num_inference_steps=1, width=24).images[0].size == (24, SIZE)


def test_long_prompts_are_cut_and_it_is_said(served: tuple[Session, Any]) -> None:
    session, pipe = served
    prompt = "a red fox " * 1000
    result: Any = session.generate(prompt, num_inference_steps=2, seed=1, negative_prompt="cat " * 40)
    assert [text.split(":")[0] for text in result.warnings] == ["prompt", "negative_prompt"]
    options = {"num_inference_steps": 2, "negative_prompt": "cat " * 40}
    assert difference(result.images[0], direct(pipe, prompt, 1, **options)) <= 1
    assert not session.generate("a red fox", num_inference_steps=1).warnings  # type: ignore[attr-defined]
    for letters in range(12):  # of one of these prompts the cut is within a fox
        cut = session.generate("a " * letters + "\U0001f98a" * 60, num_inference_steps=1)
        assert "\ufffd" not in cut.warnings[0]  # type: ignore[attr-defined]


PHOTO = Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
MASK = Image.new("L", (SIZE, SIZE))
MASK.paste(255, (0, 0, SIZE, SIZE // 2))


def from_photo(pipe: Any, prompt: str, seed: int, **options: Any) -> np.ndarray:
    """What diffusers' own class makes of the photo."""
    cls = (
        diffusers.StableDiffusionInpaintPipeline
        if "mask_image" in options
        else diffusers.StableDiffusionImg2ImgPipeline
    )
    made = cls(**pipe.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    size = {"width": SIZE, "height": SIZE} if "mask_image" in options else {}
    return direct(made, prompt, seed, image=PHOTO, **options, **size)


def test_pictures_from_pictures_are_those_of_diffusers(served: tuple[Session, Any], tmp_path: Path) -> None:
    session, pipe = served
    options = {"num_inference_steps": 3, "strength": 0.7}
    PHOTO.save(tmp_path / "photo.png")
    given = [PHOTO, str(tmp_path / "photo.png")]
    prompts, negatives = ["a red cat", "the moon"], ["blue", "fox"]
    result = session.generate(prompts, image=given, negative_prompt=negatives, seed=3, **options)
    for prompt, negative, image in zip(prompts, negatives, result.images, strict=True):
        expected = from_photo(pipe, prompt, 3, negative_prompt=negative, **options)
        assert difference(image, expected) <= 1
    row = session.records.iloc[-1]
    assert row["image_s"] == row["e2e_s"] > row["steps_s"] == 2 * row["step_s"] > 0
    assert row["vae_s"] > 0
    awaited: Any = asyncio.run(
        session.agenerate("a cat", image=PHOTO, mask_image=MASK, seed=4, num_inference_steps=3)  # type: ignore[arg-type]
    )
    expected = from_photo(pipe, "a cat", 4, mask_image=MASK, strength=1.0, num_inference_steps=3)
    assert difference(awaited.images[0], expected) <= 1
    handle = miinb.mii_query_handle(session.name)
    again = handle.query({"query": "a cat"}, image=PHOTO, mask_image=MASK, seed=4, num_inference_steps=3)
    assert again.images == [awaited.images[0]]


def test_gen_begins_from_files(served: tuple[Session, Any], tmp_path: Path) -> None:
    session, pipe = served
    PHOTO.save(tmp_path / "photo.png")
    MASK.save(tmp_path / "mask.png")
    words = ("a cat", "--image", str(tmp_path / "photo.png"), "--num-inference-steps", "3", "--seed", "5")
    command(session, *words, "--strength", "0.7", "--out", str(tmp_path / "out"))
    command(session, *words, "--mask", str(tmp_path / "mask.png"), "--out", str(tmp_path / "out"))
    with Image.open(tmp_path / "out" / "5.png") as image:
        assert difference(image, from_photo(pipe, "a cat", 5, strength=0.7, num_inference_steps=3)) <= 1
        assert json.loads(image.info["miinb"])["source"]["name"] == "photo.png"
    with Image.open(tmp_path / "out" / "5-2.png") as image:
        expected = from_photo(pipe, "a cat", 5, mask_image=MASK, strength=1.0, num_inference_steps=3)
        assert difference(image, expected) <= 1
    (tmp_path / "junk.png").write_text("no picture")
    for name, why in (("none.png", "No such file"), ("junk.png", "it is no PNG, JPEG or WebP file"), ("{no}", "in a")):
        with pytest.raises(InvalidRequest) as refused:
            command(session, "a cat", "--image", str(tmp_path / name))
        told = str(refused.value)
        assert why in told
        assert name in told
        assert "PNG, JPEG or WebP file" in refused.value.hint


def test_awaited_and_attached(served: tuple[Session, Any]) -> None:
    session, pipe = served
    told: list[Any] = []
    first = asyncio.run(session.agenerate("a cat", num_inference_steps=2, seed=9))  # type: ignore[arg-type]
    session.generate("a cat", num_inference_steps=2, on_progress=told.append)
    assert told[-1].total == 2
    assert difference(first.images[0], direct(pipe, "a cat", 9, num_inference_steps=2)) <= 1
    joined = Session._of(session._deployment)
    assert joined.generate("a cat", num_inference_steps=2, seed=9).images[0] == first.images[0]


def test_what_is_wrong_is_said_before_a_step(served: tuple[Session, Any]) -> None:
    session = served[0]
    for wrong, words in (({"height": 30}, "multiple of 8"), ({"sheduler": "x"}, "sheduler"), ({"scheduler": "x"}, "x")):
        with pytest.raises(InvalidRequest, match=words):
            session.generate("a", **wrong)
    with pytest.raises(InvalidValue, match="'image'"):
        session.panel("text")
    with pytest.raises(InvalidValue, match="multiple of 8"):
        session.bench(height=30)
    with pytest.raises(InvalidValue, match="'DDIMSchedule' is none for the model") as refused_value:
        session.bench(scheduler="DDIMSchedule", requests=1)
    assert "Did you mean DDIMScheduler? There are: DDIMScheduler, DDPMScheduler, " in refused_value.value.hint
    with pytest.raises(InvalidRequest):
        session.create_session("a")
    for ask in (session.chat, session.predict, lambda prompt: session.stream(prompt).result):
        with pytest.raises(InvalidRequest, match="serves text-to-image") as refused:
            ask("a cat")
        assert refused.value.hint == "Use generate()."
    with pytest.raises(InvalidRequest, match="on_progress: int is no function"):
        session.generate("a", on_progress=3)
    assert session.generate("a", on_progress=None, num_inference_steps=1).images


def test_a_canceled_task_leaves_no_error_behind(served: tuple[Session, Any]) -> None:
    left: list[Any] = []

    async def canceled() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
        task = asyncio.ensure_future(served[0].agenerate(["a", "b"], num_inference_steps=500))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.5)
        gc.collect()

    asyncio.run(canceled())
    assert not left


def test_it_is_measured_under_a_workload(served: tuple[Session, Any], tmp_path: Path) -> None:
    session, _ = served
    runs = session.bench(["a cat", "the moon"], num_images_per_prompt=[1, 3], requests=2, num_inference_steps=2)
    rows = runs.requests[~runs.requests["warmup"]]
    assert list(rows["status"]) == ["ok"] * 4
    assert list(rows["images"]) == [1, 1, 3, 3]
    assert (rows["e2e_s"] >= rows["model_s"]).all()
    assert (rows[["queue_s", "text_encode_s", "steps_s", "vae_s", "postprocess_s"]] > 0).all().all()
    summary = runs.summary
    assert summary["overhead"].iloc[0] > 0
    assert (summary["peak_mem_bytes"] > 0).all()
    (env,) = miinb.load_runs(runs.save(tmp_path)).env.values()
    assert [one["seed"] for one in env["pictures"]] == [2, 3]


def test_mii_asks_for_pictures(served: tuple[Session, Any]) -> None:
    session, pipe = served
    handle = miinb.mii_query_handle(session.name)
    reply = handle.query({"query": ["a cat", "the moon"]}, num_inference_steps=2, seed=4)
    assert isinstance(reply, ImageReply)
    assert reply.nsfw_content_detected == [False, False]
    assert difference(reply.images[1], direct(pipe, "the moon", 4, num_inference_steps=2)) <= 1
    assert reply.time_taken >= reply.model_time_taken > 0
    with pytest.raises(InvalidRequest, match="prompt"):
        handle.query({"prompt": "a cat"})


def test_a_card_shows_pictures_and_escapes_prompts(served: tuple[Session, Any]) -> None:
    result: Any = served[0].generate('<script>"a cat"', num_inference_steps=1, seed=6, num_images_per_prompt=2)
    shown = result._repr_mimebundle_()
    assert shown["text/html"].count("<img ") == 2
    assert "<script>" not in shown["text/html"]
    assert "&lt;script&gt;&quot;a cat&quot; · seed 7" in shown["text/html"]
    assert str(result) == shown["text/plain"]
    assert "seed 6" in str(result)
    assert "2 images" in str(result)


def test_panels_ask_the_deployment(served: tuple[Session, Any]) -> None:
    session, pipe = served
    shown, both = session.panel(), session.panel("compare")
    for panel in (shown, both):
        panel.prompt.value = "a cat"
        panel.controls.load({"num_inference_steps": 2, "seed": 3})
        panel.controls.lock.value = True
    shown.generate()
    assert shown.wait(60)
    assert difference(shown.chosen.image, direct(pipe, "a cat", 3, num_inference_steps=2)) <= 1
    shown.remake()
    assert shown.wait(60)
    assert "The same as picture 1, pixel for pixel" in shown.status.value
    shown.controls.load({"num_inference_steps": 900, "scheduler": "DDIMScheduler"})
    shown.generate()
    wait_for(lambda: "Step " in shown.status.value, "progress")
    shown.stop()
    assert shown.wait(20)
    assert "given up" in shown.status.value
    both.compare()
    assert both.wait(60)
    assert "pixel for pixel" in both.viewer.words.value
    assert "faster" in both.output.value or "slower" in both.output.value or "as fast" in both.output.value
    shown.close()
    both.close()


def command(session: Session, *words: str, in_notebook: bool = False) -> Any:
    context = commands.Context(prog="%mii" if in_notebook else "miinb", sessions={session.name: session})
    gen = commands.find("gen")
    values = commands.parse(gen, [*words, "-d", session.name], prog="miinb")
    return commands.execute(context, gen, values)


def test_gen_writes_files(
    served: tuple[Session, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session, pipe = served
    words = ("a cat", "--num-inference-steps", "2", "--seed", "3", "--num-images-per-prompt", "2")
    folder = tmp_path / "out"
    for _ in range(2):  # what is there stays
        command(session, *words, "--out", str(folder))
    assert sorted(file.name for file in folder.iterdir()) == ["3-2.png", "3.png", "4-2.png", "4.png"]
    with Image.open(folder / "4.png") as image:
        assert difference(image, direct(pipe, "a cat", 4, num_inference_steps=2)) <= 1
        assert json.loads(image.info["miinb"])["seed"] == 4
    assert str(folder / "4-2.png") in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    command(session, *words, "--image-format", "webp")
    assert {file.name for file in tmp_path.glob("*.webp")} == {"3.webp", "4.webp"}
    shown = command(session, *words, "--format", "json", in_notebook=True)
    assert json.loads(commands.as_json(shown))["seeds"] == [3, 4]
    assert json.loads(commands.as_json(shown))["saved"] == []
    shown = command(session, *words, "--format", "json", "--out", str(folder))
    assert json.loads(commands.as_json(shown))["saved"] == [str(folder / "3-3.png"), str(folder / "4-3.png")]
    short = ("--steps", "2", "--guidance", "3", "--negative", "a dog", "--size", "24x40", "-k", "2", "--seed", "1")
    shown = command(session, "a cat", *short, in_notebook=True)
    assert [image.size for image in shown.images] == [(24, 40)] * 2
    asked = {"num_inference_steps": 2, "guidance_scale": 3, "negative_prompt": "a dog", "width": 24, "height": 40}
    assert difference(shown.images[0], direct(pipe, "a cat", 1, **asked)) <= 1
    with pytest.raises(InvalidRequest, match="--size"):
        command(session, "a cat", "--size", "24x40", "--width", "24")
    with pytest.raises(InvalidRequest, match="--chat"):
        command(session, "a cat", "--chat")
    with pytest.raises(InvalidRequest, match="max_new_tokens"):
        command(session, "a cat", "-n", "4")
    (tmp_path / "file").write_text("")
    asked = len(session.records)
    with pytest.raises(InvalidRequest, match="cannot be written"):
        command(session, *words, "--out", str(tmp_path / "file"))
    assert len(session.records) == asked  # refused before anything was computed


class Full:
    """A file on a disk that is full."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [Interrupted, QueueFull])
def test_gen_that_ends_early_writes_what_is_done(
    served: tuple[Session, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[Interrupted] | type[QueueFull],
) -> None:
    session = served[0]
    done = session.generate("a cat", num_inference_steps=1, seed=3)

    def stopped(*_: object, **parameters: object) -> None:
        ended = error("ended.", hint=f"1 of 2 pictures done. {KEPT}")
        ended.result = done
        raise ended

    monkeypatch.setattr(session, "generate", stopped)
    with pytest.raises(error) as told:
        command(session, "a cat", "--out", str(tmp_path / "out"))
    assert str(told.value) == f"ended. 1 of 2 pictures done. What is done was written to {tmp_path / 'out'}."
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["3.png"]
    assert str(tmp_path / "out" / "3.png") in capsys.readouterr().out


def test_half_a_file_does_not_stay(
    served: tuple[Session, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result: Any = served[0].generate("a cat", num_inference_steps=1, seed=3)
    opened = Path.open

    def full(path: Path, mode: str = "r") -> Any:
        file = opened(path, mode)
        file.write(b"half")
        return Full(file)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InvalidRequest, match="No space left"):
        result.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_who_joins_while_a_rank_starts_again_asks_for_pictures(served: tuple[Session, Any]) -> None:
    """What a deployment serves is known before any replica says so: its parameters are not taken for those of texts."""
    (victim,) = served[0].status().ranks
    os.kill(victim.pid, signal.SIGKILL)
    wait_for(lambda: not served[0]._client.health(), "the end of the rank")
    joined = Session._of(Deployment(registry.find(served[0].name)))  # as another process has it
    failures: list[BaseException] = []

    def pictures() -> ImageResult | None:
        try:
            return joined.generate("a", width=SIZE, height=SIZE, num_inference_steps=1)  # type: ignore[return-value]
        except MiinbError as error:
            failures.append(error)
            return None

    deadline = time.monotonic() + 60
    while (result := pictures()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert isinstance(result, ImageResult)
    assert {type(error) for error in failures} == {Unavailable}
    assert joined.task == "text-to-image"


def test_a_rank_that_is_killed_fails_its_pictures_and_comes_back(served: tuple[Session, Any]) -> None:
    session, pipe = served
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            session.generate("a cat", num_inference_steps=900, scheduler="DDIMScheduler", num_images_per_prompt=4)
        except BaseException as error:
            failures.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    wait_for(lambda: session.status().in_flight == 1, "the request")
    (victim,) = session.status().ranks
    os.kill(victim.pid, signal.SIGKILL)
    asker.join(30)
    assert [type(error) for error in failures] == [Unavailable]
    deadline = time.monotonic() + 60
    while True:
        try:
            result = session.generate("a cat", num_inference_steps=2, seed=1)
            break
        except Unavailable:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert difference(result.images[0], direct(pipe, "a cat", 1, num_inference_steps=2)) <= 1
    (rank,) = session.status().ranks
    assert rank.pid != victim.pid
