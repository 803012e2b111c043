"""Encoder tasks with plain transformers: its pipelines, and mean or first-token pooling for embeddings."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from miinb.config import DeploymentConfig
from miinb.engine.compute import STEP_ERRORS
from miinb.engine.executor import Emit, Poll
from miinb.engine.lockstep import Lead, settled
from miinb.engine.parallel import PeerLost
from miinb.engine.transformers_encoder import load_encoding
from miinb.errors import InvalidRequest, PromptTooLong, QueueFull, UnsupportedModel, did_you_mean
from miinb.messages import (
    EncodeRequest,
    EngineInfo,
    FailedEvent,
    FinishReason,
    PredictedEvent,
    PredictRequest,
    SequenceRequest,
)
from miinb.models import ModelInfo
from miinb.tasks import TASKS

log = logging.getLogger(__name__)

#: Options of a predict request by task, and the types they may have.
OPTIONS: dict[str, dict[str, tuple[type, ...]]] = {
    "text-classification": {"top_k": (int,), "function_to_apply": (str,)},
    "token-classification": {"aggregation_strategy": (str,)},
    "fill-mask": {"top_k": (int,), "targets": (str, list)},
    "feature-extraction": {"pooling": (str,), "normalize": (bool,)},
}
CHOICES = {
    "function_to_apply": ("sigmoid", "softmax", "none"),
    "aggregation_strategy": ("none", "simple", "first", "average", "max"),
    "pooling": ("mean", "first", "none"),
}


def check_options(task: str, options: Mapping[str, Any]) -> None:
    """Refuse unknown or wrong options of a predict request. Raises InvalidRequest."""
    known = OPTIONS[task]
    for name, value in options.items():
        if name not in known:
            raise InvalidRequest(f"{task} has no option {name!r}.", hint=did_you_mean(name, known))
        if not isinstance(value, known[name]) or (isinstance(value, bool) and bool not in known[name]):
            raise InvalidRequest(f"{name}: {value!r} is not of type {' or '.join(t.__name__ for t in known[name])}.")
        if name in CHOICES and value not in CHOICES[name]:
            raise InvalidRequest(f"{name}: {value!r} is not one of {', '.join(CHOICES[name])}.")
        if isinstance(value, int) and value < 1 and name == "top_k":
            raise InvalidRequest(f"top_k: {value} is below 1.")


class PredictExecutor:
    """One predict request after another through a transformers pipeline.

    Args:
        model: the transformers model.
        files: its files.
        config: the deployment's.
        info: what the frontend is told.
        lead: to the replica's other ranks, which compute the same forwards.

    Raises:
        UnsupportedModel: the task is not served.
    """

    def __init__(
        self, model: Any, files: ModelInfo, config: DeploymentConfig, info: EngineInfo, lead: Lead | None = None
    ) -> None:
        if info.task not in OPTIONS:
            raise UnsupportedModel(f"{info.task} is not served yet.", hint=f"Served: {', '.join(OPTIONS)}.")
        self.info = info
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=config.trust_remote_code
        )
        self._pipe = transformers.pipeline(
            info.task, model=model, tokenizer=self._tokenizer, device=torch.device(info.device)
        )
        self._model = model
        self._max_queue = config.options.max_queue
        self._waiting: deque[PredictRequest] = deque()
        self._model_s = 0.0
        self._t_first = 0.0
        self._served = 0
        self._lead = lead
        self._encoding = load_encoding(model, config, info, lead)
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    def submit(self, request: SequenceRequest) -> None:
        """Refuse: this executor predicts. Raises InvalidRequest."""
        raise InvalidRequest(f"This deployment serves {self.info.task}.", hint="Use predict.")

    def predict(self, request: PredictRequest) -> None:
        """See `Executor`. Raises InvalidRequest, PromptTooLong, QueueFull."""
        check_options(self.info.task, request.options)
        (key,) = TASKS[self.info.task].inputs
        for one in request.inputs:
            if set(one) != {key} or not isinstance(one[key], str) or not one[key]:
                raise InvalidRequest(f"An input of {self.info.task} is {{{key!r}: text}}, not {str(one)[:60]}.")
            self._check_length(one[key])
        if len(self._waiting) >= self._max_queue:
            raise QueueFull(f"{len(self._waiting)} requests wait already.", hint="Try again later.")
        self._waiting.append(request)

    def _check_length(self, text: str) -> None:
        """Refuse what the model would fail at, or a pipeline cut off. Raises PromptTooLong."""
        most = min(self.info.max_length, self._tokenizer.model_max_length)
        if len(text.encode()) + 2 <= most:  # no tokenizer makes more tokens than bytes, and two of its own
            return
        tokens = len(self._tokenizer(text, verbose=False)["input_ids"])
        if tokens > most:
            raise PromptTooLong(f"An input has {tokens} tokens, but the model takes {most}.", hint="Shorten it.")

    def encode(self, request: EncodeRequest) -> None:
        """See `Executor`. Raises InvalidRequest, PromptTooLong, QueueFull."""
        self._encoding.encode(request)

    def cancel(self, row_id: int, reason: FinishReason) -> None:
        """See `Executor`; a request that is being computed is answered all the same."""
        self._waiting = deque(request for request in self._waiting if request.row_id != row_id)
        self._encoding.cancel(row_id, reason)

    @property
    def busy(self) -> bool:
        """Whether requests wait."""
        return bool(self._waiting or self._encoding.busy)

    def status(self) -> dict[str, Any]:
        """See `Executor`."""
        return {"running": 0, "waiting": len(self._waiting), "served": self._served}

    def close(self) -> None:
        """See `Executor`."""
        self._pipe = self._model = None
        if self._lead is not None:
            self._lead.close()

    @torch.inference_mode()
    def step(self, emit: Emit, poll: Poll) -> None:
        """Answer the request that has waited longest. Raises PeerLost."""
        if self._encoding.busy:
            self._encoding.step(emit, poll)
        if not self._waiting:
            return
        request = self._waiting.popleft()
        self._served += 1
        self._model_s = self._t_first = 0.0
        start = time.monotonic()
        try:
            outputs = self._answer([one["query"] for one in request.inputs], request.options)
        except transformers.pipelines.PipelineException as error:  # such as a text without a mask token
            emit(FailedEvent(request.row_id, "InvalidRequest", str(error)))
        except (*STEP_ERRORS, PeerLost) as error:
            log.exception("a predict request of %d inputs raised", len(request.inputs))
            failure, lost = settled(self._lead, error)
            emit(FailedEvent(request.row_id, type(failure).__name__, failure.message, failure.hint))
            if lost is not None:
                poll()
                raise lost from error
        else:
            end = time.monotonic()
            before = (self._t_first or end) - start
            emit(
                PredictedEvent(
                    row_id=request.row_id,
                    outputs=outputs,
                    queue_s=max(0.0, start - request.t_submit),
                    preprocess_s=before,
                    model_s=self._model_s,
                    postprocess_s=max(0.0, end - start - before - self._model_s),
                )
            )

    def _answer(self, texts: Sequence[str], options: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        if not texts:
            return []
        if self.info.task == "feature-extraction":
            return self._embed(texts, **options)
        if len(texts) == 1:  # a list of one text is unpacked by some pipelines and not by others
            answers = [self._pipe(texts[0], **options)]
        else:
            answers = self._pipe(list(texts), batch_size=self._batch(len(texts)), **options)
        return [_plain(answer if isinstance(answer, list) else [answer]) for answer in answers]

    def _batch(self, count: int) -> int:
        """A batch needs padding, which some tokenizers cannot do."""
        return min(count, self.info.max_batch) if self._tokenizer.pad_token_id is not None else 1

    def _embed(
        self, texts: Sequence[str], pooling: str = "mean", normalize: bool = False
    ) -> list[list[dict[str, Any]]]:
        found: list[list[dict[str, Any]]] = []
        batch = self._batch(len(texts))
        for start in range(0, len(texts), batch):
            part = list(texts[start : start + batch])
            tokens = self._tokenizer(part, return_tensors="pt", padding=batch > 1, truncation=True)
            tokens = {name: tensor.to(self.info.device) for name, tensor in tokens.items()}
            hidden = self._model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"][..., None].float()
            if pooling == "none":
                rows = [row[keep[:, 0] > 0] for row, keep in zip(hidden, mask, strict=True)]
            else:
                pooled = hidden[:, 0] if pooling == "first" else (hidden * mask).sum(1) / mask.sum(1)
                rows = list(torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled)
            found += [[{"embedding": row.tolist()}] for row in rows]
        return found

    def _before_forward(self, module: Any, inputs: Any) -> None:
        if self.info.device == "cuda":
            torch.cuda.synchronize()
        self._t_forward = time.monotonic()
        self._t_first = self._t_first or self._t_forward

    def _after_forward(self, module: Any, inputs: Any, outputs: Any) -> None:
        if self.info.device == "cuda":
            torch.cuda.synchronize()
        self._model_s += time.monotonic() - self._t_forward


def _plain(answer: Any) -> Any:
    """The answer as JSON can say it (pipelines return numpy's numbers)."""
    if isinstance(answer, list):
        return [_plain(one) for one in answer]
    if isinstance(answer, dict):
        return {name: _plain(value) for name, value in answer.items()}
    return answer.item() if hasattr(answer, "item") else answer
