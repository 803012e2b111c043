"""Sessions in the server: shared by all clients, one turn at a time, whole turns only, bounded in number and time."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from miinb import errors
from miinb.client import Client
from miinb.config import GenerationParams
from miinb.messages import GenerateRequest
from miinb.queries import query
from miinb.results import Reply
from miinb.server import conversations
from miinb.server.conversations import Conversations
from tests.frontend_process import FrontendProcess, wait_for


def test_two_clients_share_a_session(frontend: FrontendProcess, client: Client) -> None:
    with frontend.client() as other:
        client.create_session("shared")
        with pytest.raises(errors.InvalidRequest, match="exists already"):
            other.create_session("shared")
        first = query(client, {"query": ["the fox"]}, {"session_id": "shared", "max_new_tokens": 3})
        second = query(other, {"query": " and"}, {"session_id": "shared", "max_new_tokens": 3})
        assert isinstance(first, Reply)
        assert isinstance(second, Reply)
        assert second.response[0].startswith(first.response[0] + " and")
        other.destroy_session("shared")
        with pytest.raises(errors.InvalidRequest, match="does not exist"):
            client.generate("x", session_id="shared")
        with pytest.raises(errors.InvalidRequest, match="does not exist"):
            client.destroy_session("shared")


def test_turns_at_the_same_time_wait_for_each_other(frontend: FrontendProcess, client: Client) -> None:
    client.create_session("many")
    words = [f"word{number} " for number in range(12)]
    with ThreadPoolExecutor(len(words)) as pool:
        results = list(
            pool.map(lambda word: client.generate(word, session_id="many", max_new_tokens=2, timeout_s=30), words)
        )
    said = [len(result.history) for result in results]
    assert sorted(said) == list(range(2, 26, 2)), "each saw all that were before it"
    last = max(results, key=lambda result: len(result.history)).history
    assert sorted(message["content"] for message in last[::2]) == sorted(words)
    client.destroy_session("many")


def test_a_turn_that_does_not_end_leaves_the_history(frontend: FrontendProcess, client: Client) -> None:
    client.create_session("whole")
    kept = client.generate("SLOW abc", session_id="whole", max_new_tokens=2).history
    stream = client.stream(" go on", session_id="whole", max_new_tokens=1000)
    next(stream)
    stream.cancel()
    assert stream.result.history == ()
    with pytest.raises(errors.DeadlineExceeded):
        client.generate(" go on", session_id="whole", max_new_tokens=1000, timeout_s=0.3)
    with pytest.raises(errors.InvalidRequest, match="empty"):
        client.generate("", session_id="whole")
    with pytest.raises(errors.PromptTooLong):
        client.generate("the fox " * 4000, session_id="whole")
    after = client.generate(" go on", session_id="whole", max_new_tokens=2).history
    assert after[:2] == kept
    assert [message["content"] for message in after[2:3]] == [" go on"]
    assert len(after) == 4
    wait_for(lambda: frontend.running() == 0, "the end")
    client.destroy_session("whole")


def test_a_failed_row_leaves_the_history(client: Client) -> None:
    client.create_session("nan")
    with pytest.raises(errors.NonFinite):
        client.generate("NAN abc", session_id="nan", max_new_tokens=20)
    assert client.generate("abc", session_id="nan", max_new_tokens=1).history[0]["content"] == "abc"
    client.destroy_session("nan")


def test_a_session_destroyed_in_the_middle_of_a_turn_is_gone(client: Client) -> None:
    client.create_session("gone")
    running = client.stream("SLOW abc", session_id="gone", max_new_tokens=20)
    next(running)
    waiting = client.stream("abc", session_id="gone", max_new_tokens=2)
    time.sleep(0.1)
    client.destroy_session("gone")
    assert running.result.usage.output_tokens == 20
    with pytest.raises(errors.InvalidRequest, match="does not exist"):
        _ = waiting.result


@pytest.mark.parametrize(
    ("session_id", "says"),
    [
        ("", "no name"),
        (True, "no name"),
        (1.5, "no name"),
        (["a"], "no name"),
        ("a\n", "printable"),
        ("x" * 200, "128"),
    ],
)
def test_names_that_no_session_can_have(client: Client, session_id: object, says: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=says):
        client.create_session(session_id)  # type: ignore[arg-type]


def test_what_a_session_refuses(client: Client) -> None:
    client.create_session(7)
    with pytest.raises(errors.InvalidRequest, match="one prompt"):
        client.generate(["a", "b"], session_id=7)
    with pytest.raises(errors.InvalidRequest, match="one answer"):
        client.generate("a", session_id=7, do_sample=True, num_return_sequences=2)
    assert len(client.generate("a", session_id="7", max_new_tokens=1).history) == 2
    client.destroy_session(7)


def test_a_chat_in_a_session(client: Client) -> None:
    client.create_session("chat")
    rules = {"role": "system", "content": "Be brief."}
    client.chat([rules, {"role": "user", "content": "Hi"}], session_id="chat", max_new_tokens=3)
    result = client.chat([{"role": "user", "content": "More"}], session_id="chat", max_new_tokens=3)
    assert [message["role"] for message in result.history] == ["system", "user", "assistant", "user", "assistant"]
    assert result.history[-1]["content"] == result.text
    client.destroy_session("chat")


def test_sessions_are_bounded_and_idle_ones_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "MAX_CONVERSATIONS", 3)
    now = [0.0]
    store = Conversations(clock=lambda: now[0])
    for number in range(3):
        store.create(f"s{number}")
    with pytest.raises(errors.QueueFull, match="destroy_session"):
        store.create("s3")
    now[0] += conversations.IDLE_S / 2

    async def turn(name: str) -> None:
        async with store.turn(GenerateRequest("x", GenerationParams(), session_id=name)):
            now[0] += conversations.IDLE_S  # a long one: the session is not idle meanwhile
            store.create("later")

    asyncio.run(turn("s1"))
    assert len(store) == 2
    with pytest.raises(errors.InvalidRequest, match=r"does not exist.*60 min"):
        store.destroy("s0")
    store.destroy("s1")


def test_too_many_turns_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "MAX_WAITING", 1)
    store = Conversations()
    store.create("s")

    async def turn() -> None:
        async with store.turn(GenerateRequest("x", GenerationParams(), session_id="s")):
            await asyncio.sleep(0.01)

    async def all_of_them() -> list[BaseException | None]:
        return await asyncio.gather(*(turn() for _ in range(4)), return_exceptions=True)

    results = asyncio.run(all_of_them())
    assert [type(result) for result in results] == [type(None), type(None), errors.QueueFull, errors.QueueFull]
