"""Text classification: the labels of a text and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import numpy as np
from tokenizers import Encoding

from miinb.messages import EngineInfo
from miinb.server.encoders.request import Answers, Asked, Prepared
from miinb.server.encoders.windows import fitted
from miinb.server.encoders.words import TokenIds
from miinb.tasks import FEW_LABELS


def names_of(info: EngineInfo, count: int) -> Sequence[str]:
    """The labels of a classifier with `count` of them; a model that names none has LABEL_0, LABEL_1, ..."""
    return info.labels if len(info.labels) == count else tuple(f"LABEL_{number}" for number in range(count))


def prepare(asked: Asked, encodings: Sequence[Encoding | TokenIds]) -> Prepared:
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
        names = names_of(asked.info, known or (values.shape[1] if ids is None else int(ids.max()) + 1))
        if ids is None:  # all labels, which are few most often: numpy would not be faster
            named = [zip(scores, names, strict=True) for scores in values.tolist()]
            rows = [sorted(row, key=itemgetter(0), reverse=True)[:top_k] for row in named]
        else:
            rows = [
                [(score, names[i]) for i, score in zip(best, scores, strict=True)]
                for best, scores in zip(ids.tolist(), values.tolist(), strict=True)
            ]
        return Answers([[{"label": name, "score": score} for score, name in row] for row in rows])

    return Prepared(sequences, finish, options=reduction)
