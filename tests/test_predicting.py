"""`predict` on the client's side: what it takes, how long lists are cut, how errors and the Stop button end them."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy
import pandas
import pytest

from miinb import errors
from miinb.asking import task_inputs
from miinb.client import Client
from miinb.messages import PredictedEvent
from miinb.predicting import CALL_BYTES, CALL_INPUTS, MAX_CALLS, PredictCalls, cut
from miinb.predictions import Label
from miinb.queries import query
from miinb.rpc import codec
from tests.frontend_process import wait_for
from tests.predict_server import PredictServer

TEXTS = ["a" * (1 + i % 7) for i in range(4 * codec.MAX_INPUTS + 6)]


@pytest.fixture
def server() -> Iterator[PredictServer]:
    server = PredictServer()
    yield server
    server.close()


@pytest.fixture
def client(server: PredictServer) -> Iterator[Client]:
    client = Client(server.address)
    yield client
    client.close()


def test_a_list_waits_for_room_in_a_full_queue_and_a_single_call_does_not() -> None:
    refusals = iter([True, False, True, True])
    answer = codec.encode_predicted(PredictedEvent([[{"label": "A", "score": 1.0}]], 0.0, 0.0, 0.0, 0.0, b"", 0))

    class Call:
        def result(self) -> bytes:
            if next(refusals, False):
                raise errors.QueueFull("2 requests wait already.")
            return answer

        def cancel(self) -> None:
            pass

    rows: list[dict[str, Any]] = []
    calls = PredictCalls(lambda data, left_s: Call(), rows.append)
    with pytest.raises(errors.QueueFull):
        calls.run([{"query": "a"}], {}, 10.0, alone=True)
    inputs = [{"query": "a"}] * (CALL_INPUTS + 1)
    assert len(calls.run(inputs, {}, 10.0, alone=False).outputs) == 2
    assert [row["status"] for row in rows] == ["error", "ok", "ok"]
    refusals = iter([True] * 1000)
    with pytest.raises(errors.QueueFull):
        calls.run(inputs, {}, 0.2, alone=False)


def test_a_long_list_goes_in_calls_and_keeps_its_order(server: PredictServer, client: Client) -> None:
    answered: list[int] = []
    server.least = 2
    found = client.predict(TEXTS, answered.append)
    assert found == [[Label("length", float(len(text)))] for text in TEXTS]
    assert found.inputs == TEXTS
    assert sum(server.calls) == sum(answered) == len(TEXTS)
    assert max(server.calls) <= codec.MAX_INPUTS
    assert 2 <= server.most <= MAX_CALLS
    assert server.described <= 2, "what is served is asked for once (and once for the records)"
    calls = len(server.calls)
    assert (found.timing.model_s, found.timing.queue_s) == (0.5 * calls, 0.125)
    assert found.timing.e2e_s > 0
    assert client.records["batch_size"].sum() == len(TEXTS)
    assert client.records["model_s"].tolist() == [0.5] * calls


def test_calls_are_cut_by_inputs_and_by_bytes() -> None:
    def sizes(texts: list[str]) -> list[int]:
        return [len(places) for places in cut([{"query": text} for text in texts])]

    assert sizes(["a"]) == [1]
    assert sizes(["a"] * (CALL_INPUTS + 1)) == [CALL_INPUTS, 1]
    half = "ä" * (CALL_BYTES // 4)
    assert sizes([half] * 5) == [2, 2, 1]
    assert sizes(["a", "b" * (2 * CALL_BYTES), "c"]) == [1, 1, 1]


def test_long_texts_go_through(client: Client) -> None:
    text = "b" * (codec.MAX_REQUEST_BYTES // 5)
    assert [one.score for (one,) in client.predict([text] * 9)] == [float(len(text))] * 9
    with pytest.raises(errors.InvalidRequest, match="larger than the 16 MiB"):
        client.predict(["a", "b" * (codec.MAX_REQUEST_BYTES + 1)])


@pytest.mark.parametrize("place", [0, 3, 1500, 4096])
def test_an_error_names_the_input_by_its_place_in_the_list(client: Client, place: int) -> None:
    texts = list(TEXTS)
    texts[place] = "BAD"
    with pytest.raises(errors.InvalidRequest, match=rf"^inputs\[{place}\]: it is bad\.$"):
        client.predict(texts)
    with pytest.raises(errors.InvalidRequest, match=r"^inputs: it is bad\.$"):
        client.predict("BAD")
    assert client.records.iloc[-1]["status"] == "error"
    assert client.predict("abc") == [[Label("length", 3.0)]]


def test_a_failed_call_ends_the_others(server: PredictServer, client: Client) -> None:
    texts = list(TEXTS)
    texts[0], texts[2000] = "WAIT", "BAD"
    with pytest.raises(errors.InvalidRequest, match=r"inputs\[2000\]"):
        client.predict(texts, timeout_s=15)
    wait_for(lambda: server.running == 0, "the end of the calls")
    assert set(client.records["status"]) <= {"ok", "error", "cancelled"}


@pytest.mark.parametrize(("inputs", "sent"), [("WAIT", 1), (["WAIT", *TEXTS], len(TEXTS) + 1)])
def test_the_stop_button_ends_all_calls(server: PredictServer, client: Client, inputs: Any, sent: int) -> None:
    def press() -> None:
        wait_for(lambda: server.running == 1 and sum(server.calls) == sent, "the call that waits")
        time.sleep(0.5)  # where an interrupt meets gRPC as it begins a call, the caller alone is done with it
        os.kill(os.getpid(), signal.SIGINT)

    gc.collect()  # an interrupt that meets the collector would be lost
    threading.Thread(target=press).start()
    with pytest.raises(errors.Interrupted, match="the deployment lives on"):
        client.predict(inputs)
    wait_for(lambda: server.running == 0, "the end of the calls")
    assert "cancelled" in set(client.records["status"])
    assert client.predict("abc") == [[Label("length", 3.0)]]


def test_the_awaitable_can_be_canceled(server: PredictServer, client: Client) -> None:
    async def run() -> None:
        task = asyncio.create_task(client.apredict("WAIT"))
        while not server.running:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    wait_for(lambda: server.running == 0, "the end of the call")
    assert asyncio.run(client.apredict(["ab"])) == [[Label("length", 2.0)]]


def test_time_runs_out_for_all_calls(client: Client) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        client.predict(["WAIT", *TEXTS], timeout_s=0.5)
    assert "timeout" in set(client.records["status"])


@pytest.mark.parametrize(
    "inputs",
    [
        ["ab", "c"],
        ("ab", "c"),
        iter(["ab", "c"]),
        (text for text in ("ab", "c")),
        pandas.Series(["ab", "c"], index=[7, 3]),
        numpy.array(["ab", "c"]),
        numpy.array(["ab", "c"], dtype=object),
        [{"query": "ab"}, {"query": "c"}],
        {"first": "ab", "second": "c"}.values(),
    ],
)
def test_whatever_holds_texts_in_order_is_taken(client: Client, inputs: Any) -> None:
    found = client.predict(inputs)
    assert found == [[Label("length", 2.0)], [Label("length", 1.0)]]
    assert found.inputs == ["ab", "c"]


FRAME = pandas.DataFrame({"question": ["a"], "context": ["b"]})
WRONG: list[tuple[str, Any, str]] = [
    ("fill-mask", [], "there are none"),
    ("fill-mask", 3, "int is no input of fill-mask"),
    ("fill-mask", None, "NoneType is no input"),
    ("fill-mask", b"abc", "bytes is no input"),
    ("fill-mask", {"a", "b"}, "it has no order"),
    ("fill-mask", ["a", None], r"inputs[1]: None is no input of fill-mask. Give a text."),
    ("fill-mask", pandas.Series(["a", float("nan")]), "inputs[1]: nan is no input"),
    ("fill-mask", FRAME, "DataFrame of 2 dimensions is not taken. Choose what to send: predict(frame['text'])."),
    ("question-answering", FRAME, "predict(frame[['question', 'context']].to_dict('records'))"),
    ("fill-mask", numpy.array([["a"]]), "ndarray of 2 dimensions"),
    ("fill-mask", [{"querry": "a"}], "inputs[0]: fill-mask has no input 'querry'. Did you mean 'query'?"),
    ("question-answering", [{"question": "a", "contxt": "b"}], "no input 'contxt'. Did you mean 'context'?"),
    ("question-answering", {"question": "a"}, "inputs: context is missing. Give a dictionary of question and context."),
    ("question-answering", "a", "inputs: 'a' is no input of question-answering. Give a dictionary of question and"),
    ("question-answering", {"question": ["a"], "context": ["b"]}, "inputs: question is list, not text."),
    ("text-generation", "a", "serves text-generation. Use generate()"),
]


@pytest.mark.parametrize(("task", "inputs", "words"), WRONG)
def test_what_is_no_input_is_refused_in_words(task: str, inputs: Any, words: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        task_inputs(task, inputs)
    assert words in caught.value.line()


def test_frames_of_questions_are_taken_as_records() -> None:
    assert task_inputs("question-answering", FRAME.to_dict("records")) == [{"question": "a", "context": "b"}]


def test_query_gives_plain_data(server: PredictServer, client: Client) -> None:
    assert query(client, {"query": "abc"}, {}).response == [{"label": "length", "score": 3.0}]
    assert query(client, {"query": ["abc", "d"]}, {}).response[1] == [{"label": "length", "score": 1.0}]
    assert len(query(client, {"query": TEXTS}, {}).response) == len(TEXTS)


def test_embeddings_are_one_array(server: PredictServer, client: Client) -> None:
    server.info = dataclasses.replace(server.info, task="feature-extraction")
    found = client.predict(TEXTS)
    assert found.array.shape == (len(TEXTS), 3)
    assert found.array.dtype == numpy.float32
    assert found.array[:, 0].tolist() == [len(text) for text in TEXTS]
    assert numpy.shares_memory(found[1500][0].embedding, found.array)
    tokens = client.predict(["ab", "c"], pooling="none")
    assert [answers[0].embedding.shape for answers in tokens] == [(2, 3), (1, 3)]
    with pytest.raises(errors.InvalidRequest, match="differ in their number of vectors"):
        _ = tokens.array
    reply = query(client, {"query": ["ab", "c"]}, {}).response
    assert reply[0][0]["embedding"][:2] == [2.0, 0.0]
    assert isinstance(reply[0][0]["embedding"], list)


def test_a_call_that_the_server_ends_says_that_the_deployment_was_stopped(
    server: PredictServer, client: Client
) -> None:
    with pytest.raises(errors.Unavailable, match="was stopped while this request ran"):
        client.predict("CANCEL")
