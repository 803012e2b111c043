"""Token classification: the labeled pieces of a text, joined to names in the ways of transformers' pipeline.

All texts of a request are one flat row of tokens: numpy finds words and groups for all at once, and only what is kept
of them becomes Python objects.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding

from miinb.errors import InvalidRequest, PromptTooLong, did_you_mean
from miinb.messages import EngineInfo
from miinb.server.encoders.labels import names_of
from miinb.server.encoders.request import Answers, Asked, Prepared
from miinb.server.encoders.tokenization import EncoderText
from miinb.server.encoders.windows import fitted, windows

Entity = dict[str, Any]


@dataclass(slots=True)
class Piece:
    """A sequence of the model: a text, or a window of it. Its `begin`th token of the text is its first."""

    place: int  # of the input
    begin: int
    count: int


def prepare(asked: Asked, encodings: Sequence[Encoding]) -> Prepared:
    """See `Prepared`. Raises InvalidRequest, PromptTooLong."""
    text, options, stride = asked.text, asked.options, asked.options["stride"]
    before, around = len(text.prefix), len(text.prefix) + len(text.suffix)
    room = asked.limit - around
    if stride is not None:
        _check_stride(options, room)
    _check_labels(options["ignore_labels"], asked.info.labels)
    sequences: list[Sequence[int]] = []
    pieces: list[Piece] = []
    for place, encoding in enumerate(encodings):
        ids = encoding.ids
        if stride is None or len(ids) <= asked.limit:
            try:
                kept = fitted(ids, text, asked.limit, place=place, truncation=options["truncation"])
            except PromptTooLong as error:
                error.hint += " With stride=64 it is read in windows (and an aggregation_strategy joins their tokens)."
                raise
            begin = len(ids) - len(kept) if text.keep_end else 0
            sequences.append(kept)
            pieces.append(Piece(place, begin, len(kept) - around))
            continue
        for begin, end in windows(len(ids) - around, room, stride, from_end=text.keep_end):
            sequences.append([*text.prefix, *ids[before + begin : before + end], *text.suffix])
            pieces.append(Piece(place, begin, end - begin))

    def finish(values: np.ndarray, ids: np.ndarray | None) -> Answers:
        texts = [values_["query"] for values_ in asked.inputs]
        tokens = _Tokens.of(texts, encodings, pieces, text)
        return Answers(_entities(tokens, values, pieces, len(texts), asked.info, text, options))

    return Prepared(sequences, finish)


def _check_stride(options: Mapping[str, Any], room: int) -> None:
    if options["truncation"]:
        raise InvalidRequest("stride: a text is read in windows or cut (truncation), not both.")
    if options["aggregation_strategy"] == "none":
        raise InvalidRequest(
            "stride: windows need an aggregation_strategy other than none.", hint="Give aggregation_strategy='simple'."
        )
    if options["stride"] >= room:
        raise InvalidRequest(f"stride: {options['stride']} is not below the {room} tokens of a window.")


def _check_labels(ignored: Sequence[Any], labels: Sequence[str]) -> None:
    """Refuse what would leave out nothing. "O" most models have, and it is the default."""
    known = {"O", *labels, *map(_group, labels)}
    for name in ignored if labels else ():
        if name not in known:
            raise InvalidRequest(f"ignore_labels: the model has no {name!r:.60}.", hint=did_you_mean(str(name), labels))


def _group(label: str) -> str:
    """How the group of a label's tokens is called: "PER" of "B-PER"."""
    return label.split("-", 1)[-1]


@dataclass(slots=True)
class _Tokens:
    """The tokens of all pieces, without special ones, one after another.

    Attributes:
        rows: each token's row in the model's results.
        index: its place in its sequence.
        start: where it begins in its text, characters.
        end: where it ends.
        inside: it goes on with the word of the token before.
        first: it is the first of its piece.
        piece: the number of its piece.
        words: its text.
    """

    rows: np.ndarray
    index: np.ndarray
    start: np.ndarray
    end: np.ndarray
    inside: np.ndarray
    first: np.ndarray
    piece: np.ndarray
    words: list[str]

    @classmethod
    def of(
        cls, texts: Sequence[str], encodings: Sequence[Encoding], pieces: Sequence[Piece], text: EncoderText
    ) -> _Tokens:
        before, around = len(text.prefix), len(text.prefix) + len(text.suffix)
        unknown = text.special_id("unk_token")
        offsets: list[np.ndarray] = []
        inside: list[np.ndarray] = []
        words: list[str] = []
        cut: tuple[int, np.ndarray, np.ndarray, list[str]] | None = None
        for piece in pieces:
            if cut is None or cut[0] != piece.place:
                cut = (piece.place, *_tokens_of(texts[piece.place], encodings[piece.place], text, unknown))
            part = slice(before + piece.begin, before + piece.begin + piece.count)
            offsets.append(cut[1][part])
            inside.append(cut[2][part])
            words += cut[3][part]
        counts = np.array([piece.count for piece in pieces])
        number = np.repeat(np.arange(len(pieces)), counts)
        within = np.arange(len(number)) - (np.cumsum(counts) - counts)[number]
        places = np.concatenate(offsets) if offsets else np.zeros((0, 2), np.int64)
        rows = np.arange(len(number)) + number * around + before
        flags = np.concatenate(inside) if inside else np.zeros(0, bool)
        return cls(rows, within + before, places[:, 0], places[:, 1], flags, within == 0, number, words)


def _tokens_of(
    sentence: str, encoding: Encoding, text: EncoderText, unknown: int | None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Offsets [n, 2], whether a token goes on with a word [n], and the tokens' texts, special ones included."""
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    special = text.special_ids  # one that takes the space before it with it is called by its own name
    words = [
        (text.tokenizer.id_to_token(number) or word) if number in special else word
        for number, word in zip(encoding.ids, encoding.tokens, strict=True)
    ]
    start, end = offsets[:, 0], offsets[:, 1]
    if text.has_words:
        inside = np.fromiter(map(len, words), np.int64, len(words)) != np.minimum(end, len(sentence)) - start
    else:  # no tokenizer of words: a token that neither begins with a space nor follows one goes on with a word
        space = np.frombuffer(sentence.encode("utf-32-le", "surrogatepass"), np.uint32) == ord(" ")
        space = np.append(space, False)
        inside = (start > 0) & ~space[np.maximum(start, 1) - 1] & ~space[np.minimum(start, len(sentence))]
    for place in np.flatnonzero(np.array(encoding.ids) == unknown) if unknown is not None else ():
        words[place] = sentence[start[place] : end[place]]
        inside[place] = False
    return offsets, inside, words


def _entities(
    tokens: _Tokens,
    values: np.ndarray,
    pieces: Sequence[Piece],
    inputs: int,
    info: EngineInfo,
    text: EncoderText,
    options: Mapping[str, Any],
) -> list[list[Entity]]:
    """The entities of each input."""
    names = names_of(info, values.shape[1])
    strategy, ignored = options["aggregation_strategy"], options["ignore_labels"]
    scores = values[tokens.rows]
    found: list[list[Entity]] = [[] for _ in range(inputs)]
    if strategy == "none":
        _add_tokens(found, tokens, scores, pieces, names, ignored)
        return found
    if strategy == "simple":
        units = np.arange(len(scores))
    else:
        units = np.flatnonzero(~tokens.inside | tokens.first)
        scores = _word_scores(scores, units, strategy)
    _add_groups(found, tokens, units, scores, pieces, names, ignored, text, joined=strategy != "simple")
    windowed = np.bincount([piece.place for piece in pieces], minlength=inputs)
    return [
        _without_overlaps(entities) if count > 1 else entities for entities, count in zip(found, windowed, strict=True)
    ]


def _add_tokens(
    found: list[list[Entity]],
    tokens: _Tokens,
    scores: np.ndarray,
    pieces: Sequence[Piece],
    names: Sequence[str],
    ignored: Sequence[str],
) -> None:
    labels = scores.argmax(axis=1) if len(scores) else np.zeros(0, np.int64)
    wanted = np.array([name not in ignored for name in names])
    kept = np.flatnonzero(wanted[labels])
    places = np.array([piece.place for piece in pieces])[tokens.piece[kept]]
    best = scores[kept, labels[kept]]
    columns = (kept, places, labels[kept], best, tokens.index[kept], tokens.start[kept], tokens.end[kept])
    for i, place, label, score, index, start, end in zip(*(column.tolist() for column in columns), strict=True):
        word = tokens.words[i]
        found[place].append(
            {"entity": names[label], "score": score, "index": index, "word": word, "start": start, "end": end}
        )


def _word_scores(scores: np.ndarray, begins: np.ndarray, strategy: str) -> np.ndarray:
    """The scores of words that begin at these tokens, from those of their tokens."""
    if strategy == "first" or not len(begins):
        return np.take(scores, begins, axis=0)
    if strategy == "average":
        counts = np.diff(np.append(begins, len(scores)))
        mean: np.ndarray = np.add.reduceat(scores, begins, axis=0) / counts[:, None].astype(scores.dtype)
        return mean
    best = scores.max(axis=1)
    highest = np.repeat(np.maximum.reduceat(best, begins), np.diff(np.append(begins, len(scores))))
    is_best = np.flatnonzero(best == highest)
    chosen = is_best[np.searchsorted(is_best, begins)]  # the first best token of each word
    return np.take(scores, chosen, axis=0)


def _add_groups(
    found: list[list[Entity]],
    tokens: _Tokens,
    units: np.ndarray,
    scores: np.ndarray,
    pieces: Sequence[Piece],
    names: Sequence[str],
    ignored: Sequence[str],
    text: EncoderText,
    *,
    joined: bool,
) -> None:
    """Add the groups of neighbors with the same tag, but for the ignored ones.

    Args:
        found: gets them, by input.
        tokens: all tokens.
        units: where tokens or words begin, as numbers of tokens.
        scores: [units, labels].
        pieces: the sequences.
        names: of the labels.
        ignored: groups to leave out.
        text: joins tokens to words.
        joined: a unit is a word, whose tokens are joined before the words are.
    """
    if not len(units):
        return
    labels = scores.argmax(axis=1)
    score = np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    tags = [name[2:] if name.startswith(("B-", "I-")) else name for name in names]
    tag = np.array([tags.index(one) for one in tags])[labels]
    starts_anew = np.array([name.startswith("B-") for name in names])[labels]
    new = starts_anew | tokens.first[units]
    new[1:] |= tag[1:] != tag[:-1]
    begins = np.flatnonzero(new)
    ends = np.append(begins[1:], len(units))
    groups = [_group(name) for name in names]
    wanted = np.array([group not in ignored for group in groups])
    mean = np.add.reduceat(score, begins) / (ends - begins).astype(score.dtype)
    edges = np.append(units, len(tokens.words))  # where units begin, and where the last ends
    kept = np.flatnonzero(wanted[labels[begins]])
    first, last = begins[kept], ends[kept]
    at, stop = edges[first], edges[last]
    places = np.array([piece.place for piece in pieces])[tokens.piece[at]]
    columns = (first, last, at, stop, places, labels[first], mean[kept], tokens.start[at], tokens.end[stop - 1])
    bounds = edges.tolist()
    join = functools.cache(lambda *parts: text.join(parts))  # most words come again
    for i, j, k, n, place, label, likely, start, end in zip(*(column.tolist() for column in columns), strict=True):
        parts = tokens.words[k:n]
        if joined:
            parts = [join(*tokens.words[bounds[unit] : bounds[unit + 1]]) for unit in range(i, j)]
        found[place].append(
            {"entity_group": groups[label], "score": likely, "word": join(*parts), "start": start, "end": end}
        )


def _without_overlaps(entities: list[Entity]) -> list[Entity]:
    """Of entities that overlap, as windows do, the longest; of equally long ones the most likely."""
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda one: one["start"]):
        last = kept[-1] if kept else None
        if last is None or not last["start"] <= entity["start"] < last["end"]:
            kept.append(entity)
        elif _rank(entity) > _rank(last):
            kept[-1] = entity
    return kept


def _rank(entity: Entity) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]
