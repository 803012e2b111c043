"""Texts of sequences that differ from one another in one token: put together from pieces, not decoded each as a whole.

What a token adds to a text depends, with the decoders of `_BY_TOKEN`, only on whether it is the first (see
https://github.com/huggingface/tokenizers, tokenizers/src/decoders). So each token is decoded once as the first and
once behind another. Where a sequence has tokens that are a part of a character, its variants are decoded as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import accumulate, islice
from typing import NamedTuple

from miinb.server.encoders.tokenization import EncoderText, Piece

#: A place in a sequence, and the token that it has instead of its own (None: it is left out).
Change = tuple[int, int | None]
#: The kinds of decoders that take token by token.
_BY_TOKEN = ("WordPiece", "ByteLevel", "Metaspace")
#: What a decoder makes of bytes that are no character.
_PART = "\ufffd"


class _Own(NamedTuple):
    """What a sequence's own tokens say.

    Attributes:
        text: of its tokens, each as one behind another.
        bounds: where each token's text begins, and the end.
        shown: places of its first two tokens that are shown.
    """

    text: str
    bounds: list[int]
    shown: list[int]


class Variants:
    """A sequence of token ids, whose texts with changes are asked for.

    Args:
        text: the tokenizer.
        ids: the sequence.
        skip_special_tokens: they are not shown.
    """

    def __init__(self, text: EncoderText, ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self.text = text
        self.ids = ids
        self.skip_special_tokens = skip_special_tokens
        self.hidden = text.special_ids if skip_special_tokens else frozenset[int]()

    def sequence(self, change: Change) -> list[int]:
        """The token ids of one variant."""
        place, token = change
        return [*self.ids[:place], *(() if token is None else (token,)), *self.ids[place + 1 :]]

    @cached_property
    def own(self) -> _Own | None:
        """What its texts have in common; can be made before the changes are known. None: they have to be decoded."""
        if not _by_token(self.text):
            return None
        hidden, pieces = self.hidden, pieces_of(self.text, set(self.ids) - self.hidden)
        parts = ["" if token in hidden else pieces[token].behind for token in self.ids]
        shown = (place for place, token in enumerate(self.ids) if token not in hidden)
        text = "".join(parts)
        return None if _PART in text else _Own(text, [0, *accumulate(map(len, parts))], [*islice(shown, 2)])

    def text_of(self, change: Change) -> str | None:
        """The text of a variant, whose token's piece is known; None if it has to be decoded."""
        own = self.own
        if own is None:
            return None
        place, token = change
        pieces = self.text.pieces
        piece = None if token is None or token in self.hidden else pieces[token]
        begin = next((i for i in own.shown if i != place), len(self.ids))
        if piece is not None and _PART in piece.behind:
            return None
        if piece is not None and place < begin:
            made = piece.first + own.text[own.bounds[place + 1] :]
        elif begin == len(self.ids):
            return None
        else:
            head, rest = pieces[self.ids[begin]].first, own.text[own.bounds[begin + 1] : own.bounds[place]]
            made = head + rest + ("" if piece is None else piece.behind) + own.text[own.bounds[max(place, begin) + 1] :]
        return self.text.cleaned(made)


def texts_of(asked: Sequence[tuple[Variants, Sequence[Change]]]) -> list[list[str]]:
    """The texts of each sequence's variants, as `EncoderText.decode` gives them."""
    found: list[list[str]] = []
    for one, changes in asked:
        if _by_token(one.text):
            pieces_of(one.text, {token for _, token in changes if token is not None} - one.hidden)
        made = [one.text_of(change) for change in changes]
        left = [one.sequence(change) for change, known in zip(changes, made, strict=True) if known is None]
        decoded = iter(one.text.decode(left, skip_special_tokens=one.skip_special_tokens) if left else ())
        found.append([next(decoded) if known is None else known for known in made])
    return found


def words_of(text: EncoderText, tokens: Collection[int]) -> dict[int, str]:
    """The text of each token alone."""
    if _by_token(text):
        return {token: text.cleaned(piece.first) for token, piece in pieces_of(text, tokens).items()}
    chosen = sorted(tokens)
    return dict(zip(chosen, text.decode([[token] for token in chosen], skip_special_tokens=False), strict=True))


def _by_token(text: EncoderText) -> bool:
    return type(text.tokenizer.decoder).__name__ in _BY_TOKEN


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
