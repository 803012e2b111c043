"""Which sequences come into which step: budgets, shares, order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miinb.engine.encode_queue import Bounds, EncodeQueue, EncodeStep, make_job, spans
from miinb.engine.reduction import Reduction, parse_reduction
from miinb.errors import InvalidRequest, PromptTooLong
from miinb.messages import EncodeRequest


def bounds(**changes: Any) -> Bounds:
    return Bounds(**({"max_length": 64, "vocab_size": 100, "token_types": 2, "max_tokens": 32} | changes))


def request(row_id: int, lengths: list[int], **fields: Any) -> EncodeRequest:
    """Texts whose tokens count up from 0."""
    given = {"token_ids": [i % 100 for i in range(sum(lengths))], "lengths": lengths, "t_submit": 0.0}
    return EncodeRequest(row_id, **(given | fields))


def queue_of(*jobs: list[int], task: str = "token-classification", **changes: Any) -> EncodeQueue:
    queue = EncodeQueue(bounds(**changes))
    queue.jobs = [make_job(request(i, lengths), Reduction(task), queue.bounds) for i, lengths in enumerate(jobs)]
    return queue


def shares(step: EncodeStep | None) -> dict[int, int]:
    assert step is not None
    return {piece.job.request.row_id: piece.count for piece in step.pieces}


def drain(queue: EncodeQueue) -> list[dict[int, int]]:
    found = []
    while (step := queue.next_step()) is not None:
        found.append(shares(step))
    return found


def test_small_requests_share_a_step_and_a_large_one_is_spread() -> None:
    assert drain(queue_of([10], [10], [10])) == [{0: 1, 1: 1, 2: 1}]
    assert drain(queue_of([10] * 7)) == [{0: 3}, {0: 3}, {0: 1}]
    assert drain(queue_of([10], [20], [30])) == [{0: 1, 1: 1}, {2: 1}]


def test_a_huge_request_leaves_half_to_those_behind() -> None:
    assert drain(queue_of([4] * 12, [6], [6])) == [{0: 5, 1: 1, 2: 1}, {0: 7}]
    # What a second large one is left is halved again for the one behind it; the first gets what nobody needs.
    steps = drain(queue_of([4] * 12, [4] * 12, [3]))
    assert steps == [{0: 5, 1: 2, 2: 1}, {0: 7, 1: 1}, {1: 8}, {1: 1}]


def test_a_sequence_longer_than_a_step_comes_alone() -> None:
    assert drain(queue_of([50, 50], [4])) == [{0: 1}, {0: 1}, {1: 1}]
    assert drain(queue_of([4], [50])) == [{0: 1}, {1: 1}]


def test_padded_batches_have_so_many_sequences_and_one_request_where_asked() -> None:
    assert drain(queue_of([1] * 5, [1], max_sequences=2)) == [{0: 1, 1: 1}, {0: 2}, {0: 2}]
    assert drain(queue_of([1] * 3, [1], max_sequences=2, shared=False)) == [{0: 2}, {0: 1}, {1: 1}]


def test_a_job_apart_is_alone_and_what_was_put_back_comes_first() -> None:
    queue = queue_of([4], [4], [4])
    step = queue.next_step()
    assert step is not None
    assert not queue.jobs
    step.pieces[0].job.alone = step.pieces[2].job.alone = True
    step.pieces[1].job.ended = True
    queue.put_back(step)
    assert drain(queue) == [{0: 1}, {2: 1}]


@pytest.mark.parametrize("by_length", [False, True])
def test_every_sequence_is_computed_once_and_its_results_find_their_place(by_length: bool) -> None:
    rng = np.random.default_rng(3)
    queue = queue_of(*([int(n) for n in rng.integers(1, 30, size)] for size in (9, 1, 14, 3)), by_length=by_length)
    jobs = list(queue.jobs)
    while (step := queue.next_step()) is not None:
        assert len(step.token_ids) <= 32 or len(step.lengths) == 1
        at = 0
        for piece, rows in zip(step.pieces, step.row_counts, strict=True):
            results = step.token_ids[step.rows[at : at + rows]]  # a model that answers with the token
            piece.job.store(piece, results[:, None].astype(np.float32), results[:, None].astype(np.int32))
            at += rows
        assert at == len(step.rows)
    for job in jobs:
        assert job.done == job.sequences
        assert job.values is not None
        assert job.ids is not None
        assert job.values[:, 0].tolist() == job.ids[:, 0].tolist() == list(job.request.token_ids)


@pytest.mark.parametrize("by_length", [False, True])
def test_wanted_places_and_first_tokens_in_a_packed_step(by_length: bool) -> None:
    one = request(0, [5, 2, 4], wanted=[1, 4, 8, 10])
    other = request(1, [3, 1], wanted=[2], type_ids=[0, 1, 1, 0])
    limits = bounds(by_length=by_length)
    jobs = [
        make_job(each, parse_reduction("fill-mask", {}, function="", vocab_size=9), limits) for each in (one, other)
    ]
    queue = EncodeQueue(limits, jobs=list(jobs))
    step = queue.next_step()
    assert step is not None
    order = [7, 8, 9, 10, 0, 1, 2, 3, 4] if by_length else list(range(11))
    tokens = [5, 6, *order] if by_length else order
    assert step.token_ids.tolist() == tokens + ([3, 0, 1, 2] if by_length else [0, 1, 2, 3])
    masks = [8, 10, 1, 4] if by_length else [1, 4, 8, 10]
    assert step.token_ids[step.rows].tolist() == [*masks, 2]
    assert step.row_counts == [4, 1]
    assert step.type_ids is not None
    assert step.type_ids.tolist() == [0] * 11 + ([0, 0, 1, 1] if by_length else [0, 1, 1, 0])
    firsts = queue_of([3, 2], [4], task="text-classification").next_step()
    assert firsts is not None
    assert firsts.rows.tolist() == [0, 3, 5]
    assert firsts.row_counts == [2, 1]


def test_pieces_with_equal_options_are_reduced_together() -> None:
    queue = EncodeQueue(bounds())
    for i, pooling in enumerate(("mean", "first", "mean")):
        queue.jobs.append(make_job(request(i, [3]), Reduction("feature-extraction", pooling=pooling), queue.bounds))
    step = queue.next_step()
    assert step is not None
    assert [(numbers, reduction.pooling) for numbers, reduction in step.groups()] == [([0], "first"), ([1, 2], "mean")]
    assert shares(step) == {0: 1, 1: 1, 2: 1}


def test_spans() -> None:
    starts = np.array([0, 2, 2, 5, 6])
    assert spans(starts, np.array([2, 0, 1])).tolist() == [2, 3, 4, 0, 1]
    assert spans(starts, np.array([], dtype=np.int64)).tolist() == []


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"lengths": [3, 0]}, InvalidRequest, "no tokens"),
        ({"lengths": [4]}, InvalidRequest, "4 tokens in all, but 3 are given"),
        ({"lengths": [65], "token_ids": [1] * 65}, PromptTooLong, "65 tokens, but the model takes 64"),
        ({"token_ids": [1, 100, 2]}, InvalidRequest, "token_ids: 100 is not one of 0 to 99"),
        ({"token_ids": [1, -3, 2]}, InvalidRequest, "token_ids: -3"),
        ({"type_ids": [0, 1]}, InvalidRequest, "2 for 3 tokens"),
        ({"type_ids": [0, 1, 2]}, InvalidRequest, "type_ids: 2 is not one of 0 to 1"),
        ({"wanted": [3]}, InvalidRequest, "wanted: 3"),
        ({"wanted": [1, 1]}, InvalidRequest, "ascend"),
    ],
)
def test_what_would_break_a_step_is_refused(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make_job(request(0, **({"lengths": [3], "token_ids": [1, 2, 3]} | fields)), Reduction("fill-mask"), bounds())
    with pytest.raises(InvalidRequest, match="wanted"):
        make_job(request(0, [3], wanted=[1]), Reduction("question-answering"), bounds())


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("text-classification", {"topk": 1}, "no option 'topk'"),
        ("text-classification", {"function": "relu"}, "not one of softmax"),
        ("text-classification", {"top_k": -1}, "no number of answers"),
        ("fill-mask", {"targets": 3}, "no list"),
        ("fill-mask", {"targets": [100]}, "no token id"),
        ("feature-extraction", {"pooling": "max"}, "not one of mean"),
        ("question-answering", {"top_k": 1}, "no option"),
    ],
)
def test_wrong_options_are_refused(task: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_reduction(task, options, function="softmax", vocab_size=100)


def test_a_text_classifier_s_function_is_the_model_s_unless_asked() -> None:
    task = "text-classification"
    assert parse_reduction(task, {}, function="sigmoid", vocab_size=1).function == "sigmoid"
    assert parse_reduction(task, {"function": None}, function="", vocab_size=1).function == "softmax"
    assert parse_reduction(task, {"function": "none"}, function="sigmoid", vocab_size=1).function == "none"


def test_types_are_not_read_by_a_model_that_has_none() -> None:
    given = request(0, [2], type_ids=[0, 1])
    assert make_job(given, Reduction("question-answering"), bounds(token_types=0)).type_ids is None
    job = make_job(given, Reduction("question-answering"), bounds())
    assert job.type_ids is not None
    assert job.type_ids.tolist() == [0, 1]
