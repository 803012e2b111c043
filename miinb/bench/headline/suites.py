"""What the headline runs: arms, workloads with their lengths, and which of them each suite and model has."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

#: Models of a suite where none are named, by device.
MODELS: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {
        "decode": ("gpt2", "bloom-560m", "opt-1.3b", "gpt-j-6b", "llama-8b"),
        "throughput": ("gpt2", "opt-1.3b", "gpt-j-6b", "llama-8b"),
        "ragged": ("llama-8b",),
        "server": ("gpt2", "llama-8b"),
        "memory": ("opt-1.3b",),
        "quantized": ("gpt-j-6b", "llama-8b", "gpt-neox-20b"),
        "cpu": ("smollm2-135m", "gpt2"),
    },
    "cpu": dict.fromkeys(("decode", "throughput", "ragged", "server", "memory", "quantized"), ("smollm2-135m",))
    | {"cpu": ("smollm2-135m", "gpt2")},
}
SUITES = tuple(MODELS["cuda"])
#: Suites that run where none is named.
DEFAULT_SUITES = {"cuda": ("decode", "throughput", "ragged", "server", "memory"), "cpu": ("cpu",)}


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of the comparison.

    Attributes:
        label: as the records name it.
        engine: "optimized" or "baseline".
        dtype: "" is the run's.
        kv_dtype: of the KV cache; "auto" is the dtype.
        compiled: transformers' fastest KV cache or `torch.compile`, measured at load.
        continuous: transformers' own continuous batching instead of `generate`.
        served: through a `Session` and its server.
        turn: arms of a lower turn go first, for all models: what a spent time budget leaves out comes last.
    """

    label: str
    engine: str
    dtype: str = ""
    kv_dtype: str = "auto"
    compiled: bool = False
    continuous: bool = False
    served: bool = False
    turn: int = 0


FP8_CACHE = "optimized, lossy fp8 cache"
ARMS = {
    arm.label: arm
    for arm in (
        Arm("optimized", "optimized"),
        Arm("baseline", "baseline"),
        Arm(FP8_CACHE, "optimized", kv_dtype="fp8"),
        Arm("optimized int8", "optimized", "int8"),
        Arm("optimized int4", "optimized", "int4"),
        Arm("optimized fp8", "optimized", "fp8"),
        Arm("served", "optimized", served=True, turn=1),
        Arm("baseline-continuous", "baseline", continuous=True, turn=2),
        Arm("baseline-best", "baseline", compiled=True, turn=3),
    )
}
#: Suites that have this arm when it is asked for.
FP8_CACHE_SUITES = ("decode", "throughput", "ragged")
CPU_ARMS = (
    Arm("baseline", "baseline", "fp32"),
    *(Arm(f"optimized {dtype}", "optimized", dtype) for dtype in ("fp32", "bf16", "int8", "int4")),
    Arm("baseline-best", "baseline", "fp32", compiled=True, turn=3),
)
#: What transformers alone computes in; for others its bf16 is what they are compared with.
BASELINE_DTYPES = ("fp32", "fp16", "bf16")
#: Arms of each suite; those of "server" are part of the run of "decode".
SUITE_ARMS = {
    "decode": ("optimized", "baseline", "baseline-best"),
    "server": ("optimized", "served"),
    "throughput": ("optimized", "baseline", "baseline-best"),
    "ragged": ("optimized", "baseline", "baseline-continuous"),
    "memory": ("optimized",),
    "quantized": ("optimized", "optimized int8", "optimized int4", "optimized fp8"),  # ratios are to the first
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of known lengths in tokens: one after another, or all at once.

    Attributes:
        suite: names the run.
        lengths: (prompt, new) of each request; one after another there is one, repeated.
        at_once: submit all before the first step.
        sample: so many of the requests, spread evenly over their lengths, are what the baseline runs; 0 is all.
        batches: sizes of static batches that the baseline tries; the faster counts.
        warmup, repeats: passes that do not count, and the most that do.
        seed: of the prompts; every arm gets the same.
        limit_s: a pass that takes longer is cut.
    """

    suite: str
    lengths: tuple[tuple[int, int], ...]
    at_once: bool = False
    sample: int = 0
    batches: tuple[int, ...] = ()
    warmup: int = 1
    repeats: int = 5
    seed: int = 0
    limit_s: float = 120.0

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer together."""
        return max(prompt + new for prompt, new in self.lengths)

    def sorted_sample(self) -> tuple[tuple[int, int], ...]:
        """The baseline's requests: the longest answers first, so that a static batch wastes least."""
        ranked = sorted(self.lengths, key=lambda pair: (pair[1], pair[0]), reverse=True)
        count = min(self.sample or len(ranked), len(ranked))
        return tuple(ranked[int((i + 0.5) * len(ranked) / count)] for i in range(count))

    def about(self) -> dict[str, Any]:
        """The workload for a run's environment; lengths as [least, most]."""
        prompts, news = zip(*self.lengths, strict=True)
        return {
            "prompt_tokens": [min(prompts), max(prompts)],
            "new_tokens": [min(news), max(news)],
            "requests": len(self.lengths),
            "baseline_requests": self.sample or len(self.lengths),
            **{name: getattr(self, name) for name in ("at_once", "warmup", "repeats", "seed", "limit_s")},
        }

    def prompts(self, lengths: Sequence[tuple[int, int]], vocab_size: int, number: int) -> list[list[int]]:
        """Random token ids of pass `number`: the same for every arm, different from pass to pass."""
        rng = random.Random(f"{self.seed}/{number}")
        return [[rng.randrange(3, vocab_size) for _ in range(prompt)] for prompt, _ in lengths]


@dataclass(frozen=True, slots=True)
class Job:
    """What a process does before it lets go of a model: load it as one arm, run workloads.

    Attributes:
        model: of `presets.PRESETS`.
        folder: its files.
        arm: how it is loaded.
        device: "cuda" or "cpu".
        dtype: of the run.
        workloads: run one after another.
        checkpoint: load random weights from safetensors made for it, instead of making them in place.
    """

    model: str
    folder: str
    arm: Arm
    device: str
    dtype: str
    workloads: tuple[Workload, ...]
    checkpoint: bool = False

    @property
    def task(self) -> str:
        """Hugging Face's name."""
        return "text-generation"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths and counts of all suites; see the command's options."""

    prompt_tokens: int = 128
    new_tokens: int = 128
    load_prompt_tokens: int = 128
    load_new_tokens: int = 64
    requests: int = 128
    ragged: tuple[int, int] = (100, 1024)
    ragged_requests: int = 256
    baseline_requests: int = 64
    batches: tuple[int, ...] = (32,)
    repeats: int = 5
    warmup: int = 1
    seed: int = 0
    limit_s: float = 120.0


TINY = Sizes(8, 6, 8, 4, 4, (4, 12), 6, 4, (2,), 2, 1)
QUICK = Sizes(repeats=2, baseline_requests=32)


def workload(suite: str, sizes: Sizes) -> Workload:
    """The requests of a suite."""
    common: dict[str, Any] = {"warmup": sizes.warmup, "repeats": sizes.repeats, "seed": sizes.seed}
    common["limit_s"] = sizes.limit_s
    if suite == "throughput":
        lengths = ((sizes.load_prompt_tokens, sizes.load_new_tokens),) * sizes.requests
        batches = tuple(dict.fromkeys((sizes.requests, *(b for b in sizes.batches if b < sizes.requests))))
        return Workload(suite, lengths, at_once=True, batches=batches, **common)
    if suite == "ragged":
        rng = random.Random(sizes.seed)
        low, high = sizes.ragged
        lengths = tuple((rng.randint(low, high), rng.randint(low, high)) for _ in range(sizes.ragged_requests))
        more: dict[str, Any] = {"at_once": True, "sample": sizes.baseline_requests, "batches": sizes.batches}
        return Workload(suite, lengths, **more, **common)
    if suite == "memory":
        common |= {"warmup": 0, "repeats": 1}
        return Workload(suite, ((sizes.prompt_tokens, min(sizes.new_tokens, 8)),), **common)
    name = "decode" if suite == "server" else suite  # "quantized" has the lengths of "decode"
    return Workload(name, ((sizes.prompt_tokens, sizes.new_tokens),), **common)


@dataclass
class Choice:
    """What the user asked for; None and "" take the defaults of the device."""

    suites: Sequence[str]
    device: str
    dtype: str
    sizes: Sizes = field(default_factory=Sizes)
    models: Sequence[str] = ()
    arms: Sequence[str] = ()
    kv_dtype: str = "auto"  # "fp8" adds an arm


def jobs(choice: Choice, folders: dict[str, str]) -> list[Job]:
    """Every job, in the order to run: an arm loads a model once for all of its workloads.

    Args:
        choice: what was asked for.
        folders: of the models' files, by name.
    """
    wanted: dict[tuple[str, str, str], dict[str, Workload]] = {}
    for suite in choice.suites:
        device = "cpu" if suite == "cpu" else choice.device
        arms = [arm.label for arm in CPU_ARMS] if suite == "cpu" else list(SUITE_ARMS[suite])
        arms += [FP8_CACHE] if choice.kv_dtype == "fp8" and suite in FP8_CACHE_SUITES else []
        group = suite if suite in ("cpu", "memory") else ""
        for model in choice.models or MODELS[choice.device][suite]:
            for label in arms:
                if choice.arms and label not in choice.arms and re.split("[ ,]", label)[0] not in choice.arms:
                    continue
                if device == "cpu" and label == "optimized fp8":  # which a CPU has no numbers for
                    continue
                found = workload(suite, choice.sizes)
                wanted.setdefault((model, f"{device}/{group}", label), {})[found.suite] = found
    made = []
    for (model, where, label), found_by_suite in wanted.items():
        device, _, group = where.partition("/")
        arm = next(arm for arm in CPU_ARMS if arm.label == label) if group == "cpu" else ARMS[label]
        dtype = arm.dtype or choice.dtype
        if arm.engine == "baseline" and dtype not in BASELINE_DTYPES:
            dtype = "bf16"
        workloads = tuple(found_by_suite.values())
        made.append(Job(model, folders[model], arm, device, dtype, workloads, checkpoint=group == "memory"))
    return sorted(made, key=lambda job: job.arm.turn)


def models_of(choice: Choice) -> list[str]:
    """The models that any suite of the choice runs."""
    names = [name for suite in choice.suites for name in choice.models or MODELS[choice.device][suite]]
    return list(dict.fromkeys(names))
