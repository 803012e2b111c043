"""Texts put together from pieces equal those that the tokenizer decodes, whatever tokens stand beside one another."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from miinb.server.encoders.tokenization import EncoderText
from miinb.server.encoders.variants import Change, Variants, texts_of, words_of
from tests.tiny_tokenizers import encoder_tokenizer, sentence_piece


def end_of_word(folder: Path) -> Path:
    """Of a decoder that treats the last token differently: pieces do not tell its texts."""
    vocab = {text: number for number, text in enumerate(("a</w>", "b", "c</w>", "d", "e</w>", "<s>"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "bert": lambda folder: encoder_tokenizer("bert", folder),
    "roberta": lambda folder: encoder_tokenizer("roberta", folder),
    "xlm-roberta": lambda folder: encoder_tokenizer("xlm-roberta", folder),
    "byte fallback": sentence_piece,
    "end of word": end_of_word,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EncoderText]:
    return {kind: EncoderText.load(make(tmp_path_factory.mktemp("kind"))) for kind, make in MAKERS.items()}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", MAKERS)
def test_texts_are_those_of_the_decoder(texts: dict[str, EncoderText], kind: str, skip: bool) -> None:
    text, draw = texts[kind], random.Random(7)
    numbers = range(text.tokenizer.get_vocab_size())
    asked: list[tuple[Variants, list[Change]]] = []
    for _ in range(60):
        ids = draw.choices(numbers, k=draw.randint(1, 12))
        ids = [draw.choice([*text.special_ids]), *ids] if draw.random() < 0.5 else ids
        changes = [(draw.randrange(len(ids)), draw.choice([*numbers, None])) for _ in range(12)]
        asked.append((Variants(text, ids, skip_special_tokens=skip), changes))
    for (one, changes), made in zip(asked, texts_of(asked), strict=True):
        wanted = text.decode([one.sequence(change) for change in changes], skip_special_tokens=skip)
        assert made == wanted, (one.ids, changes, made, wanted)


@pytest.mark.parametrize("kind", MAKERS)
def test_words_are_those_of_the_decoder(texts: dict[str, EncoderText], kind: str) -> None:
    text = texts[kind]
    numbers = range(text.tokenizer.get_vocab_size())
    wanted = text.decode([[number] for number in numbers], skip_special_tokens=False)
    assert words_of(text, numbers) == dict(zip(numbers, wanted, strict=True))


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_a_text_with_many_masks_is_not_decoded_for_each_fill(
    texts: dict[str, EncoderText], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, decode, decoded = texts[kind], EncoderText.decode, 0

    def count(self: EncoderText, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        nonlocal decoded
        decoded += sum(map(len, sequences))
        return decode(self, sequences, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(EncoderText, "decode", count)
    ids = text.tokenizer.encode("one two three " * 50).ids
    changes: list[Change] = [(place, token) for place in range(1, len(ids) - 1) for token in ids[1:6]]
    texts_of([(Variants(text, ids, skip_special_tokens=False), changes)])
    assert decoded <= 2 * len(ids)
