"""Every family of encoders with every head against transformers' own model on the same weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miinb import models
from miinb.engine import encoder_parity
from miinb.engine.encoder import Encoder, EncoderBatch
from miinb.engine.encoder_kernels import encoder_kernels
from miinb.engine.encoder_weights import load_encoder_weights
from miinb.engine.place import Place
from miinb.engine.policies import ENCODERS
from miinb.engine.weights import DTYPES
from miinb.messages import Plan
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


def load(folder: Path, task: str, dtype: str = "fp32", **layout: Any) -> Encoder:
    info = models.inspect(folder).serving(task)
    assert info.encoder is not None
    weights = load_encoder_weights(info, ENCODERS[info.family], info.encoder, dtype=dtype, device=CPU, **layout)
    return Encoder(info.encoder, weights)


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


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("task", ["text-classification", "fill-mask", "feature-extraction"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra"])
def test_short_dtypes_are_as_exact_as_transformers(tiny: Tiny, name: str, task: str, dtype: str) -> None:
    model, folder = tiny(name, task)
    exact = torch.cat([truth(model, *each) for each in zip(SEQUENCES, TYPES, strict=True)])
    short = copy.deepcopy(model).to(DTYPES[dtype])
    theirs = torch.cat([truth(short, *each) for each in zip(SEQUENCES, TYPES, strict=True)])
    encoder = load(folder, task, dtype)
    ours = encoder.outputs(batch_of(encoder, SEQUENCES, TYPES))
    assert ours.dtype == DTYPES[dtype]
    allowed = 1.5 * (theirs.float() - exact).norm()
    few = torch.finfo(DTYPES[dtype]).eps * exact.norm()  # of a head with a few outputs theirs may be exact by chance
    assert (ours.float() - exact).norm() <= allowed + 0.5 * few


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["bert", "roberta-untied", "distilbert", "electra"])
def test_the_operators_of_this_cpu(tiny: Tiny, name: str, dtype: str) -> None:
    model, folder = tiny(name, "fill-mask")
    kernels, plan = encoder_kernels(Plan("optimized", "cpu", dtype), Place(CPU, dtype))
    assert plan.lines[-1].choice == "compiled for this CPU"
    encoder = load(folder, "fill-mask", dtype, levels=kernels.levels, pack=kernels.pack)
    encoder.ops = kernels.operators
    exact = torch.cat([truth(model, *each) for each in zip(SEQUENCES, TYPES, strict=True)])
    ours = encoder.outputs(batch_of(encoder, SEQUENCES, TYPES)).float()
    allowed = {"fp32": 1e-4, "bf16": 0.03, "int8": 0.05}[dtype]
    assert (ours - exact).norm() <= allowed * exact.norm()
    assert encoder_parity.check(encoder, kernels.tolerance).passed
    encoder.ops = encoder.ops._replace(packed_attention=lambda qkv, *_, **__: qkv[:, : qkv.shape[1] // 3].contiguous())
    report = encoder_parity.check(encoder, kernels.tolerance)
    assert not report.passed
    assert report.where.startswith("layer")
