"""The planner: what it chooses, what it refuses, and that it says why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from miinb.config import DeploymentConfig
from miinb.engine.policies import decoder_spec
from miinb.errors import InvalidValue, MiinbError, OutOfMemory, UnsupportedModel
from miinb.hardware import Gpu, Hardware, _visible
from miinb.messages import Plan
from miinb.models import ModelInfo
from miinb.planner import plan, resolve

GB = 1 << 30
CPU = Hardware("A CPU", 8, 64 * GB, 32 * GB, frozenset({"avx2"}))
OLD_CPU = dataclasses.replace(CPU, cpu_flags=frozenset())
GPUS = tuple(Gpu(n, n, "H100", 80 * GB, 78 * GB, (9, 0)) for n in range(2))
TWO_GPUS = dataclasses.replace(CPU, gpus=GPUS)

CONFIG = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA = ModelInfo(
    source="llama", folder=Path(), format="safetensors", family="llama", architecture="LlamaForCausalLM",
    tasks=("text-generation", "conversational"), config=CONFIG, tensors={}, parameters=1_000_000_000, dtype="bf16",
    context_length=8192, vocab_size=32000, layers=16, hidden_size=2048, heads=32, kv_heads=8, head_size=64,
    spec=decoder_spec(CONFIG, "llama"),
)  # fmt: skip


def planned(hardware: Hardware = CPU, model: ModelInfo = LLAMA, **fields: Any) -> Plan:
    return plan(DeploymentConfig.parse({"model": "m", **fields}), model, hardware)


def line(choice: Plan, what: str) -> str:
    return next(f"{one.choice}: {one.reason}" for one in choice.lines if one.what == what)


def test_a_cpu() -> None:
    choice = planned()
    assert (choice.engine, choice.device, choice.dtype) == ("optimized", "cpu", "bf16")
    assert choice.weights_bytes == 2_000_000_000
    assert (choice.max_length, choice.max_batch) == (4096, 16)
    assert choice.kv_cache_bytes == 16 * 4096 * LLAMA.kv_bytes_per_token("bf16")
    assert line(choice, "threads") == "8: 8 cores for 1 rank"
    assert {one.what for one in choice.lines} == {
        "engine", "device", "threads", "dtype", "max_length", "max_batch", "kv_cache"
    }  # fmt: skip
    assert all(one.reason for one in choice.lines)


def test_gpus() -> None:
    choice = planned(TWO_GPUS, replicas=2)
    assert (choice.device, choice.max_length, choice.max_batch) == ("cuda", 8192, 256)
    config = resolve(DeploymentConfig.parse({"model": "m", "replicas": 2}), choice, TWO_GPUS)
    assert config.gpus == [[0], [1]]
    assert (config.device, config.dtype, config.max_length, config.max_batch) == ("cuda", "bf16", 8192, 256)
    assert resolve(DeploymentConfig.parse({"model": "m"}), planned(), CPU).gpus is None


@pytest.mark.parametrize("asked", ["auto", "fp16"])
def test_fp16_on_a_cpu_follows_auto_and_says_so(asked: str) -> None:
    model = dataclasses.replace(LLAMA, dtype="fp16")
    assert planned(model=model, dtype=asked).dtype == "bf16"
    assert "fp16" in line(planned(model=model, dtype=asked), "dtype")
    assert planned(OLD_CPU, model=model, dtype=asked).dtype == "fp32"
    assert planned(TWO_GPUS, model=model, dtype=asked).dtype == "fp16"


def test_a_gpu_without_bf16() -> None:
    old = dataclasses.replace(CPU, gpus=(dataclasses.replace(GPUS[0], capability=(7, 5)),))
    assert planned(old).dtype == "fp16"
    with pytest.raises(InvalidValue, match="no bf16"):
        planned(old, dtype="bf16")


def test_fallbacks_say_so() -> None:
    no_policy = UnsupportedModel("There is no policy for falcon yet.")
    model = dataclasses.replace(LLAMA, family="falcon", spec=None, unfused=no_policy)
    choice = planned(model=model)
    assert choice.engine == "baseline"
    assert "no policy for falcon" in choice.warnings[0]
    bert = dataclasses.replace(LLAMA, family="bert", tasks=("fill-mask",), spec=None, kv_heads=0, context_length=512)
    choice = planned(model=bert)
    assert (choice.engine, choice.max_length, choice.max_batch) == ("baseline", 512, 32)
    assert "fill-mask" in line(choice, "engine")
    assert "compiled" in line(planned(engine="baseline", options={"compile": True}), "engine")


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"dtype": "int8"}, InvalidValue, "dtype: int8 is not built yet"),
        ({"dtype": "fp8"}, InvalidValue, "not built yet"),
        ({"kv_dtype": "fp8"}, InvalidValue, "kv_dtype"),
        ({"tensor_parallel": 2}, InvalidValue, "tensor_parallel: 2 is not built yet"),
        ({"device": "cuda"}, InvalidValue, "no GPU can be seen"),
        ({"gpus": [0]}, InvalidValue, "no GPU can be seen"),
        ({"task": "fill-mask"}, UnsupportedModel, "does not serve"),
        ({"max_length": 8193}, InvalidValue, "above the model's context of 8192"),
        ({"max_batch": 4096, "max_length": 8192}, OutOfMemory, "Use max_batch="),
        ({"options": {"kv_cache_bytes": 1 << 20}, "max_length": 4096}, OutOfMemory, "max_length=32"),
    ],
)
def test_refused_before_anything_starts(fields: dict[str, Any], error: type[MiinbError], words: str) -> None:
    with pytest.raises(error) as caught:
        planned(**fields)
    assert words in caught.value.line()


def test_gpus_that_are_not_there() -> None:
    with pytest.raises(InvalidValue, match="replicas: 3 need 3 GPUs; 2 can be seen"):
        planned(TWO_GPUS, replicas=3)
    with pytest.raises(InvalidValue, match="there is no GPU 5"):
        planned(TWO_GPUS, gpus=[5])


def test_a_model_that_does_not_fit() -> None:
    large = dataclasses.replace(LLAMA, parameters=70_000_000_000)
    with pytest.raises(OutOfMemory, match=r"needs about 14\d\.\d\d GB in bf16, 34\.36 GB are free") as caught:
        planned(model=large)
    assert "70.0 billion" in caught.value.hint


def test_little_memory_shortens_the_cache() -> None:
    tight = dataclasses.replace(CPU, free_bytes=4 * GB)
    choice = planned(tight)
    assert choice.kv_cache_bytes < 2 * GB
    assert choice.max_batch < 16


def test_visible_gpus_follow_cuda() -> None:
    found = [(f"GPU-{n}abc", Gpu(0, n, "H100", 1, 1, (9, 0))) for n in range(4)]
    assert [(g.index, g.physical) for g in _visible(found, "2,0")] == [(0, 2), (1, 0)]
    assert [g.physical for g in _visible(found, "GPU-3")] == [3]
    assert [g.physical for g in _visible(found, "1,9,0")] == [1]
    assert _visible(found, "") == ()
    assert len(_visible(found, None)) == 4
