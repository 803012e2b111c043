"""`Predictions`: the dataclasses of each task, the frame, the array."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy
import pytest

from miinb.errors import InvalidRequest
from miinb.messages import PredictedEvent
from miinb.predictions import Answer, Embedding, Entity, Fill, Label, Predictions, predictions_of

GOOD, BAD = {"label": "good", "score": 0.9}, {"label": "bad", "score": 0.1}
ENTITY = {"entity_group": "PER", "score": 0.5, "word": "Ada", "start": 0, "end": 3}
FILL = {"token_str": "a", "score": 0.5, "token": 3, "sequence": "a b"}
ANSWER = {"answer": "Ada", "score": 0.5, "start": 0, "end": 3}
ADA = {"question": "Who?", "context": "Ada did."}


def predicted(task: str, inputs: list[Any], outputs: list[Any], *, pooled: bool = True, **more: Any) -> Predictions:
    event = PredictedEvent(outputs, 0.1, 0.2, 0.3, 0.4, **more)
    rows = [one if isinstance(one, dict) else {"query": one} for one in inputs]
    return predictions_of(task, rows, event, 1.5, pooled=pooled)


def test_a_dataclass_for_each_task() -> None:
    assert predicted("text-classification", ["a"], [[GOOD]]) == [[Label("good", 0.9)]]
    assert predicted("token-classification", ["Ada", ""], [[ENTITY], []]) == [[Entity("PER", 0.5, "Ada", 0, 3)], []]
    assert predicted("question-answering", [ADA], [[ANSWER]]) == [[Answer("Ada", 0.5, 0, 3)]]
    fill = Fill("a", 0.5, 3, "a b")
    assert predicted("fill-mask", ["_ b"], [[FILL]]) == [[fill]]
    assert predicted("fill-mask", ["_ _"], [[[FILL], [FILL]]]) == [[[fill], [fill]]]


def test_the_frame_has_a_row_for_each_prediction() -> None:
    found = predicted("text-classification", ["one", "two"], [[GOOD, BAD], [BAD]])
    assert found.frame.to_dict("records") == [
        {"input": 0, "rank": 0, "text": "one", "label": "good", "score": 0.9},
        {"input": 0, "rank": 1, "text": "one", "label": "bad", "score": 0.1},
        {"input": 1, "rank": 0, "text": "two", "label": "bad", "score": 0.1},
    ]
    (row,) = predicted("question-answering", [ADA], [[ANSWER]]).frame.to_dict("records")
    assert row == {"input": 0, "rank": 0, **ADA, **ANSWER}
    masks = predicted("fill-mask", ["_ _"], [[[FILL, FILL], [FILL]]]).frame
    assert masks[["mask", "rank"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0]]
    none = predicted("token-classification", ["nobody"], [[]]).frame
    assert list(none.columns) == ["input", "rank", "text", "entity", "score", "word", "start", "end"]
    assert len(none) == 0


def test_embeddings_stay_numbers() -> None:
    numbers = numpy.arange(6, dtype=numpy.float32)
    found = predicted("feature-extraction", ["a", "b"], [1, 1], vectors=numbers.tobytes(), columns=3)
    assert found.array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found == [[Embedding(numbers[:3])], [Embedding(numbers[3:])]]
    assert found != [[Embedding(numbers[3:])], [Embedding(numbers[:3])]]
    assert list(found.frame.columns) == ["input", "text", "embedding"]
    assert found.frame["embedding"][1].tolist() == [3, 4, 5]
    tokens = predicted("feature-extraction", ["a", "b"], [2, 1], vectors=numbers.tobytes(), columns=2, pooled=False)
    assert [answers[0].embedding.tolist() for answers in tokens] == [[[0, 1], [2, 3]], [[4, 5]]]
    with pytest.raises(InvalidRequest, match="pooling='none'"):
        _ = tokens.array
    with pytest.raises(InvalidRequest, match="text-classification has none"):
        _ = predicted("text-classification", ["a"], [[GOOD]]).array


def test_it_is_a_list_with_more() -> None:
    found = predicted("text-classification", ["one", "two"], [[GOOD], [BAD]])
    assert (found.task, found.inputs, found.timing.model_s, found.timing.e2e_s) == (
        "text-classification",
        ["one", "two"],
        0.3,
        1.5,
    )
    assert found[1] == [Label("bad", 0.1)]
    for other in (copy.copy(found), pickle.loads(pickle.dumps(found))):
        assert (other, other.inputs, other.timing) == (found, found.inputs, found.timing)
