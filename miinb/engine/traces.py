"""What a model computes, layer by layer, and how far one trace is from another: for `comparison` and its encoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miinb.config import DeploymentConfig
from miinb.engine.finite import check_finite
from miinb.engine.transformers_model import load_model
from miinb.engine.weights import DTYPES
from miinb.messages import EngineInfo, Plan
from miinb.models import ModelInfo


@dataclass(frozen=True, slots=True)
class Trace:
    """What a model computed for the tokens: fp32 on the CPU.

    Attributes:
        layers: [T, hidden] after each layer.
        logits: [T, vocab]; of an encoder its head's outputs [L, C].
    """

    layers: list[Tensor]
    logits: Tensor


@contextmanager
def transformers_model(model: ModelInfo, config: DeploymentConfig, dtype: str, task: str) -> Iterator[Any]:
    """The model as transformers loads it; its memory is free afterwards."""
    info = EngineInfo(
        replica=0, model=config.model, task=task, engine="baseline", dtype=dtype, device=config.device,
        vocab_size=model.vocab_size, max_length=0, max_batch=1, eos_token_ids=(), tokenizer_folder="",
        plan=Plan("baseline", config.device, dtype),
    )  # fmt: skip
    held = [load_model(model, config, info)]
    check_finite(held[0].parameters(), model, DTYPES[dtype])
    try:
        with torch.inference_mode():
            yield held[0]
    finally:
        held.clear()
        torch.cuda.empty_cache()


def trace_plain(plain: nn.Module, layers: int, forward: Callable[[], Tensor]) -> Trace:
    """transformers' forward with the output of every layer caught.

    Args:
        plain: transformers' model.
        layers: how many it has.
        forward: runs it and gives the logits.
    """
    stack = next(m for m in plain.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        caught.append(hidden.reshape(-1, hidden.shape[-1]).float().cpu())

    hooks = [layer.register_forward_hook(catch) for layer in stack]
    logits = forward().float().cpu()
    for hook in hooks:
        hook.remove()
    return Trace(caught, logits)


def errors(ours: Trace, base: Trace, truth: Trace, *, exact: bool) -> dict[str, Any]:
    """The errors of two traces against a third: of each layer and of the logits, ours first.

    Args:
        ours: of the optimized engine.
        base: of transformers in the same dtype.
        truth: of transformers in fp32.
        exact: the largest difference counts, else the root mean square.
    """
    error = _largest if exact else _mean_square
    traces = zip(ours.layers, base.layers, truth.layers, strict=True)
    return {
        "layers": [[error(fused, exact), error(plain, exact)] for fused, plain, exact in traces],
        "logits": [error(ours.logits, truth.logits), error(base.logits, truth.logits)],
    }


def _largest(values: Tensor, truth: Tensor) -> float:
    error = float((values - truth).abs().max() / truth.abs().max().clamp(min=1e-20))
    return math.inf if math.isnan(error) else error


def _mean_square(values: Tensor, truth: Tensor) -> float:
    error = float((values - truth).norm() / truth.norm().clamp(min=1e-20))
    return math.inf if math.isnan(error) else error
