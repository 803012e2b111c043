"""Question answering: the spans of a context that answer a question.

The score of a span is the product of the probabilities that the answer starts at its first token and ends at its last,
each a softmax over its window's context (and the first special token, which stands for "no answer"), as in
"Reading Wikipedia to Answer Open-Domain Questions" (Chen et al., 2017) and transformers 4's pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tokenizers import Encoding

from miinb.errors import InvalidRequest, PromptTooLong
from miinb.server.encoders.request import Answers, Asked, Prepared
from miinb.server.encoders.windows import windows

MAX_SEQ_LEN = 384
DOC_STRIDE = 128


@dataclass(slots=True)
class Window:
    """A sequence of the model: a question and a piece of its context.

    Attributes:
        place: of the input.
        begin: the context's token that is the piece's first.
        end: the token behind its last.
        at: the piece's first row in the sequence.
        ids: of the sequence.
    """

    place: int
    begin: int
    end: int
    at: int
    ids: list[int]


@dataclass(slots=True)
class Context:
    """Where the context's tokens lie in its text: characters, start and end of each [n]."""

    text: str
    start: np.ndarray
    end: np.ndarray


def prepare(asked: Asked, encodings: Sequence[Encoding]) -> Prepared:
    """See `Prepared`. Raises InvalidRequest, PromptTooLong."""
    found: list[Window] = []
    contexts: list[Context] = []
    types: list[int] = []
    for place, encoding in enumerate(encodings):
        some, kinds = _windows(asked, place, encoding)
        found += some
        types += kinds
        contexts.append(_context(asked, place, encoding))
    first = asked.text.special_id("cls_token")

    def finish(values: np.ndarray, _: np.ndarray | None) -> Answers:
        return Answers(answers(values, found, contexts, first, asked.options))

    return Prepared(
        [window.ids for window in found], finish, type_ids=types if asked.text.has_types and any(types) else ()
    )


def _windows(asked: Asked, place: int, encoding: Encoding) -> tuple[list[Window], list[int]]:
    """The windows of an input, and the token types of all their tokens."""
    limit, stride = _sizes(asked)
    question, context = (0, 1) if asked.text.question_first else (1, 0)
    sides = np.array([-1 if side is None else side for side in encoding.sequence_ids])
    cut = asked.options["max_question_len"]
    dropped = np.flatnonzero(sides == question)[cut:] if cut is not None else np.zeros(0, np.int64)
    keep = np.ones(len(sides), bool)
    keep[dropped] = False
    ids, types, sides = np.array(encoding.ids)[keep], np.array(encoding.type_ids)[keep], sides[keep]
    places = np.flatnonzero(sides == context)
    if not len(places):
        raise InvalidRequest(f"inputs[{place}]: the context has no tokens.", hint="Give a text to look in.")
    begin, end = int(places[0]), int(places[-1]) + 1
    room = limit - (len(ids) - len(places))
    if room < 1:
        raise PromptTooLong(
            f"inputs[{place}]: the question's {int((sides == question).sum())} tokens leave no room for a context in "
            f"the {limit} of a window.",
            hint="Shorten it, or give max_question_len.",
        )
    overlap = min(DOC_STRIDE, limit // 2) if stride is None else stride
    if stride is None and overlap >= room:  # a long question
        overlap = room // 2
    if overlap >= room and room < len(places):
        raise InvalidRequest(f"doc_stride: {overlap} is not below the {room} tokens that a window has for the context.")
    found, kinds = [], []
    for first, last in windows(len(places), room, min(overlap, room - 1), from_end=asked.text.keep_end):
        part = np.r_[0:begin, begin + first : begin + last, end : len(ids)]
        found.append(Window(place, first, last, begin, ids[part].tolist()))
        kinds += types[part].tolist()
    return found, kinds


def _sizes(asked: Asked) -> tuple[int, int | None]:
    """The most tokens of a window, and how many of the context two windows share (None: to be chosen)."""
    limit = asked.options["max_seq_len"]
    if limit is None:
        return min(MAX_SEQ_LEN, asked.limit), asked.options["doc_stride"]
    if limit > asked.limit:
        raise InvalidRequest(f"max_seq_len: {limit} is above the {asked.limit} tokens that the model takes.")
    return limit, asked.options["doc_stride"]


def _context(asked: Asked, place: int, encoding: Encoding) -> Context:
    """The context's tokens; with `align_to_words` each has the offsets of its word."""
    side = 1 if asked.text.question_first else 0
    mine = [i for i, other in enumerate(encoding.sequence_ids) if other == side]
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)[mine]
    start, end = offsets[:, 0], offsets[:, 1]
    if asked.options["align_to_words"]:
        ids = encoding.word_ids
        words = np.array([-1 if ids[i] is None else ids[i] for i in mine])  # -1: a token without a word
        new = np.ones(len(words), bool)
        new[1:] = (words[1:] != words[:-1]) | (words[1:] < 0)
        begins = np.flatnonzero(new)
        word = np.cumsum(new) - 1
        start, end = start[begins][word], end[np.append(begins[1:], len(words)) - 1][word]
    return Context(asked.inputs[place]["context"], start, end)


def answers(
    values: np.ndarray,
    found: Sequence[Window],
    contexts: Sequence[Context],
    first: int | None,
    options: Mapping[str, Any],
) -> list[list[dict[str, Any]]]:
    """The best spans of each context, best first.

    Args:
        values: logits of start and end of each token of each window [rows, 2].
        found: the windows, in the order of their rows.
        contexts: the inputs' contexts.
        first: id of the token that stands for "no answer" where a sequence begins with it (None: there is none).
        options: of the task.
    """
    top_k = options["top_k"]
    best: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
    nothing = [1.0] * len(contexts)
    row = 0
    for window in found:
        logits = values[row : row + len(window.ids)].astype(np.float64)
        row += len(window.ids)
        start, end, none = _probabilities(logits, window, first)
        nothing[window.place] = min(nothing[window.place], none)
        context, spans = contexts[window.place], best[window.place]
        part = slice(window.begin, window.end)
        for span, score in _best(start, end, context.start[part], context.end[part], top_k, options["max_answer_len"]):
            spans[span] = max(score, spans.get(span, 0.0))
    answered = []
    for context, spans, none in zip(contexts, best, nothing, strict=True):
        rows: list[dict[str, Any]] = [
            {"score": score, "start": begin, "end": end, "answer": context.text[begin:end]}
            for (begin, end), score in spans.items()
        ]
        if options["handle_impossible_answer"]:
            rows.append({"score": none, "start": 0, "end": 0, "answer": ""})
        answered.append(sorted(rows, key=lambda one: one["score"], reverse=True)[:top_k])
    return answered


def _probabilities(logits: np.ndarray, window: Window, first: int | None) -> tuple[np.ndarray, np.ndarray, float]:
    """Of each token of the window's context to be the answer's first and its last, and of no answer."""
    part = slice(window.at, window.at + window.end - window.begin)
    counted = np.array(window.ids) == first
    counted[part] = True
    scores = np.where(counted[:, None], logits, -np.inf)
    scores = np.exp(scores - scores.max(axis=0))
    scores /= scores.sum(axis=0)
    return scores[part, 0], scores[part, 1], float(scores[0].prod()) if window.at else 0.0


def _best(
    start: np.ndarray, end: np.ndarray, begins: np.ndarray, ends: np.ndarray, top_k: int, max_answer_len: int
) -> list[tuple[tuple[int, int], float]]:
    """The best `top_k` different spans of a window, as characters, and their scores.

    Args:
        start: probability of each token to be the first [n].
        end: to be the last [n].
        begins: where each token's span begins, characters.
        ends: where it ends.
        top_k: how many.
        max_answer_len: most tokens of a span.
    """
    width = min(max_answer_len, len(end))
    padded = np.concatenate([end, np.full(width - 1, -1.0)])  # spans that would leave the window score below 0
    scores = (start[:, None] * sliding_window_view(padded, width)).ravel()
    scores[np.add.outer(np.arange(len(end)), np.arange(width)).ravel() >= len(end)] = -1.0
    size = 2 * top_k + 8  # several spans of tokens may be the same span of words
    while True:
        size = min(size, len(scores))
        top = np.argpartition(-scores, size - 1)[:size]
        top = top[np.argsort(-scores[top], kind="stable")]
        found: dict[tuple[int, int], float] = {}
        for i, score in zip(top.tolist(), scores[top].tolist(), strict=True):
            at, length = divmod(i, width)
            if score >= 0:
                found.setdefault((int(begins[at]), int(ends[at + length])), score)
        if len(found) >= top_k or size == len(scores):
            return list(found.items())[:top_k]
        size *= 4
