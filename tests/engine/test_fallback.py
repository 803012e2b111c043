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
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # far from ties
    model.save_pretrained(tmp_path)
    _stand_in(101, tmp_path)
    wanted_config = DeploymentConfig.parse({"model": str(tmp_path), "device": "cpu", "options": {"threads": 1}})
    info = models.inspect(tmp_path)
    planned = plan(wanted_config, info, Hardware("A CPU", 2, 8 << 30, 8 << 30, frozenset({"avx2"})))
    assert planned.engine == "baseline"
    assert f"no policy for {family}" in planned.warnings[0]
    assert info.context_length == (0 if family in ("rwkv", "mamba") else 128)

    state = tmp_path / "state"
    state.mkdir()
    executor = load_executor(wanted_config, replica=0, rank=0, gpus=None, folder=state, report=lambda phase: None)
    assert executor.info.engine == "baseline"
    assert family in executor.info.plan.warnings[0]
    lines = {line.what: line.choice for line in executor.info.plan.lines}
    assert lines["cache"] == "dynamic cache"
    assert ("batches" in lines) == (family == "rwkv")  # it takes padding for text
    for row, prompt in enumerate(PROMPTS):
        params = GenerationParams(max_new_tokens=12, ignore_eos=True, seed=0)
        executor.submit(SequenceRequest(row, prompt, params, time.monotonic()))
    answers: list[list[int]] = [[] for _ in PROMPTS]

    def emit(event: object) -> None:
        assert isinstance(event, TokensEvent) or event.finish_reason  # type: ignore[attr-defined]
        if isinstance(event, TokensEvent):
            answers[event.row_id].extend(event.token_ids)

    while executor.busy:
        executor.step(emit, lambda: None)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer == out[0, len(prompt) :].tolist()


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
