"""Text: equal to transformers', no split character, no stop string shown."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miinb.errors import InvalidRequest, PromptTooLong
from miinb.server.text import Cleaner, StopFinder, TextCodec, cleaned
from tests.tiny_tokenizers import TEXT, byte_level, sentence_piece

TEXTS = ["Once upon a time", "", " ", "日本語 😀 café\n\n", "a<s>b</s><|user|>", "\x00\t", "x" * 3000, *TEXT[:3]]
CHATS = [
    [{"role": "user", "content": " Hi <s> "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "x"},
    ],
]


def make(folder: Path, kind: str) -> Path:
    return sentence_piece(folder) if kind == "sentence piece" else byte_level(folder, bos=kind == "bos")


@pytest.fixture(scope="module", params=["byte level", "bos", "sentence piece"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextCodec, Any]:
    from transformers import AutoTokenizer

    folder = make(tmp_path_factory.mktemp("tokenizer"), request.param)
    return TextCodec.load(folder), AutoTokenizer.from_pretrained(folder)


def test_token_ids_equal_transformers(pair: tuple[TextCodec, Any]) -> None:
    codec, reference = pair
    for text in TEXTS:
        assert codec.encode(text) == reference(text).input_ids
        assert codec.encode(text, add_special_tokens=False) == reference(text, add_special_tokens=False).input_ids


def test_texts_of_single_tokens_make_the_whole(pair: tuple[TextCodec, Any]) -> None:
    codec, _ = pair
    ids = codec.encode("a little fox, who liked", add_special_tokens=False)
    for _ in range(2):
        assert "".join(map(codec.token_text, ids)).lstrip() == "a little fox, who liked"
    assert codec.token_text(1) in ("<s>", "</s>")
    assert codec.token_text(1 << 30) == ""


def test_chats_equal_transformers(pair: tuple[TextCodec, Any]) -> None:
    codec, reference = pair
    if reference.chat_template is None:
        with pytest.raises(InvalidRequest, match="no chat template"):
            codec.render_chat(CHATS[0])
        return
    for messages in CHATS:
        text = codec.render_chat(messages)
        assert text == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert codec.encode(text, add_special_tokens=False) == ids
    with pytest.raises(InvalidRequest, match="no tools"):
        codec.render_chat([{"role": "tool", "content": ""}])


def test_detokenized_pieces_equal_the_whole(pair: tuple[TextCodec, Any]) -> None:
    codec, reference = pair
    draw = random.Random(0)
    for _ in range(60):
        prompt = codec.encode(draw.choice(TEXTS[:1] + TEXT))
        ids = [draw.randrange(len(reference)) for _ in range(draw.randrange(1, 40))]
        if draw.random() < 0.5:
            ids = codec.encode(draw.choice(TEXTS), add_special_tokens=False)[: draw.randrange(1, 60)]
        detokenizer = codec.detokenizer(prompt)
        pieces = []
        at = 0
        while at < len(ids):
            size = draw.randrange(1, 4)
            pieces.append(detokenizer.add(ids[at : at + size]))
            at += size
        pieces.append(detokenizer.finish())
        whole = reference.decode(prompt + ids, skip_special_tokens=True)
        assert reference.decode(prompt, skip_special_tokens=True) + "".join(pieces) == whole


def test_characters_of_several_tokens_come_whole_behind_any_prompt_and_in_pieces_of_any_size(
    pair: tuple[TextCodec, Any],
) -> None:
    codec, reference = pair
    draw = random.Random(1)
    for _ in range(300):
        prompt, answer = ("".join(draw.choices("中文字é👩👧 \u200da", k=draw.randrange(1, 12))) for _ in range(2))
        context, ids = codec.encode("café" + prompt), codec.encode(answer + " ok", add_special_tokens=False)
        detokenizer = codec.detokenizer(context)
        pieces, at = [], 0
        while at < len(ids):
            size = draw.choice((1, 2, 17, 18, 19, 40))
            pieces.append(detokenizer.add(ids[at : at + size]))
            at += size
        pieces.append(detokenizer.finish())
        before = reference.decode(context, skip_special_tokens=True)
        assert before + "".join(pieces) == reference.decode(context + ids, skip_special_tokens=True)
        assert not any("�" in piece for piece in pieces)


def spaced(folder: Path, kind: str) -> Path:
    """A tokenizer whose texts have spaces that the clean-up takes away."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["hello", "world", "do", "n", "n't", "'", "m", "'s", "'re", "'v", "e", "t", ",", ".", "?", "!", "<unk>"]
    if kind == "word level":
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        pieces = [*(f"▁{word}" for word in words), "▁", *words]
        tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=len(pieces) - 1))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=True)
    made.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("kind", ["word level", "unigram"])
def test_pieces_are_cleaned_up_as_the_whole(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    folder = spaced(tmp_path, kind)
    codec, reference = TextCodec.load(folder), AutoTokenizer.from_pretrained(folder)
    start = codec.encode("hello world")
    before = reference.decode(start)
    detokenizer = codec.detokenizer(start)
    shown = [detokenizer.add([one]) for one in codec.encode("hello , world . do n't")]
    assert before + "".join(shown) + detokenizer.finish() == "hello world hello, world. don't"
    draw = random.Random(2)
    for _ in range(500):
        ids = [draw.randrange(len(reference)) for _ in range(draw.randrange(1, 30))]
        detokenizer, pieces, at = codec.detokenizer(start), [], 0
        while at < len(ids):
            size = draw.randrange(1, 4)
            pieces.append(detokenizer.add(ids[at : at + size]))
            at += size
        pieces.append(detokenizer.finish())
        assert before + "".join(pieces) == reference.decode(start + ids, skip_special_tokens=True)


@given(st.lists(st.sampled_from([*" 'ntmsvre.,?!ax", "n't", " n", " '", " ' ", "'s", "  "]), max_size=20))
def test_a_text_is_cleaned_up_in_any_pieces(pieces: list[str]) -> None:
    cleaner = Cleaner()
    assert "".join(map(cleaner.add, pieces)) + cleaner.finish() == cleaned("".join(pieces))


def test_an_ordinary_text_is_not_held_back() -> None:
    cleaner = Cleaner()
    assert [cleaner.add(piece) for piece in ("Hello", " world", " .", " No", " n", "ever")] == [
        *("Hello", " world", "", ". No", "", " never")
    ]


def test_no_piece_ends_inside_a_character(tmp_path: Path) -> None:
    codec = TextCodec.load(byte_level(tmp_path))
    text = "日本語😀é" * 5
    detokenizer = codec.detokenizer([])
    pieces = [detokenizer.add([token]) for token in codec.encode(text)] + [detokenizer.finish()]
    assert "".join(pieces) == text
    assert all("�" not in piece for piece in pieces)


def test_broken_characters_come_out_and_do_not_pile_up(tmp_path: Path) -> None:
    codec = TextCodec.load(byte_level(tmp_path))
    half = codec.encode("日")[:1]
    detokenizer = codec.detokenizer([])
    assert detokenizer.add(half) == ""
    assert detokenizer.finish() == "�"
    detokenizer = codec.detokenizer([])
    shown = [detokenizer.add(half) for _ in range(100)]
    assert "".join(shown) + detokenizer.finish() == "�" * 100
    assert max(map(len, shown)) < 40


def test_a_text_too_long_is_refused_before_the_tokenizer_runs(tmp_path: Path) -> None:
    codec = TextCodec.load(byte_level(tmp_path))
    with pytest.raises(PromptTooLong):
        codec.encode("a" * 10_000_000, max_tokens=10)


@pytest.mark.parametrize(
    "attack",
    ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ ''.__class__ }}", "{{ 1/0 }}", "{{ x.y.z }}"],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, attack: str) -> None:
    from tokenizers import Tokenizer, models

    codec = TextCodec(Tokenizer(models.BPE()), attack, {})
    shown = ""  # jinja2 refuses, or shows what it must not touch as nothing
    with contextlib.suppress(InvalidRequest):
        shown = codec.render_chat(CHATS[0])
    assert shown == ""


STOP_ALPHABET = "ab\n"


@given(
    st.lists(st.text(STOP_ALPHABET, max_size=4), max_size=12),
    st.lists(st.text(STOP_ALPHABET, min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_across_any_borders(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    shown, whole, found = "", "", False
    for piece in pieces:
        whole += piece
        text, found = finder.add(piece)
        shown += text
        if found:
            break
        assert not any(stop in shown for stop in stops)
    if not found:
        shown += finder.finish()
    cuts = [whole.find(stop) for stop in stops if stop in whole]
    assert shown == (whole[: min(cuts)] if cuts else whole)
    assert found == bool(cuts)


def test_text_without_a_stop_string_is_shown_at_once() -> None:
    finder = StopFinder(["END"])
    assert [finder.add(piece) for piece in ("abc", "E", "N", "x")] == [
        ("abc", False),
        ("", False),
        ("", False),
        ("ENx", False),
    ]
