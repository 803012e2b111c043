"""Steps that reuse inner layers: exact on features of their own step, whole when they should be, near otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miinb.engine.diffusion import ImageExecutor
from miinb.engine.painting import Start
from miinb.engine.step_reuse import StepReuse
from miinb.engine.unet import Unet
from miinb.engine.unet_graphs import GraphedUnet
from miinb.errors import InvalidValue
from tests.engine import tiny_images
from tests.engine.image_rows import latents_of, picture, psnr, start, work
from tests.engine.recomputing import Recomputing
from tests.engine.test_unet import inputs
from tests.engine.test_unet import load as load_unet
from tests.engine.tiny_images import distance, saved
from tests.tiny_pipeline import SIZE

#: Decibels that pictures of this model keep of 20 steps of PNDM: measured were 51 with every second step whole, 45 with
#: every third.
PSNR = 40


@pytest.fixture(scope="module")
def executor(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageExecutor]:
    """One that reuses two of three steps."""
    options = {"threads": 1, "step_reuse": 3}
    loaded, _ = start(pipeline_folder, tmp_path_factory.mktemp("state"), max_batch=4, options=options)
    yield loaded
    loaded.close()


@pytest.fixture
def exact(executor: ImageExecutor) -> Iterator[None]:
    """Within a test all steps are whole."""
    painter: Any = executor.painter
    painter._step_reuse = 1
    yield
    painter._step_reuse = 3


class Watched(Unet):
    """A UNet that keeps which of its steps were whole ("w") and which were shallow ("s"), and of what timestep."""

    def __init__(self, unet: Unet) -> None:
        super().__init__(unet.spec, unet.weights)
        self.seen = ""
        self.places: list[int] = []

    def whole_step(self, latents: Any, step_index: Any, conditions: Any) -> Any:
        self.seen += "w"
        self.places.append(int(step_index))
        return super().whole_step(latents, step_index, conditions)

    def shallow_step(self, latents: Any, step_index: Any, conditions: Any, deep: Any) -> Any:
        self.seen += "s"
        self.places.append(int(step_index))
        return super().shallow_step(latents, step_index, conditions, deep)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("name", "size"), [("sd1", (16, 16)), ("sd2", (11, 6)), ("other", (12, 7)), ("other", (1, 1))])
def test_on_the_features_of_its_own_step_a_shallow_step_is_the_whole_one(
    name: str, size: tuple[int, int], guided: bool, tmp_path: Path
) -> None:
    unet = load_unet(saved(tiny_images.unet(name), tmp_path))
    latents, text = inputs(name, 2, size)
    conditions = unet.prepare(text, torch.tensor([900, 300]))
    latents, first, second = (latents[:1] if guided else latents), torch.tensor([0]), torch.tensor([1])
    expected = unet.step(latents, second, conditions)
    whole, deep = unet.whole_step(latents, second, conditions)
    assert deep.shape == (2, *size, unet.deep_channels)
    kept = deep.clone()
    shallow = unet.shallow_step(latents, second, conditions, deep)
    assert shallow.shape == expected.shape
    assert shallow.is_contiguous()
    assert torch.equal(whole, expected)
    assert distance(shallow, expected) < 1e-5
    assert torch.equal(deep, kept)  # the next step needs them too
    _, other = unet.whole_step(latents, first, conditions)
    assert distance(unet.shallow_step(latents, second, conditions, other), expected) > 1e-4


@pytest.mark.parametrize(
    ("scheduler", "steps", "every", "pattern"),
    [
        ("DDIMScheduler", 7, 3, "wsswssw"),
        ("DDIMScheduler", 4, 2, "wsws"),
        ("DDIMScheduler", 2, 10, "ws"),
        ("DDIMScheduler", 3, 1, ""),
        ("PNDMScheduler", 4, 2, "wswsw"),  # its second timestep is computed twice
        ("HeunDiscreteScheduler", 3, 2, "wswsw"),  # two predictions a step, but for the last
    ],
)
def test_whole_steps_are_where_they_should_be(
    executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch, scheduler: str, steps: int, every: int, pattern: str
) -> None:
    painter: Any = executor.painter
    watched = Watched(painter._unet)
    monkeypatch.setattr(painter, "_unet", watched)
    monkeypatch.setattr(painter, "_step_reuse", every)
    for _ in range(2):  # each batch begins with a whole one
        watched.seen = ""
        latents_of(executor, work(scheduler=scheduler, steps=steps), [1])
        assert watched.seen == pattern


def test_the_first_step_that_a_picture_is_made_from_is_whole(
    executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter: Any = executor.painter
    watched = Watched(painter._unet)
    monkeypatch.setattr(painter, "_unet", watched)
    start = Start(5, np.full((SIZE, SIZE, 3), 90, np.uint8).tobytes())
    latents_of(executor, work(kind="image", strength=0.5, steps=8, scheduler="DDIMScheduler"), [start])
    assert (watched.seen, watched.places) == ("wssw", [4, 5, 6, 7])


@pytest.mark.usefixtures("exact")
def test_without_reuse_nothing_changes(executor: ImageExecutor, pipeline_folder: Path, tmp_path: Path) -> None:
    plain, _ = start(pipeline_folder, tmp_path / "state")
    assert torch.equal(latents_of(executor, work(), [1]), latents_of(plain, work(), [1]))


def test_reused_steps_are_near(executor: ImageExecutor) -> None:
    painter: Any = executor.painter
    found: dict[int, np.ndarray] = {}
    for every in (1, 2, 3):
        painter._step_reuse = every
        found[every] = picture(executor, num_inference_steps=20)
    near = [psnr(found[every], found[1]) for every in (2, 3)]
    assert 80 > near[0] > near[1] > PSNR


def test_a_batch_gives_what_each_gives_alone(executor: ImageExecutor) -> None:
    prompts = ["a red cat", "the blue fox", ""]
    asked = work(steps=5)
    together = latents_of(executor, asked, [3, 4, 5], *prompts)
    for place, prompt in enumerate(prompts):
        assert distance(together[place : place + 1], latents_of(executor, asked, [3 + place], prompt)) < 1e-4


def test_graphs_compute_the_same(tmp_path: Path) -> None:
    """Two sizes in turns, with and without guidance, features of elsewhere, and a size that no graph has."""
    unet = load_unet(saved(tiny_images.unet("sd1"), tmp_path))
    recorder: Any = Recomputing()
    graphed = GraphedUnet(unet, recorder, reuse=True)
    for size in ((8, 8), (9, 6)):
        assert graphed.capture(1, *size, tokens=7, guided=True)
    assert graphed.capture(2, 8, 8, tokens=7)
    for images, texts, size in ((1, 2, (8, 8)), (1, 2, (9, 6)), (2, 2, (8, 8)), (1, 1, (8, 8))):
        latents, text = inputs("sd1", texts, size)
        conditions = unet.prepare(text, torch.tensor([900, 600, 300, 1]))
        reused = [StepReuse(one, 3) for one in (graphed, unet)]
        before = recorder.replays
        for index in range(4):
            ours, theirs = (one.step(latents[:images] + index, torch.tensor([index]), conditions) for one in reused)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert recorder.replays - before == (4 if texts == 2 else 0)
    where = torch.tensor([2])
    _, deep = unet.whole_step(latents, where, conditions)
    expected = unet.shallow_step(latents, where, conditions, deep)
    torch.testing.assert_close(graphed.shallow_step(latents, where, conditions, deep), expected, rtol=0, atol=0)


def test_graphs_of_a_batch_are_made_with_both_steps(executor: ImageExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    painter: Any = executor.painter
    expected = latents_of(executor, work(), [2, 3])
    recorder: Any = Recomputing()
    monkeypatch.setattr(painter, "_unet", GraphedUnet(painter._unet, recorder, reuse=True))
    assert distance(latents_of(executor, work(), [2, 3]), expected) < 1e-5
    assert recorder.replays == 5


def test_kernels_of_shallow_steps_are_known_ahead() -> None:
    pytest.importorskip("triton")
    from miinb.engine.diffusion_spec import unet_spec, vae_spec
    from miinb.engine.image_kernels import kernels_of_images
    from miinb.engine.image_weights import RandomTensors
    from miinb.engine.recording import META, compiling_for, recording
    from miinb.engine.unet_weights import unet_weights

    spec, vae = unet_spec({"cross_attention_dim": 768}), vae_spec(tiny_images.VAES["four"])
    with compiling_for((9, 0)):
        ahead = kernels_of_images(spec, vae, dtype=torch.float16, sizes=[(1, 64, 64)], reuse=True)
        unet = Unet(spec, unet_weights(spec, RandomTensors(torch.float16, META)))
        text = torch.empty((2, 77, 768), dtype=torch.float16, device=META)
        latents, index = torch.empty((1, 4, 64, 64), device=META), torch.empty(1, dtype=torch.int64, device=META)
        with recording():
            conditions = unet.prepare(text, torch.empty(9, device=META))
            _, deep = unet.whole_step(latents, index, conditions)
        assert deep.shape == (2, 64, 64, 320)
        with recording() as launched:
            unet.shallow_step(latents, index, conditions, deep)
    known = {(kernel.name, kernel.specialization) for kernel in ahead}
    assert {(kernel.name, kernel.specialization) for kernel in launched} <= known
    assert launched


def test_what_falls_back_to_diffusers_is_refused(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miinb.engine import image_loading
    from miinb.errors import UnsupportedModel

    def fail(*args: Any) -> None:
        raise UnsupportedModel("The fused layers differ.")

    monkeypatch.setattr(image_loading, "verified", fail)
    with pytest.raises(InvalidValue, match=r"options\.step_reuse: only the optimized engine has it: The fused layers"):
        start(pipeline_folder, tmp_path / "state", options={"threads": 1, "step_reuse": 2})


@pytest.mark.gpu
def test_a_gpus_graphs_compute_what_a_cpu_does(tmp_path: Path) -> None:
    from miinb.engine.unet_weights import load_unet as load_on

    exact = load_unet(saved(tiny_images.unet("sd1"), tmp_path))
    latents, text = inputs("sd1", 2, (16, 24), tokens=77)
    times = torch.tensor([900, 600, 300, 1])
    for dtype, limit in ((torch.float32, 3e-3), (torch.float16, 1e-2)):
        graphed = GraphedUnet(load_on(tmp_path, dtype=dtype, device=torch.device("cuda")), reuse=True)
        assert graphed.capture(2, 16, 24)
        reused = [StepReuse(exact, 3), StepReuse(graphed, 3)]
        conditions = [exact.prepare(text, times), graphed.prepare(text.cuda(), times)]
        for i in range(4):
            index = torch.tensor([i])
            expected = reused[0].step(latents + i / 10, index, conditions[0])
            out = reused[1].step((latents + i / 10).cuda(), index.cuda(), conditions[1])
            assert distance(out.cpu(), expected) < limit
