"""The fused decoder: chunked prompts, the cache's size, GGUF. `test_families.py` compares it with transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miinb import models
from miinb.config import DeploymentConfig
from miinb.engine.decoder import Decoder
from miinb.engine.kv_cache import CacheSize, KVCache, size_cache
from miinb.engine.policies import POLICIES
from miinb.engine.step_batch import StepBatch, StepRow
from miinb.engine.weights import DTYPES, load_weights
from miinb.errors import InvalidValue, OutOfMemory
from miinb.kernels import decode_attention
from tests.engine.conftest import build

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


def test_rows_of_one_sequence_are_not_computed_by_the_kernel_that_waits_for_none_of_them(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft's tokens are rows of one token each, and see each other's keys."""
    monkeypatch.setattr(decode_attention, "_LEAST_HEAD", 1)
    decoder, cache = load(tiny("mistral")[1])
    taken: list[int] = []

    def counted(qkv: Tensor, *given: Any, **options: Any) -> Tensor:
        taken.append(len(qkv))
        return decode_attention.decode_attention(qkv, *given, **options)

    decoder.ops = decoder.ops._replace(decode_attention=counted)
    tokens = prompts()[0]
    one_by_one = [step(decoder, cache, [StepRow([token], at, [0])])[0] for at, token in enumerate(tokens)]
    assert set(taken) == {1}
    del taken[:]
    step(decoder, cache, [StepRow(tokens[:-3], 0, [1])])
    last = [StepRow([tokens[at]], at, [1]) for at in range(len(tokens) - 3, len(tokens))]
    together = step(decoder, cache, last)
    assert not taken
    assert torch.allclose(together, torch.stack(one_by_one[-3:]), rtol=1e-4, atol=1e-5)


def test_cache_is_sized_by_memory_and_wishes(tiny: Tiny) -> None:
    spec = POLICIES["llama"].spec(models.inspect(tiny("llama")[1]).config)
    token = 2 * 3 * 2 * 12 * 4

    def size(device: str, free: int, **fields: Any) -> CacheSize:
        return size_cache(spec, DeploymentConfig(model="x", **fields), device, torch.float32, free)

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
