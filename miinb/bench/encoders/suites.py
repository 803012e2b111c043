"""What is measured of encoders: suites, arms, workloads with their lengths, and which models and tasks each has."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

#: Suites by what they show.
SUITES = ("latency", "throughput", "mixed", "served", "clients", "cpu", "embeddings")
#: Suites that run where none is named, by device.
DEFAULT_SUITES = {
    "cuda": ("latency", "throughput", "mixed", "served", "clients"),
    "cpu": ("cpu", "embeddings", "served", "clients"),
}
#: Models and tasks of a suite where none are named.
MODELS: dict[str, tuple[str, ...]] = {
    "latency": ("bert-base", "roberta-large"),
    "throughput": ("bert-base",),
    "mixed": ("bert-base",),
    "served": ("bert-base", "roberta-large"),
    "clients": ("bert-base",),
    "cpu": ("bert-base",),
    "embeddings": ("minilm",),
}
HEADS = ("fill-mask", "text-classification", "question-answering", "token-classification")
TASKS: dict[str, tuple[str, ...]] = {
    "latency": HEADS,
    "throughput": ("text-classification",),
    "mixed": ("text-classification",),
    "served": HEADS,
    "clients": ("text-classification",),
    "cpu": ("text-classification",),
    "embeddings": ("feature-extraction",),
}
QUICK_TASKS = {"latency": HEADS[:2], "served": HEADS[:2]}

Kind = Literal["eager", "sorted", "compiled", "engine", "pipeline", "batches", "session"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of the comparison.

    Attributes:
        label: as the records name it.
        kind: what runs: transformers' model ("eager", "sorted": batches of like lengths, "compiled"), its pipeline
            ("pipeline"; "batches": the model on padded batches of like lengths, from texts), this project's executor in
            process ("engine"), or its server ("session").
        dtype: "" is the run's.
        turn: arms of a lower turn go first, for all models: what a spent time budget leaves out comes last.
    """

    label: str
    kind: Kind
    dtype: str = ""
    turn: int = 0

    @property
    def engine(self) -> str:
        """ "optimized" or "baseline"."""
        return "optimized" if self.kind in ("engine", "session") else "baseline"


EAGER = Arm("baseline", "eager")
ENGINE = Arm("optimized", "engine", turn=1)
SORTED = Arm("baseline-sorted", "sorted", turn=1)
COMPILED = Arm("baseline-best", "compiled", turn=3)
PIPELINE = Arm("baseline", "pipeline")
SESSION = Arm("optimized", "session", turn=2)
#: Arms of each suite. On a CPU every precision is an arm of its own.
ARMS: dict[str, tuple[Arm, ...]] = {
    "latency": (EAGER, ENGINE, COMPILED),
    "throughput": (EAGER, ENGINE, COMPILED),
    "mixed": (EAGER, SORTED, ENGINE),
    "served": (PIPELINE, SESSION),
    "clients": (PIPELINE, SESSION),
    "cpu": (
        dataclasses.replace(EAGER, dtype="fp32"),
        *(Arm(f"optimized {dtype}", "engine", dtype, 1) for dtype in ("fp32", "bf16", "int8")),
        dataclasses.replace(COMPILED, dtype="fp32"),
    ),
    "embeddings": (
        dataclasses.replace(PIPELINE, dtype="fp32"),
        Arm("baseline-sorted", "batches", "fp32"),
        *(Arm(f"optimized {dtype}", "session", dtype, 2) for dtype in ("fp32", "int8")),
    ),
}
LABELS = tuple(dict.fromkeys(arm.label for arms in ARMS.values() for arm in arms))
#: Suites of which all sequences are there at once.
AT_ONCE = ("throughput", "mixed")


@dataclass(frozen=True, slots=True)
class Workload:
    """Texts of known lengths in tokens, special tokens included.

    Attributes:
        suite: names the run.
        lengths: of each text. Of "latency", "cpu" and "served" one text is a request, of "throughput", "mixed" and
            "embeddings" all texts are one; clients take them in turn.
        batches: sizes of padded batches that the baseline tries; the fastest counts.
        clients: that ask at once, each for its next text as soon as it has its answer.
        seconds: that the clients ask for.
        warmup, repeats: requests that do not count, and those that do.
        seed: of the texts; every arm gets the same.
        limit_s: a workload that takes longer is ended with its process.
    """

    suite: str
    lengths: tuple[int, ...]
    batches: tuple[int, ...] = ()
    clients: int = 1
    seconds: float = 0.0
    warmup: int = 5
    repeats: int = 50
    seed: int = 0
    limit_s: float = 120.0

    @property
    def together(self) -> bool:
        """Whether all texts are one request."""
        return self.suite in (*AT_ONCE, "embeddings")

    def about(self) -> dict[str, Any]:
        """The workload for a run's environment; lengths as [least, mean, most]."""
        lengths = self.lengths
        return {
            "tokens": [min(lengths), round(sum(lengths) / len(lengths), 1), max(lengths)],
            "texts": len(lengths),
            **{name: getattr(self, name) for name in ("batches", "clients", "seconds", "warmup", "repeats", "seed")},
        }


@dataclass(frozen=True, slots=True)
class Job:
    """What a process does before it lets go of a model: load it as one arm, run workloads.

    Attributes:
        model: of `presets.PRESETS`.
        task: Hugging Face's name.
        folder: where the checkpoint is, or is made by whoever comes first.
        arm: how it is loaded.
        device: "cuda" or "cpu".
        dtype: of the run.
        workloads: run one after another.
        tiny: the shape is made tiny.
    """

    model: str
    task: str
    folder: str
    arm: Arm
    device: str
    dtype: str
    workloads: tuple[Workload, ...]
    tiny: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths and counts of all suites; see the command's options."""

    tokens: int = 128
    texts: int = 4096
    mean: float = 0.4
    batches: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    clients: int = 64
    seconds: float = 8.0
    embedded: int = 64
    repeats: int = 100
    passes: int = 5
    warmup: int = 20
    seed: int = 0


TINY = Sizes(tokens=16, texts=12, batches=(2, 4), clients=4, seconds=0.3, embedded=5, repeats=3, passes=2, warmup=1)
QUICK = Sizes(batches=(64, 256, 1024), seconds=3.0, repeats=50, passes=3, warmup=10)


def mixed_lengths(count: int, most: int, mean: float, seed: int) -> tuple[int, ...]:
    """Log-normal lengths (sigma 0.6) from 4 to `most` tokens whose mean is `mean` of the longest, in arrival order."""
    rng = random.Random(f"{seed}/lengths")
    draws = [math.exp(rng.gauss(0.0, 0.6)) for _ in range(count)]
    low, high = 0.0, 1e6
    for _ in range(60):  # the scale that gives the mean: it grows with it
        scale = (low + high) / 2
        found = [min(max(round(draw * scale), 4), most) for draw in draws]
        low, high = (scale, high) if sum(found) < mean * most * count else (low, scale)
    found[rng.randrange(count)] = most
    return tuple(found)


def workload(suite: str, sizes: Sizes, device: str) -> Workload:
    """The requests of a suite."""
    one = (sizes.tokens,)
    common: dict[str, Any] = {"seed": sizes.seed, "warmup": sizes.warmup}
    batches = sizes.batches if device == "cuda" or max(sizes.batches) <= 32 else (8, 32)
    texts = sizes.texts if device == "cuda" else min(sizes.texts, 256)
    together = common | {"batches": batches, "repeats": sizes.passes, "warmup": 1}
    if suite == "throughput":
        return Workload(suite, one * texts, **together)
    if suite == "mixed":
        return Workload(suite, mixed_lengths(texts, sizes.tokens, sizes.mean, sizes.seed), **together)
    if suite == "embeddings":
        lengths = mixed_lengths(sizes.embedded, sizes.tokens, 0.3, sizes.seed)
        return Workload(suite, lengths, **(together | {"batches": (1, min(32, sizes.embedded))}))
    if suite == "clients":
        lengths = mixed_lengths(256, max(sizes.tokens // 2, 8), 0.4, sizes.seed)
        return Workload(suite, lengths, clients=sizes.clients, seconds=sizes.seconds, **common)
    few = {} if device == "cuda" else {"repeats": min(sizes.repeats, 15), "warmup": min(sizes.warmup, 2)}
    return Workload(suite, one, **(common | {"repeats": sizes.repeats} | few))


@dataclass
class Choice:
    """What the user asked for; empty takes the defaults."""

    suites: Sequence[str]
    device: str
    dtype: str
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    models: Sequence[str] = ()
    tasks: Sequence[str] = ()
    arms: Sequence[str] = ()
    quick: bool = False
    tiny: bool = False


def jobs(choice: Choice, place: str) -> list[Job]:
    """Every job, in the order to run: an arm loads a model once for all of its workloads, baselines go first.

    Args:
        choice: what was asked for.
        place: folder of the checkpoints.
    """
    wanted: dict[tuple[str, str, str, Arm], list[Workload]] = {}
    for suite in choice.suites:
        device = "cpu" if suite in ("cpu", "embeddings") else choice.device
        for model in choice.models or MODELS[suite]:
            for task in _tasks(choice, suite):
                for arm in ARMS[suite]:
                    if choice.arms and arm.label not in choice.arms and arm.label.split(" ")[0] not in choice.arms:
                        continue
                    if arm.kind == "compiled" and choice.quick and task != _tasks(choice, suite)[0]:
                        continue  # a compilation takes longer than all else
                    found = wanted.setdefault((model, task, device, arm), [])
                    found.append(workload(suite, choice.sizes, device))
    made = []
    for (model, task, device, arm), workloads in wanted.items():
        dtype = arm.dtype or choice.dtype
        folder = f"{place}/{model}-{task}-{'fp32' if device == 'cpu' else choice.dtype}"
        made.append(Job(model, task, folder, arm, device, dtype, tuple(workloads), choice.tiny))
    return sorted(made, key=lambda job: (job.arm.turn, job.arm.kind in ("pipeline", "batches")))


def _tasks(choice: Choice, suite: str) -> Sequence[str]:
    if suite == "embeddings":
        return TASKS[suite]
    default = QUICK_TASKS.get(suite, TASKS[suite]) if choice.quick else TASKS[suite]
    return [task for task in choice.tasks or default if suite in ("latency", "served", "cpu") or task in TASKS[suite]]
