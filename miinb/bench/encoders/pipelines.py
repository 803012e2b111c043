"""transformers' pipelines as a user calls them: from a text to an answer, and 64 threads behind a lock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from miinb.bench.encoders import checkpoints
from miinb.bench.encoders.answers import Answer
from miinb.bench.encoders.clients import Call, records_of
from miinb.bench.encoders.inputs import Inputs
from miinb.bench.encoders.predictions import answer_of
from miinb.bench.encoders.suites import Job, Workload
from miinb.bench.headline.trace import Measured, error_text
from miinb.errors import MiinbError

#: Most tokens of an answer, as the pipelines of transformers 4 had it.
MAX_ANSWER = 15


class Pipe:
    """A pipeline of a job that tells the time before, in and after its model.

    transformers 5 has no pipeline for questions: there the same three steps are written out.

    Args:
        job: model, task, dtype, device.
        folder: its checkpoint.
        batch: texts of a padded batch where a list is given.
    """

    def __init__(self, job: Job, folder: Path, batch: int = 1) -> None:
        self._task, self._device, self._batch = job.task, job.device, batch
        kind = checkpoints.auto_class(job.task)
        dtype = checkpoints.DTYPES[job.dtype]
        model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
        self._model = model.to(job.device).eval()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._pipe: Any = None
        if job.task != "question-answering" and job.arm.kind == "pipeline":
            self._pipe = transformers.pipeline(
                job.task, model=self._model, tokenizer=self._tokenizer, device=torch.device(job.device)
            )
        self._first = self._model_s = self._began = 0.0
        self._model.register_forward_pre_hook(self._before)
        self._model.register_forward_hook(self._after)

    @torch.inference_mode()
    def __call__(self, text: Any) -> tuple[Any, Call]:
        """The answer to an input (or to a list of texts), and where its time went."""
        self._first = self._model_s = 0.0
        t_start = time.perf_counter()
        answer = self._answer(text)
        end_s = time.perf_counter() - t_start
        before = (self._first or t_start) - t_start
        after = max(end_s - before - self._model_s, 0.0)
        return answer, Call(t_start, end_s, preprocess_s=before, model_s=self._model_s, postprocess_s=after)

    def _answer(self, text: Any) -> Any:
        if self._task == "feature-extraction":
            return self._embed(text)
        if self._task == "question-answering":
            return self._span(text["question"], text["context"])
        options = {"top_k": None} if self._task == "text-classification" else {}
        return self._pipe(text, **options)

    def _embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Mean embeddings: of the pipeline's hidden states, or from padded batches of like lengths."""
        if self._pipe is not None:
            hidden = self._pipe(list(texts), batch_size=self._batch, return_tensors=True)
            # its results of a padded batch do not tell the padding apart: the texts' own lengths do
            lengths = [len(ids) for ids in self._tokenizer(list(texts))["input_ids"]]
            return [one[0, :length].mean(0).tolist() for one, length in zip(hidden, lengths, strict=True)]
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        found: dict[int, list[float]] = {}
        for start in range(0, len(order), self._batch):
            places = order[start : start + self._batch]
            inputs = self._tokenizer([texts[place] for place in places], padding=True, return_tensors="pt")
            inputs = inputs.to(self._device)
            hidden, mask = self._model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            found.update(zip(places, pooled.float().cpu().tolist(), strict=True))
        return [found[place] for place in range(len(texts))]

    def _span(self, question: str, context: str) -> dict[str, Any]:
        """The likeliest span of the context, by the product of its ends' probabilities."""
        inputs = self._tokenizer(question, context, return_offsets_mapping=True, return_tensors="pt")
        offsets = inputs.pop("offset_mapping")[0].numpy()
        inside = np.array([kind == 1 for kind in inputs.sequence_ids(0)])
        out = self._model(**inputs.to(self._device))
        logits = torch.stack([out.start_logits[0], out.end_logits[0]]).float().cpu().numpy()
        logits[:, ~inside] = -1e4
        start, end = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        spans = np.tril(np.triu(np.outer(start, end)), MAX_ANSWER - 1)
        first, last = np.unravel_index(spans.argmax(), spans.shape)
        left, right = int(offsets[first][0]), int(offsets[last][1])
        return {"score": float(spans[first, last]), "start": left, "end": right, "answer": context[left:right]}

    def _before(self, module: Any, inputs: Any) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._began = time.perf_counter()
        self._first = self._first or self._began

    def _after(self, module: Any, inputs: Any, outputs: Any) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._model_s += time.perf_counter() - self._began


def run_pipelines(job: Job, folder: Path) -> Iterator[Measured]:
    """What each workload of a job measured with transformers' pipeline."""
    maker = Inputs(folder, job.task)
    for workload in job.workloads:
        found = Measured(workload.suite)
        try:
            _RUNS[workload.suite](job, folder, workload, maker, found)
        except (RuntimeError, MiinbError, ValueError, MemoryError) as error:
            found.error = error_text(error)
        yield found


def _served(job: Job, folder: Path, workload: Workload, maker: Inputs, found: Measured) -> None:
    pipe = Pipe(job, folder)
    for number, text in maker.one_each(workload):
        answer, call = pipe(text)
        found.records += records_of(job, workload, [call], number)
        found.answers[str(number)] = answers_of(job.task, [text], answer)


def _embeddings(job: Job, folder: Path, workload: Workload, maker: Inputs, found: Measured) -> None:
    """The faster size of batch counts; of batches of like lengths it is the largest, as is usual."""
    texts = maker.texts(workload.lengths, workload.seed)
    sizes = workload.batches if job.arm.kind == "pipeline" else workload.batches[-1:]
    best = float("inf")
    for size in sizes:
        pipe = Pipe(job, folder, size)
        rows: list[dict[str, Any]] = []
        kept: Any = []
        for number in range(-workload.warmup, workload.repeats):
            kept, call = pipe(texts)
            rows += records_of(job, workload, [call], number)
        quickest = min(row["e2e_s"] for row in rows if not row["warmup"])
        if quickest < best:
            best, found.records, found.facts = quickest, rows, {"static_batch": size}
            found.answers = {"0": answers_of(job.task, texts, kept)}


def _clients(job: Job, folder: Path, workload: Workload, maker: Inputs, found: Measured) -> None:
    """As many threads as clients, one model: each waits for the lock, as in a web server around a pipeline."""
    pipe, lock = Pipe(job, folder), threading.Lock()
    texts = maker.texts(workload.lengths, workload.seed)
    for text in texts[: workload.warmup]:
        pipe(text)
    calls: list[Call] = []
    began = time.perf_counter()

    def ask(client: int) -> None:
        place = client
        while time.perf_counter() < began + workload.seconds:
            t_start = time.perf_counter()
            with lock:
                waited = time.perf_counter() - t_start
                _, call = pipe(texts[place % len(texts)])
            calls.append(
                Call(t_start, waited + call.e2e_s, waited, call.preprocess_s, call.model_s, call.postprocess_s, place)
            )
            place += workload.clients

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(workload.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.records = records_of(job, workload, calls, 0)
    found.answers = {str(place): answers_of(job.task, [text], pipe(text)[0]) for place, text in enumerate(texts[:64])}


_RUNS: dict[str, Callable[[Job, Path, Workload, Inputs, Measured], None]] = {
    "served": _served,
    "embeddings": _embeddings,
    "clients": _clients,
}


def answers_of(task: str, texts: Sequence[Any], answer: Any) -> list[Answer]:
    """A pipeline's result as answers; an embedding is its vector."""
    if task == "feature-extraction":
        return [Answer((), tuple(vector)) for vector in answer]
    entries = answer if isinstance(answer, list) else [answer]
    return [answer_of(task, entries) for _ in texts]
