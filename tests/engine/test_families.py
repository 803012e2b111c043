"""Every family's policy against transformers: logits, greedy tokens, cache layouts, ranks, and what is refused.

A row of `conftest.CONFIGS` is a tiny random model; the truth is transformers' own generate on a left-padded batch.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from miinb import models
from miinb.config import EngineOptions, GenerationParams
from miinb.engine.decoder import Decoder, Operators
from miinb.engine.executor import StepExecutor
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.policies import POLICIES
from miinb.engine.positions import rotary_tables
from miinb.engine.step_batch import StepBatch, StepRow
from miinb.engine.weights import DTYPES, load_weights
from miinb.errors import UnsupportedModel
from miinb.kernels import reference
from miinb.kernels.cpu import CpuKernels
from miinb.messages import EngineInfo, FinishedEvent, Plan, SequenceRequest, TokensEvent
from tests.engine.conftest import CONFIGS, build

Tiny = Callable[[str], tuple[Any, Path]]
CPU = torch.device("cpu")
PAGE_TOKENS = 8
PAGES = 48
NEW_TOKENS = 64
PROMPTS = [[(17 * i + j * j) % 98 + 3 for j in range(n)] for i, n in enumerate((17, 1, 30))]


class Truth(NamedTuple):
    """What transformers generate: tokens [rows, NEW_TOKENS] and the logits that each was chosen from."""

    tokens: list[list[int]]
    logits: Tensor


@pytest.fixture(scope="module")
def truth(tiny: Tiny) -> Callable[[str], Truth]:
    @functools.cache
    def get(name: str) -> Truth:
        width = max(map(len, PROMPTS))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
        out = tiny(name)[0].generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return Truth(out.sequences[:, width:].tolist(), torch.stack(out.logits, 1))

    return get


@functools.cache
def compiled(dtype: torch.dtype) -> Operators:
    kernels = CpuKernels(dtype)
    kernels.limit = 1 << 30  # every size through the library
    return Operators(**{name: getattr(kernels, name) for name in Operators._fields})


OPERATORS: dict[str, Callable[[torch.dtype], Operators]] = {
    "reference": lambda dtype: Operators(),
    "compiled": compiled,
}


def load(folder: Path, operators: str, dtype: str = "fp32") -> tuple[Decoder, KVCache]:
    info = models.inspect(folder)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    weights = load_weights(info, policy, spec, dtype=dtype, device=CPU)
    decoder = Decoder(spec, weights, ops=OPERATORS[operators](DTYPES[dtype]))
    return decoder, KVCache(spec, CacheSize(PAGES, PAGE_TOKENS, 128, 4, 0), DTYPES[dtype], CPU)


def executor_of(decoder: Decoder, cache: KVCache) -> StepExecutor:
    info = EngineInfo(
        replica=0, model="", task="text-generation", engine="optimized", dtype="", device="cpu",
        vocab_size=decoder.spec.vocab_size, max_length=128, max_batch=4, eos_token_ids=(), tokenizer_folder="",
        plan=Plan("optimized", "cpu", ""),
    )  # fmt: skip
    return StepExecutor(info=info, decoder=decoder, cache=cache, options=EngineOptions(max_step_tokens=32))


def generate(executor: StepExecutor, prompts: list[list[int]], new: int = NEW_TOKENS) -> tuple[list[list[int]], int]:
    """Greedy continuations, all at once, and how many tokens of the prompts came from the prefix cache."""
    out: list[list[int]] = [[] for _ in prompts]
    cached: list[int] = []

    def take(event: object) -> None:
        if isinstance(event, TokensEvent):
            out[event.row_id].extend(event.token_ids)
        elif isinstance(event, FinishedEvent):
            cached.append(event.cached_tokens)

    params = GenerationParams(max_new_tokens=new, ignore_eos=True)
    for row, prompt in enumerate(prompts):
        executor.submit(SequenceRequest(row, prompt, params, time.monotonic()))
    while executor.busy:
        executor.step(take, lambda: None)
    assert len(cached) == len(prompts)
    return out, sum(cached)


def all_logits(decoder: Decoder, cache: KVCache, tokens: list[int]) -> Tensor:
    """Logits after every token of one sequence, with its pages out of order."""
    pages = list(range(-(-len(tokens) // PAGE_TOKENS)))[::-1]
    batch = StepBatch.of_rows([StepRow(tokens, 0, pages)], PAGE_TOKENS)
    batch.logit_rows = torch.arange(len(tokens))
    return decoder.forward(batch, cache)


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_tokens_equal_transformers(
    tiny: Tiny, truth: Callable[[str], Truth], name: str, operators: str
) -> None:
    wanted = truth(name)
    decoder, cache = load(tiny(name)[1], operators)
    for prompt, tokens, logits in zip(PROMPTS, *wanted, strict=True):
        got = all_logits(decoder, cache, prompt + tokens[:-1])[len(prompt) - 1 :]
        assert (got - logits).abs().max() / logits.abs().max() < 1e-4
    executor = executor_of(decoder, cache)
    assert generate(executor, PROMPTS) == (wanted.tokens, 0), "a ragged batch, prompts in chunks"
    longer = PROMPTS[2] + wanted.tokens[2][:45]
    tokens, cached = generate(executor, [longer], NEW_TOKENS - 45)
    assert tokens == [wanted.tokens[2][45:]], "alone, after a prefix of an earlier row"
    assert cached == len(longer) // PAGE_TOKENS * PAGE_TOKENS


ONE_OF_EACH = list(POLICIES)


def test_every_family_has_rows() -> None:
    families = {POLICIES[name.split("-")[0]].family for name in CONFIGS if name.split("-")[0] in POLICIES}
    assert families == set(POLICIES)


@pytest.mark.parametrize(("dtype", "operators"), [*(("bf16", kind) for kind in OPERATORS), ("fp16", "reference")])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_error_of_few_bits_is_near_transformers_own(tiny: Tiny, name: str, dtype: str, operators: str) -> None:
    model, folder = tiny(name)
    rows = [prompt * 3 for prompt in PROMPTS]
    half = type(model)(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(DTYPES[dtype])
    with torch.inference_mode():
        exact, theirs = (torch.cat([m(torch.tensor([row])).logits[0].float() for row in rows]) for m in (model, half))
    decoder, cache = load(folder, operators, dtype)
    ours = torch.cat([all_logits(decoder, cache, row).float() for row in rows])
    assert (ours - exact).square().mean() <= 1.5**2 * (theirs - exact).square().mean()


class ThreadGroup:
    """Ranks as threads of this process: the same collectives, without processes."""

    def __init__(
        self, rank: int, size: int, barrier: threading.Barrier, board: list[Tensor | None], *, fused: bool
    ) -> None:
        self.rank, self.size, self.barrier, self.board, self.fused = rank, size, barrier, board, fused

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.board[self.rank] = x.clone()
        self.barrier.wait(60)
        parts = [part for part in self.board if part is not None]
        self.barrier.wait(60)
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def reduce_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, *, centered: bool
    ) -> tuple[Tensor, Tensor] | None:
        """As `parallel.Group` has it where GPUs are linked, if `fused`; else as it is everywhere else."""
        if not self.fused:
            return None
        total = self.all_reduce(x) if residual is None else self.all_reduce(x) + residual
        if centered:
            return reference.layer_norm(total, weight, bias, eps)
        return reference.rms_norm(total, weight, eps)

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
    ("gpt_neox", 2),
    ("gpt_neox-serial", 3),
    ("gpt_neo", 2),
    ("phi3", 2),
    ("phi", 2),
    ("gemma3_text", 2),
    ("falcon", 2),
    ("opt", 2),
    ("opt-350m", 2),
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "ranks"), RANKS)
def test_ranks_share_the_model(tmp_path: Path, name: str, ranks: int, fused: bool) -> None:
    sizes = {"vocab_size": 108} | ({"n_inner": 48} if name == "gpt2" else {})
    model = build(name, tmp_path, sizes)
    info = models.inspect(tmp_path)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    barrier, board = threading.Barrier(ranks), [None] * ranks
    prompt, new = PROMPTS[0], 8
    whole = load_weights(info, policy, spec, dtype="fp32", device=CPU)
    cache = KVCache(spec, CacheSize(PAGES, PAGE_TOKENS, 128, 4, 0), torch.float32, CPU)
    ((wanted,), _) = generate(executor_of(Decoder(spec, whole), cache), [prompt], new)

    def run(rank: int) -> Tensor:
        weights = load_weights(info, policy, spec, dtype="fp32", device=CPU, rank=rank, ranks=ranks)
        local = spec.shard(ranks)
        assert weights.layers[0].up.weight.shape[0] == (2 if spec.gated else 1) * spec.inner_size // ranks
        group: Any = ThreadGroup(rank, ranks, barrier, board, fused=fused)
        decoder = Decoder(local, weights, group=group)
        own = KVCache(local, CacheSize(PAGES, PAGE_TOKENS, 128, 4, 0), torch.float32, CPU)
        return all_logits(decoder, own, prompt + wanted[:-1])[len(prompt) - 1 :]

    with ThreadPoolExecutor(ranks) as pool:
        outputs = list(pool.map(run, range(ranks)))
    with torch.inference_mode():
        exact = model(torch.tensor([prompt + wanted[:-1]])).logits[0, len(prompt) - 1 :]
    for got in outputs:
        assert (got - exact).abs().max() / exact.abs().max() < 1e-4
        assert got.argmax(-1).tolist() == wanted


@pytest.mark.parametrize(("name", "prefix"), [("bloom", "transformer."), ("opt", "model."), ("gpt_neox", "gpt_neox.")])
def test_names_of_old_checkpoints_are_read(tiny: Tiny, tmp_path: Path, name: str, prefix: str) -> None:
    """Those of the base model alone lack its prefix, and buffers stood among the weights."""
    folder = tiny(name)[1]
    tensors = load_file(folder / "model.safetensors")
    old = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if name == "gpt_neox":
        old["layers.0.attention.bias"] = torch.ones(1, 1, 8, 8)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(old, tmp_path / "model.safetensors")
    wanted, got = (all_logits(*load(where, "reference"), PROMPTS[0]) for where in (folder, tmp_path))
    assert torch.equal(got, wanted)


REFUSED = [
    ("llama", {"hidden_act": "relu2"}, "Activation 'relu2'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scores scaled by layer"),
    ("opt", {"layer_norm_elementwise_affine": False}, "norms have no weights"),
    ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "kind 'proportional'"),
    ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "3 elements"),
    ("phi3", {"rope_parameters": {"type": "su"}}, "old checkpoints"),
    ("falcon", {"alibi": True}, "Falcon with ALiBi"),
    ("stablelm", {"qk_layernorm": True}, "StableLM with norms"),
    ("gpt_bigcode", {"multi_query": False}, "for each query head"),
    ("phi3-partial", {"original_max_position_embeddings": 32}, "past 32 tokens"),
]


@pytest.mark.parametrize(("name", "changes", "why"), REFUSED)
def test_what_the_spec_cannot_say_is_refused(tiny: Tiny, name: str, changes: dict[str, Any], why: str) -> None:
    info = models.inspect(tiny(name)[1])
    with pytest.raises(UnsupportedModel, match=why):
        POLICIES[info.family].spec({**info.config, **changes})


L3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SMALL = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
#: config.json as published checkpoints have it: the words of their time, and what they leave to defaults.
PUBLISHED: list[dict[str, Any]] = [
    {"model_type": "gpt2", "vocab_size": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    {"model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_layer": 28, "rotary": True, "vocab_size": 50400},
    {"model_type": "gpt_neox", **SMALL, "rotary_emb_base": 1000, "rotary_pct": 0.5},
    {"model_type": "gpt_neox", **SMALL, "rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_pct": 0.5},
    {"model_type": "gpt_neo", "hidden_size": 64, "num_heads": 4, "num_layers": 24, "vocab_size": 99}
    | {"attention_types": [[["global", "local"], 12]], "max_position_embeddings": 2048},
    {"model_type": "bloom", "n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 99},
    {"model_type": "opt", **SMALL, "ffn_dim": 96, "max_position_embeddings": 2048, "word_embed_proj_dim": 32},
    {"model_type": "llama", **SMALL, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **L3}},
    {"model_type": "llama", **SMALL, "num_key_value_heads": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"model_type": "mistral", **SMALL, "num_key_value_heads": 2, "sliding_window": None, "rope_theta": 1e6},
    {"model_type": "qwen2", **SMALL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    | {"num_key_value_heads": 2, "max_position_embeddings": 32768}
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}},
    {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2, "use_sliding_window": False, "sliding_window": None},
    {"model_type": "phi", **SMALL, "partial_rotary_factor": 0.25, "num_key_value_heads": None},
    {"model_type": "phi3", **SMALL, "max_position_embeddings": 4096, "sliding_window": 2047, "rope_scaling": None},
    {"model_type": "gemma", **SMALL, "hidden_act": "gelu", "num_key_value_heads": 4},
    {"model_type": "gemma2", **SMALL, "hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4},
    {"model_type": "gemma3_text", **SMALL, "rope_theta": 1e6, "rope_local_base_freq": 5e3, "num_key_value_heads": 4}
    | {"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 512},
    {"model_type": "falcon", **SMALL, "intermediate_size": None, "multi_query": True, "parallel_attn": True},
    {"model_type": "stablelm", **SMALL, "num_key_value_heads": 4, "use_qkv_bias": True, "rope_theta": 1e5},
    {"model_type": "gpt_bigcode", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 256, "vocab_size": 99},
    {"model_type": "starcoder2", **SMALL, "num_key_value_heads": 2, "sliding_window": 4096, "rope_theta": 1e5},
]


WIDE = SMALL | {"num_attention_heads": 32, "hidden_size": 512}
#: Where config.json does not say how many key/value heads there are.
PUBLISHED += [
    {"model_type": family, **WIDE}
    for family in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "stablelm", "starcoder2")
]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config["model_type"])
def test_published_configurations_are_read_as_transformers_reads_them(config: dict[str, Any]) -> None:
    """The spec of a raw config.json is that of transformers' own reading, in which every default stands."""
    whole = AutoConfig.for_model(**config).to_dict()
    raw, read = (POLICIES[config["model_type"]].spec(values) for values in (config, whole))
    for spec in (raw, read):
        for rotary in filter(None, (spec.rotary, spec.windowed_rotary)):
            assert torch.isfinite(torch.stack(rotary_tables(rotary, 4, CPU))).all()
    same = {"rotary": None, "windowed_rotary": None}
    assert dataclasses.replace(raw, **same) == dataclasses.replace(read, **same)
    for ours, theirs in ((raw.rotary, read.rotary), (raw.windowed_rotary, read.windowed_rotary)):
        assert (ours is None) == (theirs is None)
        if ours and theirs:
            for a, b in zip(rotary_tables(ours, 40, CPU), rotary_tables(theirs, 40, CPU), strict=True):
                assert torch.equal(a, b)
