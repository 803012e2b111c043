"""A text's tokens put together from its words are those that the tokenizer gives for the whole."""

from __future__ import annotations

import asyncio
import random
import string

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from miinb.errors import InvalidRequest
from miinb.server.encoders import words
from miinb.server.encoders.tokenization import ALONE_CHARACTERS, EncoderText
from miinb.server.encoders.words import Words
from tests.tiny_tokenizers import encoder_tokenizer

PIECES = [
    "One",
    "two",
    "THREE",
    "naïve",
    "日本語",
    "e\u0301te\u0301",
    "it's",
    "'s",
    "--x",
    "",
    "x-Y.z",
    "4,5",
    "ſ",
    "ΟΔΟΣ",
]
SPACES = ["\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\x1c", "\u2028", "\x85", "\ufeff"]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EncoderText:
    return EncoderText.load(encoder_tokenizer(request.param, tmp_path_factory.mktemp(request.param)))


def drawn(draw: random.Random, specials: list[str]) -> str:
    kinds = [PIECES, SPACES, specials, list(string.printable)]
    parts = [draw.choice(draw.choices(kinds, [6, 1, 1, 2])[0]) for _ in range(draw.randrange(1, 12))]
    return "".join(part + draw.choice(["", " ", " ", " ", "  "]) for part in parts)


def test_tokens_are_those_of_the_whole_text(text: EncoderText) -> None:
    quick, draw = Words.of(text.tokenizer, text.prefix, text.suffix), random.Random(5)
    assert quick is not None
    told = 0
    for _ in range(3000):
        given = drawn(draw, list(text.specials.values()))
        found = quick.tokens(given)
        told += found is not None
        assert found is None or found.ids == text.tokenizer.encode(given).ids, repr(given)
    assert told > 500


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [True, False, None])
def test_any_bert_normalizer(text: EncoderText, lowercase: bool, strip_accents: bool | None) -> None:
    if type(text.tokenizer.normalizer).__name__ != "BertNormalizer":
        pytest.skip("another family")
    tokenizer, draw = Tokenizer.from_str(text.tokenizer.to_str()), random.Random(6)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.add_tokens([AddedToken("FooBar", normalized=True), AddedToken("x-Y", normalized=False)])
    quick = Words.of(tokenizer, text.prefix, text.suffix)
    assert quick is not None
    for _ in range(1000):
        given = drawn(draw, ["FooBar", "foobar", "x-Y", "[MASK]"])
        found = quick.tokens(given)
        assert found is not None
        assert found.ids == tokenizer.encode(given).ids, repr(given)


def test_what_stands_around_a_word_may_matter(text: EncoderText) -> None:
    def changed(token: AddedToken | None = None, **parts: object) -> Words | None:
        tokenizer = Tokenizer.from_str(text.tokenizer.to_str())
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        if token is not None:
            tokenizer.add_tokens([token])
        return Words.of(tokenizer, text.prefix, text.suffix)

    assert changed() is not None
    assert changed(AddedToken("New York")) is None
    assert changed(AddedToken("York", single_word=True)) is None
    assert changed(AddedToken("York", rstrip=True)) is None
    assert changed(normalizer=normalizers.Strip()) is None
    assert changed(pre_tokenizer=pre_tokenizers.Metaspace()) is None
    assert changed(pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False)) is None


@pytest.mark.parametrize("given", ["one\n <mask> two", "\n \t<mask>", " \xa0 \xa0", "one\u2028 two", "one \n two"])
def test_white_space_that_a_token_takes_with_it_is_looked_at_as_a_whole(text: EncoderText, given: str) -> None:
    quick = Words.of(text.tokenizer, text.prefix, text.suffix)
    assert quick is not None
    found = quick.tokens(given)
    assert (found is None) == ("<mask>" in text.tokenizer.get_vocab())


def test_few_words_are_kept(text: EncoderText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 5)
    quick = Words.of(text.tokenizer, text.prefix, text.suffix)
    assert quick is not None
    for given in ("a b c d e f g h", "h g f e d c b a", "long" * 40 + " a"):
        found = quick.tokens(given)
        assert found is not None
        assert found.ids == text.tokenizer.encode(given).ids
        assert len(quick._others) <= 5
    assert "long" * 40 not in quick._first


def test_short_texts_are_made_of_words_and_others_as_a_whole(text: EncoderText) -> None:
    short, many = ["one two", "two  one"], ["one two"] * ALONE_CHARACTERS
    for texts in (short, many, [("one", "two")]):
        for offsets in (True, False):
            found = asyncio.run(text.encode(texts, offsets=offsets))
            assert [one.ids for one in found] == [one.ids for one in text.tokenizer.encode_batch(texts)]
            assert not offsets or found[0].offsets  # type: ignore[union-attr]  # an Encoding


def test_what_cannot_be_read_is_said_in_words(text: EncoderText) -> None:
    with pytest.raises(InvalidRequest, match="cannot read"):
        asyncio.run(text.encode(["one \ud800 two"], offsets=False))
