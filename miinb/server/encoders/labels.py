"""Text classification: the labels of a text and their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding

from miinb.messages import EngineInfo
from miinb.server.encoders.request import Answers, Asked, Prepared
from miinb.server.encoders.windows import fitted
from miinb.tasks import FEW_LABELS


def names_of(info: EngineInfo, count: int) -> Sequence[str]:
    """The labels of a classifier with `count` of them; a model that names none has LABEL_0, LABEL_1, ..."""
    return info.labels if len(info.labels) == count else tuple(f"LABEL_{number}" for number in range(count))


def prepare(asked: Asked, encodings: Sequence[Encoding]) -> Prepared:
    """See `Prepared`. Raises PromptTooLong."""
    options, top_k = asked.options, asked.options["top_k"]
    sequences = [
        fitted(encoding.ids, asked.text, asked.limit, place=place, truncation=options["truncation"])
        for place, encoding in enumerate(encodings)
    ]
    reduction = {"function": options["function_to_apply"] or asked.info.function or "softmax"}
    known = len(asked.info.labels)
    if top_k is not None and not 0 < known <= FEW_LABELS:
        reduction["top_k"] = min(top_k, known or top_k)

    def finish(values: np.ndarray, ids: np.ndarray | None) -> Answers:
        if ids is None:  # all labels
            ids = np.argsort(-values, axis=1, kind="stable")[:, :top_k]
            values = np.take_along_axis(values, ids, axis=1)
        names = names_of(asked.info, known or int(ids.max()) + 1)
        return Answers(
            [
                [{"label": names[i], "score": score} for i, score in zip(row_ids, scores, strict=True)]
                for row_ids, scores in zip(ids.tolist(), values.tolist(), strict=True)
            ]
        )

    return Prepared(sequences, finish, options=reduction)
