"""What encoders' requests hold at their edges: alphabets, unknown words, and answers larger than what asks for them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from miinb.errors import InvalidRequest
from miinb.messages import EngineInfo, Plan
from miinb.server.encoders import masks
from miinb.server.encoders.request import Asked, checked_options, find_task
from miinb.server.encoders.tokenization import EncoderText
from tests.tiny_tokenizers import encoder_tokenizer


def alphabet(folder: Path, letters: str, *, special: bool = True) -> EncoderText:
    """A tokenizer that has tokens for these letters alone, and none for what it does not know."""
    names = ["[CLS]", "[SEP]", "[PAD]"]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate([*names, *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(names)
    if special:
        pair = [("[CLS]", 0), ("[SEP]", 1)]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", pair)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return EncoderText.load(folder)


def asked(folder: Path, inputs: list[str], **options: Any) -> Asked:
    text = EncoderText.load(folder)
    info = EngineInfo(0, "m", "fill-mask", "o", "fp32", "cpu", 160, 128, 8, (), "", Plan("o", "cpu", "fp32"))
    task = find_task(info)
    return Asked([{"query": one} for one in inputs], checked_options(options, task), text, info)


def test_special_tokens_are_found_where_a_is_no_token(tmp_path: Path) -> None:
    text = alphabet(tmp_path, "CGT")
    assert (text.prefix, text.suffix, len(text.anchor)) == ([0], [1], 1)


def test_a_tokenizer_without_special_tokens_has_none(tmp_path: Path) -> None:
    text = alphabet(tmp_path, "CGT", special=False)
    assert (text.prefix, text.suffix, len(text.anchor)) == ([], [], 1)


def test_a_target_that_the_model_lacks_is_not_its_unknown_token(tmp_path: Path) -> None:
    folder = encoder_tokenizer("bert", tmp_path)
    with pytest.raises(InvalidRequest, match="no token for 'ꙮ'"):
        masks.target_ids(asked(folder, ["[MASK]"], targets=["on", "ꙮ"]))
    assert len(masks.target_ids(asked(folder, ["[MASK]"], targets=["[UNK]"]))) == 1


def test_the_pieces_of_a_target_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"not one token of this model but \d+ \('\w"):
        masks.target_ids(asked(encoder_tokenizer("bert", tmp_path), ["[MASK]"], targets=["onetwothree"]))


def test_fills_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    folder = encoder_tokenizer("bert", tmp_path)
    few, many = ["the [MASK]"], ["[MASK]" * 126] * 20
    for inputs in (few, many):
        request = asked(folder, inputs, top_k=160)
        encodings = [request.text.tokenizer.encode(one) for one in inputs]
        if inputs is few:
            masks.prepare(request, encodings)
            continue
        with pytest.raises(InvalidRequest, match=r"top_k: \d+ fills, each with its whole text") as caught:
            masks.prepare(request, encodings)
        assert "smaller top_k" in caught.value.hint


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_a_tokenizer_may_split_special_tokens(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    folder = encoder_tokenizer(kind, tmp_path)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"split_special_tokens": True}))
    text, reference = EncoderText.load(folder), AutoTokenizer.from_pretrained(folder)
    inputs = ["once [MASK] upon <mask> a</s>time", "one[SEP]two"]
    for offsets in (False, True):
        encoded = asyncio.run(text.encode(inputs, offsets=offsets, alone=True))
        assert [list(one.ids) for one in encoded] == reference(inputs).input_ids
