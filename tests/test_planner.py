"""The planner: what it chooses, what it refuses, and that it says why."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from miinb.config import DeploymentConfig
from miinb.engine.parameters import count_parameters
from miinb.engine.policies import POLICIES, decoder_spec
from miinb.errors import InvalidValue, MiinbError, OutOfMemory, UnsupportedModel
from miinb.hardware import Gpu, Hardware, _visible
from miinb.messages import Plan
from miinb.models import ModelInfo, inspect
from miinb.planner import plan, resolve

GB = 1 << 30
CPU = Hardware("A CPU", 8, 64 * GB, 32 * GB, frozenset({"avx2"}))
OLD_CPU = dataclasses.replace(CPU, cpu_flags=frozenset())
GPUS = tuple(Gpu(n, n, "H100", 80 * GB, 78 * GB, (9, 0)) for n in range(2))
TWO_GPUS = dataclasses.replace(CPU, gpus=GPUS)
AMPERE = dataclasses.replace(CPU, gpus=(dataclasses.replace(GPUS[0], name="A100", capability=(8, 0)),))

CONFIG = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA = ModelInfo(
    source="llama", folder=Path(), format="safetensors", family="llama", architecture="LlamaForCausalLM",
    tasks=("text-generation", "conversational"), config=CONFIG, tensors={}, parameters=852_559_872, dtype="bf16",
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
    assert choice.weights_bytes == 2 * LLAMA.parameters
    assert line(choice, "weights") == "1.71 GB: 0.853 billion parameters in bf16"
    assert (choice.max_length, choice.max_batch) == (4096, 16)
    assert choice.kv_cache_bytes == 16 * 4096 * LLAMA.kv_bytes_per_token("bf16")
    assert line(choice, "threads") == "8: 8 cores for 1 rank"
    assert {one.what for one in choice.lines} == {
        "engine", "device", "threads", "dtype", "weights", "max_length", "max_batch", "kv_cache", "step_budget"
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


def test_an_fp8_cache() -> None:
    choice, plain = planned(TWO_GPUS, kv_dtype="fp8", max_batch=8), planned(TWO_GPUS, max_batch=8)
    assert choice.kv_cache_bytes / plain.kv_cache_bytes == (64 + 2) / (2 * 64)
    assert line(choice, "kv_cache").endswith("all rows full, in fp8: answers can differ from those of other caches")
    assert "slower" in line(planned(kv_dtype="fp8"), "kv_cache")
    old = dataclasses.replace(CPU, gpus=(dataclasses.replace(GPUS[0], capability=(8, 0)),))
    with pytest.raises(InvalidValue, match="no fp8"):
        planned(old, kv_dtype="fp8")
    assert planned(old, kv_dtype="fp8", device="cpu").device == "cpu"
    bert = dataclasses.replace(LLAMA, family="bert", tasks=("fill-mask",), spec=None, kv_heads=0, context_length=512)
    with pytest.raises(InvalidValue, match="an encoder has no cache"):
        planned(model=bert, kv_dtype="fp8")
    with pytest.raises(InvalidValue, match="optimized engine"):
        planned(engine="baseline", kv_dtype="fp8")


def test_fallbacks_say_so() -> None:
    no_policy = UnsupportedModel("There is no policy for falcon yet.")
    model = dataclasses.replace(LLAMA, family="falcon", spec=None, unfused=no_policy)
    choice = planned(model=model)
    assert choice.engine == "baseline"
    assert "no policy for falcon" in choice.warnings[0]
    albert = dataclasses.replace(LLAMA, family="albert", tasks=("fill-mask",), spec=None, context_length=512)
    choice = planned(model=albert)
    assert (choice.engine, choice.max_length, choice.max_batch) == ("baseline", 512, 32)
    assert "no policy for fill-mask of albert" in line(choice, "engine")
    assert choice.kv_cache_bytes == 0
    assert "compiled" in line(planned(engine="baseline", options={"compile": True}), "engine")


BERT = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip


def encoder(folder: Path, **changes: Any) -> ModelInfo:
    values = BERT | {"architectures": ["BertForSequenceClassification"]} | changes
    (folder / "config.json").write_text(json.dumps(values))
    return inspect(folder, load_format="dummy")


def test_an_encoder(tmp_path: Path) -> None:
    bert = encoder(tmp_path)
    choice = planned(model=bert)
    assert (choice.engine, choice.max_length, choice.max_batch, choice.kv_cache_bytes) == ("optimized", 512, 256, 0)
    assert choice.weights_bytes == 4 * bert.parameters == 4 * 109_483_778
    assert line(choice, "engine") == "optimized: fused encoder with the policy of bert"
    assert line(choice, "steps").startswith("256 tokens: of all waiting requests")
    assert line(choice, "labels") == "2: LABEL_0, LABEL_1: config.json names none"
    assert planned(TWO_GPUS, bert, dtype="fp16").max_batch == 4096
    roberta = encoder(tmp_path, model_type="roberta", max_position_embeddings=514)
    assert line(planned(model=roberta), "max_length").startswith("512 tokens: the model's 514 positions")
    with pytest.raises(InvalidValue, match="above the model's context of 512"):
        planned(model=roberta, max_length=514)
    small = dataclasses.replace(CPU, free_bytes=1 * GB)
    with pytest.raises(OutOfMemory, match=r"438 MB of weights") as caught:
        planned(small, bert)
    assert caught.value.hint == "What would fit: dtype='bf16'; dtype='int8'."
    assert "int8" in line(planned(small, bert, dtype="int8"), "weights")
    with pytest.raises(OutOfMemory, match=r"can be used \(options\.memory_limit_bytes is 1\.07 GB\)\."):
        planned(CPU, bert, options={"memory_limit_bytes": 1 * GB})


@pytest.mark.parametrize(
    ("flags", "asked", "used", "words"),
    [
        ({"avx2"}, "auto", "fp32", "the checkpoint's; this CPU has none for bf16"),
        ({"avx2", "amx_bf16"}, "auto", "fp32", "bf16 would use this CPU's AMX"),
        ({"avx2", "amx_bf16", "avx512_bf16"}, "bf16", "bf16", "asked for; this CPU has AMX"),
        ({"avx2"}, "bf16", "bf16", "no instructions for it"),
        ({"avx512_bf16"}, "fp16", "bf16", "AVX512-BF16"),
        ({"avx2"}, "fp16", "fp32", "no instructions for bf16"),
    ],
)
def test_an_encoders_dtype_follows_the_instructions(
    tmp_path: Path, flags: set[str], asked: str, used: str, words: str
) -> None:
    choice = planned(dataclasses.replace(CPU, cpu_flags=frozenset(flags)), encoder(tmp_path), dtype=asked)
    assert choice.dtype == used
    assert words in line(choice, "dtype")


def test_an_encoder_that_transformers_run(tmp_path: Path) -> None:
    choice = planned(model=encoder(tmp_path, position_embedding_type="relative_key"))
    assert "'relative_key' have no fused form" in choice.warnings[0]
    choice = planned(model=encoder(tmp_path, num_labels=50, id2label={"0": "a", "1": "b"}))
    assert "names 2 of the 50 labels" in choice.warnings[0]


def test_an_encoder_on_several_ranks(tmp_path: Path) -> None:
    one, two = planned(TWO_GPUS, encoder(tmp_path)), planned(TWO_GPUS, encoder(tmp_path), tensor_parallel=2)
    assert (two.engine, two.warnings) == ("optimized", ())
    words = "2 ranks: 6 of 12 attention heads each; the embeddings and the task's head are whole on each"
    assert line(two, "tensor_parallel") == words
    assert line(two, "device") == "cuda 0 (H100), 1 (H100): 2 a replica"
    assert one.weights_bytes - two.weights_bytes == pytest.approx(85e6 / 2 * 4, rel=0.01)  # half of the layers, in fp32
    assert line(two, "weights").endswith("the share of each of 2 ranks")
    with pytest.raises(InvalidValue, match=r"the 12 attention heads .* do not divide by 5") as caught:
        planned(model=encoder(tmp_path), tensor_parallel=5)
    assert caught.value.hint == "Numbers of ranks that work: 1, 2, 3, 4, 6, 12."
    whole, half = (planned(TWO_GPUS, encoder(tmp_path), tensor_parallel=n, dtype="int8").weights_bytes for n in (1, 2))
    assert whole - half == pytest.approx(85e6 / 2 * (1 + 2 / 64), rel=0.01)
    split = planned(TWO_GPUS, encoder(tmp_path), tensor_parallel=2, engine="baseline")
    assert line(split, "tensor_parallel").startswith("2 ranks, DeepSpeed AutoTP: 6 of 12 attention heads each")


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"dtype": "int8", "engine": "baseline"}, InvalidValue, "int8 needs the optimized engine"),
        ({"dtype": "fp8"}, InvalidValue, "a CPU has no fp8. Use dtype='int8'"),
        ({"kv_dtype": "fp8", "engine": "baseline"}, InvalidValue, "kv_dtype: fp8 needs the optimized engine"),
        ({"tensor_parallel": 3}, InvalidValue, "do not divide by 3. Numbers of ranks that work: 1, 2, 4, 8"),
        (
            {"tensor_parallel": 3, "engine": "baseline"},
            InvalidValue,
            "the 32 attention heads of llama do not divide by 3",
        ),
        (
            {"tensor_parallel": 2, "options": {"all_reduce": "nccl"}},
            InvalidValue,
            "ranks on a CPU do not sum by 'nccl'. Use 'auto' or 'shared_memory' or 'gloo'",
        ),
        ({"device": "cuda"}, InvalidValue, "no GPU can be seen"),
        ({"gpus": [0]}, InvalidValue, "no GPU can be seen"),
        ({"task": "fill-mask"}, UnsupportedModel, "does not serve"),
        ({"options": {"step_reuse": 2}}, InvalidValue, "step_reuse: text-generation has no steps of denoising"),
        ({"max_length": 8193}, InvalidValue, "above the model's context of 8192"),
        ({"max_batch": 4096, "max_length": 8192}, OutOfMemory, "Use max_batch="),
        ({"options": {"kv_cache_bytes": 1 << 20}, "max_length": 4096}, OutOfMemory, "max_length=32"),
    ],
)
def test_refused_before_anything_starts(fields: dict[str, Any], error: type[MiinbError], words: str) -> None:
    with pytest.raises(error) as caught:
        planned(**fields)
    assert words in caught.value.line()


def test_ranks_share_weights_cache_and_cores() -> None:
    one, two = planned(max_batch=2), planned(max_batch=2, tensor_parallel=2)
    assert one.weights_bytes / 2 < two.weights_bytes < one.weights_bytes  # each has the whole embedding
    assert two.kv_cache_bytes == one.kv_cache_bytes / 2
    assert "2 ranks" in line(two, "threads")


def test_few_key_value_heads_are_copied() -> None:
    eight, more = (planned(max_batch=2, max_length=512, tensor_parallel=ranks) for ranks in (8, 16))
    assert line(eight, "tensor_parallel") == "8 ranks: 4 of 32 attention heads each"
    assert line(more, "tensor_parallel").endswith("2 of 32 attention heads each; each key/value head is on 2 of them")
    one_head = 16 * 2 * 64 * 2  # keys and values of each layer, in two bytes
    assert more.kv_cache_bytes == eight.kv_cache_bytes == 2 * 512 * one_head
    shared = 16 * (2 * 2048 * 2048 + 3 * 2048 * 5632) + 32000 * 2048  # of queries, outputs, MLP and head
    copied = 16 * 2 * 64 * 2048  # a head's part of the keys' and values' projections
    norms = LLAMA.weights_bytes("bf16", 1) - 2 * (shared + 8 * copied)  # and the embedding
    assert more.weights_bytes == norms + 2 * (shared // 16 + copied)
    odd = CONFIG | {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 768, "intermediate_size": 3072}
    model = dataclasses.replace(LLAMA, spec=decoder_spec(odd, "llama"))
    with pytest.raises(InvalidValue, match=r"the 4 key/value heads of llama do not divide by 6") as caught:
        planned(model=model, tensor_parallel=6)
    assert caught.value.hint == "Numbers of ranks that work: 1, 2, 4, 12."


def test_transformers_models_are_split_by_autotp() -> None:
    one, two = planned(engine="baseline", max_batch=2), planned(engine="baseline", max_batch=2, tensor_parallel=2)
    assert line(two, "tensor_parallel").startswith("2 ranks, DeepSpeed AutoTP: 16 of 32 attention heads each")
    assert line(two, "load") == "2 x 1.71 GB: of host memory: each rank reads the whole model first"
    assert one.weights_bytes / 2 < two.weights_bytes < one.weights_bytes
    with pytest.raises(OutOfMemory, match="Each of 2 ranks reads all 138 GB"):
        planned(dataclasses.replace(TWO_GPUS, free_bytes=200 * GB), large(), engine="baseline", tensor_parallel=2)


def test_weights_that_wait_elsewhere() -> None:
    host = dataclasses.replace(TWO_GPUS, free_bytes=200 * GB)
    with pytest.raises(OutOfMemory) as caught:
        planned(host, large())
    assert "options={'offload': 'cpu'} (ZeRO-Inference: about 0.14 tokens/s a request)" in caught.value.hint
    choice = planned(host, large(), options={"offload": "cpu"})
    assert (choice.engine, choice.dtype) == ("baseline", "bf16")
    assert line(choice, "offload").startswith("138 GB: of the host's memory")
    assert 0 < choice.weights_bytes < host.gpus[0].free_bytes / 2
    with pytest.raises(OutOfMemory, match="138 GB of weights in bf16, for each of 2 replicas; 215 GB of the host"):
        planned(host, large(), options={"offload": "cpu"}, replicas=2)
    folder = {"offload": "nvme", "offload_folder": "/fast"}
    assert line(planned(TWO_GPUS, large(), options=folder), "offload") == "nvme: 138 GB in /fast"
    with pytest.raises(InvalidValue, match="int8 needs the optimized engine"):
        planned(model=LLAMA, dtype="int8", options={"offload": "cpu"})


def test_a_limit_below_what_is_free() -> None:
    assert planned(options={"memory_limit_bytes": 4 * GB}).kv_cache_bytes < planned().kv_cache_bytes
    with pytest.raises(OutOfMemory, match=r"1\.71 GB of weights.*options\.memory_limit_bytes is 2\.15 GB, 90% of"):
        planned(options={"memory_limit_bytes": 2 * GB})
    with pytest.raises(OutOfMemory, match=r"2\.15 GB are free on this machine"):
        planned(dataclasses.replace(CPU, free_bytes=2 * GB), options={"memory_limit_bytes": 3 * GB})
    choice = planned(options={"memory_limit_bytes": 2 * GB, "offload": "cpu"})
    assert "some layers of 16 at a time" in line(choice, "weights")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", {}, "AutoTP does not split gpt2"),
        ("olmo2", {}, "AutoTP does not split olmo2"),
        ("mixtral", {}, "AutoTP does not split mixtral"),
        ("falcon", {}, "falcon with new_decoder_architecture=True alone"),
        ("cohere", {"use_qk_norm": True}, "cohere with use_qk_norm=False alone"),
        ("codegen", {"heads": 12}, "the 12 attention heads of llama do not divide by 8"),
        ("granite", {"kv_heads": 1}, "the 1 key/value heads of llama do not divide by 2"),
    ],
)
def test_what_autotp_cannot_split_is_refused(family: str, changes: dict[str, Any], words: str) -> None:
    facts = {name: value for name, value in changes.items() if name in ("heads", "kv_heads")}
    model = dataclasses.replace(LLAMA, family=family, config=CONFIG | changes, spec=None, **facts)
    with pytest.raises(InvalidValue, match="tensor_parallel") as caught:
        planned(model=model, tensor_parallel=2, engine="baseline")
    assert words in caught.value.message


def test_sums_over_ranks_on_gpus() -> None:
    for asked in ("auto", "nccl"):
        assert planned(TWO_GPUS, tensor_parallel=2, options={"all_reduce": asked}).device == "cuda"
    for asked in ("gloo", "shared_memory"):
        with pytest.raises(InvalidValue, match=f"ranks on GPUs do not sum by '{asked}'"):
            planned(TWO_GPUS, tensor_parallel=2, options={"all_reduce": asked})


def test_gpus_that_are_not_there() -> None:
    with pytest.raises(InvalidValue, match="replicas: 3 need 3 GPUs; 2 can be seen"):
        planned(TWO_GPUS, replicas=3)
    with pytest.raises(InvalidValue, match="there is no GPU 5"):
        planned(TWO_GPUS, gpus=[5])


SEVENTY = CONFIG | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "max_position_embeddings": 131072,
}  # fmt: skip


def large(**fields: Any) -> ModelInfo:
    spec = decoder_spec(SEVENTY, "llama")
    changes = {"config": SEVENTY, "spec": spec, "parameters": count_parameters(spec, POLICIES["llama"]).total}
    return dataclasses.replace(LLAMA, context_length=131072, **(changes | fields))


def test_a_model_that_does_not_fit_one_gpu_names_how_many_hold_it() -> None:
    with pytest.raises(OutOfMemory, match=r"about 139 GB in bf16 \(138 GB of weights") as caught:
        planned(TWO_GPUS, large())
    assert "83.8 GB are free on each GPU" in caught.value.message
    assert re.search(r"tensor_parallel=2 on 2 such GPUs \(69\.\d GB of weights on each\)", caught.value.hint)
    with pytest.raises(OutOfMemory) as caught:
        planned(TWO_GPUS, large(dtype="fp32"))
    assert "tensor_parallel=4" in caught.value.hint


def test_a_model_that_does_not_fit_a_cpu_names_what_would() -> None:
    with pytest.raises(OutOfMemory, match="free on this machine") as caught:
        planned(model=large())
    assert "room for about 15.1 billion parameters; it has 69.0 billion" in caught.value.hint
    middle = dataclasses.replace(CPU, free_bytes=4 * GB)
    with pytest.raises(OutOfMemory, match=r"3\.41 GB of weights") as caught:
        planned(middle, dtype="fp32")
    assert "dtype='bf16' (1.71 GB of weights)" in caught.value.hint
    with pytest.raises(OutOfMemory) as caught:
        planned(dataclasses.replace(CPU, free_bytes=int(2.6 * GB)), max_length=8192)
    found = re.search(r"max_length=(\d+)", caught.value.hint)
    assert found
    planned(dataclasses.replace(CPU, free_bytes=int(2.6 * GB)), max_length=int(found[1]))
    with pytest.raises(OutOfMemory) as caught:
        planned(middle, replicas=2)
    assert "fewer replicas" in caught.value.hint


def test_what_is_said_where_nothing_fits() -> None:
    for hardware, runtime in ((CPU, "629 MB"), (TWO_GPUS, "1.07 GB")):
        with pytest.raises(OutOfMemory) as caught:
            planned(hardware, options={"memory_limit_bytes": GB // 2})
        assert caught.value.hint == (
            f"Raise options.memory_limit_bytes: a rank takes {runtime} besides the weights and the cache."
        )
    with pytest.raises(OutOfMemory) as caught:
        planned(dataclasses.replace(CPU, free_bytes=GB // 2))
    assert caught.value.hint.startswith("Free some memory: a rank takes 629 MB")
    with pytest.raises(OutOfMemory) as caught:
        planned(dataclasses.replace(CPU, free_bytes=int(0.75 * GB)))
    assert caught.value.hint == "There is room for about 47.8 million parameters; it has 852.6 million."


def test_lines_of_a_gpu() -> None:
    choice = planned(TWO_GPUS, max_batch=64)
    assert line(choice, "graphs") == "on: decode steps of up to 64 rows are one launch each"
    assert line(planned(TWO_GPUS, options={"cuda_graphs": False}), "graphs") == "off: asked for"
    assert line(choice, "step_budget").startswith("2048 tokens: ")
    assert line(choice, "kv_cache") == "17.2 GB: pages for 524,288 tokens, all rows full"
    assert "of all rows together" in line(planned(TWO_GPUS, max_batch=512), "kv_cache")
    assert not [one for one in planned(TWO_GPUS, engine="baseline").lines if one.what in ("graphs", "step_budget")]


def test_what_was_planned_for_a_cpu_is_what_the_rank_may_take() -> None:
    config = DeploymentConfig.parse({"model": "m"})
    choice = planned()
    assert resolve(config, choice, CPU).options.kv_cache_bytes == choice.kv_cache_bytes
    assert resolve(config, planned(TWO_GPUS), TWO_GPUS).options.kv_cache_bytes is None


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


def test_quantized_weights() -> None:
    sizes = {}
    for hardware, place in ((CPU, "cpu"), (TWO_GPUS, "cuda")):
        for dtype in ("int8", "int4"):
            choice = planned(hardware, dtype=dtype)
            sizes[place, dtype] = choice.weights_bytes
            assert (choice.device, choice.dtype) == (place, dtype)
            assert choice.weights_bytes == LLAMA.weights_bytes(dtype, on_gpu=place == "cuda")
            number = "fp32" if place == "cpu" else "bf16"
            assert f"norms and cache in {number}" in line(choice, "dtype")
            token = LLAMA.kv_bytes_per_token(dtype, on_gpu=place == "cuda")
            assert token == LLAMA.kv_bytes_per_token(number)
            if place == "cpu":
                assert choice.kv_cache_bytes == choice.max_batch * choice.max_length * token
            else:
                assert f"pages for {choice.kv_cache_bytes // token:,} tokens" in line(choice, "kv_cache")
    matrices = LLAMA.parameters
    assert sizes["cuda", "int8"] == pytest.approx(matrices * (1 + 2 / 64), rel=1e-3)
    assert sizes["cpu", "int8"] == pytest.approx(matrices * (1 + 4 / 64), rel=1e-3)
    tables = 2 * 32000 * 2048
    rest = (matrices - tables) * (0.5 + 4 / 64)
    assert sizes["cuda", "int4"] == pytest.approx(rest + tables * (1 + 2 / 64), rel=1e-3)
    choice = planned(TWO_GPUS, dtype="int4", options={"quantize_head": False})
    assert choice.weights_bytes == pytest.approx(rest + 2 * tables, rel=1e-3)
    assert "embedding and head in bf16" in line(choice, "dtype")
    choice = planned(TWO_GPUS, dtype="int8", options={"quantize_head": False})
    assert "embedding and head in bf16" in line(choice, "dtype")
    half = planned(TWO_GPUS, dtype="int4", tensor_parallel=2)
    assert half.weights_bytes == pytest.approx(rest / 2 + 0.75 * tables * (1 + 2 / 64), rel=1e-3)
    assert not any(each.choice == "slow" for each in planned(dtype="int4").lines)
    fp16 = dataclasses.replace(LLAMA, dtype="fp16")
    assert "norms and cache in fp16" in line(planned(TWO_GPUS, fp16, dtype="int8"), "dtype")


def test_fp8_weights(tmp_path: Path) -> None:
    choice = planned(TWO_GPUS, dtype="fp8")
    assert (choice.device, choice.dtype) == ("cuda", "fp8")
    assert choice.weights_bytes == LLAMA.weights_bytes("fp8", on_gpu=True)
    tables = 2 * 32000 * 2048
    rest = LLAMA.parameters - tables
    assert choice.weights_bytes == pytest.approx(rest + tables * (1 + 2 / 64), rel=2e-3)
    assert "embedding and head in int8; activations, norms and cache in bf16, and" in line(choice, "dtype")
    assert f"pages for {choice.kv_cache_bytes // LLAMA.kv_bytes_per_token('bf16'):,} tokens" in line(choice, "kv_cache")
    choice = planned(TWO_GPUS, dtype="fp8", options={"quantize_head": False})
    assert choice.weights_bytes == pytest.approx(rest + 2 * tables, rel=2e-3)
    assert "embedding and head in bf16" in line(choice, "dtype")
    half = planned(TWO_GPUS, dtype="fp8", tensor_parallel=2)
    assert half.weights_bytes == pytest.approx(rest / 2 + 0.75 * tables * (1 + 2 / 64), rel=2e-3)
    fp16 = dataclasses.replace(LLAMA, dtype="fp16")
    assert line(planned(TWO_GPUS, fp16, dtype="fp8"), "dtype") == line(planned(TWO_GPUS, dtype="fp8"), "dtype")
    choice = planned(TWO_GPUS, encoder(tmp_path), dtype="fp8")
    assert choice.weights_bytes == pytest.approx(85.6e6 + 23.8e6 * 2, rel=0.01)
    assert "vocabulary" not in line(choice, "dtype")
    choice = planned(TWO_GPUS, encoder(tmp_path, architectures=["BertForMaskedLM"]), dtype="fp8")
    assert "the head over the vocabulary in int8" in line(choice, "dtype")


@pytest.mark.parametrize(
    ("hardware", "fields", "words"),
    [
        (CPU, {}, "dtype: a CPU has no fp8. Use dtype='int8' or 'auto'."),
        (TWO_GPUS, {"device": "cpu"}, "dtype: a CPU has no fp8. Use dtype='int8' or 'auto'."),
        (AMPERE, {}, "dtype: this GPU has no fp8; Ada, Hopper and later have. Use dtype='int8' or 'auto'."),
        (TWO_GPUS, {"engine": "baseline"}, "dtype: fp8 needs the optimized engine"),
        (TWO_GPUS, {"options": {"offload": "cpu"}}, "dtype: fp8 needs the optimized engine"),
    ],
)
def test_fp8_weights_that_cannot_be(hardware: Hardware, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        planned(hardware, dtype="fp8", **fields)
    assert words in str(caught.value)


def test_fp8_is_asked_of_the_gpus_that_are_used() -> None:
    mixed = dataclasses.replace(CPU, gpus=(GPUS[0], dataclasses.replace(GPUS[1], capability=(8, 0))))
    assert planned(mixed, dtype="fp8", gpus=[0]).dtype == "fp8"
    with pytest.raises(InvalidValue, match="no fp8"):
        planned(mixed, dtype="fp8", gpus=[1])


def test_what_is_offered_does_not_have_fp8() -> None:
    """It takes as many bytes as int8, which more GPUs have."""
    small = dataclasses.replace(CPU, gpus=(dataclasses.replace(GPUS[0], free_bytes=3 * GB),))
    with pytest.raises(OutOfMemory) as caught:
        planned(small, dtype="fp32")
    assert "dtype='int8'" in caught.value.hint
    assert "fp8" not in caught.value.hint


def test_int4_that_is_not_fitted_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    small = dataclasses.replace(LLAMA, folder=tmp_path, parameters=200_000_000)
    given = {"options": {"calibration": ["Some text."]}}

    def told(hardware: Hardware, model: ModelInfo, **fields: Any) -> tuple[str, tuple[str, ...]]:
        choice = planned(hardware, model, dtype="int4", **fields)
        lines = [f"{one.choice}: {one.reason}" for one in choice.lines if one.what == "calibration"]
        return "".join(lines), choice.warnings

    nearest = "int4 is rounded to the nearest, which loses more"
    for hardware in (CPU, TWO_GPUS):
        assert told(hardware, small) == told(hardware, small, **given) == ("", ())
        several, warnings = told(hardware, small, tensor_parallel=2)
        assert several.startswith("off: several ranks")
        assert several.endswith(nearest)
        assert warnings == ()
        with pytest.raises(InvalidValue, match=r"options\.calibration: int4 over several ranks") as caught:
            told(hardware, small, tensor_parallel=2, **given)
        assert "tensor_parallel=1, dtype='int8'" in caught.value.hint
        assert told(hardware, small, options={"calibration": "off"}) == (f"off: asked for; {nearest}", ())
        dummy = f"random weights; {nearest}"
        assert told(hardware, small, load_format="dummy", **given) == (f"off: {dummy}", (dummy,))
        bare = dataclasses.replace(small, folder=tmp_path / "bare")
        assert told(hardware, bare) == (f"off: there is no tokenizer.json; {nearest}", ())
    large_one = dataclasses.replace(small, parameters=LLAMA.parameters)
    assert told(CPU, large_one)[0].startswith("off: it would take a CPU long")
    assert told(TWO_GPUS, large_one) == told(CPU, large_one, **given) == ("", ())
    assert not [one for one in planned(dtype="int8").lines if one.what == "calibration"]


def test_quantized_weights_that_cannot_be(tmp_path: Path) -> None:
    turing = dataclasses.replace(CPU, gpus=(dataclasses.replace(GPUS[0], capability=(7, 5)),))
    for dtype in ("int8", "int4"):
        with pytest.raises(InvalidValue, match=f"{dtype} needs an Ampere GPU"):
            planned(turing, dtype=dtype)
    with pytest.raises(InvalidValue, match="int4 is for models that generate text"):
        planned(TWO_GPUS, encoder(tmp_path), dtype="int4")
    choice = planned(TWO_GPUS, encoder(tmp_path), dtype="int8")
    assert choice.weights_bytes == pytest.approx(85.6e6 * (1 + 2 / 64) + 23.8e6 * 2, rel=0.01)


@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8"])
def test_options_of_quantized_weights_are_refused_without_them(dtype: str) -> None:
    with pytest.raises(InvalidValue, match=r"options\.calibration: acts only with dtype='int4'"):
        planned(dtype=dtype, options={"calibration": ["Some text."]})
    planned(dtype=dtype, options={"calibration": "off"})
    if dtype != "int8":
        with pytest.raises(InvalidValue, match=r"options\.quantize_head: acts only with"):
            planned(dtype=dtype, options={"quantize_head": False})
