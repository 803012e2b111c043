"""Models whose weights wait elsewhere answer as those whose weights are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import miinb
from miinb.config import DeploymentConfig
from miinb.demo import tiny_encoder, tiny_model
from miinb.errors import InvalidValue, MiinbError, OutOfMemory

OFFLOAD = {"offload": "cpu", "ds_config": {"zero_optimization": {"stage3_prefetch_bucket_size": 1000}}}


def gpt2(folder: Path) -> str:
    """A tied head and buffers."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=737, n_embd=48, n_layer=3, n_head=4, n_positions=128, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_model() / name).read_bytes())
    return str(folder)


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bf16"), ("gpt2", "fp32")])
def test_answers_equal_those_of_weights_in_place(family: str, dtype: str, tmp_path: Path) -> None:
    model = str(tiny_model()) if family == "llama" else gpt2(tmp_path)
    common: dict[str, Any] = {"task": "text-generation", "device": "cpu", "dtype": dtype, "max_length": 96}
    prompts = ["Once upon a time, there was a cat", "The", "One day a bird"]
    with miinb.Session(model, **common, options=OFFLOAD) as session:
        plan, status = str(session.plan()), session.status()
        found = [session.generate(prompts[:n], max_new_tokens=10).texts for n in (1, 3)]
    assert "in the host's memory: ZeRO-Inference fetches a layer at a time" in plan
    assert "baseline" in plan.splitlines()[0]
    assert status.ranks[0].weights_bytes == 0  # none is in place
    with miinb.Session(model, **common, engine="baseline") as session:
        assert found == [session.generate(prompts[:n], max_new_tokens=10).texts for n in (1, 3)]


def test_an_encoder_and_a_limit_that_its_weights_do_not_fit() -> None:
    model, text = str(tiny_encoder("fill-mask")), "ida lost her [MASK] in oslo ."
    common: dict[str, Any] = {"task": "fill-mask", "device": "cpu", "dtype": "fp32"}
    with miinb.Session(model, **common, engine="baseline") as session:
        expected = session.predict(text)[0]
    with miinb.Session(model, **common, options=OFFLOAD) as session:
        found = session.predict(text)[0]
    assert [fill.token_str for fill in found] == [fill.token_str for fill in expected]
    assert [fill.score for fill in found] == pytest.approx([fill.score for fill in expected], rel=1e-5)
    limit = {"memory_limit_bytes": 600 << 20}  # what a rank takes besides weights
    with pytest.raises(OutOfMemory):
        miinb.Session(model, **common, options=limit)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"options": {"offload_folder": "/fast"}}, "only with options.offload"),
        ({"options": {"ds_config": {}}}, "only with options.offload"),
        ({"options": {"offload": "nvme"}}, "with options.offload='nvme'"),
        ({"options": {"offload": "cpu", "offload_folder": "/fast"}}, "and only there"),
        ({"options": {"offload": "cpu", "ds_config": {"zero_optimization": {"stage": 1}}}}, "needs stage 3"),
        ({"options": {"offload": "cpu"}, "tensor_parallel": 2}, "not together with tensor_parallel"),
        ({"options": {"offload": "cpu", "speculative": "prompt_lookup"}}, "without compile and speculative"),
        ({"options": {"offload": "ram"}}, "cpu"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        DeploymentConfig.parse({"model": "m", **fields})


def test_a_configuration_of_another_dtype_is_refused() -> None:
    options = {"offload": "cpu", "ds_config": {"fp16": {"enabled": True}}}
    with pytest.raises(MiinbError, match="fp16 is on, the dtype is fp32"):
        miinb.Session(str(tiny_model()), "text-generation", device="cpu", dtype="fp32", options=options)
