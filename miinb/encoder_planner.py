"""What is chosen for an encoder, and why: a dtype by the CPU's instructions, room for a step, names of labels. Pure."""

from __future__ import annotations

import dataclasses

from miinb.config import DeploymentConfig
from miinb.errors import OutOfMemory
from miinb.hardware import Hardware
from miinb.messages import Plan
from miinb.models import DTYPE_BYTES, ModelInfo
from miinb.wording import size_words

#: /proc/cpuinfo's names of the instructions that multiply in bf16, the fastest first, and what they are called.
_BF16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "bf16 instructions"}
#: As `DeploymentConfig.max_batch` has it.
_MOST_SEQUENCES = 4096
_TASKS_WITH_LABELS = ("text-classification", "token-classification")


def dtype_on_cpu(asked: str, origin: str, hardware: Hardware) -> tuple[str, str]:
    """An encoder's dtype on a CPU and the reason: it computes many tokens at once, so that instructions decide.

    Args:
        asked: fp32, bf16 or fp16.
        origin: "asked for", or "the checkpoint's".
        hardware: the machine.
    """
    fast = next((name for flag, name in _BF16.items() if flag in hardware.cpu_flags), "")
    if asked == "fp16":
        used = "bf16" if fast else "fp32"
        why = f"this CPU has {fast}" if fast else "this CPU has no instructions for bf16, and fp32 is as exact"
        return used, f"fp16 ({origin}) is slow on a CPU: {why}"
    if asked == "fp32":
        return "fp32", f"{origin}; " + (f"bf16 would use this CPU's {fast}" if fast else "this CPU has none for bf16")
    return asked, f"{origin}; this CPU has " + (fast or "no instructions for it, each weight is widened first")


def head(choice: Plan, model: ModelInfo, task: str) -> Plan:
    """The plan with a warning where config.json names another task's head, whose weights may have the same names."""
    named = [str(name) for name in model.config.get("architectures") or ()]
    if model.encoder is None or not model.tasks or task in (*model.tasks, "feature-extraction"):
        return choice
    words = f"config.json names {', '.join(named)}: was this head trained for {task}? Its answers may mean nothing."
    return dataclasses.replace(choice, warnings=(*choice.warnings, words))


def labels(choice: Plan, model: ModelInfo, task: str) -> Plan:
    """The plan with the names of a classifier's labels, and a warning where config.json's cannot be used."""
    if task not in _TASKS_WITH_LABELS:
        return choice
    names, wrong = model.labels()
    shown = ", ".join(names[:4]) + (", ..." if names[4:] else "")
    origin = wrong or ("config.json names them" if model.config.get("id2label") else "config.json names none")
    choice = choice.with_line("labels", f"{len(names)}: {shown}", origin)
    return dataclasses.replace(choice, warnings=(*choice.warnings, wrong)) if wrong else choice


def memory(choice: Plan, config: DeploymentConfig, model: ModelInfo, length: int, usable: int) -> Plan:
    """The plan with weights, steps and lengths of an encoder of the optimized engine.

    Args:
        choice: so far; its device and dtype count.
        config: the deployment's.
        model: with an encoder.
        length: most tokens of a sequence.
        usable: bytes of a rank's device that weights and activations may take.

    Raises:
        OutOfMemory: it cannot fit; the hint has what would.
    """
    on_gpu = choice.device == "cuda"
    ranks = config.tensor_parallel
    weights = model.weights_bytes(choice.dtype, ranks, on_gpu=on_gpu)
    tokens = config.options.step_tokens(choice.device, encoder=True)
    step = model.step_bytes(choice.dtype, max(tokens, length), ranks, on_gpu=on_gpu)
    if weights + step > usable:
        raise _does_not_fit(config, choice, model, weights, step, usable)
    share = f", the share of each of {ranks} ranks" if ranks > 1 else ""
    why = f"{model.parameters / 1e9:.3g} billion parameters in {choice.dtype}{share}"
    choice = choice.with_line("weights", size_words(weights), why, weights_bytes=weights)
    choice = choice.with_line("kv_cache", "none", "an encoder keeps nothing between requests")
    why = "asked for" if config.max_length else _why_length(model, length)
    choice = choice.with_line("max_length", f"{length} tokens", why, max_length=length)
    why = f"of all waiting requests together, unpadded; about {size_words(step)} while one is computed"
    if choice.device == "cuda" and config.options.cuda_graphs:
        why += "; CUDA graphs take about as much again where it is free"
    choice = choice.with_line("steps", f"{tokens} tokens", why)
    sequences = config.max_batch or min(tokens, _MOST_SEQUENCES)
    if config.max_batch:
        choice = choice.with_line("max_batch", str(sequences), "asked for: sequences of a step")
    return dataclasses.replace(choice, max_batch=sequences)


def _why_length(model: ModelInfo, length: int) -> str:
    if length < model.context_length:
        return "what a CPU serves in good time"
    offset = model.encoder.position_offset if model.encoder else 0
    if not offset:
        return "the model's positions"
    return f"the model's {length + offset} positions, of which the first {offset} are no token's"


def _does_not_fit(
    config: DeploymentConfig, choice: Plan, model: ModelInfo, weights: int, step: int, usable: int
) -> OutOfMemory:
    on_gpu, ranks = choice.device == "cuda", config.tensor_parallel
    smaller = [dtype for dtype in ("bf16", "int8") if DTYPE_BYTES[dtype] < DTYPE_BYTES[choice.dtype]]
    needs = {dtype: model.weights_bytes(dtype, ranks, on_gpu=on_gpu) + step for dtype in smaller}
    fits = [f"dtype={dtype!r}" for dtype, need in needs.items() if need <= usable]
    if weights < usable:
        fits.append("a smaller options.max_step_tokens")
    if choice.device == "cpu" and config.replicas > 1:
        fits.append("fewer replicas")
    limit = config.options.memory_limit_bytes
    bound = f" (options.memory_limit_bytes is {size_words(limit)})" if limit else ""
    return OutOfMemory(
        f"{config.model} needs about {size_words(weights + step)} in {choice.dtype} ({size_words(weights)} of weights, "
        f"{size_words(step)} for a step); {size_words(max(0, usable))} can be used{bound}.",
        hint=f"What would fit: {'; '.join(fits)}." if fits else "Take a smaller model.",
    )
