"""One of several ranks: `python rank_process.py RANK RANKS FOLDER ALL_REDUCE PASS...`; a pass is "model folder=fault".

The ranks go through the passes together. Rank 0 runs each model alone first, then with the followers, and all write
what they saw to FOLDER/rank-N.json. Faults: "none"; "memory-0", "memory-1": that rank has none in the step of a prompt;
"nan-0", "nan-1": a token's embedding is NaN there; "death-1": rank 1 is killed in a step. No faults but other ways:
"int8", "bf16", and "ahead": steps are launched before the tokens of the one before are read.

With "boards" for ALL_REDUCE sums go as on linked GPUs: by the kernel, under Triton's interpreter, over files in FOLDER.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from miinb import models
from miinb.config import DeploymentConfig, EngineOptions, GenerationParams
from miinb.engine.decoder import Decoder, Operators
from miinb.engine.executor import StepExecutor
from miinb.engine.followers import Follower, Followers
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.parallel import PeerLost
from miinb.engine.policies import POLICIES
from miinb.engine.ranks import Ranks, join
from miinb.engine.readers import SafetensorsReader
from miinb.engine.weights import DTYPES, load_weights, weights_bytes
from miinb.kernels.cpu import CpuKernels
from miinb.messages import EngineInfo, FailedEvent, Plan, SequenceRequest, TokensEvent

CPU = torch.device("cpu")
OPTIONS = EngineOptions(max_step_tokens=32, speculative="prompt_lookup")
PROMPTS = [[5, 9, 23, 41, 7], [3], [(7 * i) % 97 + 3 for i in range(30)], [50, 51, 52] * 4]
GREEDY = {"max_new_tokens": 48, "speculative": False}
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2, "min_new_tokens": 3}
REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    (PROMPTS[0], GREEDY),
    (PROMPTS[1], GREEDY),
    (PROMPTS[2], GREEDY),
    (PROMPTS[3], {"max_new_tokens": 48}),  # guesses tokens
    (PROMPTS[0], {**SAMPLED, "max_new_tokens": 20, "seed": 11}),
    (PROMPTS[1], {**SAMPLED, "max_new_tokens": 20, "seed": 12, "logit_bias": {9: 4.0}}),
]


def load(folder: str, ranks: Ranks | None, dtype: str) -> tuple[EngineInfo, Decoder, KVCache]:
    model = models.inspect(folder)
    spec, size = model.spec, ranks.group.size if ranks and ranks.group else 1
    assert spec is not None
    weights = load_weights(
        model, POLICIES[model.family], spec, dtype=dtype, device=CPU, rank=ranks.rank if ranks else 0, ranks=size
    )
    local = spec.shard(size)
    kernels = CpuKernels(DTYPES.get(dtype, torch.float32), int8=dtype in ("int8", "int4"))
    ops = Operators(**{name: getattr(kernels, name) for name in Operators._fields})
    decoder = Decoder(local, weights, group=ranks.group if ranks else None, ops=ops)
    pages = CacheSize(24, 8, 96, 5, 0)  # too few for all rows: some are preempted
    info = EngineInfo(
        replica=0, model=folder, task="text-generation", engine="optimized", dtype="fp32", device="cpu",
        vocab_size=spec.vocab_size, max_length=96, max_batch=5, eos_token_ids=(2,), tokenizer_folder="",
        plan=Plan("optimized", "cpu", "fp32"),
    )  # fmt: skip
    return info, decoder, KVCache(local, pages, weights.dtype, CPU)


def answers(executor: StepExecutor, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Any]:
    """The rows' tokens, or the name of their error."""
    found: dict[int, list[Any]] = {i: [] for i in range(len(requests))}
    for i, (prompt, params) in enumerate(requests):
        executor.submit(SequenceRequest(i, prompt, GenerationParams(ignore_eos=True, **params), time.monotonic()))

    def take(event: Any) -> None:
        if isinstance(event, TokensEvent):
            found[event.row_id] += event.token_ids
        elif isinstance(event, FailedEvent):
            found[event.row_id].append(event.error)

    while executor.busy:
        executor.step(take, lambda: None)
    return list(found.values())


def break_down(decoder: Decoder, fault: str, rank: int) -> None:
    """Make an operator of this rank fail after some collectives of a long step, and of the next long one."""
    kind, _, whose = fault.partition("-")
    if kind == "nan" and whose == str(rank):
        decoder.weights.embed[PROMPTS[0][3]] = float("nan")
    whole = decoder.ops.linear
    left = [7, 7]  # calls of each step; a layer makes three

    def linear(x: torch.Tensor, packed: Any, **options: Any) -> torch.Tensor:
        if len(x) >= 12 and left:
            left[0] -= 1
            if left[0] == 0 and kind == "death":
                os.kill(os.getpid(), signal.SIGKILL)
            if left[0] == 0:
                left.pop(0)
                raise torch.OutOfMemoryError("no memory")
        return whole(x, packed, **options)

    if kind in ("memory", "death") and whose == str(rank):
        decoder.ops = Operators(**{**decoder.ops._asdict(), "linear": linear})


def run_pass(folder: str, fault: str, ranks: Ranks) -> dict[str, Any]:
    seen: dict[str, int] = {}
    fill = SafetensorsReader.fill

    def counting(self: Any, target: torch.Tensor, name: str, region: Any) -> None:
        seen[name] = seen.get(name, 0) + target.numel()
        fill(self, target, name, region)

    dtype = fault if fault in (*DTYPES, "int8", "int4") else "fp32"
    alone = load(folder, None, dtype)
    SafetensorsReader.fill = counting  # type: ignore[method-assign]
    info, decoder, cache = load(folder, ranks, dtype)
    SafetensorsReader.fill = fill  # type: ignore[method-assign]
    break_down(decoder, fault, ranks.rank)
    ranks.meet()
    facts = {"read": seen, "weights": weights_bytes(decoder.weights), "cache": token_bytes(cache)}
    if ranks.link is not None:
        Follower(info, decoder, cache, OPTIONS, ranks.link).run()
        return facts
    requests = REQUESTS if "-" not in fault else REQUESTS[:3]
    result: dict[str, Any] = {**facts, "shapes": sizes(folder)}
    one = StepExecutor(info=alone[0], decoder=alone[1], cache=alone[2], options=OPTIONS)
    result["alone"] = answers(one, requests)
    two = StepExecutor(
        info=info, decoder=decoder, cache=cache, options=OPTIONS, followers=Followers.of(ranks.leader),
        launch_ahead=fault == "ahead",
    )  # fmt: skip
    started = time.monotonic()
    try:
        result["together"] = answers(two, requests)
        result["again"] = answers(two, requests) if "-" in fault else result["together"]
        result["accepted"] = two.scheduler.drafts.accepted
        assert ranks.leader is not None
        ranks.leader.send(b"")
    except PeerLost as error:
        result["lost"], result["lost_s"] = str(error), time.monotonic() - started
    return result


def token_bytes(cache: KVCache) -> int:
    """What a token takes of the rank's cache."""
    return sum(layer[0, 0].nbytes for layer in (*cache.k, *cache.v))


def sizes(folder: str) -> dict[str, int]:
    """Elements of each tensor of the checkpoint."""
    return {name: entry.elements for name, entry in models.inspect(folder).tensors.items()}


def main() -> None:
    rank, count, folder, all_reduce, *passes = sys.argv[1:]
    torch.set_num_threads(1)
    by_boards = all_reduce == "boards"
    options = {"all_reduce": "gloo" if by_boards else all_reduce}
    config = DeploymentConfig.parse({"model": "m", "tensor_parallel": int(count), "device": "cpu", "options": options})
    ranks = join(config, replica=0, rank=int(rank), folder=Path(folder), device="cpu")
    assert ranks.group is not None
    if by_boards:
        from tests.kernels.all_reduce_rank import boards_of

        ranks.group.boards = boards_of(int(rank), int(count), Path(folder))
    results: dict[str, Any] = {"kind": ranks.group.kind}
    for each in passes:
        results[each] = run_pass(*each.split("="), ranks)
        results["sums"] = int(ranks.group.boards.epochs[0]) if ranks.group.boards is not None else 0
        Path(folder, f"rank-{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # the last pass may have killed another rank, for whom leaving the group would wait


if __name__ == "__main__":
    main()
