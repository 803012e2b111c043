"""Texts of sequences that differ from one another in one token: put together from pieces, not decoded each as a whole.

What a token adds to a text depends, with the decoders of `_BY_TOKEN`, only on whether it is the first (see
https://github.com/huggingface/tokenizers, tokenizers/src/decoders). So each token is decoded once as the first and
once behind another. Where a sequence has tokens that are a part of a character, its variants are decoded as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from miinb.server.encoders.tokenization import EncoderText, Piece

#: The kinds of decoders that take token by token.
_BY_TOKEN = ("WordPiece", "ByteLevel", "Metaspace")
#: What a decoder makes of bytes that are no character.
_PART = "\ufffd"


@dataclass(slots=True)
class Variants:
    """A sequence of token ids, and what is put into it: one token (None: nothing) in one place at a time."""

    ids: Sequence[int]
    changes: Sequence[tuple[int, int | None]]

    def sequence(self, change: tuple[int, int | None]) -> list[int]:
        """The token ids of one variant."""
        place, token = change
        return [*self.ids[:place], *(() if token is None else (token,)), *self.ids[place + 1 :]]


def texts_of(text: EncoderText, variants: Sequence[Variants], *, skip_special_tokens: bool) -> list[list[str]]:
    """The texts of each sequence's variants, which have at least one, as `text.decode` gives them."""
    if type(text.tokenizer.decoder).__name__ not in _BY_TOKEN:
        every = [one.sequence(change) for one in variants for change in one.changes]
        each = iter(text.decode(every, skip_special_tokens=skip_special_tokens))
        return [[next(each) for _ in one.changes] for one in variants]
    tokens = {token for one in variants for token in one.ids}
    tokens |= {token for one in variants for _, token in one.changes if token is not None}
    shown = tokens - text.special_ids if skip_special_tokens else tokens
    pieces = _Pieces(text, pieces_of(text, shown))
    found: list[list[str]] = []
    for one in variants:
        made = pieces.texts(one)
        left = [one.sequence(change) for change, known in zip(one.changes, made, strict=True) if known is None]
        decoded = iter(text.decode(left, skip_special_tokens=skip_special_tokens))
        found.append([next(decoded) if known is None else known for known in made])
    return found


def pieces_of(text: EncoderText, tokens: Collection[int]) -> dict[int, Piece]:
    """What each of some tokens adds to a text. It is the tokenizer's, which keeps what has been asked for."""
    new = [token for token in tokens if token not in text.pieces]
    if new:
        decode = text.decode_as_is
        before, *pairs = decode([text.anchor, *([*text.anchor, token] for token in new)], skip_special_tokens=False)
        firsts = decode([[token] for token in new], skip_special_tokens=False)
        for token, first, pair in zip(new, firsts, pairs, strict=True):
            behind = pair[len(before) :] if pair.startswith(before) else _PART
            text.pieces[token] = Piece(first, behind)
    return {token: text.pieces[token] for token in tokens}


@dataclass(slots=True)
class _Pieces:
    """Texts put together from what each token adds; a token that is skipped is not among them."""

    text: EncoderText
    known: dict[int, Piece]

    def texts(self, one: Variants) -> list[str | None]:
        """The texts of a sequence's variants; None for those that are not known from pieces."""
        known = self.known
        parts = [known[token].behind if token in known else "" for token in one.ids]
        inner, bounds = "".join(parts), [0, *accumulate(map(len, parts))]
        if _PART in inner:
            return [None] * len(one.changes)
        texts: list[str | None] = []
        for place, token in one.changes:
            shown = token is not None and token in known
            piece = known[token].behind if token is not None and shown else ""
            begin = next((i for i, other in enumerate(one.ids) if i != place and other in known), len(parts))
            if _PART in piece or (not shown and begin == len(parts)):
                texts.append(None)
            elif token is not None and shown and place < begin:
                texts.append(known[token].first + inner[bounds[place + 1] :])
            else:
                head, rest = known[one.ids[begin]].first, inner[bounds[begin + 1] : bounds[place]]
                tail = max(place, begin) + 1
                texts.append(head + rest + piece + inner[bounds[tail] :])
        return [known if known is None else self.text.cleaned(known) for known in texts]
