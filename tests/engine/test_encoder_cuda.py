"""The executor of encoders on a GPU: kernels, CUDA graphs, launch-ahead, pinned results. Run with `-m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miinb import models
from miinb.config import DeploymentConfig
from miinb.engine.encoder import Encoder
from miinb.engine.encoder_executor import fused_executor
from miinb.engine.encoder_weights import load_encoder_weights
from miinb.engine.encoding import EncodeExecutor
from miinb.engine.policies import ENCODERS, encoder_spec
from miinb.engine.reduction import ROWS
from miinb.engine.transformers_encoder import load_encoding
from tests.engine import tiny_encoders
from tests.engine.test_encoding import ask, info_of, run, sequences, values

#: One text, a step as full as it gets, one that no graph holds, texts of one token, and what takes several steps.
LOADS = [[9], [48, 3, 40], [30] * 9, [1] * 13, [17, 5, 31], [48] * 20]
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "fp8": 0.15}


def fused(folder: Path, task: str, dtype: str, device: str) -> EncodeExecutor:
    info = models.inspect(folder)
    policy, spec = ENCODERS[info.family], encoder_spec(info.config, task, str(folder))
    encoder = Encoder(spec, load_encoder_weights(info, policy, spec, dtype=dtype, device=torch.device(device)))
    config = DeploymentConfig.parse({"model": "m", "options": {"max_step_tokens": 256}})
    return fused_executor(encoder, config, info_of(task, max_length=64, device=device), lambda phase: None)


def answers(executor: EncodeExecutor, task: str) -> dict[int, Any]:
    for row, lengths in enumerate(LOADS):
        masks = [(0, 0), (len(lengths) - 1, lengths[-1] - 1)][: len(lengths)] if task == "fill-mask" else None
        executor.encode(ask(row, sequences(lengths, row), masks=masks))
    return run(executor)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("task", ROWS)
def test_a_gpu_answers_as_a_cpu_does(task: str, dtype: str, tmp_path: Path) -> None:
    tiny_encoders.build("bert", task, tmp_path)
    wanted = answers(fused(tmp_path, task, "fp32", "cpu"), task)
    executor = fused(tmp_path, task, dtype, "cuda")
    assert executor.info.plan.lines[-1].choice == "on"
    first, again = answers(executor, task), answers(executor, task)  # the second time into memory that was used
    for row, event in wanted.items():
        scale = float(np.abs(values(event)).max())
        np.testing.assert_allclose(values(first[row]), values(event), atol=TOLERANCE[dtype] * scale)
        np.testing.assert_array_equal(values(first[row]), values(again[row]))
        assert 0 < first[row].model_s < 5
    assert not executor.busy


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_transformers_on_a_gpu_answers_as_on_a_cpu(compiled: bool, tmp_path: Path) -> None:
    model = tiny_encoders.build("bert", "token-classification", tmp_path)
    config = DeploymentConfig.parse({"model": "m", "engine": "baseline", "options": {"compile": compiled}})
    wanted = answers(load_encoding(model, config, info_of("token-classification", max_length=48)), "")
    info = info_of("token-classification", max_length=48, device="cuda")
    found = answers(load_encoding(model.cuda(), config, info), "")
    for row, event in wanted.items():
        np.testing.assert_allclose(values(found[row]), values(event), atol=1e-3)
