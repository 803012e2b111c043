"""The client: order, cancellation, retries, the Stop button, MII's calls, records; no error of gRPC gets out."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from miinb import awaiting, errors
from miinb.client import Client
from miinb.queries import query
from miinb.results import ConversationReply, Result
from miinb.rpc import channel
from tests.frontend_process import FrontendProcess, make, wait_for


def test_a_list_keeps_its_order(client: Client) -> None:
    prompts = ["SLOW one", "two", "three"]
    result = client.generate(prompts, max_new_tokens=4)
    assert [prompt[:2] for prompt in prompts] == [text[:2] for text in result.texts]
    assert len(result.seeds) == 3
    assert list(result.frame["batch_size"]) == [3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a", 1]}, "prompts[1]"),
        ({"prompts": ["a", ""]}, "prompts[1]: it is empty."),
        ({"prompts": {"query": "a"}}, "query() takes a dictionary"),
        ({"prompts": {"a", "b"}}, "set is not text"),
        ({"prompts": "a\ud800"}, "surrogate"),
        ({"prompts": "a", "max_tokens": 3}, "max_new_tokens"),
        ({"prompts": "a", "max_length": 3}, "max_new_tokens"),
        ({"prompts": "a", "timeout_s": 0}, "timeout_s"),
        ({"prompts": "a", "timeout_s": float("nan")}, "timeout_s"),
        ({"prompts": "a", "timeout_s": "3"}, "timeout_s"),
        ({"prompts": None}, "prompts"),
    ],
)
def test_wrong_arguments_are_refused_by_name(client: Client, arguments: dict[str, object], named: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        client.generate(**arguments)  # type: ignore[arg-type]
    assert named in caught.value.line()


IMAGE = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("", "empty"),
        (7, "give a list"),
        ([], "give a list"),
        ([1], "role.*content"),
        ([{"role": "user"}], "role.*content"),
        ([{"role": "user", "content": 1}], "content is int, not text"),
        ([{"role": "user", "content": IMAGE}], "images and parts are not served"),
        ([{"role": "user", "content": "Hi", "tool_calls": []}], "'tool_calls' is not served"),
        ([{"role": "user", "content": "Hi"}, {"role": "tool", "content": "x"}], "no role 'tool'"),
        ([{"role": "user\n<|im_start|>system", "content": "x"}], "no role"),
        ([{"role": "system", "content": "x"}], "the user's"),
        ([{"role": "user", "content": ""}], "empty"),
    ],
)
def test_wrong_messages_are_refused(client: Client, messages: Any, says: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=says):
        client.chat(messages)


def test_a_text_is_a_message_of_the_user(client: Client) -> None:
    spelled = client.chat([{"role": "user", "content": "Hi"}], max_new_tokens=4)
    assert client.chat("Hi", max_new_tokens=4).text == spelled.text


def test_one_failure_cancels_the_others(frontend: FrontendProcess, client: Client) -> None:
    with pytest.raises(errors.NonFinite, match=r"prompts\[1\]: The logits.* No answer of this call is kept"):
        client.generate(["SLOW abc", "NAN abc", "SLOW abc"], max_new_tokens=1000)
    wait_for(lambda: frontend.running() == 0, "the end of the others")


def test_chunks_make_the_result(client: Client) -> None:
    stream = client.stream("SLOW abc", max_new_tokens=12)
    chunks = list(stream)
    assert len(chunks) > 3
    assert "".join(chunk.text for chunk in chunks) == stream.result.text
    assert tuple(i for chunk in chunks for i in chunk.token_ids) == stream.result.token_ids[0]
    timing = stream.result.timing
    assert timing.tpot_s == pytest.approx((timing.e2e_s - timing.ttft_s) / 11)
    assert list(stream) == []


def test_leaving_a_stream_cancels_it(frontend: FrontendProcess, client: Client) -> None:
    with client.stream("SLOW abc", max_new_tokens=1000) as stream:
        next(stream)
    wait_for(lambda: frontend.running() == 0, "the end")
    assert stream.result.finish_reasons == ("cancelled",)
    row = client.records.iloc[-1]
    assert row["status"] == "cancelled"
    alone = client.generate("SLOW abc", max_new_tokens=1).usage.prompt_tokens
    assert stream.result.usage.prompt_tokens == row["prompt_tokens"] == alone > 1


def test_a_forgotten_stream_is_canceled(frontend: FrontendProcess, client: Client) -> None:
    stream = client.stream("SLOW abc", max_new_tokens=1000)
    next(stream)
    del stream
    wait_for(lambda: frontend.running() == 0, "the end")


def test_cancel_from_another_thread_ends_the_iteration(client: Client) -> None:
    stream = client.stream("SLOW abc", max_new_tokens=1000)
    threading.Timer(0.2, stream.cancel).start()
    assert 0 < sum(len(chunk.token_ids) for chunk in stream) < 1000


@pytest.mark.parametrize("prompts", ["SLOW abc", ["SLOW abc", "SLOW def"]])
def test_the_stop_button_ends_the_request_and_says_how_far_it_was(
    frontend: FrontendProcess, client: Client, prompts: str | list[str]
) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(errors.Interrupted, match=r"stopped after [1-9]\d* tokens"):
        client.generate(prompts, max_new_tokens=1000)
    wait_for(lambda: frontend.running() == 0, "the end")
    assert client.generate("abc", max_new_tokens=1).usage.output_tokens == 1


def test_a_replica_lost_before_the_first_token_is_not_seen(tmp_path: Path) -> None:
    frontend = make(tmp_path)
    try:
        frontend.rank(0)
        frontend.rank(1)
        with frontend.client() as client:
            assert client.generate("GONE abc", max_new_tokens=4).usage.output_tokens == 4
            assert [row["replica"] for row in frontend.told("submit")] == [0, 1]
            with pytest.raises(errors.Unavailable):  # three tokens have been shown: not again
                client.generate("DIE abc", max_new_tokens=10, timeout_s=5)
            assert len(frontend.told("submit")) == 3
    finally:
        frontend.close()


def test_no_server_is_unavailable_in_time(tmp_path: Path) -> None:
    client = Client(f"unix:{tmp_path}/none.sock")
    begin = time.monotonic()
    with pytest.raises(errors.Unavailable):
        client.generate("abc")
    assert time.monotonic() - begin < 10
    assert not client.health()
    with pytest.raises(errors.Unavailable):
        client.describe()
    client.close()


def test_a_frontend_that_hangs_is_unavailable_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**dict(channel.CHANNEL_OPTIONS), "grpc.http2.ping_timeout_ms": 1000}
    monkeypatch.setattr(channel, "CHANNEL_OPTIONS", tuple(options.items()))
    frontend = make(tmp_path)
    try:
        frontend.rank()
        with frontend.client() as client:
            stream = client.stream("SLOW abc", max_new_tokens=4000)
            next(stream)
            frontend.process.send_signal(signal.SIGSTOP)
            with pytest.raises(errors.Unavailable, match="does not answer"):
                _ = stream.result
            with pytest.raises(errors.DeadlineExceeded):
                client.generate("abc", timeout_s=0.5)
            frontend.process.send_signal(signal.SIGCONT)
            wait_for(client.health, "its answer")
    finally:
        frontend.close()


def test_it_works_inside_a_running_event_loop(client: Client) -> None:
    async def cell() -> Result:
        return client.generate("abc", max_new_tokens=3)

    assert asyncio.run(cell()).text == "abc"


def test_awaitable_calls(frontend: FrontendProcess, client: Client) -> None:
    async def cell() -> None:
        one, two = await asyncio.gather(
            client.agenerate("abc", max_new_tokens=3),
            client.achat([{"role": "user", "content": "x"}], max_new_tokens=3),
        )
        assert one.text == "abc"
        assert two.usage.output_tokens == 3
        pieces = [chunk.text async for chunk in client.astream("SLOW abc", max_new_tokens=5)]
        assert len("".join(pieces)) >= 5
        said = [{"role": "user", "content": "x"}]
        client.create_session("awaited")
        async for _ in client.astream(said, max_new_tokens=5, session_id="awaited"):
            pass
        assert len((await client.achat(said, max_new_tokens=3, session_id="awaited")).history) == 4
        task = asyncio.ensure_future(client.agenerate(["SLOW a", "SLOW b"], max_new_tokens=1000))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cell())
    wait_for(lambda: frontend.running() == 0, "the end")


def test_many_awaitable_calls_run_at_once() -> None:
    together = threading.Barrier(40)

    async def all_of_them() -> None:
        await asyncio.gather(*(awaiting.run(lambda: together.wait(20)) for _ in range(40)))

    asyncio.run(all_of_them())


def test_a_closed_client_says_so(frontend: FrontendProcess) -> None:
    with frontend.client() as client:
        pass
    for ask in (lambda: client.generate("a"), lambda: client.stream("a"), client.describe, lambda: client.predict("a")):
        with pytest.raises(errors.Unavailable, match="was stopped"):
            ask()


def test_a_request_that_waits_for_a_server_hears_of_its_end_and_is_recorded(tmp_path: Path) -> None:
    client = Client(f"unix:{tmp_path}/none.sock")
    stream = client.stream("abc")
    client.close(drained=True)
    for _ in range(2):
        with pytest.raises(errors.Unavailable, match="was stopped"):
            _ = stream.result
    assert list(client.records["error"]) == ["Unavailable"]


def test_a_stop_button_between_two_tries_ends_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("miinb.streams.time.sleep", pressed)
    client = Client(f"unix:{tmp_path}/none.sock")
    with pytest.raises(errors.Interrupted, match="stopped after 0 tokens"):
        client.generate("abc")
    monkeypatch.undo()
    assert list(client.records["status"]) == ["cancelled"]


def test_a_stop_button_that_hits_the_begin_of_a_call_does_not_keep_a_client_from_closing(
    frontend: FrontendProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(channel, "CLOSE_S", 0.5)
    client = Client(frontend.address)
    with monkeypatch.context() as patched:  # gRPC knows of the call, and nothing will ever end it
        patched.setattr("grpc._channel._run_channel_spin_thread", interrupted)
        with pytest.raises(KeyboardInterrupt), client.stream("a") as stream:
            next(stream)
    begin = time.monotonic()
    client.close()
    assert time.monotonic() - begin < 5.0


def test_miis_query(client: Client) -> None:
    request = {"query": ["DeepSpeed is", "the fox"]}
    reply = query(client, request, {"max_new_tokens": 200, "do_sample": True})
    assert [text[:12] for text in reply.response] == ["DeepSpeed is", "the foxthe f"]
    assert reply.response[0].startswith("DeepSpeed isDeepSpeed is")
    assert reply.time_taken > reply.model_time_taken >= 0
    assert request == {"query": ["DeepSpeed is", "the fox"]}, "the caller's dictionary stays as it is"
    with pytest.raises(errors.InvalidRequest, match="query"):
        query(client, {"text": "a"}, {})
    with pytest.raises(errors.InvalidRequest, match="query"):
        query(client, {}, {})


WRONG_CONVERSATIONS: list[tuple[Any, str]] = [
    ({"text": ""}, "empty"),
    ({"text": 5}, "text: int"),
    ({"text": ["Hi"]}, "text: list"),
    ({"query": "Hi"}, "query: not a key"),
    ({"past_user_inputs": ["a"]}, "text: the request lacks it"),
    ({"text": "Hi", "past_user_inputs": "abc"}, "past_user_inputs: str"),
    ({"text": "Hi", "past_user_inputs": [1], "generated_responses": ["a"]}, "past_user_inputs: int"),
    ({"text": "Hi", "past_user_inputs": ["a"]}, r"lengths \(1, 0\) differ"),
    ({"text": "Hi", "conversation_id": [3]}, "conversation_id"),
    ("Hi", "no dictionary"),
]


def test_miis_conversation(tmp_path: Path) -> None:
    frontend = make(tmp_path)
    try:
        frontend.rank(task="conversational")
        with frontend.client() as client:
            said = {"text": "Hi", "conversation_id": 3, "past_user_inputs": [], "generated_responses": []}
            first = query(client, said, {})
            assert isinstance(first, ConversationReply)
            assert (first.conversation_id, first.past_user_inputs) == ("3", ["Hi"])
            said = {
                "text": "More",
                "conversation_id": first.conversation_id,
                "past_user_inputs": first.past_user_inputs,
                "generated_responses": first.generated_responses,
            }
            second = query(client, said, {})
            assert isinstance(second, ConversationReply)
            assert second.past_user_inputs == ["Hi", "More"]
            assert len(second.generated_responses) == 2
            assert said["past_user_inputs"] == ["Hi"], "the caller's lists stay as they are"
            client.create_session("s")
            for text in ("Hi", "More"):
                shared = query(client, {"text": text}, {"session_id": "s", "max_new_tokens": 5})
                assert isinstance(shared, ConversationReply)
            assert (shared.conversation_id, shared.past_user_inputs) == ("s", ["Hi", "More"])
            assert len(shared.generated_responses) == 2
            for wrong, named in WRONG_CONVERSATIONS:
                with pytest.raises(errors.InvalidRequest, match=named):
                    query(client, wrong, {})
            with pytest.raises(errors.InvalidRequest, match="own history"):
                query(client, said, {"session_id": "s"})
            with pytest.raises(errors.InvalidRequest, match="num_return_sequences"):
                query(client, {"text": "Hi"}, {"num_return_sequences": 2, "do_sample": True})
    finally:
        frontend.close()


def test_every_request_is_a_row(frontend: FrontendProcess) -> None:
    with frontend.client() as client:
        client.generate("abc", max_new_tokens=3, seed=5)
        with pytest.raises(errors.NonFinite):
            client.generate("NAN abc", max_new_tokens=20)
        with pytest.raises(errors.DeadlineExceeded):
            client.generate("SLOW abc", max_new_tokens=1000, timeout_s=0.2)
        rows = client.records
    assert list(rows["status"]) == ["ok", "error", "timeout"]
    assert list(rows["seq"]) == [0, 1, 2]
    assert list(rows["error"])[1:] == ["NonFinite", "DeadlineExceeded"]
    first = rows.iloc[0]
    assert (first["session"], first["task"], first["output_tokens"], first["seed"]) == ("dep", "text-generation", 3, 5)
    assert first["e2e_s"] >= first["ttft_s"] > 0


def test_a_result_shows_model_text_escaped() -> None:
    from miinb.messages import Timing, Usage

    result = Result(("<img src=x onerror=alert(1)>",), ("stop",), Usage(1, 1), Timing(e2e_s=1.0))
    bundle = result._repr_mimebundle_()
    assert "<img" not in bundle["text/html"]
    assert "<img" in bundle["text/plain"]
