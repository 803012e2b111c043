"""Every family of encoders with every head against transformers' own model on the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miinb import models
from miinb.engine.encoder import Encoder, EncoderBatch
from miinb.engine.encoder_weights import load_encoder_weights
from miinb.engine.policies import ENCODERS, encoder_spec
from tests.engine.tiny_encoders import CONFIGS, HEADS, build

Tiny = Callable[[str, str], tuple[Any, Path]]
CPU = torch.device("cpu")
#: Ragged, one token alone, and one as long as the model takes.
SEQUENCES = [[(17 * i + j * j) % 96 + 3 for j in range(n)] for i, n in enumerate((17, 1, 48, 5))]
TYPES = [[int(3 * j >= len(tokens)) for j in range(len(tokens))] for tokens in SEQUENCES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    @functools.cache
    def get(name: str, task: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp(name)
        return build(name, task, folder), folder

    return get


def load(folder: Path, task: str, dtype: str = "fp32") -> Encoder:
    info = models.inspect(folder)
    policy, spec = ENCODERS[info.family], encoder_spec(info.config, task, str(folder))
    return Encoder(spec, load_encoder_weights(info, policy, spec, dtype=dtype, device=CPU))


def batch_of(encoder: Encoder, sequences: list[list[int]], types: list[list[int]]) -> EncoderBatch:
    rows = "first" if encoder.spec.head.rows == "first" else "all"
    return EncoderBatch.of_sequences(sequences, rows=rows, type_ids=[kind for each in types for kind in each])


@torch.inference_mode()
def truth(model: Any, tokens: list[int], types: list[int]) -> Tensor:
    """transformers' outputs [rows, columns] for one sequence without padding."""
    extra = {"token_type_ids": torch.tensor([types])} if getattr(model.config, "type_vocab_size", 0) > 1 else {}
    found = model(torch.tensor([tokens]), **extra)
    if hasattr(found, "start_logits"):
        return torch.stack((found.start_logits[0], found.end_logits[0]), -1)
    return found.logits.view(-1, found.logits.shape[-1]) if hasattr(found, "logits") else found.last_hidden_state[0]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_transformers(tiny: Tiny, name: str, task: str) -> None:
    model, folder = tiny(name, task)
    encoder = load(folder, task)
    wanted = [truth(model, *each) for each in zip(SEQUENCES, TYPES, strict=True)]
    packed = batch_of(encoder, SEQUENCES, TYPES)
    assert relative(encoder.outputs(packed), torch.cat(wanted)) < 1e-4, "packed, in order"
    assert relative(encoder.head(encoder.body(packed), packed.rows), torch.cat(wanted)) < 1e-4, "by its parts"
    for tokens, types, alone in zip(SEQUENCES, TYPES, wanted, strict=True):
        assert relative(encoder.outputs(batch_of(encoder, [tokens], [types])), alone) < 1e-4
