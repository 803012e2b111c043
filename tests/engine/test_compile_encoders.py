"""The kernels of an encoder are compiled before they are needed: those of every step that its executor computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from miinb import models
from miinb.bench import presets
from miinb.config import DeploymentConfig
from miinb.engine import compile as compiling
from miinb.engine.compile import kernels_of
from miinb.engine.encoder_inputs import Sizes
from miinb.engine.recording import Kernel, compiling_for

H100 = (9, 0)


def found(kernels: list[Kernel]) -> set[tuple[str, str]]:
    return {(kernel.name, json.dumps(json.loads(kernel.specialization)["key"])) for kernel in kernels}


@pytest.mark.parametrize(
    ("preset", "task", "ranks"),
    [
        ("bert-base", "text-classification", 1),
        ("bert-base", "text-classification", 2),
        ("roberta-base", "fill-mask", 1),
    ],
)
def test_steps_of_any_size_find_their_kernels(
    preset: str, task: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = presets.write(preset, tmp_path / preset)
    info = models.inspect(folder, load_format="dummy")
    fields = {"model": str(folder), "task": task, "dtype": "fp16", "load_format": "dummy", "tensor_parallel": ranks}
    config = DeploymentConfig.parse(fields)
    with compiling_for(H100):
        ahead = found(kernels_of(config, info))
        names = {"_product", "_large_product", "_packed_attention", "_embedding_norm", "_norm"}
        names |= {"_best_shares"} if task == "fill-mask" else set()
        names |= {"_reduce", "pushed_sum"} if ranks > 1 else set()
        assert {name for name, _ in ahead} == names
        large = [(tokens, longest) for tokens in (4097, 5000, 12345, 16384) for longest in (20, 77, 130, 500)]
        sizes = [Sizes(tokens, longest, 300, 300) for tokens, longest in large]
        monkeypatch.setattr(compiling, "graph_sizes", lambda *_: sizes)
        monkeypatch.setattr(compiling, "_large_steps", lambda *_: [])
        assert found(kernels_of(config, info)) <= ahead
