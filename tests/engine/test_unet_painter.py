"""The optimized painter against diffusers' pipeline: the same pictures of the same seeds, whatever is asked for."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miinb import models
from miinb.engine import diffusion, image_parity, unet_painter
from miinb.engine.diffusion import ImageExecutor
from miinb.engine.painting import Kind, Start
from miinb.engine.pipeline_parts import _random_parts
from miinb.engine.unet import Unet
from miinb.engine.unet_graphs import GraphedUnet, batches
from miinb.engine.unet_painter import UnetPainter, denoised
from miinb.errors import BrokenCheckpoint, InvalidRequest, RankFailed
from miinb.image_messages import PaintProgress, PaintRequest
from miinb.image_params import ImageParams, parse_images
from miinb.messages import FinishedEvent
from miinb.samplers import SAMPLERS
from tests.engine import tiny_images
from tests.engine.image_rows import latents_of, painted, picture, psnr, request, run, start, work
from tests.engine.recomputing import Recomputing
from tests.engine.tiny_images import distance
from tests.tiny_pipeline import SIZE, make_pipeline

#: All that PNDM can be replaced by; LMS needs scipy, and DPMSolverSDE torchsde, which are dependencies.
SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *(
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
    ),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
)


@pytest.fixture(scope="module")
def arms(
    pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ImageExecutor, ImageExecutor]]:
    """The optimized engine and the baseline, of one folder."""
    state = tmp_path_factory.mktemp("state")
    both = [start(pipeline_folder, state, engine=engine, max_batch=4)[0] for engine in ("optimized", "baseline")]
    yield both[0], both[1]
    for one in both:
        one.close()


def test_the_plan_and_the_phases_tell_what_runs(pipeline_folder: Path, tmp_path: Path) -> None:
    executor, phases = start(pipeline_folder, tmp_path / "state")
    assert isinstance(executor.painter, UnetPainter)
    assert executor.info.engine == executor.info.plan.engine == "optimized"
    lines = {line.what: line for line in executor.info.plan.lines}
    assert lines["parity"].choice == "passed"
    assert {"unet", "vae", "diffusers", "kernels", "load"} <= set(lines)
    assert executor.info.plan.weights_bytes > 0
    assert [phase.name for phase in phases] == ["load"] * 4 + ["verify"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_ends_at_the_same_latents(arms: tuple[ImageExecutor, ImageExecutor], scheduler: str) -> None:
    asked, seeds = work(scheduler=scheduler), [5, 9]
    ours, theirs = (latents_of(arm, asked, seeds) for arm in arms)
    assert distance(ours, theirs) < 1e-4
    assert distance(theirs[:1], theirs[1:]) > 1e-2


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("kind", ["image", "inpaint"])
@pytest.mark.parametrize(
    "scheduler", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverSDEScheduler"]
)
def test_pictures_from_pictures_end_at_the_same_latents(
    arms: tuple[ImageExecutor, ImageExecutor], scheduler: str, kind: Kind, strength: float
) -> None:
    draw = np.random.default_rng(0)
    starts: list[Start | int] = []
    for seed in (5, 9):
        image = draw.integers(0, 256, (SIZE, SIZE, 3), np.uint8).tobytes()
        mask = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % SIZE < SIZE // 2).astype(np.uint8) * 255
        starts.append(Start(seed, image, mask.tobytes() if kind == "inpaint" else b""))
    asked = work(scheduler=scheduler, kind=kind, strength=strength, steps=5)
    ours, theirs = (latents_of(arm, asked, starts) for arm in arms)
    assert distance(ours, theirs) < 1e-4
    assert distance(theirs[:1], theirs[1:]) > 1e-2


def test_a_mask_and_progress_of_a_later_beginning(arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    image = np.full((SIZE, SIZE, 3), 90, np.uint8).tobytes()
    start = Start(5, image, np.zeros((SIZE, SIZE), np.uint8).tobytes())  # nothing is painted anew
    asked, steps = work(kind="inpaint", strength=0.5, steps=6, scheduler="DDIMScheduler"), []
    found = {}
    for arm in arms:
        conditions = arm.painter.embed(["a"], ["b"], asked.guidance)
        told: list[int] = []
        found[arm.info.engine] = arm.painter.denoise(conditions, asked, [start], lambda step, _: told.append(step))  # noqa: B023
        steps.append(told)
    assert steps[0] == steps[1] == [1, 2, 3]
    assert distance(found["optimized"], found["baseline"]) < 1e-4


def test_no_scheduler_is_left_out(arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    offered = [arm.painter.schedulers for arm in arms]
    assert offered[0] == offered[1]
    assert set(offered[0]) >= set(SCHEDULERS) | set(SAMPLERS.values())
    assert [arm.info.plan.schedulers for arm in arms] == [tuple(names) for names in offered]
    assert set(offered[0]) == set(SCHEDULERS)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_the_shapes_of_stable_diffusion_1_and_2(name: str, tmp_path: Path) -> None:
    """sd2 predicts velocities, and its schedulers have been told so."""
    from diffusers import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    make_pipeline(tmp_path)
    model, unet = tmp_path / "model", tiny_images.unet(name, sample_size=8)
    for part, made in (("unet", unet), ("vae", tiny_images.vae("four"))):
        shutil.rmtree(model / part)
        made.save_pretrained(model / part)
    settings = json.loads((model / "text_encoder" / "config.json").read_text())
    text = CLIPTextConfig(**settings | {"hidden_size": unet.config.cross_attention_dim})
    CLIPTextModel(text).save_pretrained(model / "text_encoder")
    kind = "v_prediction" if name == "sd2" else "epsilon"
    DDIMScheduler(prediction_type=kind, steps_offset=1, clip_sample=False).save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    arms = [start(model, tmp_path / "state", engine=engine)[0] for engine in ("optimized", "baseline")]
    assert [arm.info.engine for arm in arms] == ["optimized", "baseline"]
    for scheduler in ("DDIMScheduler", "EulerDiscreteScheduler"):
        asked = work(width=72, height=40, steps=5, scheduler=scheduler)
        ours, theirs = (latents_of(arm, asked, [1, 2]) for arm in arms)
        assert distance(ours, theirs) < 1e-3
    assert psnr(*(picture(arm, width=64, height=64) for arm in arms)) > 50


CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "a size of its own": {"height": 24, "width": 40},
    "an empty prompt": {"prompt": ""},
    "a long prompt": {"prompt": "the moon a " * 1000},
    "guidance 0": {"guidance_scale": 0.0},
    "guidance 1": {"guidance_scale": 1.0, "num_inference_steps": 1},
    "a negative prompt": {"negative_prompt": "blue", "guidance_scale": 1.5},
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_the_baseline(arms: tuple[ImageExecutor, ImageExecutor], case: str) -> None:
    ours, theirs = (picture(arm, **CASES[case]) for arm in arms)
    assert psnr(ours, theirs) > 50
    assert theirs.std() > 1


def test_without_guidance_one_prediction_is_computed(arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    painter: Any = arms[0].painter
    assert painter.embed(["a"], ["b"], 1.0)[1] is None
    assert painter.embed(["a"], ["b"], 1.1)[1].shape == painter.embed(["a"], ["b"], 1.0)[0].shape


def test_texts_are_embedded_once(arms: tuple[ImageExecutor, ImageExecutor], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the baseline embeds them; so many are kept as were used last."""
    painter: Any = arms[0].painter
    monkeypatch.setattr(painter, "_texts", {})
    monkeypatch.setattr(unet_painter, "MOST_TEXTS", 3)
    seen: list[list[str]] = []
    encode = painter._pipe.encode_prompt
    monkeypatch.setattr(painter._pipe, "encode_prompt", lambda texts, *rest: seen.append(texts) or encode(texts, *rest))
    for prompts, negatives, guidance in (
        *((["a", "b", "a"], ["", "", ""], 7.5), (["b"], [""], 7.5), (["c"], ["a"], 1.0)),
        *((["d"], [""], 7.5), (["a"], ["b"], 7.5), (["v", "w", "x", "y"], ["z"] * 4, 2.0)),
    ):
        found, expected = (arm.painter.embed(prompts, negatives, guidance) for arm in arms)
        for own, other in zip(found, expected, strict=True):
            assert (own is None) == (other is None)
            assert own is None or distance(own, other) < 1e-5
    assert seen == [["a", "b", ""], ["c"], ["d"], ["a", "b"], ["v", "w", "x", "y", "z"]]
    assert list(painter._texts) == ["x", "y", "z"]


def test_a_batch_gives_what_each_gives_alone(arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    prompts = ["a red cat", "the blue fox", ""]
    together = latents_of(arms[0], work(), [3, 4, 5], *prompts)
    for place, prompt in enumerate(prompts):
        alone = latents_of(arms[0], work(), [3 + place], prompt)
        assert distance(together[place : place + 1], alone) < 1e-4


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("scheduler", ["DPMSolverSDEScheduler", "DDPMScheduler"])
def test_noise_between_steps_is_of_each_pictures_seed(
    arms: tuple[ImageExecutor, ImageExecutor], scheduler: str, kind: Kind
) -> None:
    """Of two runs, in batches of every size and at every place, on both engines."""
    image = np.full((SIZE, SIZE, 3), 90, np.uint8).tobytes() if kind == "image" else b""
    asked, seeds = work(scheduler=scheduler, kind=kind, strength=0.8, steps=6), (3, 2**63 - 1, 5)
    starts = [Start(seed, image) for seed in seeds]
    for arm in arms:
        together, pair = latents_of(arm, asked, starts), latents_of(arm, asked, starts[:0:-1])
        assert torch.equal(together, latents_of(arm, asked, starts))
        assert distance(pair, together[1:].flip(0)) < 1e-4
        for place, one in enumerate(starts):
            assert distance(together[place : place + 1], latents_of(arm, asked, [one])) < 1e-4
        assert distance(together[:1], together[1:2]) > 1e-2


def test_a_hint_names_the_least_steps_that_work(
    arms: tuple[ImageExecutor, ImageExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PNDM with its Runge-Kutta steps does 4 and more."""
    painter: Any = arms[0].painter
    monkeypatch.setattr(painter, "_config", {**painter._config, "skip_prk_steps": False})
    check = painter._check  # which remembers nothing
    for steps, hint in ((1, "Ask for 4 or more."), (3, "Ask for 4 or more."), (1000, "Ask for 20 to 50.")):
        with pytest.raises(InvalidRequest) as caught:
            check(work(steps=steps))
        assert caught.value.hint == hint
    check(work(steps=4))


def test_a_schedule_of_the_models_settings_is_told(
    arms: tuple[ImageExecutor, ImageExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    painter: Any = arms[0].painter
    assert painter.noise_schedule("DPMSolverMultistepScheduler") == ""
    monkeypatch.setattr(painter, "_config", {**painter._config, "use_karras_sigmas": True})
    assert painter.noise_schedule("DPMSolverMultistepScheduler") == "Karras"
    assert painter.noise_schedule("DDIMScheduler") == ""  # which has none
    (event,) = painted(run(arms[0], request(0, scheduler="EulerDiscreteScheduler"))).values()
    assert event.schedule == "Karras"


def test_progress_previews_and_cancels(
    arms: tuple[ImageExecutor, ImageExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion, "PROGRESS_S", 0.0)
    executor = arms[0]
    told: dict[str, list[tuple[int, bool]]] = {}
    for arm in arms:
        arm.paint(PaintRequest(1, "a", ImageParams(num_inference_steps=6, seed=1, preview_steps=3), time.monotonic()))
        events: list[Any] = []
        arm.step(events.append, lambda: None)
        progress = [event for event in events if isinstance(event, PaintProgress)]
        told[arm.info.engine] = [(event.step, bool(event.preview)) for event in progress]
    assert told["optimized"] == told["baseline"]
    assert told["optimized"][-1] == (6, True)
    executor.paint(PaintRequest(2, "a", ImageParams(num_inference_steps=400, seed=1), time.monotonic()))
    events, polls = [], 0

    def cancel() -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            executor.cancel(2, "cancelled")

    executor.step(events.append, cancel)
    assert polls == 3
    assert [event.row_id for event in events if isinstance(event, FinishedEvent)] == [2]


def test_what_is_wrong_is_refused(arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    for values in ({"height": 30}, {"num_inference_steps": 0}, {"guidance_scale": float("nan")}):
        with pytest.raises(InvalidRequest):
            parse_images(values)
    for params in (ImageParams(scheduler="DDIMSchedule"), ImageParams(num_inference_steps=1000)):
        with pytest.raises(InvalidRequest):
            arms[0].paint(PaintRequest(0, "a", params, time.monotonic()))
    assert not arms[0].busy


def test_a_check_of_another_request_leaves_running_steps_alone(arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    painter: Any = arms[0].painter
    asked, conditions = work(), painter.embed(["a"], ["b"], 7.5)
    expected = painter.denoise(conditions, asked, [Start(1)], lambda step, latents: None)
    other = dataclasses.replace(asked, steps=9, scheduler="DDIMScheduler")
    again = painter.denoise(conditions, asked, [Start(1)], lambda step, latents: painter.check(other))
    assert torch.equal(again, expected)


def test_bf16_is_near(pipeline_folder: Path, arms: tuple[ImageExecutor, ImageExecutor], tmp_path: Path) -> None:
    """40 dB from fp32 at least, and not farther than diffusers in bf16 by more than 3."""
    exact = picture(arms[1])
    half = [
        start(pipeline_folder, tmp_path / "s", engine=engine, dtype="bf16")[0] for engine in ("optimized", "baseline")
    ]
    ours, theirs = (psnr(picture(arm), exact) for arm in half)
    assert ours > max(40, theirs - 3)
    assert half[0].info.dtype == "bf16"


def test_graphs_paint_the_same(pipeline_folder: Path, arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    """Each size is captured when it first comes; a graph's result is not kept by a scheduler that keeps predictions."""
    painter: Any = arms[0].painter
    unet, recorder = painter._unet, Recomputing()
    graphed: Any = GraphedUnet(unet, recorder)  # type: ignore[arg-type]
    painter._unet = graphed
    try:
        for guidance in (7.5, 1.0):
            replays = recorder.replays
            found = latents_of(arms[0], work(guidance=guidance), [2, 3])
            assert recorder.replays > replays
            painter._unet = unet
            assert distance(found, latents_of(arms[0], work(guidance=guidance), [2, 3])) < 1e-5
            painter._unet = graphed
    finally:
        painter._unet = unet
    assert len(graphed._captured) == 2
    assert [batches(most) for most in (1, 3, 8, 12)] == [[1], [3, 2, 1], [8, 4, 2, 1], [8, 4, 2, 1]]


def test_a_loop_may_begin_later(arms: tuple[ImageExecutor, ImageExecutor]) -> None:
    painter: Any = arms[0].painter
    seen: list[torch.Tensor] = []
    text = torch.cat(painter.embed(["a"], ["b"], 7.5)[::-1])

    def scheduler() -> Any:
        made = painter.new_scheduler(work(scheduler="DDIMScheduler"), [Start(1)])
        made.set_timesteps(5)
        return made

    noise = torch.randn(1, 4, 8, 8)

    def keep(index: int, latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents)
        return latents

    whole = denoised(painter._unet, scheduler(), noise, text, 7.5, after=keep)
    assert torch.equal(denoised(painter._unet, scheduler(), seen[1], text, 7.5, first=2), whole)
    assert len(seen) == 5


def test_parity_finds_a_wrong_operator(
    pipeline_folder: Path, arms: tuple[ImageExecutor, ImageExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miinb.engine import image_blocks
    from miinb.kernels import dispatch, reference

    painter: Any = arms[0].painter
    assert isinstance(painter._unet, Unet)
    assert image_parity.check(painter._unet, painter._vae).passed

    def wrong(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        y, total = reference.group_norm(x, *args, **options)
        return (y if dispatch.is_plain() else 1.01 * y), total

    monkeypatch.setattr(image_blocks, "group_norm", wrong)
    report = image_parity.check(painter._unet, painter._vae)
    assert not report.passed
    assert report.error > 1e-3
    fallen, _ = start(pipeline_folder, tmp_path / "a")
    assert fallen.info.engine == "baseline"
    assert "differ from their reference" in fallen.info.plan.warnings[-1]
    with pytest.raises(RankFailed):
        start(pipeline_folder, tmp_path / "b", options={"parity": "raise", "threads": 1})
    off, _ = start(pipeline_folder, tmp_path / "c", options={"parity": "off", "threads": 1})
    assert off.info.engine == "optimized"


def test_what_the_engine_does_not_know_diffusers_serve(pipeline_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"resnet_out_scale_factor": 2.0}))
    info = models.inspect(tmp_path / "model")
    assert not info.optimized
    executor, _ = start(tmp_path / "model", tmp_path / "state")
    assert executor.info.engine == "baseline"
    assert "resnet_out_scale_factor" in executor.info.plan.warnings[-1]
    assert picture(executor).std() > 1


def test_weights_that_are_no_numbers_end_the_start(tmp_path: Path) -> None:
    pipe = make_pipeline(tmp_path)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[0, 0] = float("inf")
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    with pytest.raises(BrokenCheckpoint, match="text_encoder/"):
        start(tmp_path / "model", tmp_path / "state")


@pytest.mark.parametrize("engine", ["optimized", "baseline"])
def test_random_weights_need_no_files(pipeline_folder: Path, tmp_path: Path, engine: str) -> None:
    counted = models.inspect(pipeline_folder).parameters
    shutil.copytree(pipeline_folder, tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    with pytest.raises(BrokenCheckpoint, match="tokenizer"):
        models.inspect(tmp_path / "model")
    info = models.inspect(tmp_path / "model", load_format="dummy")
    assert (info.parameters, info.format, info.optimized) == (counted, "none", True)
    images = [
        picture(start(tmp_path / "model", tmp_path / f"s{n}", engine=engine, load_format="dummy")[0]) for n in range(2)
    ]
    assert images[0].std() > 1
    assert psnr(*images) > 50  # the same at every start


def test_the_host_keeps_near_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    class Event:
        made = 0

        def record(self) -> None:
            Event.made += 1
            self.number = Event.made

        def synchronize(self) -> None:
            waited.append(self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = unet_painter.Pace(torch.device("cuda"))
    for _ in range(5):
        pace.step()
    assert waited == [1, 2, 3]


def test_random_parts_are_the_same_whichever_are_made(pipeline_folder: Path) -> None:
    info = models.inspect(pipeline_folder, load_format="dummy")
    assert info.pipeline is not None
    asked = (info, info.pipeline, "cpu", torch.float32)
    names = ("unet", "vae", "text_encoder")
    together = _random_parts(*asked, ())
    for name in names:
        without = [other for other in names if other != name]
        alone = _random_parts(*asked, without)
        assert all(map(torch.equal, together[name].parameters(), alone[name].parameters()))
