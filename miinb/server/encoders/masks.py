"""Fill-mask: the most likely tokens in the place of each mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np
from tokenizers import Encoding

from miinb.errors import InvalidRequest, RequestError, UnsupportedModel
from miinb.server.encoders.request import Answers, Asked, Prepared, find_task
from miinb.server.encoders.tokenization import EncoderText
from miinb.server.encoders.variants import Change, Variants, texts_of, words_of
from miinb.server.encoders.windows import fitted
from miinb.server.encoders.words import TokenIds

#: Most characters of an answer's texts: each fill has the whole text with it.
MAX_CHARACTERS = 1 << 26
#: What a fill takes besides its text, in characters.
_FILL = 200


def prepare(asked: Asked, encodings: Sequence[Encoding | TokenIds]) -> Prepared:
    """See `Prepared`. Raises InvalidRequest, PromptTooLong, UnsupportedModel."""
    text, options = asked.text, asked.options
    mask = text.special_id("mask_token")
    if mask is None:
        raise UnsupportedModel("The model's tokenizer has no mask token, so there is nothing to fill.")
    sequences: list[Sequence[int]] = []
    masked: list[_Masked] = []
    wanted: list[int] = []
    at = 0
    for place, encoding in enumerate(encodings):
        whole = encoding.ids
        ids = fitted(whole, text, asked.limit, place=place, truncation=options["truncation"])
        found = [i for i, token in enumerate(ids) if token == mask]
        if not found:
            raise _no_mask(asked, place, cut=mask in whole)
        sequences.append(ids)
        masked.append(_Masked.of(text, ids, found))
        wanted += [at + i for i in found]
        at += len(ids)
    reduction: dict[str, Any] = {"top_k": min(options["top_k"], asked.info.vocab_size)}
    if options["targets"] is not None:
        targets = target_ids(asked)
        reduction = {"top_k": min(options["top_k"], len(targets)), "targets": targets}
    _check_size(asked, masked, reduction["top_k"])

    def finish(values: np.ndarray, ids: np.ndarray | None) -> Answers:
        if ids is None:  # targets in their order, or the whole vocabulary
            raise RequestError("The replica's answer lacks the tokens.")
        return Answers(_fills(text, masked, ids.tolist(), values.tolist()))

    def meanwhile() -> None:
        for one in masked:
            _ = one.variants.own

    return Prepared(sequences, finish, wanted=wanted, options=reduction, meanwhile=meanwhile)


def _check_size(asked: Asked, masked: Sequence[_Masked], top_k: int) -> None:
    """Refuse an answer that would fill the frontend's memory. Raises InvalidRequest."""
    (name,) = find_task(asked.info).inputs
    texts = zip(asked.inputs, masked, strict=True)
    size = sum(len(one.masks) * top_k * (len(values[name]) + _FILL) for values, one in texts)
    if size > MAX_CHARACTERS:
        fills = sum(len(one.masks) for one in masked) * top_k
        raise InvalidRequest(
            f"top_k: {fills} fills, each with its whole text, are about {size >> 20} MB.",
            hint=f"At most {MAX_CHARACTERS >> 20} MB are made at once: give a smaller top_k, or fewer masks in a call.",
        )


def _no_mask(asked: Asked, place: int, *, cut: bool) -> InvalidRequest:
    token = asked.text.specials["mask_token"]
    if cut:
        return InvalidRequest(f"inputs[{place}]: its mask token lies behind what truncation keeps.")
    return InvalidRequest(
        f"inputs[{place}]: it has no mask token.", hint=f"Write {token} in the place of the missing word."
    )


def target_ids(asked: Asked) -> list[int]:
    """Token ids of the option `targets`, each once.

    Raises:
        InvalidRequest: one is no text or not a single token. (transformers takes its first piece, and warns.)
    """
    tokenizer = asked.text.tokenizer
    given = asked.options["targets"]
    numbers: dict[str, int | None] = {}
    for target in [given] if isinstance(given, str) else given:
        if not isinstance(target, str) or not target:
            raise InvalidRequest(f"targets: {target!r:.60} is no text, or empty.")
        if target not in numbers:
            numbers[target] = tokenizer.token_to_id(target)
    others = [target for target, number in numbers.items() if number is None]
    unknown = asked.text.special_id("unk_token")
    for target, pieces in zip(others, tokenizer.encode_batch(others, add_special_tokens=False), strict=True):
        if pieces.ids == [unknown]:
            raise InvalidRequest(f"targets: the model has no token for {target!r:.60}.", hint="Give words that it has.")
        if len(pieces.ids) != 1:
            shown = ", ".join(repr(piece) for piece in pieces.tokens[:5]) or "none"
            raise InvalidRequest(
                f"targets: {target!r:.60} is not one token of this model but {len(pieces.ids)} ({shown}).",
                hint="Give words that are single tokens.",
            )
        numbers[target] = pieces.ids[0]
    found: dict[int, None] = {}
    for target, token in numbers.items():
        if token is None or token >= asked.info.vocab_size:
            raise InvalidRequest(f"targets: the model has no output for {target!r:.60}.")
        found[token] = None
    if not found:
        raise InvalidRequest("targets: there are none.", hint="Give a list of words, or leave it out.")
    return list(found)


@dataclass(slots=True)
class _Masked:
    """A text with masks.

    Attributes:
        variants: of its tokens without padding.
        masks: their places.
    """

    variants: Variants
    masks: list[int]

    @classmethod
    def of(cls, text: EncoderText, ids: Sequence[int], masks: list[int]) -> _Masked:
        """The text of one mask is plain; with several it shows the special tokens: the other masks are among them."""
        pad = text.special_id("pad_token")
        if pad in ids:
            before = list(accumulate((token == pad for token in ids), initial=0))  # pads before each place
            masks = [place - before[place] for place in masks]
            ids = [token for token in ids if token != pad]
        return cls(Variants(text, ids, skip_special_tokens=len(masks) == 1), masks)

    def changes(self, best: Iterable[Sequence[int]], pad: int | None) -> list[Change]:
        """Each mask's tokens in its place, mask by mask."""
        rows = zip(self.masks, best, strict=True)
        return [(place, None if token == pad else token) for place, tokens in rows for token in tokens]


def _fills(
    text: EncoderText, masked: Sequence[_Masked], tokens: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]
) -> list[list[Any]]:
    """One list of fills an input, or with several masks one list of such lists.

    Args:
        text: the tokenizer.
        masked: the inputs.
        tokens: the best of each mask.
        scores: theirs.
    """
    pad, rows = text.special_id("pad_token"), iter(tokens)
    asked = [(one.variants, one.changes(islice(rows, len(one.masks)), pad)) for one in masked]
    words = words_of(text, {token for best in tokens for token in best})
    best = iter(zip(tokens, scores, strict=True))
    answers: list[list[Any]] = []
    for one, texts in zip(masked, map(iter, texts_of(asked)), strict=True):
        fills = [
            [
                {"score": score, "token": token, "token_str": words[token], "sequence": next(texts)}
                for token, score in zip(*next(best), strict=True)
            ]
            for _ in one.masks
        ]
        answers.append(fills[0] if len(one.masks) == 1 else fills)
    return answers
