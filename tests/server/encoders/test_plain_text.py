"""Plain texts are tokenized without the normalizer, to the same tokens at the same places."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from miinb.server.encoders.plain_text import PlainText
from tests.tiny_tokenizers import encoder_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(str(encoder_tokenizer("bert", tmp_path_factory.mktemp("bert")) / "tokenizer.json"))


@pytest.mark.parametrize("lowercase", [True, False])
def test_tokens_and_offsets_are_those_of_the_whole_tokenizer(whole: Tokenizer, lowercase: bool) -> None:
    tokenizer = Tokenizer.from_str(whole.to_str())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    plain, draw = PlainText.of(tokenizer), random.Random(3)
    assert plain is not None
    words = ["One", "two", "THREE", "[MASK]", "[mask]", "[SEP][MASK]", "[PAD]x", "it's", " ", "x-Y.z", "", "[", "MASK]"]
    for _ in range(400):
        text = " ".join(draw.choices(words, k=draw.randrange(1, 9)))
        text += "".join(draw.choices(string.ascii_letters + string.digits + string.punctuation + "  ", k=8))
        other = "".join(draw.choices(string.printable[:95], k=12))
        normalized, second = plain.normalized(text), plain.normalized(other)
        assert normalized is not None
        assert second is not None
        for ours, theirs in (
            (plain.tokenizer.encode(normalized), tokenizer.encode(text)),
            (plain.tokenizer.encode(normalized, second), tokenizer.encode(text, other)),
        ):
            assert (ours.ids, ours.offsets, ours.type_ids) == (theirs.ids, theirs.offsets, theirs.type_ids)
            assert (ours.word_ids, ours.special_tokens_mask) == (theirs.word_ids, theirs.special_tokens_mask)


@pytest.mark.parametrize("text", ["naïve", "a\tb", "line\nend", "日本", "\x7f", "soft\u00adhyphen", "İ"])
def test_other_texts_are_not_plain(whole: Tokenizer, text: str) -> None:
    plain = PlainText.of(whole)
    assert plain is not None
    assert plain.normalized(text) is None


def test_tokenizers_that_it_could_get_wrong_are_left_alone(whole: Tokenizer, tmp_path: Path) -> None:
    small, folded, other, split = (Tokenizer.from_str(whole.to_str()) for _ in range(4))
    small.add_special_tokens(["<small>"])  # "<SMALL>" must not become it
    folded.add_tokens([AddedToken("FooBar", normalized=True)])
    other.normalizer = normalizers.NFC()
    split.encode_special_tokens = True  # its copy would find them
    assert [PlainText.of(tokenizer) for tokenizer in (small, folded, other, split)] == [None] * 4
    byte_level = Tokenizer.from_file(str(encoder_tokenizer("roberta", tmp_path) / "tokenizer.json"))
    assert PlainText.of(byte_level) is None
