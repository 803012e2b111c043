"""Chat in the text panel: turns add up, and whatever happens the conversation is one that can be gone on with."""

from __future__ import annotations

import base64
import itertools
import json
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from panel_checks import count_traffic, html_of, nothing_left, until
from standin import StandIn

import miinb
from miinb.errors import PromptTooLong
from miinb.notebook import streaming
from miinb.notebook.panels import panel
from miinb.notebook.text_panel import TextPanel


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    one = StandIn(words=["Fine", "."])
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [one.status()])
    return one


@pytest.fixture
def chat(session: StandIn) -> Iterator[TextPanel]:
    with nothing_left():
        made = panel(session)
        assert isinstance(made, TextPanel)
        made.controls.chat.value = True
        yield made
        made.close()


def say(chat: TextPanel, text: str) -> None:
    chat.prompt.value = text
    chat.run.click()
    assert chat.wait(10)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def shown(chat: TextPanel) -> list[str]:
    """What stands on the screen, in its order: prompts, answers and names."""
    parts = [*(widget.value for widget in chat._earlier.box.children), chat.asked.value, chat.output.value]
    return [text for text in re.sub(r"<[^>]*>", "\n", "".join(parts)).split("\n") if text]


def asked(session: StandIn) -> Any:
    return session.calls[-1][1]


def saved(chat: TextPanel, kind: str) -> str:
    found = re.search(rf'download="conversation.{kind}"[^>]*base64,([^"]*)"', chat.files.value)
    assert found
    return base64.b64decode(found[1]).decode()


def refuse(session: StandIn, message: str = "Too <long>.") -> None:
    def stream(prompt: Any, **_: Any) -> Any:
        raise PromptTooLong(message, hint="Shorten it.")

    session.stream = stream  # type: ignore[method-assign]


def test_turns_add_up_and_stand_above_the_newest(chat: TextPanel, session: StandIn) -> None:
    chat.controls.system.value = "Be short."
    say(chat, "Hello?")
    assert chat.prompt.value == ""
    session.words = ["Very", " fine."]
    say(chat, "And <b>now</b>?")
    system = {"role": "system", "content": "Be short."}
    assert asked(session) == [system, user("Hello?"), assistant("Fine."), user("And <b>now</b>?")]
    name = "Assistant · tiny"
    yours = "And &lt;b&gt;now&lt;/b&gt;?"
    assert shown(chat) == ["System", "Be short.", "You", "Hello?", name, "Fine.", "You", yours, name, "Very fine."]


def test_new_chat_begins_anew_and_the_history_brings_the_old_one_back(chat: TextPanel, session: StandIn) -> None:
    say(chat, "One")
    say(chat, "Two")
    assert chat.clear.description == "New chat"
    chat.clear.click()
    assert not shown(chat)
    assert chat.again.disabled
    chat.pin()
    assert "nothing to pin" in chat.status.value
    say(chat, "Three")
    assert asked(session) == [user("Three")]
    chat.clear.click()
    chat.previous.click()
    assert shown(chat) == ["You", "Three", "Assistant · tiny", "Fine."]
    chat.previous.click()
    say(chat, "Two and a half")
    assert [turn["content"] for turn in asked(session)] == ["One", "Fine.", "Two", "Fine.", "Two and a half"]


def test_going_on_from_an_earlier_turn_makes_another_conversation(chat: TextPanel, session: StandIn) -> None:
    say(chat, "One")
    say(chat, "Two")
    chat.previous.click()
    assert "Two" not in shown(chat)
    say(chat, "Other")
    assert asked(session) == [user("One"), assistant("Fine."), user("Other")]
    chat.previous.click()
    assert [text for text in shown(chat) if text in ("One", "Two", "Other")] == ["One", "Two"]


def test_regenerate_replaces_the_last_turn(chat: TextPanel, session: StandIn) -> None:
    chat.controls.do_sample.value = True
    say(chat, "One")
    say(chat, "Two")
    chat.prompt.value = "half a thou"
    session.words = ["Better."]
    chat.again.click()
    assert chat.wait(10)
    assert asked(session) == [user("One"), assistant("Fine."), user("Two")]
    assert shown(chat)[-3:] == ["Two", "Assistant · tiny", "Better."]
    assert shown(chat).count("Two") == 1
    assert chat.prompt.value == "half a thou"
    seeds = [parameters["seed"] for _, _, parameters in session.calls]
    assert seeds[1] != seeds[2]
    chat.controls.lock.value = True
    chat.again.click()
    assert chat.wait(10)
    assert session.calls[-1][2]["seed"] == seeds[2]
    say(chat, "Three")
    assert [turn["content"] for turn in asked(session)] == ["One", "Fine.", "Two", "Better.", "Three"]


def stopped_after(chat: TextPanel, session: StandIn, tokens: int) -> None:
    session.gate, session.words = threading.Event(), ["par", "tial", "!"]
    chat.prompt.value = "Stop me"
    if tokens:
        session.delay_s = 0.3
        session.gate.set()
    chat.run.click()
    if tokens:
        until(lambda: "par" in chat.output.value)
    chat.halt.click()
    assert chat.wait(10)
    session.gate, session.words, session.delay_s = None, ["Fine."], 0.0


def test_a_stopped_answer_stays_with_its_text(chat: TextPanel, session: StandIn) -> None:
    stopped_after(chat, session, 1)
    assert "stopped" in chat.status.value
    partial = chat.history[-1].text
    assert partial.startswith("par")
    assert not partial.endswith("!")
    assert chat.prompt.value == ""
    say(chat, "Go on")
    assert asked(session) == [user("Stop me"), assistant(partial), user("Go on")]
    assert "Assistant · tiny · stopped" in shown(chat)


def test_stopped_before_the_first_token_it_was_never_asked(chat: TextPanel, session: StandIn) -> None:
    say(chat, "One")
    before = shown(chat)
    stopped_after(chat, session, 0)
    assert shown(chat) == before
    assert chat.prompt.value == "Stop me"
    assert len(chat.history) == 1
    say(chat, "Two")
    assert asked(session) == [user("One"), assistant("Fine."), user("Two")]


def test_an_empty_answer_is_one(chat: TextPanel, session: StandIn) -> None:
    session.words = [""]
    say(chat, "Say nothing")
    session.words = ["Fine."]
    say(chat, "Now?")
    assert asked(session) == [user("Say nothing"), assistant(""), user("Now?")]


@pytest.mark.parametrize("again", [False, True])
def test_an_error_leaves_the_turns_and_the_prompt(chat: TextPanel, session: StandIn, again: bool) -> None:
    say(chat, "One")
    before, files = shown(chat), chat.files.value
    refuse(session)
    if again:
        chat.again.click()
        assert chat.wait(10)
    else:
        say(chat, "Two\nlines")
    assert "PromptTooLong: Too &lt;long&gt;. Shorten it." in chat.status.value
    assert (shown(chat), chat.files.value) == (before, files)
    assert chat.prompt.value == ("" if again else "Two\nlines")
    assert [answer.prompt for answer in chat.history] == ["One"]
    assert not chat.run.disabled
    del session.stream  # type: ignore[misc]  # the class's own again
    say(chat, "Two")
    assert asked(session) == [user("One"), assistant("Fine."), user("Two")]


def test_what_is_typed_while_a_request_fails_stays_too(chat: TextPanel, session: StandIn) -> None:
    gate = threading.Event()

    def stream(prompt: Any, **_: Any) -> Any:
        assert gate.wait(10)
        raise PromptTooLong("Too long.")

    session.stream = stream  # type: ignore[method-assign]
    chat.prompt.value = "One"
    chat.run.click()
    assert shown(chat)[:2] == ["You", "One"]
    chat.prompt.value = "Two"
    gate.set()
    assert chat.wait(10)
    assert chat.prompt.value == "One\nTwo"
    assert not shown(chat)


def test_another_deployment_goes_on_with_the_conversation(
    chat: TextPanel, session: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = StandIn("other", words=["Mine."])
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [session.status(), other.status()])
    monkeypatch.setitem(vars(miinb), "attach", lambda name: other)
    say(chat, "One")
    chat.deployment.value = "other"
    assert "other goes on with this conversation" in chat.status.value
    say(chat, "Two")
    assert asked(other) == [user("One"), assistant("Fine."), user("Two")]
    assert [text for text in shown(chat) if "·" in text] == ["Assistant · tiny", "Assistant · other"]


def test_other_instructions_stand_first_and_are_told_where_they_change(chat: TextPanel, session: StandIn) -> None:
    say(chat, "One")
    chat.controls.system.value = "Be brief."
    say(chat, "Two")
    assert asked(session)[0] == {"role": "system", "content": "Be brief."}
    chat.controls.system.value = ""
    say(chat, "Three")
    assert asked(session)[0] == user("One")
    texts = shown(chat)
    assert texts[texts.index("Be brief.") + 1 :][:2] == ["You", "Two"]
    assert texts[texts.index("(nothing)") + 1 :][:2] == ["You", "Three"]


def test_plain_and_chat_do_not_mix(chat: TextPanel, session: StandIn) -> None:
    say(chat, "One")
    chat.controls.chat.value = False
    assert (chat.run.description, chat.clear.description) == ("Generate", "Clear")
    say(chat, "Once")
    assert asked(session) == "Once"
    assert shown(chat) == ["Fine."]
    chat.controls.chat.value = True
    say(chat, "Two")
    assert asked(session) == [user("Two")]


def test_pins_files_and_snapshots_hold_the_whole_conversation(chat: TextPanel, session: StandIn) -> None:
    chat.controls.system.value = "Be short."
    say(chat, "One")
    session.words = ["<img src=x>"]
    say(chat, "Two")
    chat.pin()
    assert "pinned" in chat.status.value
    for text in (chat.snapshot().text, saved(chat, "txt"), chat._pins[0][1]):
        parts = ("System: Be short.", "You: One", "Assistant · tiny: Fine.", "You: Two", "tiny: <img src=x>")
        assert [part for part in parts if part not in text] == []
    html = chat.snapshot().html
    places = [html.index(part) for part in ("Be short.", "One", "Fine.", "Two", "&lt;img src=x&gt;")]
    assert places == sorted(places)
    assert "<img" not in html_of(chat)
    known = json.loads(saved(chat, "json"))
    assert [turn["content"] for turn in known["request"]] == ["Be short.", "One", "Fine.", "Two"]
    assert known["text"] == "<img src=x>"


def test_large_files_are_made_when_somebody_asks(chat: TextPanel, session: StandIn) -> None:
    session.words = ["words "] * 2000
    say(chat, "One")
    assert (chat.files.value, chat.filing.layout.display) == ("", None)
    chat.filing.click()
    assert saved(chat, "txt").count("words") == 2000
    assert chat.filing.layout.display == "none"
    session.words = ["Fine."]
    chat.clear.click()
    say(chat, "Two")
    assert "Fine." in saved(chat, "txt")


@pytest.mark.parametrize("turns", [0, 20])
@pytest.mark.parametrize("tokens_a_second", [10, 80, 1000])
def test_a_turn_of_400_tokens_is_small_below_a_long_conversation(
    chat: TextPanel, session: StandIn, monkeypatch: pytest.MonkeyPatch, tokens_a_second: int, turns: int
) -> None:
    session.words = ["words "] * 400
    for number in range(turns):
        say(chat, f"Question {number}")
    session.delay_s = 0.0005
    ticks = itertools.count()  # the clock is read at each token
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / tokens_a_second)
    monkeypatch.setattr(streaming, "time", clock)
    updates: list[Any] = []
    sent = count_traffic(monkeypatch)
    chat.output.observe(updates.append, "value")
    say(chat, "One more")
    chat.output.unobserve_all()
    assert sum(sent) < 60_000
    assert min(20, 4000 / tokens_a_second) < len(updates) <= 10 * 400 / tokens_a_second + 4
    assert sum(text == "words " * 400 for text in shown(chat)) == turns + 1
