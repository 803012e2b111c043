"""One batch through transformers' own `generate`, with tokens coming out between its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers
from torch import Tensor

from miinb.engine.caches import cache_arguments
from miinb.errors import MiinbError, NonFinite
from miinb.messages import SequenceRequest, TokenLogprob

if TYPE_CHECKING:
    from miinb.engine.lockstep import Lead

#: Parameters that may differ between the rows of one batch.
PER_ROW = {"seed", "stop", "num_return_sequences", "return_full_text", "max_new_tokens", "logprobs"}


class BaselineRow:
    """One sequence on its way through `generate`."""

    def __init__(self, request: SequenceRequest, eos: frozenset[int]) -> None:
        self.request = request
        self.params = request.params
        self.eos = eos
        self.output: list[int] = []
        self.replay: list[int] = []  # tokens that it has had from a batch that raised; they are computed again
        self.ended = False
        self.t_start = 0.0
        self.t_first = 0.0

    def key(self, *, padded: bool) -> tuple[object, ...]:
        """Rows of equal keys may share a batch; under beam search those are the answers to one prompt.

        Args:
            padded: rows of different lengths may.
        """
        if self.params.num_beams > 1:
            alike = self.params.model_dump_json(exclude=PER_ROW - {"max_new_tokens"})
            return alike, tuple(self.request.token_ids), self.eos
        # transformers would count the padding among the tokens that a repetition penalty has seen.
        padded = padded and self.params.repetition_penalty == 1.0
        same_length = 0 if padded else len(self.request.token_ids)
        # Where nothing ends a row early, a least length says nothing: a load of many lengths shares its batches.
        free = PER_ROW if self.eos else PER_ROW | {"min_new_tokens"}
        return self.params.model_dump_json(exclude=free), same_length, self.eos


class Sink(Protocol):
    """Where a batch's tokens go: the batch executor."""

    def take(self, row: BaselineRow, token_id: int, logprobs: tuple[TokenLogprob, ...]) -> None:
        """A row's next token; ends the row if it is its last."""

    def fail(self, row: BaselineRow, error: MiinbError) -> None:
        """End a row with an error of its own."""


class Watcher(transformers.LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """First among the processors: sees the model's own logits, for `finite` and for log-probabilities."""

    def __init__(self, rows: Sequence[BaselineRow]) -> None:
        self._wanted = [row.params.logprobs for row in rows]
        self.finite: Tensor | None = None
        self.logprobs: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by transformers with the tokens so far [R, n] and the logits [R, vocab]."""
        self.finite = torch.isfinite(scores.amax(-1))
        if any(wanted is not None for wanted in self._wanted):
            self.logprobs = scores.log_softmax(-1)
        return scores

    def read(self, place: int, token_id: int) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of a row's chosen token, if it asked for them."""
        wanted = self._wanted[place]
        if wanted is None or self.logprobs is None:
            return ()
        values, ids = self.logprobs[place].topk(wanted)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return (TokenLogprob(token_id, float(self.logprobs[place, token_id]), top),)


class NewTokenPenalties(transformers.LogitsProcessor):  # type: ignore[misc]
    """Presence and frequency penalty over the new tokens; transformers has none."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._from, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by transformers."""
        new = input_ids[:, self._from :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - counts * self._frequency - (counts > 0) * self._presence


class RowNoise(transformers.LogitsProcessor):  # type: ignore[misc]
    """Gumbel noise from each row's own generator, so that the largest score is a draw that no other row changes.

    It is what `torch.multinomial` does inside (scores against exponential noise), once a row rather than once a batch.
    """

    def __init__(self, rows: Sequence[BaselineRow], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(row.params.seed or 0) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by transformers."""
        noise = torch.empty_like(scores)
        for row, generator in enumerate(self._generators):
            noise[row].exponential_(generator=generator)
        return scores - noise.log()


class Replay(transformers.LogitsProcessor):  # type: ignore[misc]
    """Makes `generate` choose what the rows have had before; the noise goes on as it would have."""

    def __init__(self, rows: Sequence[BaselineRow], width: int) -> None:
        self._rows, self._width = rows, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by transformers."""
        step = input_ids.shape[1] - self._width
        for place, row in enumerate(self._rows):
            if step < len(row.replay):
                scores[place] = -torch.inf
                scores[place, row.replay[step]] = 0.0
        return scores


class Taker(transformers.StoppingCriteria):  # type: ignore[misc]
    """Called by transformers after each step: hands out the new tokens and says which rows have ended."""

    def __init__(self, rows: Sequence[BaselineRow], watcher: Watcher, sink: Sink, between: Callable[[], None]) -> None:
        self._rows, self._watcher, self._sink, self._between = rows, watcher, sink, between
        self._steps = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by transformers with all tokens [R, n]; True where a row has ended."""
        self._steps += 1
        finite = self._watcher.finite.tolist() if self._watcher.finite is not None else []
        for place, (row, token_id) in enumerate(zip(self._rows, input_ids[:, -1].tolist(), strict=True)):
            if row.ended or self._steps <= len(row.replay):
                continue
            if finite[place]:
                self._sink.take(row, token_id, self._watcher.read(place, token_id))
            else:
                self._sink.fail(row, NonFinite("The model produced NaN or infinity for this request."))
        self._between()
        return torch.tensor([row.ended for row in self._rows], device=input_ids.device)


def processors_of(rows: Sequence[BaselineRow], watcher: Watcher, width: int, device: torch.device) -> Any:
    """transformers' logits processors, in transformers' order, of rows that share a key.

    Args:
        rows: the rows; all but `PER_ROW` is equal in them.
        watcher: goes first.
        width: length of the padded prompts.
        device: where the logits are.
    """
    params = rows[0].params
    found = transformers.LogitsProcessorList([watcher])
    if params.logit_bias:
        found.append(transformers.SequenceBiasLogitsProcessor({(i,): bias for i, bias in params.logit_bias.items()}))
    if params.repetition_penalty != 1.0:
        found.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        found.append(NewTokenPenalties(width, params.presence_penalty, params.frequency_penalty))
    if params.min_new_tokens and rows[0].eos:
        eos = sorted(rows[0].eos)
        found.append(transformers.MinNewTokensLengthLogitsProcessor(width, params.min_new_tokens, eos, device=device))
    if params.do_sample:
        if params.temperature != 1.0:
            found.append(transformers.TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            found.append(transformers.TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            found.append(transformers.TopPLogitsWarper(params.top_p))
        if params.min_p:
            found.append(transformers.MinPLogitsWarper(params.min_p))
        found.append(RowNoise(rows, device))
    if any(row.replay for row in rows):
        found.append(Replay(rows, width))
    return found


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts side by side, [R, longest] int64, and their attention mask; the padding is masked, so any id will do."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def generate(
    model: Any, rows: Sequence[BaselineRow], sink: Sink, between: Callable[[], None], cache: str, lead: Lead | None
) -> None:
    """Run rows that share a key to their ends.

    Args:
        model: the transformers model.
        rows: the batch.
        sink: gets tokens and failures.
        between: called after each step.
        cache: which of `caches.CACHES`.
        lead: to the other ranks.
    """
    prompts = [row.request.token_ids for row in rows]
    watcher = Watcher(rows)
    processors = processors_of(rows, watcher, max(map(len, prompts)), model.device)
    settings = {"max_new_tokens": max(row.params.max_new_tokens for row in rows)}
    run_generate(model, prompts, settings, cache, processors, [Taker(rows, watcher, sink, between)], lead)


@torch.inference_mode()
def run_generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    cache: str,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    lead: Lead | None = None,
) -> Tensor:
    """transformers' `generate`, the same call on every rank.

    Args:
        model: the transformers model.
        prompts: the batch.
        settings: arguments of GenerationConfig, as JSON can say them.
        cache: which of `caches.CACHES`.
        processors: this rank's logits processors; the largest of the scores that come out is a row's token.
        criteria: this rank's stopping criteria.
        lead: on rank 0: to the others.

    Returns:
        Prompts and answers, [R, n].
    """
    input_ids, mask = pad_left(prompts, model.device)
    if lead is not None:
        lead.begin(prompts=[list(prompt) for prompt in prompts], settings=dict(settings), cache=cache)
        processors, criteria = lead.join(processors, criteria, beams="num_beams" in settings)
    length = input_ids.shape[1] + settings["max_new_tokens"]
    # Requests say everything; nothing comes unasked from the checkpoint's generation_config.json.
    model.generation_config = transformers.GenerationConfig()
    answers: Tensor = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=transformers.GenerationConfig(
            do_sample=False, use_cache=True, pad_token_id=0, **settings, **cache_arguments(cache, length)
        ),
        logits_processor=transformers.LogitsProcessorList(processors),
        stopping_criteria=transformers.StoppingCriteriaList(criteria),
    )
    return answers
