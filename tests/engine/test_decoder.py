"""The fused decoder against transformers, family by family: logits, greedy tokens, ragged batches, chunked prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miinb import models
from miinb.config import DeploymentConfig
from miinb.engine.decoder import Decoder, StepBatch, StepRow
from miinb.engine.kv_cache import CacheSize, KVCache, size_cache
from miinb.engine.policies import POLICIES
from miinb.engine.weights import DTYPES, load_weights
from miinb.errors import InvalidValue, OutOfMemory
from tests.engine.conftest import CONFIGS

Tiny = Callable[[str], tuple[Any, Path]]
CPU = torch.device("cpu")


def load(folder: Path, dtype: str = "fp32", *, page_tokens: int = 128, pages: int = 4) -> tuple[Decoder, KVCache]:
    info = models.inspect(folder)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    decoder = Decoder(spec, load_weights(info, policy, spec, dtype=dtype, device=CPU))
    size = CacheSize(pages, page_tokens, spec.max_length, pages, 0)
    return decoder, KVCache(spec, size, DTYPES[dtype], CPU)


def prompts(count: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 101, (n,), generator=generator).tolist() for n in (17, 1, 30)[:count]]


def step(decoder: Decoder, cache: KVCache, rows: list[StepRow]) -> Tensor:
    return decoder.forward(StepBatch.of_rows(rows, cache.page_tokens), cache)


def generate(decoder: Decoder, cache: KVCache, batch: list[list[int]], new: int) -> list[list[int]]:
    """Greedy continuations; row r has page r."""
    rows = [StepRow(tokens, 0, [r]) for r, tokens in enumerate(batch)]
    out: list[list[int]] = [[] for _ in batch]
    for _ in range(new):
        ids, finite = decoder.greedy(StepBatch.of_rows(rows, cache.page_tokens), cache)
        assert finite.all()
        for texts, token in zip(out, ids.tolist(), strict=True):
            texts.append(token)
        rows = [StepRow([out[r][-1]], row.start + len(row.token_ids), row.pages) for r, row in enumerate(rows)]
    return out


def reference_tokens(model: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=-1)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_tokens_equal_transformers(tiny: Tiny, name: str) -> None:
    model, folder = tiny(name)
    decoder, cache = load(folder)
    batch = prompts()
    with torch.inference_mode():
        wanted = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in batch])
    got = step(decoder, cache, [StepRow(prompt, 0, [r]) for r, prompt in enumerate(batch)])
    assert (got - wanted).abs().max() / wanted.abs().max() < 1e-4
    expected = [reference_tokens(model, prompt, 64) for prompt in batch]
    assert generate(decoder, cache, batch, 64) == expected, "ragged batch"
    assert generate(decoder, cache, batch[:1], 64) == expected[:1], "alone"


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_chunked_prompts_share_steps_with_decoding(tiny: Tiny, name: str) -> None:
    _, folder = tiny(name)
    decoder, cache = load(folder)
    first, _, second = prompts()
    whole = step(decoder, cache, [StepRow(first, 0, [0]), StepRow(second, 0, [1])])
    step(decoder, cache, [StepRow(second[:11], 0, [2]), StepRow(first[:-1], 0, [3])])
    step(decoder, cache, [StepRow(second[11:12], 11, [2])])
    mixed = step(decoder, cache, [StepRow(first[-1:], len(first) - 1, [3]), StepRow(second[12:], 12, [2])])
    assert torch.allclose(mixed, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_small_pages_in_any_order_give_the_same(tiny: Tiny, name: str) -> None:
    _, folder = tiny(name)
    decoder, cache = load(folder)
    batch = [StepRow(prompt, 0, [r]) for r, prompt in enumerate(prompts())]
    wanted = step(decoder, cache, batch)
    _, paged = load(folder, page_tokens=8, pages=12)
    tables = [[7, 2, 9], [0], [11, 4, 1, 5]]
    rows = [StepRow(row.token_ids, 0, pages) for row, pages in zip(batch, tables, strict=True)]
    assert torch.allclose(step(decoder, paged, rows), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_bf16_error_is_not_above_transformers_own(tiny: Tiny, name: str) -> None:
    model, folder = tiny(name)
    tokens = prompts()[2]
    with torch.inference_mode():
        exact = model(torch.tensor([tokens])).logits[0]
        half = type(model)(model.config).eval()
        half.load_state_dict(model.state_dict())
        theirs = half.to(torch.bfloat16)(torch.tensor([tokens])).logits[0].float()
    decoder, cache = load(folder, "bf16")
    batch = StepBatch.of_rows([StepRow(tokens, 0, [0])], cache.page_tokens)
    batch.logit_rows = torch.arange(len(tokens))
    ours = decoder.forward(batch, cache).float()
    assert (ours - exact).square().mean() <= 1.5**2 * (theirs - exact).square().mean()


def test_cache_is_sized_by_memory_and_wishes(tiny: Tiny) -> None:
    spec = POLICIES["llama"].spec(models.inspect(tiny("llama")[1]).config)
    token = 2 * 3 * 2 * 12 * 4

    def size(device: str, free: int, **fields: Any) -> CacheSize:
        return size_cache(spec, DeploymentConfig(model="x", **fields), device, 4, free)

    assert size("cpu", 1 << 30) == CacheSize(16, 128, 128, 16, 16 * 128 * token)
    few = size("cpu", int(128 * token * 3 / 0.4) + 8)
    assert (few.pages, few.max_batch, few.max_length) == (3, 3, 128)
    assert size("cuda", 1 << 30, max_batch=4, max_length=100).pages == 4 * 7
    assert size("cpu", 1 << 30, max_batch=2, max_length=50).size_bytes == 2 * 50 * token
    with pytest.raises(InvalidValue, match="max_length"):
        size("cpu", 1 << 30, max_length=129)
    with pytest.raises(OutOfMemory):
        size("cpu", 1 << 20, max_batch=100)
    with pytest.raises(OutOfMemory):
        size("cuda", 128 * token, max_length=128)
