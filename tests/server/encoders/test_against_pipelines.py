"""Answers equal those of transformers' pipelines: three kinds of tokenizers, every option, logits of tiny models."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from miinb.errors import InvalidRequest
from miinb.server.encoders.tokenization import EncoderText
from miinb.server.prediction import _checked
from tests.server.encoders.by_model import answers, ask, prepare
from tests.server.encoders.tiny import Tiny, same
from tests.tiny_tokenizers import encoder_tokenizer

KINDS = ("bert", "roberta", "xlm-roberta")
TEXTS = [
    "Once upon a time there was a little fox in London.",
    "The café was closed — naïve visitors waited. 日本語 текст 😀 Zürich",
    "one",
    "  def main(): return   {'a': 1}\n fox, fox  (two)three",
]
NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC-X")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: encoder_tokenizer(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def tiny(folders: dict[str, Path]) -> Callable[..., Tiny]:
    """Makes each tiny model once."""

    @functools.cache
    def make(kind: str, head: str, names: tuple[str, ...] = ()) -> Tiny:
        return Tiny(folders[kind], kind, head, names)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_those_of_auto_tokenizer(folders: dict[str, Path], kind: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    mask = tokenizer.mask_token
    texts = [*TEXTS, f"a {mask} b{mask} c", f"{mask}{tokenizer.sep_token} x {tokenizer.cls_token}", "\t a\u00a0b  "]
    prepared = prepare(ask(folders[kind], "feature-extraction", list(texts), info={"max_length": 512}))
    assert [list(ids) for ids in prepared.sequences] == tokenizer(texts)["input_ids"]
    pairs = [(one, other) for one in texts[:3] for other in texts[1:4]]
    inputs = [{"question": one, "context": other} for one, other in pairs]
    prepared = prepare(ask(folders[kind], "question-answering", inputs, info={"max_length": 512}))
    theirs = tokenizer([one for one, _ in pairs], [other for _, other in pairs])
    assert [list(ids) for ids in prepared.sequences] == theirs["input_ids"]
    if "token_type_ids" in theirs:
        assert list(prepared.type_ids) == [one for row in theirs["token_type_ids"] for one in row]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_truncation_keeps_what_transformers_keeps(tmp_path: Path, kind: str, side: str) -> None:
    folder = encoder_tokenizer(kind, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, truncation_side=side, model_max_length=20)
    tokenizer.save_pretrained(folder)
    prepared = prepare(ask(folder, "feature-extraction", [" ".join(TEXTS), "one"], truncation=True))
    theirs = tokenizer([" ".join(TEXTS), "one"], truncation=True)["input_ids"]
    assert [list(ids) for ids in prepared.sequences] == theirs
    assert len(theirs[0]) == 20


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": None}, {"top_k": 1, "function_to_apply": "sigmoid"},
                                     {"function_to_apply": "none", "top_k": None}])  # fmt: skip
def test_labels(tiny: Callable[..., Tiny], options: dict[str, Any]) -> None:
    names = ("bad", "fair", "good")
    model = tiny("bert", "ForSequenceClassification", names)
    theirs = model.pipeline("text-classification")(TEXTS, **options)
    theirs = [one if isinstance(one, list) else [one] for one in theirs]
    same(answers(model.ask("text-classification", TEXTS, names, **options), model.model).outputs, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"ignore_labels": []}, {"ignore_labels": ["O", "PER", "I-LOC"], "aggregation_strategy": "simple"}]
    + [{"aggregation_strategy": how, "ignore_labels": []} for how in ("simple", "first", "average", "max")],
)  # fmt: skip
def test_entities(tiny: Callable[..., Tiny], kind: str, options: dict[str, Any]) -> None:
    model = tiny(kind, "ForTokenClassification", NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "Tokenizer does not support real words"
        theirs = model.pipeline("token-classification")(TEXTS, **options)
    assert sum(map(len, theirs)) > 10
    same(answers(model.ask("token-classification", TEXTS, NAMES, **options), model.model).outputs, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
def test_entities_in_windows(tiny: Callable[..., Tiny], kind: str, strategy: str) -> None:
    model = tiny(kind, "ForTokenClassification", NAMES)
    texts = [" ".join(TEXTS * 2), "one", " ".join(TEXTS[::-1])]
    pipeline = model.pipeline("token-classification")
    for stride in (0, 7, 40):
        options: dict[str, Any] = {"aggregation_strategy": strategy, "stride": stride, "ignore_labels": ["PER"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            theirs = [pipeline(text, **options) for text in texts]
        for entities in theirs:
            if entities[1:] and entities[0] == entities[1]:  # transformers tells a first entity without text twice
                del entities[0]
        same(answers(model.ask("token-classification", texts, NAMES, **options), model.model).outputs, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"targets": ["on", "one", "a", "a"]}, {"targets": "e"}])
def test_fills(tiny: Callable[..., Tiny], kind: str, options: dict[str, Any]) -> None:
    model = tiny(kind, "ForMaskedLM")
    mask, pad = model.tokenizer.mask_token, model.tokenizer.pad_token
    texts = [f"Once upon a {mask}, naïve.", f"{mask} fox {mask}", f"a{mask}", f"x {pad} y {mask} {pad} is n't , {mask}"]
    if "targets" in options:
        vocab = model.tokenizer.get_vocab()
        options = {"targets": [word for word in options["targets"] if word in vocab] or "a"}
    theirs = [model.pipeline("fill-mask")(text, **options) for text in texts]
    same(answers(model.ask("fill-mask", texts, **options), model.model).outputs, theirs)


def test_windows_without_number_are_refused(folders: dict[str, Path]) -> None:
    options = {"stride": 509, "aggregation_strategy": "simple"}
    asked = ask(folders["bert"], "token-classification", ["a " * 10_000], info={"max_length": 512}, **options)
    with pytest.raises(InvalidRequest, match=r"windows with \d+ tokens in all"):
        _checked(prepare(asked), asked)


def test_a_token_that_the_model_lacks_is_refused_though_ids_have_gaps(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["bert"], tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {"fox": 100_000}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    asked = ask(tmp_path, "text-classification", ["a fox"])
    with pytest.raises(InvalidRequest, match="does not know the token 'fox'"):
        _checked(prepare(asked), asked)


def test_who_asks_as_a_batch_ends_is_tokenized_too(folders: dict[str, Path]) -> None:
    text = EncoderText.load(folders["bert"])

    async def one_after_another() -> list[int]:
        async with asyncio.timeout(20):
            return [len(await text.encode(["fox " * n], offsets=False)) for n in (50, 60, 70)]

    assert asyncio.run(one_after_another()) == [1] * 3


def test_labels_that_the_model_lacks_cannot_be_ignored(tiny: Callable[..., Tiny]) -> None:
    model = tiny("bert", "ForTokenClassification", NAMES)
    for known in (["O"], [NAMES[1], NAMES[1][2:]], ["X"], []):  # X: the group of MISC-X
        answers(model.ask("token-classification", TEXTS, NAMES, ignore_labels=known), model.model)
    with pytest.raises(InvalidRequest, match="ignore_labels: the model has no 'MISK'"):
        answers(model.ask("token-classification", TEXTS, NAMES, ignore_labels=["O", "MISK"]), model.model)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_a_token_that_takes_a_space_with_it_is_called_by_its_name(tiny: Callable[..., Tiny], kind: str) -> None:
    model = tiny(kind, "ForTokenClassification", NAMES)
    text = ["One <mask> two"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = model.pipeline("token-classification")(text, ignore_labels=[])
    same(answers(model.ask("token-classification", text, NAMES, ignore_labels=[]), model.model).outputs, theirs)
