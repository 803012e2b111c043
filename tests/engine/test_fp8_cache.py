"""kv_dtype="fp8": what is stored, how far answers move, and that they depend on nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miinb import models
from miinb.config import DeploymentConfig, EngineOptions
from miinb.demo import fetch
from miinb.engine import parity
from miinb.engine.decoder import Decoder
from miinb.engine.executor import StepExecutor
from miinb.engine.kv_cache import CacheSize, KVCache, size_cache, token_bytes
from miinb.engine.perplexity import perplexity
from miinb.engine.policies import POLICIES
from miinb.engine.weights import DTYPES, load_weights
from miinb.errors import InvalidValue
from miinb.kernels.formats import FP8
from miinb.kernels.reference import to_fp8
from miinb.messages import EngineInfo, Plan
from tests.engine.conftest import real_text
from tests.engine.test_families import CPU, PAGE_TOKENS, PAGES, PROMPTS, ThreadGroup, all_logits, generate
from tests.engine.test_families import load as load_family
from tests.engine.test_loading import answer, load, stand_in_tokenizer

Tiny = Callable[[str], tuple[Any, Path]]
TEXT = PROMPTS[2] + [(5 * i + i * i) % 98 + 3 for i in range(60)]
#: Grouped queries, one key head, ALiBi, a window, soft caps and windows, norms of queries and keys.
NAMES = ["llama", "llama-tied-mqa", "bloom", "mistral", "gemma2", "qwen3"]


def cache_of(decoder: Decoder, dtype: torch.dtype = FP8, page_tokens: int = PAGE_TOKENS, pages: int = PAGES) -> KVCache:
    return KVCache(decoder.spec, CacheSize(pages, page_tokens, 128, 4, 0), dtype, CPU)


def executor_of(decoder: Decoder, cache: KVCache, **options: Any) -> StepExecutor:
    info = EngineInfo(
        replica=0, model="", task="text-generation", engine="optimized", dtype="", device="cpu",
        vocab_size=decoder.spec.vocab_size, max_length=128, max_batch=4, eos_token_ids=(), tokenizer_folder="",
        plan=Plan("optimized", "cpu", ""),
    )  # fmt: skip
    return StepExecutor(info=info, decoder=decoder, cache=cache, options=EngineOptions(**options))


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


def test_numbers_are_rounded_to_the_nearest_and_the_largest_is_fp8s_largest() -> None:
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 50)[:, None, None]
    x[7, 1] = 0
    x[9, 2, 5], x[10, 2, 5] = float("nan"), float("inf")
    numbers, scale = to_fp8(x)
    back = numbers.float() * scale.float()[..., None]
    assert not back[7, 1].any()
    assert [i for i in range(50) if not back[i, 2].isfinite().all()] == [9, 10]
    good = x.isfinite().all(-1) & (x.abs().amax(-1) > 0)
    largest = x.abs().amax(-1, keepdim=True)
    allowed = (x.abs() / 16).clamp(min=largest / 448 / 1024) * 1.01
    assert ((back - x).abs() <= allowed)[good].all()
    assert (numbers.float().abs().amax(-1) == 448)[good].all()


@pytest.mark.parametrize("operators", ["reference", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_move_little_and_tokens_do_not_depend_on_neighbors(tiny: Tiny, name: str, operators: str) -> None:
    decoder, exact_cache = load_family(tiny(name)[1], operators)
    exact = all_logits(decoder, exact_cache, TEXT)
    cache = cache_of(decoder)
    ours = all_logits(decoder, cache, TEXT)
    assert 1e-4 < error(ours, exact) < 0.1
    assert parity.check(decoder, PAGE_TOKENS, FP8).passed
    together, _ = generate(executor_of(decoder, cache), PROMPTS, 24)
    alone = [generate(executor_of(decoder, cache_of(decoder)), [prompt], 24)[0][0] for prompt in PROMPTS]
    assert together == alone
    again, cached = generate(executor_of(decoder, cache, speculative="prompt_lookup"), PROMPTS, 24)
    assert (again, cached) == (alone, 0)


def test_prefixes_and_preemption_give_the_same_tokens(tiny: Tiny) -> None:
    decoder, _ = load_family(tiny("llama")[1], "compiled")
    prompts = [PROMPTS[2], PROMPTS[0], PROMPTS[2][:20]]
    expected, _ = generate(executor_of(decoder, cache_of(decoder), prefix_cache=False), prompts, 40)
    executor = executor_of(decoder, cache_of(decoder, pages=18))  # 3 rows of 9 pages
    tokens, _ = generate(executor, prompts, 40)
    assert tokens == expected
    assert executor.scheduler.preemptions > 0
    longer = prompts[0] + expected[0][:20]
    again, cached = generate(executor_of(decoder, whole := cache_of(decoder, page_tokens=128, pages=4)), [longer], 20)
    assert again == [expected[0][20:]]
    more, cached = generate(executor := executor_of(decoder, whole), [longer, longer], 20)
    assert more == again * 2
    assert cached >= PAGE_TOKENS, "a whole slot is shared by a copy"


def test_pages_are_copied_and_blanked_with_their_scales(tiny: Tiny) -> None:
    decoder, _ = load_family(tiny("llama")[1], "reference")
    cache = cache_of(decoder)
    all_logits(decoder, cache, TEXT)
    for scale in cache.scale:
        assert scale is not None
        scale[3] = float("nan")
    cache.copy(2, 5, 6)
    for layer, scale in zip((*cache.k, *cache.v), cache.scale * 2, strict=True):
        assert scale is not None
        assert torch.equal(layer[5, :6].float(), layer[2, :6].float())
        assert torch.equal(scale[5, :, :6], scale[2, :, :6])
    cache.blank(3)
    assert not any(bool(scale[3].any()) for scale in cache.scale if scale is not None)


def test_memory_is_counted_with_the_scales(tiny: Tiny) -> None:
    model = models.inspect(tiny("llama")[1])
    spec = POLICIES["llama"].spec(model.config)
    token = 2 * 3 * 2 * (12 + 2)
    assert token_bytes(spec, FP8) == model.kv_bytes_per_token("bf16", kv_dtype="fp8") == token
    assert token_bytes(spec, torch.bfloat16) == model.kv_bytes_per_token("bf16")
    size = size_cache(spec, DeploymentConfig(model="x", max_batch=2, max_length=50), "cpu", FP8, 1 << 30)
    assert size.size_bytes == KVCache(spec, size, FP8, CPU).size_bytes == 2 * 50 * token


@pytest.mark.parametrize(("name", "ranks"), [("llama", 2), ("llama-tied-mqa", 2), ("bloom", 2)])
def test_ranks_store_what_one_would(tiny: Tiny, name: str, ranks: int) -> None:
    """Scales are of one head: how heads are divided among ranks does not matter to them."""
    folder = tiny(name)[1]
    info = models.inspect(folder)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    decoder = Decoder(spec, load_weights(info, policy, spec, dtype="fp32", device=CPU))
    whole = all_logits(decoder, cache_of(decoder), TEXT)
    barrier, board = threading.Barrier(ranks), [None] * ranks

    def run(rank: int) -> Tensor:
        weights = load_weights(info, policy, spec, dtype="fp32", device=CPU, rank=rank, ranks=ranks)
        group: Any = ThreadGroup(rank, ranks, barrier, board, fused=False)
        local = Decoder(spec.shard(ranks), weights, group=group)
        return all_logits(local, cache_of(local), TEXT)

    with ThreadPoolExecutor(ranks) as pool:
        for logits in pool.map(run, range(ranks)):
            assert error(logits, whole) < 0.01


def test_a_deployment_with_an_fp8_cache(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    executor, _ = load(folder, tmp_path, kv_dtype="fp8", max_batch=4)
    plain, _ = load(folder, tmp_path, max_batch=4)
    plan = executor.info.plan
    assert (executor.info.engine, plan.dtype) == ("optimized", "fp32")
    assert plan.kv_cache_bytes / plain.info.plan.kv_cache_bytes == (12 + 2) / (12 * 4)
    assert "passed" in {line.what: line.choice for line in plan.lines}["parity"]
    assert len(answer(executor, [5, 6, 7], 20)) == 20
    executor.close()
    with pytest.raises(InvalidValue, match="kv_dtype: fp8 needs the optimized engine"):
        load(folder, tmp_path, kv_dtype="fp8", engine="baseline")


@pytest.mark.slow
@pytest.mark.models
def test_perplexity_of_a_real_model() -> None:
    """SmolLM2 on Python's own documentation: an fp8 cache may cost a percent and a half."""
    folder = fetch.smollm2(quiet=True)
    ids = real_text(folder)
    decoder, _ = load_family(folder, "compiled")
    exact, rounded = (perplexity(decoder, ids, kv_dtype=dtype) for dtype in (DTYPES["fp32"], FP8))
    assert 2 < exact < 40
    assert rounded < 1.015 * exact
