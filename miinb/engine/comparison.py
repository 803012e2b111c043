"""The optimized engine against transformers on the same weights, layer by layer: what `miinb check` runs.

`python -m miinb.engine.comparison FILE`: a `DeploymentConfig` without "auto" as one JSON line on stdin, the result as
JSON in the file, as stdout belongs to the libraries. It is a process of its own, because the caller has no torch and
all memory is back when it ends. Models are loaded one after another.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from miinb import models
from miinb.config import DeploymentConfig
from miinb.engine.decoder import Decoder
from miinb.engine.encoder_comparison import compare_encoder
from miinb.engine.kv_cache import CacheSize, KVCache, cache_dtype
from miinb.engine.loading import operators_of
from miinb.engine.place import Place
from miinb.engine.policies import POLICIES
from miinb.engine.step_batch import StepBatch, StepRow
from miinb.engine.traces import Trace, errors, trace_plain, transformers_model
from miinb.engine.weights import load_weights
from miinb.errors import MiinbError, OutOfMemory, UnsupportedModel
from miinb.messages import Plan
from miinb.models import ModelInfo
from miinb.tasks import TASKS

PROMPT_TOKENS = 24
NEW_TOKENS = 16
_PAGE_TOKENS = 16


def compare(config: DeploymentConfig) -> dict[str, Any]:
    """Both engines on a prompt and its continuation: errors of every layer and of the logits, and greedy tokens.

    The truth is transformers in fp32. In fp32 an error is the largest difference relative to the truth's largest value;
    in shorter dtypes and with an fp8 cache, where the largest is an accident of rounding, the root mean square relative
    to the truth's.

    Raises:
        UnsupportedModel: the optimized engine has no form for the model.
        MiinbError: the model cannot be loaded.
    """
    model = models.inspect(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    task = model.task(config.task)
    if not TASKS[task].streams:
        return compare_encoder(config, model.serving(task), task)
    if model.spec is None:
        raise model.unfused or UnsupportedModel(f"{model.family} does not generate text.")
    tokens = [(7 * i + 3) % model.spec.vocab_size for i in range(min(PROMPT_TOKENS, model.spec.max_length // 2))]
    new = min(NEW_TOKENS, model.spec.max_length - len(tokens))
    with transformers_model(model, config, "fp32", task) as plain:
        ids = torch.tensor([tokens], device=config.device)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        answer = plain.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
        truth = _trace_plain(plain, answer[:-1], model.spec.layers)
    base, base_dtype = truth, "fp32"
    if config.dtype in ("bf16", "fp16"):
        base_dtype = config.dtype
        with transformers_model(model, config, base_dtype, task) as plain:
            base = _trace_plain(plain, answer[:-1], model.spec.layers)
    decoder = _fused(model, config)
    ours = _trace_fused(decoder, answer[:-1], config.kv_dtype)
    return {
        **errors(ours, base, truth, exact=config.dtype == "fp32" and config.kv_dtype == "auto"),
        "baseline_dtype": base_dtype,
        "tokens": _generate(decoder, tokens, new, config.kv_dtype),
        "expected_tokens": answer[len(tokens) :],
        "prompt_tokens": len(tokens),
    }


def _trace_plain(plain: Any, tokens: list[int], layers: int) -> Trace:
    """transformers' forward over all tokens at once."""
    return trace_plain(plain, layers, lambda: plain(torch.tensor([tokens], device=plain.device)).logits[0])


def _fused(model: ModelInfo, config: DeploymentConfig) -> Decoder:
    if model.spec is None:
        raise UnsupportedModel(f"{model.family} has no fused form.")
    place = Place(torch.device(config.device), config.dtype)
    weights = load_weights(model, POLICIES[model.family], model.spec, dtype=config.dtype, device=place.device)
    ops, _ = operators_of(Plan("optimized", config.device, config.dtype), model.spec, place)
    return Decoder(model.spec, weights, ops=ops)


def _cache(decoder: Decoder, tokens: int, kv_dtype: str) -> tuple[KVCache, list[int]]:
    weights, pages = decoder.weights, -(-tokens // _PAGE_TOKENS)
    size = CacheSize(pages, _PAGE_TOKENS, pages * _PAGE_TOKENS, 1, 0)
    cache = KVCache(decoder.spec, size, cache_dtype(kv_dtype, weights.dtype), weights.embed.device)
    return cache, list(range(pages))


@torch.inference_mode()
def _trace_fused(decoder: Decoder, tokens: list[int], kv_dtype: str) -> Trace:
    cache, pages = _cache(decoder, len(tokens), kv_dtype)
    device = decoder.weights.embed.device
    batch = StepBatch.of_rows([StepRow(tokens, 0, pages)], _PAGE_TOKENS, device)
    x, residual = decoder.embed(batch), None
    layers = []
    for index in range(decoder.spec.layers):
        x, residual = decoder.layer(index, x, residual, batch, cache)
        layers.append((x if residual is None else x.float() + residual.float()).float().cpu())
    logits = decoder.logits((x, residual), torch.arange(len(tokens), device=device))
    return Trace(layers, logits.float().cpu())


@torch.inference_mode()
def _generate(decoder: Decoder, tokens: list[int], new: int, kv_dtype: str) -> list[int]:
    """Greedy tokens of the prompt, one step each, through the cache."""
    cache, pages = _cache(decoder, len(tokens) + new, kv_dtype)
    device = decoder.weights.embed.device
    found: list[int] = []
    step, start = tokens, 0
    for _ in range(new):
        batch = StepBatch.of_rows([StepRow(step, start, pages)], _PAGE_TOKENS, device)
        found.append(int(decoder.greedy(batch, cache)[0][0]))
        step, start = found[-1:], start + len(step)
    return found


def main() -> int:
    """Compare, and write the result or the error to the file."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive who asked
    config = DeploymentConfig.from_json(sys.stdin.readline())
    out = Path(sys.argv[1])
    if config.options.threads:
        torch.set_num_threads(config.options.threads)
    if config.device == "cuda":
        torch.cuda.set_device(_first_gpu(config))
    try:
        result = compare(config)
    except torch.OutOfMemoryError:
        result = _failed(OutOfMemory("transformers in fp32 does not fit on the GPU.", hint="Check with device='cpu'."))
    except MiinbError as error:
        result = _failed(error)
    out.write_text(json.dumps(result), encoding="utf-8")
    return 0


def _first_gpu(config: DeploymentConfig) -> int:
    first = (config.gpus or [0])[0]
    return first[0] if isinstance(first, list) else first


def _failed(error: MiinbError) -> dict[str, Any]:
    return {"failed": {"error": type(error).__name__, "message": error.message, "hint": error.hint}}


if __name__ == "__main__":
    sys.exit(main())
