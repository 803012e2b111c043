"""An encoder's tokenizer: token ids equal those of transformers' AutoTokenizer, off the event loop and batched."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from miinb.errors import InvalidRequest
from miinb.server.encoders.plain_text import PlainText
from miinb.server.encoders.words import TokenIds, Words
from miinb.server.text import cleaned, cleans_up, read_json, read_tokenizer, special_tokens

#: One text, or a pair.
Text = str | tuple[str, str]

#: Texts up to so many characters are tokenized in the event loop: to hand them to a thread takes longer (130 us) ...
INLINE_CHARACTERS = 150
#: ... and up to so many where no other request waits for the loop, or where their words suffice.
ALONE_CHARACTERS = 1500
#: Up to so many tokens become text without the pool of threads that the library keeps for a batch.
INLINE_TOKENS = 256
#: More than so many characters are a batch of their own: what comes meanwhile does not wait for them.
LARGE_CHARACTERS = 100_000
#: A limit above this is none: transformers writes 10 to the power of 30 for "not known".
NO_LIMIT = 1 << 30


class Piece(NamedTuple):
    """What a token adds to a text: as its first, and behind another."""

    first: str
    behind: str


class EncoderText:
    """The tokenizer of an encoder.

    Attributes:
        tokenizer: without truncation and padding; safe to use from several threads.
        max_length: most tokens of a sequence by the tokenizer's own word, or None.
        prefix: special tokens that go before a text.
        suffix: special tokens that go behind it.
        anchor: tokens of an ordinary text.
        special_ids: the special tokens'.
        specials: the special tokens' texts by name (mask_token, ...).
        question_first: in a pair of question and context.
        keep_end: of a text that is cut, the end is kept.
        has_types: the model is told the token types of a pair.
        pieces: of the tokens that have been asked for (`variants.pieces_of`).
        has_words: the tokenizer marks pieces inside a word ("##").
    """

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.specials = special_tokens(config)
        limit = config.get("model_max_length")
        self.max_length = int(limit) if isinstance(limit, (int, float)) and 0 < limit < NO_LIMIT else None
        self.question_first = config.get("padding_side") != "left"
        self.keep_end = config.get("truncation_side") == "left"
        self.has_types = "token_type_ids" in config.get("model_input_names", ())
        self.has_words = bool(getattr(tokenizer.model, "continuing_subword_prefix", None))
        vocab = tokenizer.get_vocab()
        self.prefix, self.anchor, self.suffix = _parts(tokenizer, vocab)
        self._plain = PlainText.of(tokenizer)
        self._words = Words.of(tokenizer, self.prefix, self.suffix)
        added_tokens = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added_tokens.items() if token.special)
        self._cleans = cleans_up(tokenizer, config)
        self.pieces: dict[int, Piece] = {}
        self._highest = max(vocab.values(), default=-1)  # ids may have gaps
        self._waiting: list[tuple[Sequence[Text], bool, asyncio.Future[list[Encoding]]]] = []
        self._task: asyncio.Task[None] | None = None  # tokenizes what waits; None: nothing does

    @classmethod
    def load(cls, folder: Path) -> EncoderText:
        """The tokenizer of a folder that rank 0 wrote."""
        config = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
        return cls(read_tokenizer(folder, config), config)

    def special_id(self, name: str) -> int | None:
        """The id of a special token such as "mask_token", if the model has it."""
        text = self.specials.get(name)
        return None if text is None else self.tokenizer.token_to_id(text)

    def may_exceed(self, vocab_size: int) -> bool:
        """Whether the tokenizer has tokens that a model of this vocabulary has not."""
        return self._highest >= vocab_size

    async def encode(
        self, texts: Sequence[Text], *, offsets: bool, alone: bool = False
    ) -> Sequence[Encoding] | Sequence[TokenIds]:
        """Tokens of texts, special ones included.

        Long texts run in a thread, one batch after another: what comes meanwhile is the next batch.

        Args:
            texts: texts or pairs.
            offsets: of the tokens in the text are needed, and all else that an `Encoding` has.
            alone: no other request is being served.
        """
        size = sum(len(text) if isinstance(text, str) else len(text[0]) + len(text[1]) for text in texts)
        if not offsets and size <= ALONE_CHARACTERS and (quick := self._from_words(texts)) is not None:
            return quick
        if size <= (ALONE_CHARACTERS if alone else INLINE_CHARACTERS):
            return self._encode(texts, offsets)
        if size > LARGE_CHARACTERS:
            return await asyncio.to_thread(self._encode, texts, offsets)
        done: asyncio.Future[list[Encoding]] = asyncio.get_running_loop().create_future()
        self._waiting.append((texts, offsets, done))
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())
        return await done

    def _from_words(self, texts: Sequence[Text]) -> list[TokenIds] | None:
        """The tokens of texts whose words suffice; None: some text has to be tokenized as a whole."""
        if self._words is None:
            return None
        found = []
        try:
            for text in texts:
                tokens = self._words.tokens(text) if isinstance(text, str) else None
                if tokens is None:
                    return None
                found.append(tokens)
        except Exception:  # who tokenizes the whole says why it cannot be read
            return None
        return found

    async def _run(self) -> None:
        """Tokenize what waits, batch after batch, until nothing does.

        That nobody tokenizes any more is said before this ends: its task counts as done only later, and who came in
        between would wait for ever.
        """
        try:
            await self._run_batches()
        finally:
            self._task = None

    async def _run_batches(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            texts = [text for some, _, _ in batch for text in some]
            found: list[Encoding | Exception]
            try:
                found = [*await asyncio.to_thread(self._encode, texts, any(offsets for _, offsets, _ in batch))]
            except Exception:  # a text that the tokenizer cannot read fails alone
                found = await asyncio.to_thread(self._encode_each, texts)
            at = 0
            for some, _, done in batch:
                mine = found[at : at + len(some)]
                at += len(some)
                if done.done():  # canceled meanwhile
                    continue
                if failed := [error for error in mine if isinstance(error, Exception)]:
                    done.set_exception(failed[0])
                else:
                    done.set_result(mine)  # type: ignore[arg-type]  # no errors among them

    def _encode_each(self, texts: Sequence[Text]) -> list[Encoding | Exception]:
        found: list[Encoding | Exception] = []
        for text in texts:
            try:
                found += self._encode([text], True)
            except Exception as error:
                found.append(error)
        return found

    def _encode(self, texts: Sequence[Text], offsets: bool) -> list[Encoding]:
        tokenizer, texts = self._quickest(texts)
        try:
            if not offsets:  # a fifth less time
                return tokenizer.encode_batch_fast(texts)
            if len(texts) > 1:
                return tokenizer.encode_batch(texts)
            (text,) = texts  # in this thread: a batch would go through the library's pool
            return [tokenizer.encode(text) if isinstance(text, str) else tokenizer.encode(*text)]
        except Exception as error:  # the library raises a bare Exception
            raise InvalidRequest(f"inputs: the model's tokenizer cannot read this text ({error}).") from None

    def _quickest(self, texts: Sequence[Text]) -> tuple[Tokenizer, list[Text]]:
        """A tokenizer that gives the right tokens of these texts, and the texts as it takes them."""
        if self._plain is None:
            return self.tokenizer, list(texts)
        normalized = self._plain.normalized
        found: list[Text] = []
        for text in texts:
            parts = [normalized(part) for part in ([text] if isinstance(text, str) else text)]
            if None in parts:
                return self.tokenizer, list(texts)
            found.append(parts[0] if len(parts) == 1 else (parts[0], parts[1]))  # type: ignore[arg-type]
        return self._plain.tokenizer, found

    def decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        """Texts of token ids, as transformers' tokenizer gives them."""
        return [self.cleaned(text) for text in self.decode_as_is(sequences, skip_special_tokens=skip_special_tokens)]

    def decode_as_is(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        """Texts of token ids, as the tokenizer's decoder gives them."""
        if len(sequences) == 1 or sum(map(len, sequences)) <= INLINE_TOKENS:
            return [self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]
        return list(self.tokenizer.decode_batch(sequences, skip_special_tokens=skip_special_tokens))

    def cleaned(self, text: str) -> str:
        """What `decode` makes of the text that the tokenizer's decoder gives."""
        return cleaned(text) if self._cleans else text

    def join(self, tokens: Sequence[str]) -> str:
        """Tokens as one text, as the tokenizer's decoder joins them."""
        decoder = self.tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))


def _parts(tokenizer: Tokenizer, vocab: Iterable[str]) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before a text, the tokens of some ordinary text, and the special tokens behind it.

    Not every tokenizer has a token for "a" (of a DNA, say): then its own words are tried.
    """
    for word in chain(("a",), vocab):
        probe = tokenizer.encode(word)
        added = probe.special_tokens_mask
        if 0 in added:
            begin, end = added.index(0), len(added) - added[::-1].index(0)
            return probe.ids[:begin], probe.ids[begin:end], probe.ids[end:]
    return tokenizer.encode("").ids, [], []
