"""`python -m miinb.bench.headline.profile MODEL`: where the time of a step goes, kernel by kernel.

Runs the optimized engine in this process on random weights of a public configuration, with PyTorch's profiler around
some steps of each kind: decoding steps of so many rows with so long contexts, and steps full of prompts.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from miinb.bench import presets
from miinb.config import DeploymentConfig, GenerationParams
from miinb.engine.decoder import Decoder, Operators
from miinb.engine.executor import StepExecutor
from miinb.engine.loading import load_executor
from miinb.errors import MiinbError
from miinb.messages import SequenceRequest, TokensEvent


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of one kind of step, medians and means over the profiled ones.

    Attributes:
        label: the kind.
        wall_s: from one step's start to the next one's.
        host_s: Python's part of it; on a GPU it overlaps with the kernels.
        kernels: (seconds a step, calls a step, name), the longest first. On a CPU they are the engine's operators.
    """

    label: str
    wall_s: float
    host_s: float
    kernels: list[tuple[float, float, str]]

    def __str__(self) -> str:
        total = sum(seconds for seconds, _, _ in self.kernels)
        head = (
            f"{self.label}: {1e3 * self.wall_s:.3f} ms a step, host {1e3 * self.host_s:.3f}, kernels {1e3 * total:.3f}"
        )
        lines = [
            f"  {1e6 * seconds:9.0f} us {100 * seconds / (total or 1):5.1f} %  x{calls:<6.4g} {name[:80]}"
            for seconds, calls, name in self.kernels[:14]
        ]
        return "\n".join([head, *lines])


def profiled(executor: StepExecutor, label: str, steps: int) -> StepTimes:
    """The next `steps` steps of the executor under the profiler."""
    gpu = executor.info.device == "cuda"
    host = 0.0
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as recorded:
        started = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            executor.step(lambda event: None, lambda: None)
            host += time.perf_counter() - before
        if gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - started
    kernels = [
        ((event.self_device_time_total if gpu else event.cpu_time_total) / 1e6 / steps, event.count / steps, event.key)
        for event in recorded.key_averages()
        if gpu or event.key in Operators._fields
    ]
    return StepTimes(label, wall / steps, host / steps, sorted(kernels, reverse=True))


def name_operators(decoder: Decoder) -> None:
    """Let the profiler see the decoder's operators: on a CPU they are not PyTorch's."""

    def named(name: str, operator: Callable[..., Any] | None) -> Callable[..., Any] | None:
        if operator is None:
            return None

        def call(*args: Any, **options: Any) -> Any:
            with record_function(name):
                return operator(*args, **options)

        return call

    operators: dict[str, Any] = {name: named(name, getattr(decoder.ops, name)) for name in Operators._fields}
    decoder.ops = Operators(**operators)


def submit(executor: StepExecutor, rows: int, prompt_tokens: int, new_tokens: int, seed: int = 0) -> None:
    """Queue random prompts, all different."""
    rng = random.Random(seed)
    params = GenerationParams(max_new_tokens=new_tokens, ignore_eos=True, seed=0)
    for row_id in range(rows):
        prompt = [rng.randrange(3, executor.info.vocab_size) for _ in range(prompt_tokens)]
        executor.submit(SequenceRequest(row_id, prompt, params, time.monotonic()))


def drain(executor: StepExecutor, prompts: int = 0) -> None:
    """Step until everything has ended, or only until every one of so many prompts has its first token."""
    left = set(range(prompts))

    def take(event: object) -> None:
        if isinstance(event, TokensEvent):
            left.discard(event.row_id)

    while executor.busy and (left or not prompts):
        executor.step(take, lambda: None)


def load(options: argparse.Namespace, place: Path) -> StepExecutor:
    """The model as the optimized engine runs it."""
    folder = presets.write_into(place, options.model, small=options.tiny)
    fields = {"model": str(folder), "load_format": "dummy", "dtype": options.dtype, "device": options.device}
    fields |= {"kv_dtype": options.kv_dtype}
    fields |= {"max_batch": max(options.rows), "max_length": options.context + 2 * options.steps + 16}
    gpus = [0] if options.device == "cuda" else None
    config = DeploymentConfig.parse(fields)
    executor = load_executor(config, replica=0, rank=0, gpus=gpus, folder=folder, report=lambda phase: None)
    if not isinstance(executor, StepExecutor):
        executor.close()
        raise MiinbError("; ".join(executor.info.plan.warnings))
    if options.device == "cpu":
        name_operators(executor.compute.decoder)
    return executor


def run(options: argparse.Namespace) -> list[StepTimes]:
    """Load the model and profile every kind of step that was asked for. Raises MiinbError."""
    context, steps = options.context, options.steps
    with tempfile.TemporaryDirectory(prefix="miinb-profile-") as place:
        executor = load(options, Path(place))
        found = []
        try:
            for rows in options.rows:
                submit(executor, rows, context, 4, seed=rows)
                drain(executor)  # warm
                submit(executor, rows, context, 2 * steps, seed=-rows)
                drain(executor, prompts=rows)
                found.append(profiled(executor, f"decode, {rows} rows of {context} tokens", steps))
                drain(executor)
            submit(executor, max(options.rows), context, 1)
            if options.device == "cuda":
                executor.step(lambda event: None, lambda: None)  # a step is always ahead there
            found.append(profiled(executor, f"prompts of {context} tokens", 1))
            drain(executor)
        finally:
            executor.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.headline.profile", description=__doc__)
    parser.add_argument("model", choices=presets.DECODERS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64], help="rows of the decoding steps (1 8 64)")
    parser.add_argument("--context", type=int, default=256, help="tokens of each row (256)")
    parser.add_argument("--steps", type=int, default=20, help="steps under the profiler (20)")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16", "int8", "int4", "fp8"], default="bf16")
    parser.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto", help="of the KV cache")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of the family, to show that it runs")
    for times in run(parser.parse_args(arguments)):
        print(times, flush=True)


if __name__ == "__main__":
    main()
