"""The whole engine on a GPU against transformers: kernels, CUDA graphs, launch-ahead. Run with `-m gpu`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from miinb import models
from miinb.bench import presets
from miinb.config import EngineOptions, GenerationParams
from miinb.engine import parity
from miinb.engine.decoder import Decoder
from miinb.engine.executor import StepExecutor
from miinb.engine.graphs import GraphRunner
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.parameters import QUANTIZED
from miinb.engine.policies import POLICIES
from miinb.engine.step_batch import StepBatch, StepRow
from miinb.engine.weights import DTYPES, load_weights, weights_bytes
from miinb.kernels import decode_attention
from miinb.messages import EngineInfo, Plan, SequenceRequest, TokensEvent
from tests.engine.conftest import CONFIGS

Tiny = Callable[[str], tuple[Any, Path]]
PROMPTS = [[(17 * i + j * j) % 98 + 3 for j in range(n)] for i, n in enumerate((17, 1, 30, 64))]


def load(folder: Path, dtype: str) -> tuple[Decoder, KVCache]:
    info, device = models.inspect(folder), torch.device("cuda", 0)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    decoder = Decoder(spec, load_weights(info, policy, spec, dtype=dtype, device=device))
    return decoder, KVCache(spec, CacheSize(48, 16, 128, 6, 0), decoder.weights.dtype, device)


def executor_of(decoder: Decoder, cache: KVCache, *, graphs: bool) -> StepExecutor:
    info = EngineInfo(
        replica=0, model="", task="text-generation", engine="optimized", dtype="", device="cuda",
        vocab_size=decoder.spec.vocab_size, max_length=128, max_batch=6, eos_token_ids=(), tokenizer_folder="",
        plan=Plan("optimized", "cuda", ""),
    )  # fmt: skip
    executor = StepExecutor(info=info, decoder=decoder, cache=cache, options=EngineOptions(max_step_tokens=64))
    if graphs:
        inputs = executor.compute.inputs
        executor.compute.runner = GraphRunner(decoder, cache, inputs, 6, 64)
        assert (inputs.buckets, inputs.mixed_buckets) == ([1, 2, 4, 6], [32, 64])
    return executor


def generate(executor: StepExecutor, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]

    def take(event: object) -> None:
        if isinstance(event, TokensEvent):
            out[event.row_id].extend(event.token_ids)

    for row, prompt in enumerate(prompts):
        settings = GenerationParams(**{"max_new_tokens": 60, "ignore_eos": True, "seed": row} | params)
        executor.submit(SequenceRequest(row, prompt, settings, time.monotonic()))
    while executor.busy:
        executor.step(take, lambda: None)
    return out


def leaves_at_a_tie(model: Any, prompt: list[int], tokens: list[int], wanted: list[int]) -> bool:
    """Whether the first other token is as good as transformers', within the error that logits may have in fp32."""
    at = next(i for i, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1])
    with torch.inference_mode():
        logits = model.double()(torch.tensor([prompt + wanted[:at]])).logits[0, -1]
    model.float()
    return bool((logits[wanted[at]] - logits[tokens[at]]).abs() <= 1e-4 * logits.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("least_head", [1, 1000], ids=["one kernel", "two kernels"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_equal_transformers(tiny: Tiny, name: str, least_head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rotation and attention of a row alone in one kernel, and in two."""
    monkeypatch.setattr(decode_attention, "_LEAST_HEAD", least_head)
    model, folder = tiny(name)
    decoder, cache = load(folder, "fp32")
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        new = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, eos_token_id=-1
        )
        expected.append(new[0, len(prompt) :].tolist())
    executor = executor_of(decoder, cache, graphs=True)
    found = generate(executor, PROMPTS)
    for prompt, tokens, wanted in zip(PROMPTS, found, expected, strict=True):
        assert tokens == wanted or leaves_at_a_tie(model, prompt, tokens, wanted), "ragged batch"
    assert generate(executor, PROMPTS[:1]) == found[:1], "alone"
    assert generate(executor_of(decoder, cache, graphs=False), PROMPTS) == found, "without graphs"


@pytest.mark.gpu
def test_sampled_rows_are_alike_alone_and_in_a_batch(tiny: Tiny) -> None:
    decoder, cache = load(tiny("llama")[1], "fp32")
    executor = executor_of(decoder, cache, graphs=True)
    together = generate(executor, PROMPTS, do_sample=True, temperature=0.8, top_p=0.9, top_k=40)
    assert generate(executor, PROMPTS[:1], do_sample=True, temperature=0.8, top_p=0.9, top_k=40) == together[:1]
    assert together != generate(executor, PROMPTS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3", "gptj", "bloom", "opt-350m", "gemma2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_error_of_few_bits_is_near_the_baselines(tiny: Tiny, name: str, dtype: str) -> None:
    model, folder = tiny(name)
    prompt = PROMPTS[3]
    ids = torch.tensor([prompt], device="cuda")
    with torch.inference_mode():
        exact = model.double()(ids.cpu()).logits[0]
        model.float()
        attention = model.config._attn_implementation
        theirs = type(model).from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation=attention)
        theirs = theirs.cuda()(ids).logits[0]
    decoder, cache = load(folder, dtype)
    batch = StepBatch.of_rows([StepRow(prompt, 0, [3, 1, 2, 0])], 16, "cuda")
    batch.logit_rows = torch.arange(len(prompt), device="cuda")
    ours = decoder.forward(batch, cache)
    error, allowed = ((logits.double().cpu() - exact).norm() / exact.norm() for logits in (ours, theirs))
    assert error <= 1.5 * allowed
    assert parity.check(decoder, 16).passed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gpt_neox", "opt-350m", "bloom", "gemma2"])
def test_quantized_weights(tiny: Tiny, name: str, dtype: str) -> None:
    """The kernels against their reference, graphs against none, and the logits near those of fp32."""
    folder = tiny(name)[1]
    exact, exact_cache = load(folder, "fp32")
    decoder, cache = load(folder, dtype)
    assert parity.check(decoder, 16).passed
    prompt = PROMPTS[3]
    batch = StepBatch.of_rows([StepRow(prompt, 0, [3, 1, 2, 0])], 16, "cuda")
    wanted, found = exact.forward(batch, exact_cache).float(), decoder.forward(batch, cache).float()
    assert (found - wanted).norm() < {"int8": 0.05, "int4": 0.5, "fp8": 0.2}[dtype] * wanted.norm()
    together = generate(executor_of(decoder, cache, graphs=True), PROMPTS)
    assert generate(executor_of(decoder, cache, graphs=False), PROMPTS) == together


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt-350m", "gemma2"])
def test_prompts_whose_rows_become_fp8(tiny: Tiny, name: str) -> None:
    folder, prompt = tiny(name)[1], [(17 * i + i * i) % 98 + 3 for i in range(100)]
    (exact, exact_cache), (decoder, cache) = load(folder, "fp32"), load(folder, "fp8")
    batch = StepBatch.of_rows([StepRow(prompt, 0, [3, 1, 2, 0, 9, 8, 7])], 16, "cuda")
    wanted, found = exact.forward(batch, exact_cache).float(), decoder.forward(batch, cache).float()
    assert (found - wanted).norm() < 0.25 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_weights_are_never_there_in_full(tmp_path: Path, dtype: str) -> None:
    folder = presets.write("opt-1.3b", tmp_path)
    info = models.inspect(folder, load_format="dummy")
    assert info.spec is not None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policy = POLICIES[info.family]
    weights = load_weights(info, policy, info.spec, dtype=dtype, device=torch.device("cuda", 0), dummy=True)
    size, peak = weights_bytes(weights), torch.cuda.max_memory_allocated() - before
    assert size == info.weights_bytes(dtype, on_gpu=True)
    layer = 2 * (4 * 2048**2 + 2 * 2048 * 8192)
    assert peak <= 1.15 * size + layer


@pytest.mark.gpu
def test_int4_is_fitted_on_a_gpu(tiny: Tiny) -> None:
    info, device = models.inspect(tiny("llama")[1]), torch.device("cuda", 0)
    assert info.spec is not None
    policy, ids = POLICIES[info.family], [(17 * i + i * i) % 98 + 3 for i in range(600)]
    weights = load_weights(info, policy, info.spec, dtype="int4", device=device, calibration=ids)
    assert weights.fitted_tokens >= 500
    assert parity.check(Decoder(info.spec, weights), 16).passed
