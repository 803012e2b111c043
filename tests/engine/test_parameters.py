"""The parameters counted from config.json against transformers' own models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from miinb import models
from miinb.bench.presets import PRESETS, config
from miinb.engine.policies import POLICIES
from tests.engine.conftest import CONFIGS

#: Public shapes that no preset has.
SHAPES: dict[str, dict[str, Any]] = {
    "opt-350m": {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 50272, "hidden_size": 1024,
        "word_embed_proj_dim": 512, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "max_position_embeddings": 2048, "do_layer_norm_before": False,
    },
    "mistral-7b": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
}  # fmt: skip
SHAPES |= {name: config(name) for name in PRESETS if PRESETS[name]["model_type"] in POLICIES}


def real(values: dict[str, Any]) -> int:
    with torch.device("meta"):
        settings = transformers.AutoConfig.for_model(**values)
        return sum(
            parameter.numel() for parameter in transformers.AutoModelForCausalLM.from_config(settings).parameters()
        )


@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]))
    assert models.inspect(tmp_path, load_format="dummy").parameters == real(SHAPES[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tiny_configuration(tiny: Callable[[str], tuple[Any, Path]], name: str) -> None:
    model, folder = tiny(name)
    info = models.inspect(folder)
    assert info.optimized
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert info.weights_bytes("bf16") == 2 * info.parameters
