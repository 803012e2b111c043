"""Kernels are compiled before they are needed: under the keys that launches look for, in a pool, and never fatally."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from miinb import models
from miinb.bench import presets
from miinb.config import DeploymentConfig, GenerationParams
from miinb.engine import compile_job, parity
from miinb.engine import weights as weights_module
from miinb.engine.compile import NoPeers, kernels_of
from miinb.engine.compile_job import CompileJob, log_late_compilation
from miinb.engine.decoder import Decoder
from miinb.engine.executor import StepExecutor
from miinb.engine.graphs import capture_order, mixed_sizes
from miinb.engine.kv_cache import CacheSize, KVCache, cache_dtype
from miinb.engine.policies import POLICIES
from miinb.engine.recording import Kernel, compiling_for, recording
from miinb.engine.weights import load_weights
from miinb.kernels import (
    activation,
    all_reduce,
    attention,
    best_of_ranks,
    decode_attention,
    dequantize,
    dispatch,
    embedding,
    fp8_gemv,
    fp8_many,
    fp8_product,
    head,
    linear,
    norm,
    online_softmax,
    parallel_block,
    product,
    quantized_gemv,
    quantized_product,
    rope,
    sample,
)
from miinb.kernels.head import argmax
from miinb.messages import EngineInfo, FailedEvent, Plan, SequenceRequest

OPERATORS = (
    *(activation, all_reduce, attention, best_of_ranks, decode_attention, dequantize, embedding),
    *(fp8_gemv, fp8_many, fp8_product, head, linear, norm, online_softmax),
    *(parallel_block, product, quantized_gemv, quantized_product, rope, sample),
)
H100 = (9, 0)
SMALL: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 1, "n_embd": 128, "n_head": 2},
    "smollm2-135m": {
        "num_hidden_layers": 1,
        "hidden_size": 192,
        "intermediate_size": 256,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
}
GREEDY = GenerationParams(max_new_tokens=4, ignore_eos=True)
SAMPLED = GenerationParams(max_new_tokens=4, ignore_eos=True, do_sample=True, top_p=0.9, seed=1)


def of_folder(folder: Path, **fields: Any) -> tuple[DeploymentConfig, models.ModelInfo]:
    config = DeploymentConfig.parse({"model": str(folder), "dtype": "bf16", "load_format": "dummy", **fields})
    return config, models.inspect(folder, load_format="dummy")


def ahead(folder: Path, **fields: Any) -> list[Kernel]:
    with compiling_for(H100):
        return kernels_of(*of_folder(folder, **fields))


def keys(kernels: list[Kernel]) -> set[tuple[str, str]]:
    return {(kernel.name, json.dumps(json.loads(kernel.specialization)["key"])) for kernel in kernels}


class Blank:
    """Launches leave zeros behind, so that what follows has numbers to go on with; flags say that all is well."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        empty = torch.empty

        def zeros(*shape: Any, **options: Any) -> torch.Tensor:
            made = empty(*shape, **options)
            return made.fill_(made.dtype == torch.bool)

        monkeypatch.setattr(torch, "empty", zeros)
        monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.zeros(x.shape, dtype=x.dtype))
        for module in (*OPERATORS, dispatch):
            monkeypatch.setattr(module, "use_triton", lambda x: True, raising=False)
            monkeypatch.setattr(module, "launch_options", lambda x: {"PDL": True, "launch_pdl": True}, raising=False)


@pytest.mark.parametrize(
    ("preset", "dtype", "kv_dtype", "ranks"),
    [
        *((preset, "bf16", "auto", 1) for preset in SMALL),
        ("smollm2-135m", "bf16", "fp8", 1),
        ("smollm2-135m", "int8", "auto", 1),
        ("gpt2", "int4", "auto", 1),
        ("smollm2-135m", "fp8", "auto", 1),
        ("gpt2", "bf16", "auto", 2),
    ],
)
def test_an_executor_launches_nothing_else(
    preset: str, dtype: str, kv_dtype: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real scheduler, inputs and sampler on real memory ask for kernels that were all compiled ahead."""
    if preset != "gpt2":
        monkeypatch.setattr(decode_attention, "_LEAST_HEAD", 1)
    folder = presets.write(preset, tmp_path, vocab_size=1003, **SMALL[preset])
    fields = {"max_batch": 20, "max_length": 512, "kv_dtype": kv_dtype, "dtype": dtype}
    fields |= {"options": {"max_step_tokens": 2048}, "tensor_parallel": ranks}  # steps as a GPU has them
    config, model = of_folder(folder, **fields)
    spec = model.spec
    assert spec is not None
    compiled = keys(ahead(folder, **fields))
    quantizers, activations = weights_module.quantizers, weights_module.activation_dtype
    gpu = torch.device("cuda")  # its forms of numbers, though the memory is the host's
    monkeypatch.setattr(weights_module, "quantizers", lambda dtype, _: quantizers(dtype, gpu))
    monkeypatch.setattr(weights_module, "activation_dtype", lambda dtype, _, stored: activations(dtype, gpu, stored))
    device, group = torch.device("cpu"), NoPeers(ranks, config.options) if ranks > 1 else None
    weights = load_weights(model, POLICIES[model.family], spec, dtype=dtype, device=device, ranks=ranks, dummy=True)
    Blank(monkeypatch)
    size = CacheSize(256, config.options.page_tokens, 512, 20, 0)
    decoder = Decoder(spec.shard(ranks), weights, group=group)
    cache = KVCache(decoder.spec, size, cache_dtype(kv_dtype, weights.dtype), torch.device("cpu"))
    info = EngineInfo(0, "", "text-generation", "optimized", "bf16", "cpu", 1003, 512, 20, (), "", Plan("", "", ""))
    with compiling_for(H100), recording() as launched:
        engine = StepExecutor(info=info, decoder=decoder, cache=cache, options=config.options)
        serve(engine)
        for rows in capture_order(20):
            batch = engine.compute.inputs.decode_batch(rows)
            engine.compute.inputs.look_up(rows)
            batch.logit_rows.zero_()  # what the steps before left there is not for so few rows
            argmax(decoder.forward(batch, cache))
        for tokens in mixed_sizes(config.options.step_tokens("cuda")):
            decoder.body(engine.compute.inputs.mixed_batch(tokens), cache)
    assert launched
    assert ("_reduce" in {kernel.name for kernel in launched}) == (ranks > 1)
    assert sorted(keys(launched) - compiled) == []


def serve(engine: StepExecutor) -> None:
    """Prompts of several lengths at once and alone, greedy and sampled."""
    for row, length in enumerate((16, 1, 7, 200, 33, 64, 5, 400, 2, 3, 4)):
        engine.submit(SequenceRequest(row, [3] * length, SAMPLED if row % 2 else GREEDY, 0.0))
        if row == 0:
            run(engine)
    run(engine)
    engine.submit(SequenceRequest(99, [3] * 20, SAMPLED, 0.0))
    run(engine)


def run(engine: StepExecutor) -> None:
    events: list[Any] = []
    while engine.busy:
        engine.step(events.append, lambda: None)
    assert not [event for event in events if isinstance(event, FailedEvent)], events


@pytest.mark.parametrize("least_head", [1, 1000])
def test_a_parallel_blocks_kernels_are_launched_in_their_order(
    least_head: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`parallel_block.py` says what depends on it."""
    monkeypatch.setattr(decode_attention, "_LEAST_HEAD", least_head)
    changes = {"num_hidden_layers": 1, "hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 512}
    _, model = of_folder(presets.write("gpt-neox-20b", tmp_path, vocab_size=1003, **changes))
    spec, meta = model.spec, torch.device("meta")
    assert spec is not None
    with compiling_for(H100):
        weights = load_weights(model, POLICIES[model.family], spec, dtype="bf16", device=meta, dummy=True)
        decoder = Decoder(spec, weights)
        cache = KVCache(spec, CacheSize(4, 16, 64, 1, 0), torch.bfloat16, meta)
        with recording() as kernels:
            decoder.body(parity.batches(decoder, 16)["decode"], cache)
    launched = [
        next((f"{k.name} {s}" for s in ("after", "beside") if f'"{s}"' in k.specialization), k.name) for k in kernels
    ]
    attention = ["_decode_attention"] if least_head == 1 else ["_rope_append", "_decode"]
    assert launched == ["_token_embedding", "_norm", "_gemv after", *attention, "_gemv beside", "_gemv_of_two"]


def test_every_family_is_known(tiny: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "_LEAST_HEAD", 1)
    for name in ("llama-odd", "mistral", "qwen2", "qwen3", "gpt2-untied"):
        found = {kernel.name for kernel in ahead(tiny(name)[1])}
        wanted = {"_decode", "_decode_attention", "_prefill", "_norm", "_argmax", "_rope_append", "_token_embedding"}
        assert wanted | {"_fill_newest"} <= found, name


def small_model(folder: Path) -> Path:
    """Configurations of a small one."""
    return presets.write("gpt2", folder, n_layer=1, n_embd=64, n_head=1, vocab_size=300)


def test_a_job_fills_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("triton.knobs.compilation.listener", None)  # is put back afterwards
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    folder = small_model(tmp_path / "gpt2")
    small = {"max_batch": 1, "max_length": 64, "options": {"max_step_tokens": 16}}
    outcome, phases = job(of_folder(folder, **small)[0])
    assert outcome.done == outcome.total > 5
    assert [phase.done for phase in phases] == list(range(outcome.total + 1))
    assert {phase.name for phase in phases} == {"compile"}
    made = set(tmp_path.rglob("*.cubin"))
    assert len(made) >= outcome.total
    kernels = ahead(folder, **small)
    log_late_compilation()
    caplog.set_level("INFO", "miinb.engine.compile_job")
    with compiling_for(H100):
        found = {kernel.compile().hash for kernel in kernels}
    assert len(found) == len(kernels) == outcome.total
    assert set(tmp_path.rglob("*.cubin")) == made
    assert "compiled at first use" not in caplog.text
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another"))
    with compiling_for(H100):
        kernels[-1].compile()
    assert f"compiled at first use: {kernels[-1].name}" in caplog.text


def job(config: DeploymentConfig) -> tuple[Any, list[Any]]:
    order = {
        "config": config.model_dump(mode="json"),
        "capability": H100,
        "parent": os.getpid(),
        "processes": 2,
        "limit_s": 120.0,
    }
    phases: list[Any] = []
    return CompileJob.of_order(order).wait(phases.append), phases


def test_what_was_compiled_is_not_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compile_job, "gpu_capability", lambda device: H100)
    folder = small_model(tmp_path / "gpt2")
    fields: dict[str, Any] = {"model": str(folder), "load_format": "dummy", "max_batch": 1, "max_length": 64}
    fields["options"] = {"max_step_tokens": 16}

    def start(**more: Any) -> Any:
        job = CompileJob.start(DeploymentConfig.parse(fields | more))
        assert job is not None
        try:
            return job.outcome if job.outcome.before else job.wait(lambda phase: None)
        finally:
            job.close()

    first = start(name="one")
    assert 0 < first.done == first.total
    assert not first.before
    again = start(name="another", replicas=2)
    assert (again.done, again.total, again.waited_s, again.before) == (first.total, first.total, 0.0, True)
    marks = list((tmp_path / "cache" / "compiled").iterdir())
    assert len(marks) == 1
    assert compile_job._mark(DeploymentConfig.parse(fields | {"dtype": "fp16"}), H100) not in marks
    assert compile_job._mark(DeploymentConfig.parse(fields), (8, 0)) not in marks
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert compile_job._mark(DeploymentConfig.parse(fields), H100) not in marks


def test_a_mark_is_the_same_in_every_process(tmp_path: Path) -> None:
    small_model(tmp_path / "model")
    code = "import sys; from miinb.config import DeploymentConfig as C; from miinb.engine import compile_job as j; "
    code += "print(j._mark(C.parse({'model': sys.argv[1], 'load_format': 'dummy'}), (9, 0)))"
    marks = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "model")],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(marks) == 1
    assert "compiled" in marks.pop()


def test_a_job_that_fails_is_told_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    outcome, _ = job(DeploymentConfig.parse({"model": str(tmp_path / "nothing")}))
    assert outcome.total == 0
    assert "ModelNotFound" in caplog.text


def test_there_is_no_job_without_a_gpu() -> None:
    config = DeploymentConfig.parse({"model": "gpt2", "device": "cpu"})
    assert CompileJob.start(config) is None
