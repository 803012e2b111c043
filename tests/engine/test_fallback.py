"""Families without a policy: planned, loaded and answered as transformers answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from miinb import models
from miinb.config import DeploymentConfig, GenerationParams
from miinb.engine.caches import measure_caches
from miinb.engine.executor import Executor
from miinb.engine.loading import load_executor
from miinb.engine.tokenizer_files import _stand_in
from miinb.hardware import Hardware
from miinb.messages import SequenceRequest, TokensEvent
from miinb.planner import plan

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "mpt": {"n_layers": 2, "d_model": 32, "n_heads": 4, "max_seq_len": 128},
    "codegen": {"n_layer": 2, "n_embd": 32, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    "olmo2": SIZES | {"intermediate_size": 48},
    "rwkv": {"num_hidden_layers": 2, "hidden_size": 32, "attention_hidden_size": 32, "context_length": 128},
    "mamba": {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 8},
    "olmo": SIZES | {"intermediate_size": 48},
    "granite": SIZES | {"num_key_value_heads": 2, "intermediate_size": 48},
}
PROMPTS = [[7, 8, 9, 10, 11], [40, 41]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_without_a_policy_answers_as_transformers(tmp_path: Path, family: str) -> None:
    torch.manual_seed(3)
    special = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family], **special)
    model = saved(config, tmp_path)
    wanted_config = DeploymentConfig.parse({"model": str(tmp_path), "device": "cpu", "options": {"threads": 1}})
    info = models.inspect(tmp_path)
    planned = plan(wanted_config, info, Hardware("A CPU", 2, 8 << 30, 8 << 30, frozenset({"avx2"})))
    assert planned.engine == "baseline"
    assert f"no policy for {family}" in planned.warnings[0]
    assert info.context_length == (0 if family in ("rwkv", "mamba") else 128)

    executor = started(tmp_path)
    assert executor.info.engine == "baseline"
    assert family in executor.info.plan.warnings[0]
    lines = {line.what: line.choice for line in executor.info.plan.lines}
    assert lines["cache"] == "dynamic cache"
    assert ("batches" in lines) == (family == "rwkv")  # it takes padding for text
    assert answers_of(executor, PROMPTS, 12) == [alone(model, prompt, 12) for prompt in PROMPTS]


def saved(config: Any, folder: Path) -> Any:
    """The model of a configuration, its random weights far from ties, saved with a tokenizer."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    _stand_in(101, folder)
    return model


def started(folder: Path, **fields: Any) -> Executor:
    state = folder / "state"
    state.mkdir(exist_ok=True)
    config = DeploymentConfig.parse({"model": str(folder), "device": "cpu", "options": {"threads": 1}} | fields)
    return load_executor(config, replica=0, rank=0, gpus=None, folder=state, report=lambda phase: None)


def answers_of(executor: Executor, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy tokens, asked for at once."""
    for row, prompt in enumerate(prompts):
        params = GenerationParams(max_new_tokens=new, ignore_eos=True, seed=0)
        executor.submit(SequenceRequest(row, prompt, params, time.monotonic()))
    answers: list[list[int]] = [[] for _ in prompts]

    def emit(event: object) -> None:
        assert isinstance(event, TokensEvent) or event.finish_reason  # type: ignore[attr-defined]
        if isinstance(event, TokensEvent):
            answers[event.row_id].extend(event.token_ids)

    while executor.busy:
        executor.step(emit, lambda: None)
    return answers


def alone(model: Any, prompt: list[int], new: int) -> list[int]:
    """What transformers answers."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return list(out[0, len(prompt) :].tolist())


def test_rotary_angles_that_change_past_a_length_are_each_row_s_own(tmp_path: Path) -> None:
    """longrope: transformers takes those of a batch's longest row for all its rows."""
    torch.manual_seed(3)
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 4.0, 8.0, 16.0]}
    config = transformers.Phi3Config(
        **SIZES | {"intermediate_size": 48, "vocab_size": 101, "max_position_embeddings": 256},
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 100.0, **factors},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = saved(config, tmp_path)
    prompts = [[7, 8, 9, 10, 11] * 2, [3, 40, 41, 5] * 25, [9, 8, 4, 10, 12] * 2]
    wanted = [alone(model, prompt, 12) for prompt in prompts]
    for parity in ("fallback", "off"):
        executor = started(tmp_path, options={"threads": 1, "parity": parity})
        assert {line.what: line.reason for line in executor.info.plan.lines}["batches"].endswith("longest prompt")
        assert answers_of(executor, prompts, 12) == wanted


def test_a_model_of_texts_and_pictures_answers_texts(tmp_path: Path) -> None:
    """Its sizes stand in a configuration of the text's own."""
    torch.manual_seed(3)
    text = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "vocab_size": 101}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=99,
        boi_token_index=98,
        eoi_token_index=97,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    _stand_in(101, tmp_path)
    info = models.inspect(tmp_path)
    assert (info.vocab_size, info.layers, info.kv_heads, info.head_size) == (101, 2, 2, 8)
    executor = started(tmp_path, task="text-generation")
    assert answers_of(executor, PROMPTS, 12) == [alone(model, prompt, 12) for prompt in PROMPTS]


def test_a_static_cache_that_answers_differently_is_not_taken() -> None:
    torch.manual_seed(3)
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    config = transformers.AutoConfig.for_model("gpt_neo", vocab_size=101, window_size=7, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    times = measure_caches(model, 101, 256)
    assert times["static cache"].text == times["static cache, compiled"].text == "answers differently"
    assert times["dynamic cache"].seconds < 60
