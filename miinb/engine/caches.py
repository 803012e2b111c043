"""The KV caches of transformers' `generate`: which there are, which give the right answers, and how fast they are.

Not every family works with every cache: GPT-Neo's local layers read the wrong rows of a static cache, RWKV takes
padding for text, and the angles of "longrope" are those of a batch's longest row. So a cache is compared before it is
measured, and padding is tried before prompts of different lengths share a batch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from miinb.engine.compute import STEP_ERRORS

#: What transformers does unless told otherwise: a cache that grows with each token.
DYNAMIC = "dynamic cache"
#: The KV caches that the arm "baseline-best" chooses from, as arguments of transformers' GenerationConfig.
CACHES: dict[str, dict[str, Any]] = {
    DYNAMIC: {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, compiled": {"cache_implementation": "static"},
}
#: Static caches are as long as a multiple of this, so that few lengths are compiled.
CACHE_STEP = 256
#: Largest difference of logits, relative to the largest, that rounding explains.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
#: A static cache is compared at this length, or the model's: local attention shows in a long one alone.
_COMPARED_LENGTH = 1024


def cache_arguments(name: str, length: int) -> dict[str, Any]:
    """GenerationConfig's arguments for one of `CACHES` that holds `length` tokens."""
    arguments = dict(CACHES[name])
    if arguments:
        arguments["max_cache_len"] = -(-length // CACHE_STEP) * CACHE_STEP
    if name.endswith("compiled"):
        arguments["compile_config"] = transformers.CompileConfig()
        arguments["compile_config"]._compile_all_devices = True  # by itself transformers compiles on GPUs alone
    return arguments


@dataclass(frozen=True, slots=True)
class CacheTime:
    """Seconds a token with one kind of cache; infinite if it cannot be used, and why."""

    seconds: float
    reason: str = ""

    @property
    def text(self) -> str:
        """For the plan."""
        return self.reason or f"{self.seconds * 1e3:.1f} ms"


@torch.inference_mode()
def measure_caches(model: Any, vocab_size: int, max_length: int) -> dict[str, CacheTime]:
    """Time a token at batch 1 with each of `CACHES` that answers as the dynamic one does, warm, median of three."""
    found: dict[str, CacheTime] = {}
    prompt = _prompt(16, vocab_size)
    long = min(max_length, _COMPARED_LENGTH)
    wrong = ""
    for name in CACHES:
        try:
            if name == "static cache" and not _alike(model, prompt, name, long):
                wrong = "answers differently"  # compiled it is the same cache
            found[name] = CacheTime(math.inf, wrong) if wrong else CacheTime(_seconds(model, prompt, name))
        except Exception as error:  # a missing compiler shows in many ways; the other caches are there
            found[name] = CacheTime(math.inf, f"failed ({type(error).__name__})")
    return found


def _seconds(model: Any, prompt: Sequence[int], name: str, new: int = 24) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _generate(model, [prompt], new, **cache_arguments(name, len(prompt) + new))
        times.append((time.perf_counter() - start) / new)
    return statistics.median(times[2:])


@torch.inference_mode()
def pads(model: Any, vocab_size: int) -> bool:
    """Whether a prompt that is padded on the left gets the logits that it gets alone."""
    short, long = _prompt(5, vocab_size), _prompt(12, vocab_size)
    told = {"output_logits": True, "return_dict_in_generate": True}
    alone = _generate(model, [short], 1, **told).logits[0][0]
    try:
        among = _generate(model, [short, long], 1, **told).logits[0][0]
    except STEP_ERRORS:
        return False
    return _close(among, alone, model.dtype)


def mixes(model: Any) -> bool:
    """Whether an answer depends on the longest row of its batch: rotary angles of kind "longrope" may."""
    config = model.config.get_text_config()
    values = getattr(config, "rope_parameters", None) or {}  # of all layers, or by the kind of layer
    parts = [part for part in (values, *values.values()) if isinstance(part, dict)]
    longrope = [part for part in parts if part.get("rope_type") == "longrope"]
    return any(part["original_max_position_embeddings"] < config.max_position_embeddings for part in longrope)


def _alike(model: Any, prompt: Sequence[int], name: str, length: int) -> bool:
    """Whether a cache gives the dynamic one's logits, up to the first token that differs."""
    told = {"output_logits": True, "return_dict_in_generate": True}
    right = _generate(model, [prompt], 8, **told)
    other = _generate(model, [prompt], 8, **told, **cache_arguments(name, length))
    for step, (wanted, got) in enumerate(zip(right.logits, other.logits, strict=True)):
        if not _close(got, wanted, model.dtype):
            return False
        place = len(prompt) + step
        if right.sequences[0, place] != other.sequences[0, place]:
            return True  # a near tie: the contexts differ from here
    return True


def _close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    return bool((got - wanted).abs().max() <= ROUNDING[dtype] * wanted.abs().max())


def _prompt(length: int, vocab_size: int) -> list[int]:
    drawn: list[int] = torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    return drawn


def _generate(model: Any, prompts: Sequence[Sequence[int]], new: int, **settings: Any) -> Any:
    """So many greedy tokens after prompts of which the last is the longest."""
    width = len(prompts[-1])
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **settings
        ),
    )
