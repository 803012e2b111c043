"""One of two ranks: `python autotp_process.py RANK FOLDER PASS...`, where a pass is "model folder=fault".

Both ranks go through the passes together. Rank 0 writes what the split model answered to FOLDER/answers.json. Faults:
"none"; "all": both ranks' model raises once in a batch; "lead": rank 0's processors raise once; "alone": the follower
raises within the model; "death": rank 1 is killed in a batch (both end the processes); "parity": the optimized engine's
check fails on rank 1.
"""

from __future__ import annotations

import array
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from miinb.config import DeploymentConfig, GenerationParams
from miinb.engine import generation, parity
from miinb.engine.followers import Following
from miinb.engine.loading import load_rank
from miinb.engine.parallel import PeerLost
from miinb.messages import EncodedEvent, EncodeRequest, FailedEvent, FinishedEvent, SequenceRequest, TokensEvent

Requests = list[tuple[list[int], dict[str, Any]]]
PROMPTS = [[5, 9, 23, 41, 7], [3], [(7 * i) % 97 + 3 for i in range(30)]]
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 11}
#: Three rows in one batch, then one drawn, one with log-probabilities, one found by beams.
REQUESTS: Requests = [
    *((prompt, {"max_new_tokens": 64}) for prompt in PROMPTS),
    (PROMPTS[0], SAMPLED | {"max_new_tokens": 24}),
    (PROMPTS[1], {"max_new_tokens": 4, "logprobs": 2, "presence_penalty": 0.5}),
    (PROMPTS[0], {"max_new_tokens": 8, "num_beams": 3, "length_penalty": 0.5}),
]
AGAIN: Requests = [(PROMPTS[0], {"max_new_tokens": 8})]
TEXTS = [[2, 5, 6, 3], [2, 11, 9, 12, 13, 3]]


def answers(
    executor: Any, requests: Requests, found: list[list[Any]] | None = None, *, stop_after: int = 0
) -> list[list[Any]]:
    """The rows' tokens and how they ended; with `stop_after` the first is canceled when it has so many."""
    found = [] if found is None else found
    found += [[] for _ in requests]
    for i, (prompt, params) in enumerate(requests):
        executor.submit(SequenceRequest(i, prompt, GenerationParams(ignore_eos=True, **params), time.monotonic()))

    def take(event: Any) -> None:
        if isinstance(event, TokensEvent):
            found[event.row_id] += event.token_ids
        elif isinstance(event, FinishedEvent):
            found[event.row_id].append(event.finish_reason)
        elif isinstance(event, FailedEvent):
            found[event.row_id].append(event.error)

    def poll() -> None:
        if stop_after and len(found[0]) >= stop_after:
            executor.cancel(0, "cancelled")

    while executor.busy:
        executor.step(take, poll)
    return found


def predictions(executor: Any) -> list[float]:
    """Scores of the texts' labels, text after text."""
    found: list[Any] = []
    tokens, lengths = [token for text in TEXTS for token in text], [len(text) for text in TEXTS]
    executor.encode(EncodeRequest(1, tokens, lengths, time.monotonic()))
    while executor.busy:
        executor.step(found.append, lambda: None)
    assert isinstance(found[0], EncodedEvent), found
    return array.array("f", found[0].values).tolist()


def break_down(loaded: Any, fault: str, rank: int) -> None:
    """Make this rank fail once, in the third forward of a batch or right after it."""
    count = [0]

    def third(error: Exception | None) -> None:
        count[0] += 1
        if count[0] == 3:
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise error

    if fault == "all" or (fault in ("alone", "death") and rank == 1):
        error = torch.OutOfMemoryError("no memory") if fault != "death" else None
        model = loaded._model if rank else loaded.model
        model.register_forward_pre_hook(lambda *_: third(error))
    if (fault, rank) == ("lead", 0):
        whole = generation.Watcher.__call__

        def failing(self: Any, *args: Any) -> Any:
            third(ValueError("a fault"))
            return whole(self, *args)

        generation.Watcher.__call__ = failing  # type: ignore[method-assign]


def run_pass(folder: str, fault: str, rank: int, state: Path, options: dict[str, Any]) -> dict[str, Any]:
    if fault == "parity" and rank == 1:
        parity.TOLERANCE[torch.float32] = -1.0
    config = DeploymentConfig.parse({"model": folder, "tensor_parallel": 2, "device": "cpu", **options})
    loaded = load_rank(config, replica=0, rank=rank, gpus=None, folder=state, report=lambda phase: None)
    lines = {line.what: f"{line.choice}: {line.reason}" for line in loaded.info.plan.lines}
    break_down(loaded, fault, rank)
    plan = loaded.info.plan
    result: dict[str, Any] = {"plan": lines, "weights": plan.weights_bytes, "warnings": plan.warnings}
    try:
        if isinstance(loaded, Following):
            loaded.run()
        elif loaded.info.task != "text-generation":
            result["answers"] = predictions(loaded)
        elif fault == "none":
            result["answers"] = answers(loaded, REQUESTS)
            result["canceled"] = answers(loaded, REQUESTS[:1], stop_after=5)[0]
            result["again"] = answers(loaded, AGAIN)[0]
        elif fault == "parity":
            result["answers"] = answers(loaded, AGAIN)
        else:
            answers(loaded, REQUESTS[:3], result.setdefault("answers", []))
            result["again"] = answers(loaded, AGAIN)[0]
    except PeerLost as error:
        result["lost"] = f"{type(error).__name__}: {error}"
        if rank == 1:
            raise  # it ends, which rank 0 sees
    loaded.close()
    return result


def main() -> None:
    rank, folder, *passes = sys.argv[1:]
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for each in passes:
        name, fault, *options = each.split("=")
        given = {"options": {"all_reduce": "gloo", "threads": 1}, **json.loads(options[0] if options else "{}")}
        results[f"{Path(name).name}={fault}"] = run_pass(name, fault, int(rank), Path(folder), given)
        Path(folder, f"rank-{rank}.json").write_text(json.dumps(results))
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # leaving the group would wait for the other rank
