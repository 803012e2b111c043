"""A quicker way for plain text: what BERT's normalizer does to most characters, it need not do to printable ASCII.

It takes away control characters and accents, sets CJK characters apart and, with most models, makes letters small: of
printable ASCII only the last is left, and takes the normalizer, which keeps where each character came from, nearly half
of a tokenizer's time. Small letters stand where the large ones stood, so that offsets are the same.
"""

from __future__ import annotations

import json
import re

from tokenizers import Tokenizer


class PlainText:
    """A tokenizer for plain texts, which gives what the whole one gives.

    Attributes:
        tokenizer: without the normalizer.
    """

    def __init__(self, tokenizer: Tokenizer, *, lowercase: bool, tokens: list[str]) -> None:
        self.tokenizer = tokenizer
        self._lowercase = lowercase
        longest_first = sorted(tokens, key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if tokens else None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> PlainText | None:
        """Of a tokenizer; None where it has no such normalizer, or added tokens that this way could miss or invent."""
        if type(tokenizer.normalizer).__name__ != "BertNormalizer":
            return None  # before a vocabulary of any size is written out
        if tokenizer.encode_special_tokens:
            return None
        values = json.loads(tokenizer.to_str())
        added, lowercase = values["added_tokens"], bool(values["normalizer"]["lowercase"])
        tokens = [token["content"] for token in added]
        if any(token["normalized"] for token in added):
            return None
        if lowercase and any(token == token.lower() for token in tokens):
            return None
        plain = Tokenizer.from_str(json.dumps({**values, "normalizer": None}))
        return cls(plain, lowercase=lowercase, tokens=tokens)

    def normalized(self, text: str) -> str | None:
        """What the normalizer makes of a text, added tokens as they are; None: the text is not plain."""
        if not (text.isascii() and text.isprintable()):
            return None
        if not self._lowercase:
            return text
        if self._tokens is None:
            return text.lower()
        parts = self._tokens.split(text)
        if len(parts) == 1:
            return text.lower()
        parts[::2] = [part.lower() for part in parts[::2]]  # those between are the tokens
        return "".join(parts)
