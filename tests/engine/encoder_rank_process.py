"""One of several ranks of encoders: `python encoder_rank_process.py RANK RANKS FOLDER ALL_REDUCE PASS...`.

A pass is "model folder=task=fault=JSON of configuration". The ranks go through the passes together, and write what they
saw to FOLDER/rank-N.json. Faults: "none"; "memory-0", "memory-1": that rank has none within one step; "ahead-1": rank 1
has none within the third step, while rank 0 has launched the fourth, which has texts of the same request; "poison-0",
"poison-1": that rank raises in every step with the token POISON; "late-1": rank 1 raises in the head, which rank 0 has
computed itself; "nan-1": a weight of rank 1 is NaN; "parity-1": its check at the start fails; "death-1": it is killed
within a step. No fault but another way: "graphs": steps are padded to graphs, which compute again.

With "boards" for ALL_REDUCE sums go as on linked GPUs: by the kernel, under Triton's interpreter, over files in FOLDER.
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

from miinb.config import DeploymentConfig
from miinb.engine import parity
from miinb.engine.encode_followers import EncodeFollower
from miinb.engine.encoder import Encoder
from miinb.engine.encoder_graphs import GraphedEncoder, graph_sizes
from miinb.engine.loading import load_rank
from miinb.engine.parallel import PeerLost
from miinb.engine.readers import SafetensorsReader
from miinb.engine.reduction import ROWS, Reduction
from miinb.messages import EncodedEvent, EncodeRequest, FailedEvent
from tests.engine.recomputing import Recomputing

POISON = 90
#: Tokens of the texts of each request: they share steps of 32, and the second takes several.
REQUESTS = ((17, 1, 5), (9, 30, 2, 25, 25, 25), (48,), (3,))


def texts_of(lengths: tuple[int, ...], row: int) -> list[list[int]]:
    """Texts without POISON, but for the last request's."""
    texts = [[(17 * row + 5 * i + j * j) % 80 + 3 for j in range(count)] for i, count in enumerate(lengths)]
    return [[*text[:-1], POISON] for text in texts] if row == len(REQUESTS) - 1 else texts


def request_of(row: int, task: str, types: int = 2) -> EncodeRequest:
    """A request; its tokens are of two types where there are, and of each text the first is wanted for fill-mask."""
    texts = texts_of(REQUESTS[row], row)
    starts = [sum(map(len, texts[:i])) for i in range(len(texts))]
    options = {"feature-extraction": {"pooling": "none"}, "text-classification": {"function": "none"}}
    return EncodeRequest(
        row, [token for text in texts for token in text], [len(text) for text in texts], time.monotonic(),
        type_ids=[int(types > 1 and 3 * j >= len(text)) for text in texts for j in range(len(text))],
        wanted=starts if task == "fill-mask" else (), options=options.get(task, {}),
    )  # fmt: skip


def answers(executor: Any, found: dict[int, Any] | None = None) -> dict[int, Any]:
    """Each request's values and ids, or the name of its error."""
    found = {} if found is None else found

    def take(event: Any) -> None:
        if isinstance(event, FailedEvent):
            found[event.row_id] = event.error
        elif isinstance(event, EncodedEvent):
            found[event.row_id] = [array.array("f", event.values).tolist(), array.array("i", event.ids).tolist()]

    for row in range(len(REQUESTS)):
        executor.encode(request_of(row, executor.info.task, executor.queue.bounds.token_types))
    while executor.busy:
        executor.step(take, lambda: None)
    return found


def break_down(encoder: Encoder, fault: str, rank: int) -> None:
    """Make an operator of this rank fail."""
    kind, _, whose = fault.partition("-")
    if whose != str(rank):
        return
    whole, embedding = encoder.ops.linear, encoder.ops.embedding_norm
    calls = [0]
    wrong = {"memory": 6, "death": 6, "ahead": 23, "late": 9}.get(
        kind, 0
    )  # of a step's nine products, two layers and a head

    def linear(x: torch.Tensor, packed: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == wrong:
            if kind == "death":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("no memory") if kind in ("memory", "ahead") else ValueError("a fault")
        return whole(x, packed, **options)

    def embedding_norm(token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if kind == "poison" and (token_ids == POISON).any():
            raise ValueError("a fault")
        return embedding(token_ids, *rest)

    if kind == "nan":
        encoder.weights.layers[0].attn_norm.weight[0] = float("nan")
    encoder.ops = encoder.ops._replace(linear=linear, embedding_norm=embedding_norm)


def capture(loaded: Any, encoder: Encoder, recorder: Any) -> None:
    """Steps through graphs, as a GPU has them."""
    inputs = loaded._inputs if isinstance(loaded, EncodeFollower) else loaded.inputs
    reduction = Reduction(loaded.info.task)
    graphed = GraphedEncoder(encoder, inputs, reduction, graph_sizes(32, 48, ROWS[loaded.info.task]), recorder)
    if isinstance(loaded, EncodeFollower):
        loaded._outputs = graphed.outputs
    else:
        loaded.model = loaded.reducing = graphed


def run_pass(folder: str, task: str, fault: str, fields: dict[str, Any], rank: int, state: Path) -> dict[str, Any]:
    read: dict[str, int] = {}
    fill, exact = SafetensorsReader.fill, parity.TOLERANCE[torch.float32]

    def counting(self: Any, target: torch.Tensor, name: str, region: Any) -> None:
        read[name] = read.get(name, 0) + target.numel()
        fill(self, target, name, region)

    if fault == f"parity-{rank}":
        parity.TOLERANCE[torch.float32] = -1.0
    SafetensorsReader.fill = counting  # type: ignore[method-assign]
    config = DeploymentConfig.parse({"model": folder, "task": task, "device": "cpu", **fields})
    loaded = load_rank(config, replica=0, rank=rank, gpus=None, folder=state, report=lambda phase: None)
    SafetensorsReader.fill, parity.TOLERANCE[torch.float32] = fill, exact  # type: ignore[method-assign]
    plan = loaded.info.plan
    result: dict[str, Any] = {"read": read, "weights": plan.weights_bytes, "warnings": plan.warnings}
    result["plan"] = {line.what: f"{line.choice}: {line.reason}" for line in plan.lines}
    encoder = loaded._encoder if isinstance(loaded, EncodeFollower) else getattr(loaded, "model", None)
    recorder: Any = Recomputing()
    if isinstance(encoder, Encoder):
        break_down(encoder, fault, rank)
        if "TRITON_INTERPRET" in os.environ and encoder.group is not None:
            from tests.kernels.all_reduce_rank import boards_of

            encoder.group.boards = boards_of(rank, encoder.group.size, state)
        if fault == "graphs":
            capture(loaded, encoder, recorder)
    if rank > 0:
        loaded.run()  # type: ignore[union-attr]
    else:
        loaded._ahead = fault == "ahead-1"  # type: ignore[union-attr]
        lead(loaded, fault, result)
    loaded.close()
    boards = encoder.group.boards if isinstance(encoder, Encoder) and encoder.group is not None else None
    return result | {"replays": recorder.replays, "sums": int(boards.epochs[0]) if boards is not None else 0}


def lead(executor: Any, fault: str, result: dict[str, Any]) -> None:
    found: dict[int, Any] = {}
    started = time.monotonic()
    try:
        answers(executor, found)
        result["again"] = answers(executor)
    except PeerLost as error:
        result["lost"], result["lost_s"] = str(error), time.monotonic() - started
    result |= {"answers": found, "status": executor.status(), "warnings": executor.info.plan.warnings}


def main() -> None:
    rank, ranks, folder, all_reduce, *passes = sys.argv[1:]
    torch.set_num_threads(1)
    results: dict[str, Any] = {"kind": all_reduce}
    for each in passes:
        model, task, fault, *more = each.split("=")
        way = "gloo" if all_reduce == "boards" else all_reduce
        options = {"all_reduce": way, "threads": 1, "max_step_tokens": 32}
        fields = {"tensor_parallel": int(ranks), "options": options, **json.loads(more[0] if more else "{}")}
        key = each.rpartition("=")[0] if more else each
        results[key] = run_pass(model, task, fault, fields, int(rank), Path(folder))
        Path(folder, f"rank-{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # the last pass may have killed another rank, for whom leaving the group would wait


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
    os._exit(1)
