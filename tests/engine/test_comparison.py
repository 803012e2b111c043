"""The comparison that `miinb check` runs, in this process: every kind of decoder, and faults that it must find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from miinb.config import DeploymentConfig
from miinb.engine import comparison
from miinb.engine.comparison import compare
from tests.engine.tiny_encoders import HEADS, build

Tiny = Callable[[str], tuple[Any, Path]]


def config(folder: Path, dtype: str = "fp32") -> DeploymentConfig:
    return DeploymentConfig.parse({"model": str(folder), "device": "cpu", "dtype": dtype})


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "bloom", "opt-350m"])
def test_every_layer_is_compared(tiny: Tiny, name: str) -> None:
    model, folder = tiny(name)
    found = compare(config(folder))
    assert len(found["layers"]) == model.config.num_hidden_layers
    assert all(ours < 1e-4 and plain == 0 for ours, plain in [*found["layers"], found["logits"]])
    assert found["tokens"] == found["expected_tokens"]


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", ["bert", "distilbert", "electra"])
def test_every_layer_of_an_encoder_is_compared(tmp_path: Path, name: str, task: str) -> None:
    build(name, task, tmp_path)
    found = compare(config(tmp_path))
    assert len(found["layers"]) == 2
    assert all(ours < 1e-4 and plain == 0 for ours, plain in [*found["layers"], found["logits"]])


def test_an_encoder_in_shorter_dtypes(tmp_path: Path) -> None:
    build("roberta", "token-classification", tmp_path)
    ours, plain = compare(config(tmp_path, "bf16"))["logits"]
    assert 1e-4 < ours <= 1.5 * plain
    ours, plain = compare(config(tmp_path, "int8"))["logits"]
    assert 1e-4 < ours < 0.1
    assert plain == 0


def test_in_bf16_the_baseline_s_own_error_stands_beside_ours(tiny: Tiny) -> None:
    found = compare(config(tiny("llama")[1], "bf16"))
    ours, plain = found["logits"]
    assert 1e-4 < ours <= 1.5 * plain


def test_a_wrong_layer_shows_where_it_is(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = comparison._fused

    def wrong(*arguments: Any) -> Any:
        decoder = fused(*arguments)
        with torch.inference_mode():
            decoder.weights.layers[1].down.weight.mul_(1.1)
        return decoder

    monkeypatch.setattr(comparison, "_fused", wrong)
    layers = [ours for ours, _ in compare(config(tiny("llama")[1]))["layers"]]
    assert layers[0] < 1e-4 < layers[1]
