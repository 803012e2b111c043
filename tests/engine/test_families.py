"""Every family's policy against transformers: logits, greedy tokens, cache layouts, ranks, and what is refused.

A row of `conftest.CONFIGS` is a tiny random model; the truth is transformers' own generate on a left-padded batch.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from miinb import models
from miinb.config import EngineOptions, GenerationParams
from miinb.engine.decoder import Decoder, Operators, StepBatch, StepRow
from miinb.engine.executor import StepExecutor
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.policies import POLICIES
from miinb.engine.weights import DTYPES, load_weights
from miinb.errors import UnsupportedModel
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
    longer = PROMPTS[2] + wanted.tokens[2][:5]
    tokens, cached = generate(executor, [longer], NEW_TOKENS - 5)
    assert tokens == [wanted.tokens[2][5:]], "alone, after a prefix of an earlier row"
    assert cached == len(longer) // PAGE_TOKENS * PAGE_TOKENS


ONE_OF_EACH = list(POLICIES)


def test_every_family_has_rows() -> None:
    families = {POLICIES[name.split("-")[0]].family for name in CONFIGS if name.split("-")[0] in POLICIES}
    assert families == set(POLICIES)


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bf16_error_is_not_above_transformers_own(tiny: Tiny, name: str, operators: str) -> None:
    model, folder = tiny(name)
    rows = [prompt * 3 for prompt in PROMPTS]
    half = type(model)(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    with torch.inference_mode():
        exact, theirs = (torch.cat([m(torch.tensor([row])).logits[0].float() for row in rows]) for m in (model, half))
    decoder, cache = load(folder, operators, "bf16")
    ours = torch.cat([all_logits(decoder, cache, row).float() for row in rows])
    assert (ours - exact).square().mean() <= 1.5**2 * (theirs - exact).square().mean()


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
    ("gpt_neox", 2),
    ("gpt_neox-serial", 3),
    ("gpt_neo", 2),
    ("phi3", 2),
    ("phi", 2),
    ("gemma3_text", 2),
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
    prompt, new = PROMPTS[0], 8
    whole = load_weights(info, policy, spec, dtype="fp32", device=CPU)
    cache = KVCache(spec, CacheSize(PAGES, PAGE_TOKENS, 128, 4, 0), torch.float32, CPU)
    ((wanted,), _) = generate(executor_of(Decoder(spec, whole), cache), [prompt], new)

    def run(rank: int) -> Tensor:
        weights = load_weights(info, policy, spec, dtype="fp32", device=CPU, rank=rank, ranks=ranks)
        local = spec.shard(ranks)
        assert weights.layers[0].up.weight.shape[0] == (2 if spec.gated else 1) * spec.inner_size // ranks
        decoder = Decoder(local, weights, group=ThreadGroup(rank, ranks, barrier, board))  # type: ignore[arg-type]
        own = KVCache(local, CacheSize(PAGES, PAGE_TOKENS, 128, 4, 0), torch.float32, CPU)
        return all_logits(decoder, own, prompt + wanted[:-1])[len(prompt) - 1 :]

    with ThreadPoolExecutor(ranks) as pool:
        outputs = list(pool.map(run, range(ranks)))
    with torch.inference_mode():
        exact = model(torch.tensor([prompt + wanted[:-1]])).logits[0, len(prompt) - 1 :]
    for got in outputs:
        assert (got - exact).abs().max() / exact.abs().max() < 1e-4
        assert got.argmax(-1).tolist() == wanted


REFUSED = [
    ("llama", {"hidden_act": "relu2"}, "Activation 'relu2'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scores scaled by layer"),
    ("opt", {"layer_norm_elementwise_affine": False}, "norms have no weights"),
    ("llama", {"rope_parameters": {"rope_type": "new"}}, "kind 'new'"),
    ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "3 elements"),
    ("phi3", {"rope_parameters": {"type": "su"}}, "old checkpoints"),
    ("phi3-partial", {"original_max_position_embeddings": 32}, "past 32 tokens"),
]


@pytest.mark.parametrize(("name", "changes", "why"), REFUSED)
def test_what_the_spec_cannot_say_is_refused(tiny: Tiny, name: str, changes: dict[str, Any], why: str) -> None:
    info = models.inspect(tiny(name)[1])
    with pytest.raises(UnsupportedModel, match=why):
        POLICIES[info.family].spec({**info.config, **changes})
