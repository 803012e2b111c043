"""transformers' own model as a careful user runs it: sdpa, inference mode, padded batches, inputs on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miinb.bench.encoders import checkpoints
from miinb.bench.encoders.answers import Answer
from miinb.bench.encoders.inputs import Encoded
from miinb.bench.encoders.side import Run
from miinb.bench.encoders.suites import Job


@dataclass(slots=True)
class Batch:
    """Padded inputs on the device, and which sequences they are."""

    tensors: dict[str, torch.Tensor]
    places: list[int]
    lengths: list[int]
    masks: list[int | None]


class PlainSide:
    """transformers' model of a job; `compiled` by `torch.compile` (on a GPU with CUDA graphs).

    Args:
        job: model, task, dtype, device, arm.
        folder: its checkpoint.
    """

    batched = True

    def __init__(self, job: Job, folder: Path) -> None:
        kind = checkpoints.auto_class(job.task)
        model = kind.from_pretrained(
            folder, dtype=checkpoints.DTYPES[job.dtype], attn_implementation="sdpa", local_files_only=True
        )
        self._model = model.to(job.device).eval()
        self.compiled = job.arm.kind == "compiled"
        self._call: Any = self._model
        if self.compiled:
            mode = "reduce-overhead" if job.device == "cuda" else None
            self._call = torch.compile(self._model, mode=mode, dynamic=False)
        self._sorted, self._job = job.arm.kind == "sorted", job

    def prepare(self, sequences: Sequence[Encoded], size: int) -> list[Batch]:
        """Padded batches on the device, in the order of arrival, or of length where that is the arm."""
        order = list(range(len(sequences)))
        if self._sorted:
            order.sort(key=lambda place: len(sequences[place].token_ids))
        size = size or len(order)
        return [self._batch(sequences, order[start : start + size]) for start in range(0, len(order), size)]

    def _batch(self, sequences: Sequence[Encoded], places: list[int]) -> Batch:
        chosen = [sequences[place] for place in places]
        lengths = [len(one.token_ids) for one in chosen]
        pad = self._model.config.pad_token_id or 0
        ids = torch.full((len(chosen), max(lengths)), pad)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, one in enumerate(chosen):
            ids[row, : lengths[row]] = torch.tensor(one.token_ids)
            mask[row, : lengths[row]] = 1
            if one.type_ids:
                types[row, : lengths[row]] = torch.tensor(one.type_ids)
        tensors = {"input_ids": ids, "attention_mask": mask}
        if any(one.type_ids for one in chosen):
            tensors["token_type_ids"] = types
        moved = {name: tensor.to(self._job.device) for name, tensor in tensors.items()}
        return Batch(moved, places, lengths, [one.mask for one in chosen])

    @torch.inference_mode()
    def run(self, batches: Sequence[Batch]) -> Run:
        """All batches through the model; the results stay on the device, as a user's own code would take them there."""
        began = time.perf_counter()
        outputs = []
        for number, batch in enumerate(batches):
            out = self._call(**batch.tensors)
            if number < 2 or number == len(batches) - 1:  # what is compared; all of them would not fit
                outputs.append(self._kept(out))
        if self._job.device == "cuda":
            torch.cuda.synchronize()
        return Run(outputs, time.perf_counter() - began)

    def _kept(self, out: Any) -> Any:
        """The part of an output that answers are made of; of a compiled model a copy, as it uses its memory again."""
        if self._job.task == "question-answering":
            kept = [out.start_logits, out.end_logits]
        else:
            kept = [out.last_hidden_state if self._job.task == "feature-extraction" else out.logits]
        return [tensor.clone() for tensor in kept] if self.compiled else kept

    def answers(self, batches: Sequence[Batch], run: Run, count: int) -> list[Answer]:
        """Of the first `count` sequences as they arrived; empty ones for those whose output was not kept."""
        found: dict[int, Answer] = {}
        for batch, kept in zip(batches, run.results, strict=False):
            for row, place in enumerate(batch.places):
                if place < count:
                    parts = [tensor[row, : batch.lengths[row]] if tensor.dim() > 1 else tensor for tensor in kept]
                    found[place] = _answer(self._job.task, parts, batch.masks[row])
        return [found.get(place, Answer((), ())) for place in range(min(count, sum(len(b.places) for b in batches)))]

    def facts(self) -> dict[str, Any]:
        """What is kept besides the records."""
        return {"load_s": float("nan")}

    def close(self) -> None:
        """Let go of the model."""
        self._model = self._call = None
        if self.compiled:
            torch.compiler.reset()


def _answer(task: str, parts: Sequence[torch.Tensor], mask: int | None) -> Answer:
    """What the engine would answer from the same logits of one sequence."""
    logits = [part.float().cpu() for part in parts]
    first = logits[0]
    if task == "text-classification":
        return Answer((int(first.argmax()),), tuple(first.tolist()))
    if task == "question-answering":
        both = torch.stack(logits, dim=-1)
        return Answer(tuple(both.argmax(0).tolist()), tuple(both.flatten().tolist()))
    if task == "token-classification":
        return Answer(tuple(first.argmax(-1).tolist()), tuple(first.softmax(-1).flatten().tolist()))
    if task == "fill-mask":
        top = first[mask].softmax(-1).topk(5)
        return Answer((int(top.indices[0]),), tuple(top.values.tolist()))
    return Answer((), tuple(first.mean(0).tolist()))
