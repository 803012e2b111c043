from __future__ import annotations

import json
import re
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from panel_checks import check_controls, count_traffic, html_of, nothing_left, until
from standin import StandIn

import miinb
from miinb.errors import QueueFull
from miinb.messages import Timing, Usage
from miinb.notebook import pair_cards
from miinb.notebook.compare_panel import ComparePanel
from miinb.notebook.pair_cards import Side
from miinb.notebook.panels import panel
from miinb.results import Result

Make = Callable[..., tuple[StandIn, StandIn, ComparePanel]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[ComparePanel] = []

    def one(**of_second: Any) -> tuple[StandIn, StandIn, ComparePanel]:
        first = StandIn(name="plain", e2e_s=0.9)
        second = StandIn(**({"name": "swift", "e2e_s": 0.5} | of_second))
        monkeypatch.setitem(vars(miinb), "deployments", lambda: [first.status(), second.status()])
        monkeypatch.setitem(vars(miinb), "attach", lambda name: second)
        made.append(panel(first, "compare"))
        return first, second, made[-1]

    yield one
    for shown in made:
        shown.close()


def compared(shown: ComparePanel, prompt: str = "Hi") -> None:
    shown.prompt.value = prompt
    shown.run.click()
    assert shown.wait(10)


def side(text: str, e2e_s: float = 1.0, tokens: int = 4, model: str = "m", ids: tuple[int, ...] = ()) -> Side:
    made = Result((text,), ("length",), Usage(1, tokens), Timing(ttft_s=0.1, tpot_s=0.1, e2e_s=e2e_s), token_ids=(ids,))
    return Side("one", model, text, made)


def test_both_answer_the_same_request_and_the_faster_is_named(make: Make) -> None:
    first, second, shown = make()
    shown.controls.do_sample.value = True
    compared(shown)
    assert first.calls == second.calls
    assert first.calls[0][2]["seed"] == shown.controls.seed.value
    assert "swift is 1.8x faster than plain." in shown.output.value
    assert "The answers are the same." in shown.output.value
    assert "1.8x faster" in shown.status.value
    assert "Once upon a time" in shown.left.value
    assert "plain" in shown.left.value
    assert "swift" in shown.right.value
    shown.pin()
    assert "1.8x faster" in shown.snapshot().html
    assert "1.8x faster" in shown.snapshot().text
    check_controls(shown, 24)


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        (side("a", 1.0), side("a", 2.0), "B is slower than A: it takes 2.0x as long."),
        (side("a", 1.0), side("a", 1.01), "B is as fast as A."),
        (side("a", 1.0), side("a", 0.95), "B is 1.05x faster than A."),
        (side("a", 1.0, 4), side("a", 1.0, 8), "B is 2.0x faster than A for each token (the answers have 4 and 8)."),
        (side("a", 1.0), Side("one"), ""),
    ],
)
def test_speed_in_words(left: Side, right: Side, words: str) -> None:
    assert pair_cards.speed_words((left, right), ("A", "B")) == words


def test_the_first_difference_is_marked_by_a_sign(make: Make) -> None:
    _, _, shown = make(words=["Once ", "upon ", "the ", "hill"])
    compared(shown)
    assert "The answers differ from token 3, character 11 on" in shown.output.value
    for place, word in ((shown.left, "a"), (shown.right, "the")):
        marked = re.search(r'class="miinb-difference"[^>]*>(<span[^>]*>≠</span>)([^<]*)<', place.value)
        assert marked
        assert marked[2] == word


@pytest.mark.parametrize(
    ("text", "place", "marked"),
    [
        ("a little frog", 3, "little"),
        ("a little frog", 8, " frog"),
        ("frog", 0, "frog"),
        ("x" * 40 + " end", 30, "x" * 10),
        ("frog", 4, "(ends here)"),
    ],
)
def test_whole_words_are_marked(text: str, place: int, marked: str) -> None:
    html = pair_cards.text_html(side(text), place)
    shown = re.sub(r"<[^>]*>", "", html)
    assert shown.replace("≠", "").replace("(ends here)", "") == text
    assert f"≠{marked}" in shown


def test_an_answer_that_ends_earlier_says_so() -> None:
    html = pair_cards.text_html(side("Once"), 4)
    assert "(ends here)" in html
    sides = (side("Once", ids=(1,)), side("Once upon", ids=(1, 2)))
    assert "token 2, character 5" in pair_cards.difference_words(sides)
    assert "token" not in pair_cards.difference_words((side("a", model="x"), side("b")))


def test_blind_sides_are_unlabeled_until_the_vote(make: Make) -> None:
    _, _, shown = make(words=["Another"])
    shown.blind.value = True
    orders = set()
    for number in range(1, 40):
        compared(shown, f"prompt {number}")
        hidden = shown.left.value + shown.right.value + shown.output.value + shown.status.value + shown.files.value
        hidden = re.sub(r"base64,[^\"]*", "", hidden) + shown.snapshot().html
        assert "plain" not in hidden
        assert "swift" not in hidden
        assert "faster" not in hidden
        assert "Left" in shown.left.value
        shown.ballot["left"].click()
        shown.ballot["left"].click()  # a vote counts once
        assert len(shown.votes) == number
        assert "swift is slower than plain: it takes 2.2x as long" in shown.status.value
        orders.add(shown.votes.iloc[-1]["left"])
        assert shown.votes.iloc[-1]["winner"] == shown.votes.iloc[-1]["left"]
        if len(orders) == 2:
            break
    assert orders == {"plain", "swift"}


def test_an_empty_panel_says_that_there_is_nothing_to_pin(make: Make) -> None:
    _, _, shown = make()
    shown.pin()
    assert "nothing to pin" in shown.status.value


def test_votes_are_a_frame(make: Make) -> None:
    _, _, shown = make()
    assert shown.votes.empty
    assert shown.ballot["tie"].disabled
    for vote in ("tie", "both bad", "right"):
        compared(shown)
        assert not shown.ballot[vote].disabled
        shown.ballot[vote].click()
        assert shown.ballot[vote].disabled
    assert list(shown.votes["vote"]) == ["tie", "both bad", "right"]
    assert list(shown.votes["winner"]) == ["", "", "swift"]
    assert not shown.votes["blind"].any()
    files = dict(re.findall(r'download="(\w+\.\w+)"[^>]*base64,([^"]*)"', shown.files.value))
    assert b64decode(files["votes.csv"]).decode().count("\n") == 4
    assert json.loads(b64decode(files["comparison.json"]))["vote"] == "right"


def test_history_brings_the_pair_back(make: Make) -> None:
    _, _, shown = make()
    shown.controls.chat.value, shown.controls.system.value = True, "Be short."
    compared(shown, "one")
    shown.ballot["tie"].click()
    shown.controls.chat.value, shown.controls.system.value = False, ""
    compared(shown, "two")
    shown.previous.click()
    assert shown.prompt.value == "one"
    assert (shown.controls.chat.value, shown.controls.system.value) == (True, "Be short.")
    assert "Your vote: tie" in shown.status.value
    assert shown.ballot["left"].disabled
    shown.next.click()
    assert not shown.ballot["left"].disabled


@pytest.mark.parametrize("together", [False, True])
def test_stop_ends_both(make: Make, together: bool) -> None:
    first, second, shown = make()
    first.gate = second.gate = threading.Event()
    shown.together.value = together
    shown.prompt.value = "Hi"
    shown.run.click()
    until(lambda: first.calls)
    assert shown.run.disabled
    shown.halt.click()
    assert shown.wait(10)
    assert "stopped" in shown.status.value
    assert shown.ballot["left"].disabled
    assert len(second.calls) <= together


def test_both_at_the_same_time(make: Make) -> None:
    first, second, shown = make()
    first.gate = second.gate = threading.Event()
    shown.together.value = True
    shown.prompt.value = "Hi"
    shown.run.click()
    until(lambda: first.calls and second.calls)
    first.gate.set()
    assert shown.wait(10)
    assert "1.8x faster" in shown.status.value


def test_an_error_of_one_side_leaves_the_other(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, second, shown = make()

    def refuse(*_: Any, **__: Any) -> None:
        raise QueueFull("1024 <requests> wait.")

    monkeypatch.setattr(second, "stream", refuse, raising=False)
    shown.blind.value = True
    compared(shown)
    both = shown.left.value + shown.right.value
    assert "QueueFull: 1024 &lt;requests&gt; wait." in both
    assert "Once upon a time" in both
    assert "an answer is missing" in shown.status.value
    assert shown.ballot["tie"].disabled
    assert not shown.run.disabled


def test_hostile_text_is_no_markup(make: Make) -> None:
    _, _, shown = make(name="<b>swift", model="<b>", words=["<img src=x onerror=alert(1)>", "\x1b[31m"])
    compared(shown, "<script>alert(2)</script>")
    shown.pin()
    html = html_of(shown)
    assert "<img" not in html
    assert "<script" not in html
    assert "<b>swift" not in html
    assert "\x1b" not in html + shown.snapshot().text
    assert "&lt;img" in shown.right.value


def test_updates_are_few_and_small(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, shown = make()
    first.words = second.words = ["token "] * 200
    first.delay_s = second.delay_s = 0.005
    sent = count_traffic(monkeypatch)
    compared(shown)
    assert shown.left.value.count("token ") == 200
    assert sum(sent) < 60_000


def test_one_deployment_is_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = StandIn()
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [alone.status()])
    with nothing_left():
        shown = panel(alone, "compare")
        assert "start another one" in shown.status.value
        compared(shown)
        assert "tiny (right) is as fast as tiny (left)." in shown.output.value
        shown.close()


def test_close_ends_what_runs_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = StandIn(gate=threading.Event())
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [alone.status()])
    with nothing_left():
        shown = panel(alone, "compare")
        shown.prompt.value = "Hi"
        shown.run.click()
        shown.close()
