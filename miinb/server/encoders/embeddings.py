"""Feature extraction: a text, or each of its tokens, as a vector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding

from miinb.server.encoders.request import Answers, Asked, Prepared
from miinb.server.encoders.windows import fitted
from miinb.server.encoders.words import TokenIds


def prepare(asked: Asked, encodings: Sequence[Encoding | TokenIds]) -> Prepared:
    """See `Prepared`. Raises PromptTooLong."""
    options = asked.options
    sequences = [
        fitted(encoding.ids, asked.text, asked.limit, place=place, truncation=options["truncation"])
        for place, encoding in enumerate(encodings)
    ]
    rows = [len(ids) if options["pooling"] == "none" else 1 for ids in sequences]

    def finish(values: np.ndarray, ids: np.ndarray | None) -> Answers:
        return Answers(rows, values.tobytes(), values.shape[1])

    return Prepared(sequences, finish, options={"pooling": options["pooling"], "normalize": options["normalize"]})
