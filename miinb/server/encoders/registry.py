"""The encoder tasks, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from miinb.server.encoders import embeddings, entities, labels, masks, spans
from miinb.server.encoders.request import Asked, Prepared


class EncoderTask(NamedTuple):
    """How a task is prepared, from `tokenizers.Encoding`; without `offsets` also from `words.TokenIds`."""

    prepare: Callable[[Asked, Sequence[Any]], Prepared]
    offsets: bool = False


ENCODER_TASKS = {
    "text-classification": EncoderTask(labels.prepare),
    "token-classification": EncoderTask(entities.prepare, offsets=True),
    "question-answering": EncoderTask(spans.prepare, offsets=True),
    "fill-mask": EncoderTask(masks.prepare),
    "feature-extraction": EncoderTask(embeddings.prepare),
}
