"""The fused decoder against transformers, family by family: logits, greedy tokens, ragged batches, chunked prompts."""

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
from miinb.config import DeploymentConfig
from miinb.engine.decoder import Decoder, StepBatch, StepRow
from miinb.engine.kv_cache import CacheSize, KVCache, size_cache
from miinb.engine.policies import POLICIES
from miinb.engine.weights import DTYPES, load_weights
from miinb.errors import InvalidValue, OutOfMemory
from tests.engine.conftest import CONFIGS, build

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


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gptj", "bloom", "opt", "opt-350m"])
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


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gguf_gives_what_its_safetensors_give(tmp_path: Path, name: str) -> None:
    import numpy
    from gguf import GGUFWriter

    model = build(name, tmp_path / "model")
    config = model.config
    writer = GGUFWriter(tmp_path / "tiny.gguf", name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = value.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if name == "llama" and heads:  # as llama.cpp's converter orders rotary pairs
            data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        target = gguf_name(key)
        if target == "blk.1.ffn_gate.weight":  # one in 16 bits: exact, as the value is rounded in both
            half = data.astype(numpy.float16)
            value.copy_(torch.from_numpy(half.astype(numpy.float32)))
            writer.add_tensor(target, half)
        else:
            writer.add_tensor(target, numpy.ascontiguousarray(data))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    decoder, cache = load(tmp_path / "tiny.gguf")
    prompt = prompts()[0]
    with torch.inference_mode():
        wanted = model(torch.tensor([prompt])).logits[0, -1]
    got = step(decoder, cache, [StepRow(prompt, 0, [0])])[0]
    assert (got - wanted).abs().max() / wanted.abs().max() < 1e-4


def gguf_name(name: str) -> str:
    for theirs, ours in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ):
        name = name.replace(theirs, ours)
    return name


class ThreadGroup:
    """Ranks as threads of this process: the same collectives, without processes."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Tensor | None]) -> None:
        self.rank, self.size, self.barrier, self.board = rank, size, barrier, board

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.board[self.rank] = x.clone()
        self.barrier.wait(60)
        parts = [part for part in self.board if part is not None]
        self.barrier.wait(60)
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), -1)


RANKS = [
    ("llama", 2),
    ("llama-tied-mqa", 2),
    ("gpt2", 3),
    ("qwen3", 2),
    ("gptj", 4),
    ("gptj-odd", 2),
    ("bloom", 2),
    ("bloom-6-heads", 3),
    ("opt", 2),
    ("opt-350m", 2),
]


@pytest.mark.parametrize(("name", "ranks"), RANKS)
def test_ranks_share_the_model(tmp_path: Path, name: str, ranks: int) -> None:
    sizes = {"vocab_size": 108} | ({"n_inner": 48} if name == "gpt2" else {})
    model = build(name, tmp_path, sizes)
    info = models.inspect(tmp_path)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    barrier, board = threading.Barrier(ranks), [None] * ranks
    prompt = prompts()[0]

    def run(rank: int) -> Tensor:
        weights = load_weights(info, policy, spec, dtype="fp32", device=CPU, rank=rank, ranks=ranks)
        local = spec.shard(ranks)
        assert weights.layers[0].up.weight.shape[0] == (2 if spec.gated else 1) * spec.inner_size // ranks
        decoder = Decoder(local, weights, group=ThreadGroup(rank, ranks, barrier, board))  # type: ignore[arg-type]
        cache = KVCache(local, CacheSize(1, 128, 128, 1, 0), torch.float32, CPU)
        return step(decoder, cache, [StepRow(prompt, 0, [0])])

    with ThreadPoolExecutor(ranks) as pool:
        outputs = list(pool.map(run, range(ranks)))
    with torch.inference_mode():
        wanted = model(torch.tensor([prompt])).logits[0, -1]
    for got in outputs:
        assert (got[0] - wanted).abs().max() / wanted.abs().max() < 1e-4
