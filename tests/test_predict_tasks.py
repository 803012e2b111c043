"""Every encoder task through a session, with both engines: the answers of transformers' pipelines, in order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miinb import Session
from miinb.errors import InvalidRequest, PromptTooLong
from tests.server.encoders.by_model import answers
from tests.server.encoders.tiny import Tiny, same
from tests.tiny_tokenizers import encoder_tokenizer

TEXTS = [
    "Once upon a time there was a little fox.",
    "one",
    "The café was closed — naïve visitors waited for the fox, who liked to count. 日本語 😀",
    "a fox, a naïve visitor",
]
NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
ENGINES = ("optimized", pytest.param("baseline", marks=pytest.mark.slow))


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a tiny model and starts it with an engine."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    started: list[Session] = []

    def start(kind: str, head: str, engine: str, names: tuple[str, ...] = ()) -> tuple[Tiny, Session]:
        tokenizer = encoder_tokenizer("bert" if kind == "distilbert" else kind, tmp_path / "tokenizer")
        tiny = Tiny(tokenizer, kind, head, names)
        folder = tiny.save(tmp_path / "model")
        started.append(Session(folder, TASKS[head], engine=engine, device="cpu", options={"threads": 1}))
        assert started[-1].engine == engine
        return tiny, started[-1]

    yield start
    for session in started:
        session.stop()


TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "Model": "feature-extraction",
}
Serve = Callable[..., tuple[Tiny, Session]]


def plain(session: Session, inputs: Any, **options: Any) -> list[Any]:
    """The answers as the server gives them: with transformers' fields."""
    return list(session._client.predicted(inputs, options).outputs)


@pytest.mark.parametrize("engine", ["optimized", "baseline"])
def test_text_classification(serve: Serve, engine: str) -> None:
    names = ("bad", "fair", "good")
    tiny, session = serve("distilbert", "ForSequenceClassification", engine, names)
    pipeline = tiny.pipeline("text-classification")
    for options in ({"top_k": 2}, {"top_k": None, "function_to_apply": "sigmoid"}):
        same(plain(session, TEXTS, **options), pipeline(TEXTS, **options))
    theirs = [[one] for one in pipeline(TEXTS)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: plain(session, [text])[0], TEXTS * 8))
    same(together, theirs * 8)
    assert [(one.label, one.score) for (one,) in session.predict(TEXTS)] == [
        (one["label"], pytest.approx(one["score"], rel=1e-4)) for (one,) in theirs
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_token_classification(serve: Serve, engine: str) -> None:
    tiny, session = serve("bert", "ForTokenClassification", engine, NAMES)
    pipeline = tiny.pipeline("token-classification")
    same(plain(session, TEXTS), pipeline(TEXTS))
    for strategy in ("simple", "max"):
        options = {"aggregation_strategy": strategy, "ignore_labels": []}
        same(plain(session, TEXTS, **options), pipeline(TEXTS, **options))
    long = " ".join(TEXTS * 3)
    options = {"aggregation_strategy": "first", "stride": 8}
    same(plain(session, [long, "one"], **options), [pipeline(text, **options) for text in (long, "one")])
    with pytest.raises(PromptTooLong, match=r"inputs\[0\]: it has .* tokens, but the model takes 64"):
        session.predict([long])
    assert session.predict([long], truncation=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_question_answering(serve: Serve, engine: str) -> None:
    tiny, session = serve("xlm-roberta", "ForQuestionAnswering", engine)
    inputs = [{"question": "who?", "context": " ".join(TEXTS * 2)}, {"question": "a fox?", "context": "one"}]
    for options in ({}, {"top_k": 3, "max_seq_len": 40, "doc_stride": 6, "handle_impossible_answer": True}):
        wanted = answers(tiny.ask("question-answering", inputs, **options), tiny.model).outputs
        same(plain(session, inputs, **options), wanted)
    (best,) = session.predict(inputs[0])[0]
    assert inputs[0]["context"][best.start : best.end] == best.answer
    with pytest.raises(InvalidRequest, match=r"inputs\[1\]"):
        session.predict([inputs[0], {"question": "who?"}])


@pytest.mark.parametrize("engine", ENGINES)
def test_fill_mask(serve: Serve, engine: str) -> None:
    tiny, session = serve("roberta", "ForMaskedLM", engine)
    pipeline, mask = tiny.pipeline("fill-mask"), tiny.tokenizer.mask_token
    texts = [f"Once upon a {mask}.", f"{mask} fox {mask} naïve", f"one{mask}"]
    for options in ({}, {"top_k": 2}, {"targets": [" a", "e", "on"], "top_k": 9}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = [pipeline(text, **options) for text in texts]
        same(plain(session, texts, **options), theirs)
    with pytest.raises(InvalidRequest, match=r"inputs\[1\]: it has no mask token. Write <mask>"):
        session.predict([texts[0], "no mask"])
    with pytest.raises(InvalidRequest, match="targets: 'naïve closed' is not one token"):
        session.predict(texts[0], targets=["naïve closed"])


@pytest.mark.parametrize("engine", ENGINES)
def test_feature_extraction(serve: Serve, engine: str) -> None:
    tiny, session = serve("bert", "Model", engine)
    hidden = [np.array(tiny.pipeline("feature-extraction")(text))[0] for text in TEXTS]
    means = session.predict(TEXTS)
    assert means.array == pytest.approx(np.stack([rows.mean(0) for rows in hidden]), abs=1e-4)
    firsts = session.predict(TEXTS, pooling="first", normalize=True)
    wanted = np.stack([rows[0] / np.linalg.norm(rows[0]) for rows in hidden])
    assert firsts.array == pytest.approx(wanted, abs=1e-4)
    event = session._client.predicted(TEXTS, {"pooling": "none"})
    assert list(event.outputs) == [len(rows) for rows in hidden]
    assert np.frombuffer(event.vectors, np.float32) == pytest.approx(np.concatenate(hidden).ravel(), abs=1e-4)
    timing = session._client.predicted(TEXTS, {})
    assert min(timing.preprocess_s, timing.model_s) > 0
    assert min(timing.queue_s, timing.postprocess_s) >= 0
