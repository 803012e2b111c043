"""The headline: time per token of one sequence, this engine against plain transformers, in one process.

`python -m miinb.bench.headline` runs the arms one after another on equal work: random weights of a public
configuration, a prompt of `--prompt-tokens`, exactly `--new-tokens` new tokens, greedy, warm. It measures the engines
themselves: no server, no tokenizer. The floor is the bytes of weights that a token must read over the measured copy
bandwidth.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from miinb import models
from miinb.bench import presets
from miinb.bench.environment import environment, hardware_words
from miinb.bench.records import Record, Runs, new_run_id, utc_now
from miinb.config import DeploymentConfig, GenerationParams
from miinb.engine.executor import Executor
from miinb.engine.loading import load_executor
from miinb.errors import MiinbError
from miinb.messages import FailedEvent, FinishedEvent, SequenceRequest, TokensEvent

ARMS: dict[str, dict[str, Any]] = {
    "baseline": {"engine": "baseline"},
    "baseline-best": {"engine": "baseline", "options": {"compile": True}},
    "optimized": {"engine": "optimized"},
}
DEFAULT_MODELS = {"cuda": ["gpt2", "llama-8b"], "cpu": ["smollm2-135m"]}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy on the device moves, reads and writes counted; the best of several."""
    size = 1 << (32 if device.type == "cuda" else 28)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        _synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


def read_bytes(model: models.ModelInfo, dtype: str) -> int:
    """Bytes of weights that one token reads: all but the tables of which it reads a row."""
    table = 0 if model.config.get("tie_word_embeddings", True) else model.vocab_size * model.hidden_size
    table += model.config.get("n_positions", 0) * model.hidden_size  # learned positions
    return int(model.weights_bytes(dtype) * (1 - table / model.parameters))


def run_once(executor: Executor, prompt: Sequence[int], new_tokens: int, row_id: int) -> tuple[list[float], list[int]]:
    """Generate greedily. Returns when each token came, in seconds after the submit, and the tokens.

    Raises:
        MiinbError: the engine failed.
    """
    times: list[float] = []
    tokens: list[int] = []

    def take(event: object) -> None:
        if isinstance(event, TokensEvent):
            tokens.extend(event.token_ids)
            times.extend([time.perf_counter() - started] * len(event.token_ids))
        elif isinstance(event, FailedEvent):
            raise MiinbError(f"{event.error}: {event.message}")
        elif isinstance(event, FinishedEvent) and event.output_tokens != new_tokens:
            raise MiinbError(f"{event.output_tokens} tokens came, {new_tokens} were asked for.")

    params = GenerationParams(max_new_tokens=new_tokens, min_new_tokens=new_tokens, ignore_eos=True, seed=0)
    started = time.perf_counter()
    executor.submit(SequenceRequest(row_id, list(prompt), params, time.monotonic()))
    while executor.busy:
        executor.step(take, lambda: None)
    return times, tokens


def measure(arm: str, folder: Path, options: argparse.Namespace, device: str) -> tuple[list[Record], dict[str, Any]]:
    """The records of one arm on one model, and what is worth keeping about it."""
    config = DeploymentConfig.parse(
        {
            "model": str(folder),
            "load_format": "dummy",
            "dtype": options.dtype,
            "device": device,
            "max_batch": 8,
            "max_length": options.prompt_tokens + options.new_tokens + 64,
        }
        | ARMS[arm]
    )
    gpus = [0] if device == "cuda" else None
    executor = load_executor(config, replica=0, rank=0, gpus=gpus, folder=folder / arm, report=lambda phase: None)
    rng = random.Random(options.seed)  # the same prompts for every arm
    records = []
    try:
        for i in range(options.warmup + options.repeats):
            prompt = [rng.randrange(3, executor.info.vocab_size) for _ in range(options.prompt_tokens)]
            submitted = utc_now()
            times, _ = run_once(executor, prompt, options.new_tokens, i)
            record = Record(options.run_id, seq=i, arm=arm, model=folder.name, engine=executor.info.engine)
            record.dtype, record.t_submit, record.warmup = executor.info.dtype, submitted, i < options.warmup
            record.prompt_id, record.prompt_tokens = str(i), options.prompt_tokens
            _fill(record, times)
            records.append(record)
        plan = executor.info.plan
        facts = {"load_s": executor.info.load_s, "weights_bytes": plan.weights_bytes, "plan": str(plan).splitlines()}
    finally:
        executor.close()
        del executor
        _free(device)
    return records, facts | {"n_gpus": int(device == "cuda")}


def _fill(record: Record, times: Sequence[float]) -> None:
    """The times of one sequence's tokens, by the definitions of `records.DEFINITIONS`."""
    gaps = [after - before for before, after in pairwise(times)]
    record.task, record.seed, record.batch_size, record.concurrency = "text-generation", 0, 1, 1
    record.output_tokens, record.chunk_count, record.finish_reason = len(times), len(times), "length"
    record.ttft_s, record.model_s, record.e2e_s = times[0], times[-1], times[-1]
    record.tpot_s = (times[-1] - times[0]) / (len(times) - 1)
    record.itl_p50_s, record.itl_max_s = statistics.median(gaps), max(gaps)


def table(runs: Runs, floors_s: dict[str, float]) -> str:
    """The result: a line for each model and arm."""
    lines = [f"{'model':<14} {'arm':<14} {'TTFT ms':>9} {'ms/token':>9} {'ratio':>7} {'% of floor':>10}"]
    measured = runs.requests[~runs.requests["warmup"]]
    for model, rows in measured.groupby("model", sort=False):
        per_token = rows.groupby("arm", sort=False)["tpot_s"].median()
        first = rows.groupby("arm", sort=False)["ttft_s"].median()
        for arm in per_token.index:
            ratio = f"{per_token['baseline'] / per_token[arm]:.2f}x" if "baseline" in per_token.index else "-"
            share = 100 * floors_s[str(model)] / per_token[arm]
            lines.append(
                f"{model:<14} {arm:<14} {1e3 * first[arm]:>9.2f} {1e3 * per_token[arm]:>9.3f} {ratio:>7} {share:>10.0f}"
            )
        lines.append(f"{model:<14} {'floor':<14} {'':>9} {1e3 * floors_s[str(model)]:>9.3f}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> tuple[Runs, str]:
    """Measure every arm on every model. Returns the records and the table."""
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    bandwidth = copy_bandwidth(torch.device(device))
    host = environment()
    records: list[Record] = []
    facts: dict[str, Any] = {}
    floors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in options.models or DEFAULT_MODELS[device]:
            for arm in options.arms:
                folder = presets.write(name, Path(place) / name)
                (folder / arm).mkdir(exist_ok=True)
                found, about = measure(arm, folder, options, device)
                records += found
                facts[arm] = facts.get(arm, {}) | {name: about}
                dtype = found[0].dtype
            model = models.inspect(folder, load_format="dummy")
            floors[name] = read_bytes(model, dtype) / bandwidth
    for seq, record in enumerate(records):
        record.seq = seq
    workload = {name: getattr(options, name) for name in ("prompt_tokens", "new_tokens", "warmup", "repeats", "seed")}
    env = {"run_id": options.run_id, "name": "headline", "created": utc_now(), "host": host, "arms": facts}
    env |= {"workload": workload, "copy_bytes_s": bandwidth, "floor_s": floors}
    runs = Runs([_fields(record) for record in records], {options.run_id: env})
    head = f"{hardware_words(host)}; batch 1, {options.prompt_tokens} + {options.new_tokens} tokens, random weights"
    return runs, f"{head}; copies move {bandwidth / 1e9:,.0f} GB/s\n{table(runs, floors)}"


def _fields(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in Record.__slots__}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", choices=sorted(presets.PRESETS), help="default: by the device")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128, help="at least 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory to append the run's records to")
    options = parser.parse_args(arguments)
    if options.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the time per token is taken between tokens")
    options.run_id = new_run_id()
    runs, text = run(options)
    print(text)
    if options.out:
        print(f"Records: {runs.save(options.out) / options.run_id}")


if __name__ == "__main__":
    main()
