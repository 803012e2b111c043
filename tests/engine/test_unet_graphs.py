"""Steps of a UNet through graphs that compute again, and its kernels compiled before they are needed."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from miinb.engine.diffusion_spec import unet_spec, vae_spec
from miinb.engine.unet import Unet
from miinb.engine.unet_graphs import GraphedUnet
from tests.engine import tiny_images
from tests.engine.recomputing import Recomputing
from tests.engine.test_unet import inputs, load
from tests.engine.tiny_images import saved


@pytest.fixture
def unet(tmp_path: Path) -> Unet:
    return load(saved(tiny_images.unet("other"), tmp_path))


def test_graphs_read_what_is_given_them(unet: Unet) -> None:
    """Prompts in turns, of different numbers of steps, two sizes, and a step that no graph has."""
    recorder: Any = Recomputing()
    graphed = GraphedUnet(unet, recorder)
    assert str(graphed) == "none"
    assert graphed.capture(2, 4, 6, tokens=7)
    assert graphed.capture(2, 4, 6, tokens=7)
    assert graphed.capture(1, 4, 4, tokens=7)
    assert graphed.capture(2, 4, 4, tokens=7, guided=True)
    assert str(graphed).startswith("predictions of 1 x 4 x 4, 2 x 4 x 6, 4 x 4 x 4, captured in 0.0 s")
    wide, narrow = inputs("other", 2, (4, 6)), inputs("other", 1, (4, 4))
    first = graphed.prepare(wide[1], torch.tensor([900, 500, 1]))
    second = graphed.prepare(-wide[1], torch.tensor([700]))
    small = graphed.prepare(narrow[1], torch.tensor([700, 300]))
    longer = graphed.prepare(inputs("other", 2, (4, 6), tokens=9)[1], torch.tensor([1]))
    calls = [(wide[0], 0, first), (narrow[0], 1, small), (wide[0] + 1, 2, first), (wide[0], 0, second)]
    calls += [(wide[0], 1, first), (wide[0], 0, longer)]
    calls += [(inputs("other", 2, (4, 4))[0], 0, graphed.prepare(inputs("other", 4, (4, 4))[1], torch.tensor([9])))]
    for latents, index, conditions in calls:
        where = torch.tensor([index])
        torch.testing.assert_close(
            graphed.step(latents, where, conditions), unet.step(latents, where, conditions), rtol=0, atol=0
        )
    assert recorder.replays == 6


@pytest.mark.parametrize("reuse", [False, True])
def test_what_a_graph_reads_lives_as_long_as_it(unet: Unet, reuse: bool) -> None:
    """A graph has addresses alone: what lies there must not go to others."""
    read: list[weakref.ref[torch.Tensor]] = []

    class Forgetting(Recomputing):
        def record(self, step: Any) -> Any:
            cells = [cell.cell_contents for cell in step.__closure__]
            cells += [getattr(one, name) for one in cells for name in getattr(one, "__dataclass_fields__", ())]
            read.extend(weakref.ref(one) for one in cells if isinstance(one, torch.Tensor))
            return (lambda: None), step()

    recorder: Any = Forgetting()
    graphed = GraphedUnet(unet, recorder, reuse=reuse)
    assert graphed.capture(1, 4, 4, tokens=7)
    gc.collect()
    assert len(read) >= 4  # latents, an index, and what is of the text and of the step
    assert all(one() is not None for one in read)


def test_convolutions_are_tried_before_a_capture_and_cudnn_stays_on(unet: Unet) -> None:
    seen = []

    class Watching(Recomputing):
        def record(self, step: Any) -> Any:
            seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark))
            return super().record(step)

    recorder: Any = Watching()
    GraphedUnet(unet, recorder).capture(1, 4, 4, tokens=7)
    assert seen == [(True, True)]
    assert not torch.backends.cudnn.benchmark


def test_a_graph_too_many_is_not_made(unet: Unet) -> None:
    recorder: Any = Recomputing()
    graphed = GraphedUnet(unet, recorder)
    recorder.enough = True
    assert not graphed.capture(2, 4, 6)
    assert str(graphed) == "none"


@pytest.mark.slow
def test_the_kernels_themselves_compute_what_diffusers_does(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.engine.interpreted_images", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    unet, vae, rounded = json.loads(done.stdout.splitlines()[-1])
    assert 0 < unet < 1e-5
    assert 0 < vae < 1e-5
    assert 0 < rounded < 1e-5


def test_kernels_are_known_before_weights_are_read() -> None:
    pytest.importorskip("triton")
    from miinb.engine.image_kernels import kernels_of_images
    from miinb.engine.recording import compiling_for

    unet, vae = unet_spec({"cross_attention_dim": 768}), vae_spec(tiny_images.VAES["four"])

    def found(*sizes: tuple[int, int, int]) -> set[tuple[str, str]]:
        kernels = kernels_of_images(unet, vae, dtype=torch.float16, sizes=sizes)
        return {(kernel.name, json.dumps(json.loads(kernel.specialization)["key"])) for kernel in kernels}

    with compiling_for((9, 0)):
        ahead = found((1, 64, 64), (8, 64, 64))
        assert {name for name, _ in ahead} >= {
            "_channel_sums",
            "_group_means",
            "_normalize",
            "_whole_groups",
            "_join",
            "_norm",
            "_gated_product",
            "_wide_product",
        }
        assert {"_channel_sums", "_group_means", "_normalize"} <= {name for name, _ in found((1, 40, 72))}


def test_a_pipelines_kernels_are_known_ahead(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from miinb import models
    from miinb.config import DeploymentConfig
    from miinb.engine.compile import kernels_of
    from miinb.engine.recording import compiling_for
    from tests.tiny_pipeline import make_pipeline

    make_pipeline(tmp_path)
    model = models.inspect(tmp_path / "model")
    config = DeploymentConfig.parse({"model": str(tmp_path / "model"), "dtype": "fp16", "max_batch": 2})
    with compiling_for((9, 0)):
        kernels = kernels_of(config, model)
    assert {kernel.name for kernel in kernels} >= {"_whole_groups", "_join", "_norm"}
    assert len({(kernel.name, kernel.specialization) for kernel in kernels}) == len(kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_gpu_predicts_what_a_cpu_does(name: str, tmp_path: Path) -> None:
    from miinb.engine.unet_weights import load_unet

    exact = load(saved(tiny_images.unet(name), tmp_path))
    latents, text = inputs(name, 2, (16, 24), tokens=77)
    times, index = torch.tensor([700, 20]), torch.tensor([1])
    expected = exact.step(latents, index, exact.prepare(text, times))
    for dtype, limit in ((torch.float32, 3e-3), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)):
        graphed = GraphedUnet(load_unet(tmp_path, dtype=dtype, device=torch.device("cuda")))
        conditions = graphed.prepare(text.cuda(), times)
        eager = graphed.step(latents.cuda(), index.cuda(), conditions).clone()
        assert graphed.capture(2, 16, 24)
        for _ in range(2):
            out = graphed.step(latents.cuda(), index.cuda(), conditions)
            assert tiny_images.distance(out.cpu(), expected) < limit
        assert tiny_images.distance(eager.cpu(), expected) < limit


@pytest.mark.gpu
def test_a_gpu_decodes_what_a_cpu_does(tmp_path: Path) -> None:
    from miinb.engine.vae import load_vae

    saved(tiny_images.vae("four"), tmp_path)
    latents = torch.randn(2, 4, 9, 16)
    expected = load_vae(tmp_path, dtype=torch.float32, device=torch.device("cpu")).decode(latents)
    for dtype, limit in ((torch.float32, 5e-3), (torch.float16, 1e-2)):  # cuDNN's convolutions in fp32 are TF32's
        vae = load_vae(tmp_path, dtype=dtype, device=torch.device("cuda"))
        assert tiny_images.distance(vae.decode(latents.cuda()).cpu(), expected) < limit
