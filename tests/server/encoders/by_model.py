"""What rank 0 would send for a request, computed plainly: transformers' model on one sequence at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miinb.messages import EngineInfo, Plan
from miinb.server.encoders.registry import ENCODER_TASKS
from miinb.server.encoders.request import Answers, Asked, Prepared, checked_inputs, checked_options
from miinb.server.encoders.tokenization import EncoderText
from miinb.server.prediction import texts_of
from miinb.tasks import TASKS


def info_of(task: str, **changes: Any) -> EngineInfo:
    values: dict[str, Any] = {
        "replica": 0, "model": "m", "task": task, "engine": "optimized", "dtype": "fp32", "device": "cpu",
        "vocab_size": 1000, "max_length": 64, "max_batch": 4, "eos_token_ids": (), "tokenizer_folder": "",
        "plan": Plan("optimized", "cpu", "fp32"),
    }  # fmt: skip
    return EngineInfo(**(values | changes))


def ask(folder: Path, task: str, inputs: list[Any], *, info: dict[str, Any] | None = None, **options: Any) -> Asked:
    """The checked request; inputs may be plain texts."""
    row = TASKS[task]
    rows = [{"query": one} if isinstance(one, str) else one for one in inputs]
    checked_inputs(rows, row)
    return Asked(rows, checked_options(options, row), EncoderText.load(folder), info_of(task, **(info or {})))


def prepare(asked: Asked) -> Prepared:
    kind = ENCODER_TASKS[asked.info.task]
    encodings = asyncio.run(asked.text.encode(texts_of(asked), offsets=kind.offsets))
    return kind.prepare(asked, encodings)


def reduce(logits: torch.Tensor, prepared: Prepared, task: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Values and ids of the logits of all rows, as docs/internals.md has them."""
    options = prepared.options
    if task == "token-classification":
        return logits.softmax(-1).numpy(), None
    if task == "text-classification":
        function = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda x: x}
        logits = function[options["function"]](logits)
        if "top_k" not in options:
            return logits.numpy(), None
    if task == "fill-mask":
        logits = logits.softmax(-1)
        if "targets" in options:
            ids = torch.tensor(options["targets"])
            values, places = logits[:, ids].topk(options["top_k"])
            return values.numpy(), ids[places].numpy().astype(np.int32)
    if task in ("text-classification", "fill-mask"):
        values, ids = logits.topk(options["top_k"])
        return values.numpy(), ids.numpy().astype(np.int32)
    return logits.numpy(), None


@torch.inference_mode()
def logits_of(model: Any, prepared: Prepared, task: str) -> torch.Tensor:
    """The head's rows for the request [rows, columns]."""
    rows: list[torch.Tensor] = []
    at = 0
    for ids in prepared.sequences:
        tokens = {"input_ids": torch.tensor([list(ids)])}
        if len(prepared.type_ids):
            tokens["token_type_ids"] = torch.tensor([list(prepared.type_ids[at : at + len(ids)])])
        output = model(**tokens)
        if task == "question-answering":
            rows.append(torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1))
        elif task == "fill-mask":
            wanted = [place - at for place in prepared.wanted if at <= place < at + len(ids)]
            rows.append(output.logits[0, wanted])
        else:
            rows.append(output.logits[0] if output.logits.dim() == 3 else output.logits)
        at += len(ids)
    return torch.cat(rows).float()


def answers(asked: Asked, model: Any) -> Answers:
    """The whole way."""
    prepared = prepare(asked)
    task = asked.info.task
    return prepared.finish(*reduce(logits_of(model, prepared, task), prepared, task))
