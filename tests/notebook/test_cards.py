from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from typing import Any, cast

import pytest
from standin import Answer, StandIn

from miinb.commands import PlainScreen, Table
from miinb.errors import Unavailable
from miinb.messages import Plan, PlanLine, Timing, TokenLogprob, Usage
from miinb.notebook import cards
from miinb.results import Result

EVIL = "<img src=x onerror=alert(1)>\x1b]0;title\x07&amp;\r"


class Tags(HTMLParser):
    """Collects tags, and checks that they close."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag != "hr":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def all_cards() -> list[cards.Card]:
    session = StandIn(name=EVIL, model=EVIL)
    plan = Plan(EVIL, "cpu", "fp32", lines=(PlanLine(EVIL, EVIL, EVIL),), warnings=(EVIL,))
    answer = Answer([EVIL, EVIL], ["stop", "length"], Usage(1, 2), Timing(e2e_s=0.5))
    likely = (TokenLogprob(1, -0.5, ((2, -1.0),), EVIL, (EVIL,)),)
    rated = Result((EVIL,), ("stop",), Usage(1, 1), Timing(), logprobs=(likely,))
    return [
        cards.session_card(session),
        cards.status_card(session.status()),
        cards.plan_card(plan),
        cards.result_card(answer),
        cards.result_card(rated),
        cards.live_card(EVIL, EVIL),
        cards.table_card(Table((EVIL,), [(EVIL,)], title=EVIL, note=EVIL)),
    ]


@pytest.mark.parametrize("card", all_cards())
def test_nothing_untrusted_becomes_markup_or_drives_a_terminal(card: cards.Card) -> None:
    html, text = card
    tags = Tags()
    tags.feed(html)
    assert tags.seen <= {"div", "b", "span", "table", "tr", "th", "td", "pre"}
    assert not tags.open
    assert "&amp;amp;" in html
    assert not {"\x1b", "\x07", "\r"} & set(html + text)


@pytest.mark.parametrize("card", all_cards())
def test_colors_come_from_the_page(card: cards.Card) -> None:
    assert "background:#" not in card[0]
    assert "background:none" in card[0] or "background" not in card[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0008, "0.8 ms"),
        (0.0352, "35 ms"),
        (0.9999, "1.00 s"),
        (1.416, "1.42 s"),
        (125, "2 min 5 s"),
        (7300, "2 h 1 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert cards.duration(seconds) == text


def test_a_result_says_how_long_it_took_and_why_it_ended() -> None:
    answer = Answer(["hello"], ["length"], Usage(5, 42), Timing(ttft_s=0.035, tpot_s=0.0113, e2e_s=0.5))
    _, text = cards.result_card(answer)
    assert text == "hello\n(42 tokens · first token 35 ms · 84 tokens/s · 500 ms in all · reached max_new_tokens)"


def test_log_probabilities_stand_under_their_answer(capsys: pytest.CaptureFixture[str]) -> None:
    entries = tuple(TokenLogprob(i, -0.5, ((i, -0.5), (7, -1.25)), " fox", (" fox", "")) for i in range(40))
    result = Result(("fox",), ("stop",), Usage(5, 40), Timing(), logprobs=(entries,))
    html, text = cards.result_card(result)
    assert "\n' fox'  -0.500           ' fox' -0.500  token 7 -1.250\n" in text
    assert "8 more tokens" in text
    assert "8 more tokens" in html
    PlainScreen().show(result)
    assert capsys.readouterr().out.count("token 7 -1.250") == 32


def test_a_stopped_session_is_not_asked() -> None:
    session = StandIn(state="stopped")
    session.status = None  # type: ignore[assignment,method-assign]
    assert "(stopped)" in cards.session_card(session)[1]


def test_the_card_of_a_session_that_has_ended_does_not_fail() -> None:
    class Ended:
        name, model, engine, state = "gone", "/models/tiny", "optimized", "lost"

        @property
        def task(self) -> str:
            raise Unavailable("The deployment does not answer.")

    html, text = cards.session_card(cast(Any, Ended()))
    assert text.startswith("Session gone (lost)")
    assert "task" not in text
    assert "lost" in html


def test_memory_tells_its_parts_on_gpus_alone() -> None:
    status = StandIn(gpu=3).status()
    (rank,) = status.ranks
    rank = dataclasses.replace(rank, kv_cache_bytes=1 << 30, graphs_bytes=10 << 20, free_bytes=5 * 10**9)
    facts = dict(cards.status_facts(dataclasses.replace(status, ranks=(rank, rank))))
    parts = "1.07 GB weights, 2.15 GB KV cache, 21.0 MB graphs"
    assert facts["memory"] == f"3.22 GB ({parts}); 5.00 GB free on GPU 3"
    alone = dataclasses.replace(rank, gpu=None, free_bytes=0)
    assert dict(cards.status_facts(dataclasses.replace(status, ranks=(alone,))))["memory"] == "1.61 GB"
