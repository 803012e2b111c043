"""Token ids of a text put together from those of its words, which a tokenizer has told before and are kept.

The library remembers no word of a WordPiece vocabulary, and makes of each text an object that knows where each token
came from: for a text of 128 tokens that takes ten times as long as looking its words up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from tokenizers import Tokenizer

#: White space that byte-level tokenizers make tokens of their own from, together with what stands around it.
_WHITE = re.compile(r"\s\s|[^\S ]")
#: Words that are kept; then it begins anew. Longer words than these characters are not kept.
MOST_WORDS = 1 << 16
LONGEST_WORD = 64


@dataclass(slots=True)
class TokenIds:
    """Of one text, special tokens included; what `tokenizers.Encoding` has besides is not known."""

    ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class _Known(dict[str, list[int]]):
    """The token ids of words, each behind `before`; those of a new word are asked for."""

    def __init__(self, tokenizer: Tokenizer, before: str) -> None:
        self._tokenizer = tokenizer
        self._before = before

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(self._before + word, add_special_tokens=False).ids
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


class Words:
    """The words of one tokenizer. For one thread.

    Args:
        tokenizer: gives the same tokens for a word wherever it stands between two spaces (`of` knows).
        prefix: token ids before a text.
        suffix: token ids behind it.
        keeps_spaces: the space before a word is a part of its tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, prefix: Sequence[int], suffix: Sequence[int], *, keeps_spaces: bool
    ) -> None:
        self._prefix, self._suffix = prefix, suffix
        self._keeps_spaces = keeps_spaces
        self._first = _Known(tokenizer, "")
        self._others = _Known(tokenizer, " ") if keeps_spaces else self._first

    @classmethod
    def of(cls, tokenizer: Tokenizer, prefix: Sequence[int], suffix: Sequence[int]) -> Words | None:
        """Of a tokenizer; None where what stands around a word may change its tokens."""
        model, normalizer, before = (
            type(part).__name__ for part in (tokenizer.model, tokenizer.normalizer, tokenizer.pre_tokenizer)
        )
        bert = (model, before) == ("WordPiece", "BertPreTokenizer") and normalizer in ("BertNormalizer", "NoneType")
        gpt2 = (model, normalizer, before) == ("BPE", "NoneType", "ByteLevel") and tokenizer.pre_tokenizer.use_regex
        if not (bert or gpt2):
            return None
        for token in tokenizer.get_added_tokens_decoder().values():
            if token.single_word or token.rstrip or (token.lstrip and bert) or not token.content.isprintable():
                return None
            if " " in token.content:
                return None
        return cls(tokenizer, prefix, suffix, keeps_spaces=gpt2)

    def tokens(self, text: str) -> TokenIds | None:
        """The tokens of a text; None: the tokenizer has to look at the whole.

        Raises:
            Exception: the tokenizer's, which cannot read a word.
        """
        if self._keeps_spaces and _WHITE.search(text):
            return None
        first, *others = text.split(" ")
        middle = chain.from_iterable(map(self._others.__getitem__, others))
        return TokenIds([*self._prefix, *self._first[first], *middle, *self._suffix])
