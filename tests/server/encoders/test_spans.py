"""Spans of answers against a plain, slow reference: every pair of tokens of every window, in Python."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from miinb.errors import InvalidRequest, PromptTooLong
from miinb.server.encoders.request import Asked
from tests.server.encoders.by_model import ask, prepare
from tests.tiny_tokenizers import encoder_tokenizer

KINDS = ("bert", "roberta", "xlm-roberta")
CONTEXT = (
    "Once upon a time there was a naïve little fox — in London — who liked to count: one, two, three. 日本語 😀 end"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: encoder_tokenizer(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def question(folder: Path, context: str = CONTEXT, text: str = "who counts?", **options: Any) -> Asked:
    limit = options.pop("limit", 512)
    return ask(
        folder, "question-answering", [{"question": text, "context": context}], info={"max_length": limit}, **options
    )


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def slow(asked: Asked, logits: np.ndarray) -> list[dict[str, Any]]:
    """The answers to the one input, by trying every pair; windows and words by the tokenizers library's own calls."""
    options, tokenizer = asked.options, asked.text.tokenizer
    (row,) = asked.inputs
    whole = tokenizer.encode(row["question"], row["context"])
    limit = options["max_seq_len"] or min(384, asked.limit)
    stride = min(128, limit // 2) if options["doc_stride"] is None else options["doc_stride"]
    tokenizer.enable_truncation(limit, stride=stride, strategy="only_second")
    first = tokenizer.encode(row["question"], row["context"])
    tokenizer.no_truncation()
    best: dict[tuple[int, int], float] = {}
    nothing = 1.0
    at = 0
    for window in [first, *first.overflowing]:
        places = [i for i, side in enumerate(window.sequence_ids) if side == 1]
        of_start, of_end = ([float(logits[at + i, column]) for i in [0, *places]] for column in (0, 1))
        at += len(window.ids)
        starts, ends = softmax(of_start), softmax(of_end)
        nothing = min(nothing, starts[0] * ends[0])
        for i, one in enumerate(places):
            for j in range(i, min(i + options["max_answer_len"], len(places))):
                span = (window.offsets[one][0], window.offsets[places[j]][1])
                if options["align_to_words"]:  # whole words, also those that a window's edge cuts
                    span = (
                        whole.word_to_chars(window.word_ids[one], 1)[0],
                        whole.word_to_chars(window.word_ids[places[j]], 1)[1],
                    )
                best[span] = max(best.get(span, 0.0), starts[i + 1] * ends[j + 1])
    found = [
        {"score": score, "start": span[0], "end": span[1], "answer": row["context"][span[0] : span[1]]}
        for span, score in best.items()
    ]
    if options["handle_impossible_answer"]:
        found.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
    return sorted(found, key=lambda one: -one["score"])[: options["top_k"]]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_every_pair_tried(folders: dict[str, Path], kind: str) -> None:
    generator = np.random.default_rng(0)
    for case in range(12):
        asked = question(
            folders[kind],
            CONTEXT * (1 + case % 3),
            top_k=(1, 3, 40)[case % 3],
            doc_stride=(None, 3, 0, 16)[case // 3 % 4],
            max_seq_len=(48, 64, 500)[case // 2 % 3],
            max_answer_len=(1, 4, 15, 200)[case % 4],
            handle_impossible_answer=case % 5 == 0,
            align_to_words=case % 2 == 0,
        )
        prepared = prepare(asked)
        logits = generator.normal(scale=4, size=(sum(map(len, prepared.sequences)), 2)).astype(np.float32)
        (ours,) = prepared.finish(logits, None).outputs
        theirs = slow(asked, logits)
        assert [{**one, "score": 0} for one in ours] == [{**one, "score": 0} for one in theirs]
        assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], rel=1e-6)


def test_no_answer_where_the_first_token_is_likelier(folders: dict[str, Path]) -> None:
    asked = question(folders["bert"], "one two", handle_impossible_answer=True)
    prepared = prepare(asked)
    logits = np.zeros((len(prepared.sequences[0]), 2), np.float32)
    logits[0] = 9
    (best,) = prepared.finish(logits, None).outputs[0]
    assert (best["start"], best["end"], best["answer"]) == (0, 0, "")
    assert best["score"] == pytest.approx(1.0, abs=2e-2)


def test_each_of_several_inputs_has_its_own_windows(folders: dict[str, Path]) -> None:
    rows = [{"question": "who?", "context": text} for text in (CONTEXT, "one", CONTEXT[::-1])]
    asked = ask(folders["roberta"], "question-answering", rows, max_seq_len=40, doc_stride=5, top_k=2)
    generator = np.random.default_rng(1)
    prepared = prepare(asked)
    logits = generator.normal(scale=4, size=(sum(map(len, prepared.sequences)), 2)).astype(np.float32)
    together = prepared.finish(logits, None).outputs
    at = 0
    for row, answers in zip(rows, together, strict=True):
        alone = prepare(ask(folders["roberta"], "question-answering", [row], max_seq_len=40, doc_stride=5, top_k=2))
        size = sum(map(len, alone.sequences))
        assert alone.finish(logits[at : at + size], None).outputs == [answers]
        at += size


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"context": "  "}, InvalidRequest, r"inputs\[0\]: the context has no tokens"),
        ({"text": "who " * 70, "limit": 64}, PromptTooLong, r"inputs\[0\]: the question's .*max_question_len"),
        ({"max_seq_len": 600}, InvalidRequest, "max_seq_len: 600 is above the 512 tokens"),
        ({"max_seq_len": 24, "doc_stride": 23}, InvalidRequest, "doc_stride: 23 is not below"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(
    folders: dict[str, Path], options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error) as caught:
        prepare(question(folders["bert"], **options))
    assert re.search(named, str(caught.value))


def test_a_question_is_cut_when_asked_for(folders: dict[str, Path]) -> None:
    asked = question(folders["bert"], "one two", text="who " * 70, limit=64, max_question_len=8)
    (ids,) = prepare(asked).sequences
    assert len(ids) == 8 + 3 + len(asked.text.tokenizer.encode("one two", add_special_tokens=False).ids)


@pytest.mark.parametrize("names", [None, ["input_ids", "token_type_ids"], ["input_ids", "attention_mask"]])
def test_token_types_are_sent_where_the_tokenizer_makes_them(tmp_path: Path, names: list[str] | None) -> None:
    folder = encoder_tokenizer("bert", tmp_path / "bert")
    file = folder / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "model_input_names"}
    file.write_text(json.dumps(config if names is None else config | {"model_input_names": names}))
    types = prepare(question(folder)).type_ids
    told = PreTrainedTokenizerFast.from_pretrained(folder)("who counts?", CONTEXT)  # the class of no family
    assert ([*types] or None) == told.get("token_type_ids")
