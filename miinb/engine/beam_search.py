"""Beam search through transformers' own `generate`: one prompt a search, its answers shown when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from miinb.engine.caches import DYNAMIC
from miinb.engine.generation import BaselineRow, Sink, Watcher, processors_of, run_generate
from miinb.errors import NonFinite

if TYPE_CHECKING:
    from miinb.engine.lockstep import Lead


class _Ear(transformers.StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Called by transformers after each step: lets cancels in, and ends the search when no row waits for it."""

    def __init__(self, rows: Sequence[BaselineRow], watcher: Watcher, sink: Sink, between: Callable[[], None]) -> None:
        self._rows, self._watcher, self._sink, self._between = rows, watcher, sink, between

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by transformers with the candidates [beams, n]."""
        if self._watcher.finite is not None and not bool(self._watcher.finite.all()):
            for row in self._rows:
                self._sink.fail(row, NonFinite("The model produced NaN or infinity for this request."))
        self._between()
        ended = all(row.ended for row in self._rows)
        return torch.full((input_ids.shape[0],), ended, device=input_ids.device)


def search(model: Any, rows: Sequence[BaselineRow], sink: Sink, between: Callable[[], None], lead: Lead | None) -> None:
    """The best answers to one prompt.

    Args:
        model: the transformers model.
        rows: of equal keys; a row gets the answer of rank `request.index`.
        sink: gets tokens and failures.
        between: called after each step.
        lead: to the other ranks.
    """
    params, prompt = rows[0].params, rows[0].request.token_ids
    watcher = Watcher(rows)
    settings = {
        "max_new_tokens": params.max_new_tokens,
        "num_beams": params.num_beams,
        "num_return_sequences": max(row.request.index for row in rows) + 1,
        "length_penalty": params.length_penalty,
        "early_stopping": params.early_stopping,
        "eos_token_id": sorted(rows[0].eos) or None,
    }
    processors = processors_of(rows, watcher, len(prompt), model.device)
    ear = _Ear(rows, watcher, sink, between)
    answers = run_generate(model, [prompt], settings, DYNAMIC, processors, [ear], lead)
    for row in rows:
        for token_id in answers[row.request.index, len(prompt) :].tolist():
            if not row.ended:  # after its last token comes padding
                sink.take(row, token_id, ())
