"""The compare panel: two deployments, one prompt; texts side by side, times as bars, votes without knowing which."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from miinb.errors import InvalidValue, MiinbError
from miinb.notebook import cards
from miinb.notebook.controls import (
    GENERATING,
    DeploymentChoice,
    GenerationControls,
    button,
    named,
    prompt_area,
    save_link,
    tick,
)
from miinb.notebook.history import History
from miinb.notebook.pair_cards import Side, Sides, marks_of, pair_card, speed_words, text_html, times_card
from miinb.notebook.streaming import Throttle
from miinb.notebook.work_panel import ROW, WorkPanel

if TYPE_CHECKING:
    import pandas

    from miinb.session import Session

#: Votes and the words on their buttons.
VOTES = {"left": "Left is better", "right": "Right is better", "tie": "Tie", "both bad": "Both bad"}
VOTE_COLUMNS = (
    *("t", "prompt", "left", "right", "vote", "winner", "blind", "seed"),
    *("left_text", "right_text", "left_e2e_s", "right_e2e_s", "parameters"),
)
#: Updates a second of one side; two texts travel in the time of one.
_HZ = 5.0


@dataclass
class Pair:
    """One entry of the panel's history: a prompt and its two answers."""

    prompt: str
    request: Any
    parameters: dict[str, Any]
    sides: Sides  # as they are shown, left first
    blind: bool
    swapped: bool = False  # the second deployment is on the left
    vote: str = ""

    @property
    def complete(self) -> bool:
        """Both answers are there as a whole."""
        return all(side.done for side in self.sides)

    @property
    def revealed(self) -> bool:
        """Names and times may be shown: the pair is not blind, or was voted on, or cannot be."""
        return not self.blind or bool(self.vote) or any(side.error for side in self.sides)

    @property
    def names(self) -> tuple[str, str]:
        """How the sides are called: by their deployments where that tells them apart."""
        left, right = (side.deployment for side in self.sides)
        if not self.revealed:
            return "Left", "Right"
        return (left, right) if left != right else (f"{left} (left)", f"{right} (right)")

    @property
    def speed(self) -> str:
        """How fast the second deployment is beside the first, wherever they are shown."""
        turn = -1 if self.swapped else 1
        first, second = self.sides[::turn]
        return speed_words((first, second), self.names[::turn])

    def summary(self) -> str:
        """What came of it, in a line."""
        if any(side.error for side in self.sides):
            return "There is nothing to compare: an answer is missing."
        if not self.complete:
            return "stopped" if any(side.result for side in self.sides) else "no answers"
        if not self.revealed:
            return "Which is better? Vote, and the names and times are shown."
        voted = f"Your vote: {VOTES[self.vote].lower()}. " if self.vote else ""
        return voted + (self.speed or "Both answers are here.")

    def card(self) -> cards.Card:
        """Prompt and answers, static."""
        settings = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        foot = " · ".join(part for part in (settings, f"vote: {self.vote}" if self.vote else "") if part)
        return pair_card(self.prompt, self.sides, self.names, speed=self.speed if self.revealed else None, foot=foot)

    def to_json(self) -> str:
        """Everything about the pair, for the download."""
        sides = [
            {
                "deployment": side.deployment,
                "text": side.text,
                "error": side.error,
                "timing": asdict(side.result.timing) if side.result else None,
                "usage": asdict(side.result.usage) if side.result else None,
            }
            for side in self.sides
        ]
        known = {"request": self.request, "parameters": self.parameters, "blind": self.blind, "vote": self.vote}
        return json.dumps({**known, "left": sides[0], "right": sides[1]}, indent=2, ensure_ascii=False)

    def row(self) -> dict[str, Any]:
        """The vote as a row of `ComparePanel.votes`."""
        left, right = self.sides
        winner = {"left": left.deployment, "right": right.deployment}.get(self.vote, "")
        values = (
            *(datetime.now(UTC), self.prompt, left.deployment, right.deployment, self.vote, winner, self.blind),
            *(self.parameters.get("seed"), left.text, right.text, left.e2e_s, right.e2e_s, json.dumps(self.parameters)),
        )
        return dict(zip(VOTE_COLUMNS, values, strict=True))


class ComparePanel(WorkPanel):
    """Two deployments answer the same prompt with the same parameters and seed, one after the other.

    "blind" shuffles the sides and hides names and times until you vote. `panel.votes` has the votes.

    Args:
        session: the first deployment; the second is another that runs, if there is one.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._streams: set[Any] = set()
        self._votes: list[dict[str, Any]] = []
        self._make_choices(session)
        self._make_controls()
        self.children = [
            W.Box([self.first, self.second, self.together, self.blind], layout=ROW),
            W.Box(self._history.controls, layout=ROW),
            self.prompt,
            W.Box([self.run, self.halt, self.pinning, self.files], layout=ROW),
            self.controls.box,
            W.Box([self.left, self.right], layout={"flex_flow": "row wrap", "align_items": "stretch"}),
            self.output,
            W.Box(list(self.ballot.values()), layout=ROW),
            self.status,
        ]
        self._set_busy(False)
        if not self._choices[1].others:
            self._say("Ready. Only one deployment runs: start another one to compare it with.")

    def _make_choices(self, session: Session) -> None:
        def choice(name: str, label: str, css: str) -> DeploymentChoice:
            task = "text-generation"
            return DeploymentChoice(name, label, css, f"{label} to compare", own_task=task, tasks=GENERATING)

        first = choice(session.name, "First", "first")
        second = choice((first.others or [session.name])[0], "Second", "second")
        self._choices = (first, second)
        self.first, self.second = first.control, second.control
        self.together = tick("at the same time", "Off: one after the other, so that neither slows the other")
        self.blind = tick("blind", "Shuffle the sides, and hide names and times until you have voted")

    def _make_controls(self) -> None:
        self.prompt = prompt_area("The text that both models continue")
        self.run = button("Compare", "compare", "Ask both models", self.compare, button_style="primary", icon="play")
        self.halt = self._halt("End the answers; the texts so far stay")
        self.controls = GenerationControls()
        self._history = History(self._lock, lambda: self._busy, lambda pair: pair.prompt, self._go_back)
        self.past, self.previous, self.next = self._history.controls
        self.history: list[Pair] = self._history.entries
        side = {"flex": "1 1 20em", "min_width": "0", "width": "auto"}
        self.left = named(W.HTML(layout=side), "left")
        self.right = named(W.HTML(layout=side), "right")
        self.ballot = {
            vote: button(words, f"vote-{vote.replace(' ', '-')}", "Vote, and see which is which", self._voter(vote))
            for vote, words in VOTES.items()
        }

    @property
    def votes(self) -> pandas.DataFrame:
        """One row a vote, oldest first; `winner` is a deployment's name, "" for a tie and where both are bad."""
        import pandas

        return pandas.DataFrame(self._votes, columns=list(VOTE_COLUMNS))

    # What the buttons do; each may be called from any thread, and from code

    def compare(self, _: Any = None) -> None:
        """Ask both with the prompt and parameters as they stand. Returns at once; what runs goes on."""
        with self._lock:
            if self._busy:
                return
            text = self.prompt.value
            if not text.strip():
                self._say("Write a prompt first.")
                return
            sides = (Side(self.first.value), Side(self.second.value))
            swapped = self.blind.value and random.random() < 0.5
            if swapped:
                sides = (sides[1], sides[0])
            request, parameters = self.controls.request(text), self.controls.values()
            pair = Pair(text, request, parameters, sides, self.blind.value, swapped)
            self._history.add(pair)
            self._show_pair(pair)
            together = self.together.value
            self._begin(lambda: self._answers(pair, together), "Asking both …")

    def vote(self, vote: str) -> None:
        """Vote on the shown pair: "left", "right", "tie" or "both bad". Once; then names and times are shown.

        Raises:
            InvalidValue: it is none of these.
        """
        if vote not in VOTES:
            raise InvalidValue(f"vote: {vote!r} is no vote.", hint=f"One of: {', '.join(VOTES)}.")
        with self._lock:
            pair = self._history.shown
            if self._busy or pair is None or not pair.complete or pair.vote:
                return
            pair.vote = vote
            self._votes.append(pair.row())
            self._show_pair(pair)
            self._set_busy(False)
            self._say(pair.summary())

    def _voter(self, vote: str) -> Any:
        return lambda _: self.vote(vote)

    # The worker

    def _answers(self, pair: Pair, together: bool) -> str:
        self._cancel_with(self._cancel_streams)
        if together:
            with ThreadPoolExecutor(2, thread_name_prefix="miinb-panel") as pool:
                list(pool.map(lambda number: self._answer(pair, number), (0, 1)))
            return pair.summary()
        for number in (0, 1):
            with self._lock:
                if self._stop.is_set():
                    break
                # Of a blind pair the time that one of them takes would tell which it is.
                self._say("Asking both …" if pair.blind else f"Asking {pair.sides[number].deployment} …")
            self._answer(pair, number)
        return pair.summary()

    def _answer(self, pair: Pair, number: int) -> None:
        side = pair.sides[number]
        try:
            session = self._session(side.deployment)
            side.model = session.model
            stream = session.stream(pair.request, **pair.parameters)
            with self._lock:
                self._streams.add(stream)
                if self._stop.is_set():
                    stream.cancel()
            try:
                self._read(pair, number, stream)
            finally:
                with self._lock:
                    self._streams.discard(stream)
        except MiinbError as error:
            side.error = f"{type(error).__name__}: {error.line()}"

    def _read(self, pair: Pair, number: int, stream: Any) -> None:
        """The answer's text, shown while it grows; not of a blind pair, where the speed would tell which it is."""
        side = pair.sides[number]
        throttle, tokens, began = Throttle(_HZ, frugal=True), 0, time.monotonic()
        for chunk in stream:
            side.text += chunk.text
            tokens += len(chunk.token_ids)
            if not pair.blind and throttle.due(side.text, tokens):
                with self._lock:
                    self._show_side(pair, number)
                    if not self._stop.is_set():
                        self._say(f"{side.deployment}: {tokens} tokens · {time.monotonic() - began:.1f} s")
        side.text, side.result = stream.result.text, stream.result

    def _cancel_streams(self) -> None:
        for stream in self._streams:
            stream.cancel()

    # What is shown; the lock is held

    def _set_busy(self, busy: bool) -> None:
        pair = self._history.shown
        for widget in (self.run, self.first, self.second, self.together, self.blind):
            widget.disabled = busy
        self.halt.disabled = not busy
        self.pinning.disabled = busy or pair is None
        self._history.set_busy(busy)
        for widget in self.ballot.values():
            widget.disabled = busy or pair is None or not pair.complete or bool(pair.vote)

    def _show(self) -> None:
        self._show_pair(self.history[-1])

    def _show_pair(self, pair: Pair) -> None:
        marks = marks_of(pair.sides)
        for number in (0, 1):
            self._show_side(pair, number, marks[number])
        self.output.value = times_card(pair.sides, pair.names, pair.speed)[0] if pair.complete and pair.revealed else ""
        links: Sequence[str] = ()
        if pair.complete and pair.revealed:
            links = (save_link(pair.to_json(), "comparison.json", "Save .json"),)
        if self._votes:
            links = (*links, save_link(self.votes.to_csv(index=False), "votes.csv", "Save votes .csv"))
        self.files.value = " &nbsp; ".join(links)

    def _show_side(self, pair: Pair, number: int, mark: int | None = None) -> None:
        side = pair.sides[number]
        text = "" if pair.blind and not pair.complete and pair.revealed is False else text_html(side, mark)
        head = f"<div><b>{cards.escaped(pair.names[number])}</b></div>"
        (self.left, self.right)[number].value = cards.box(head + text)

    def _go_back(self, pair: Pair) -> None:
        self.prompt.value = pair.prompt
        self.controls.load(pair.parameters, pair.request)
        self._show_pair(pair)
        self._set_busy(False)
        self._say(pair.summary())

    def _card(self) -> cards.Card | None:
        return self._history.shown.card() if self.history else None

    def _empty_card(self) -> cards.Card:
        facts = [("first", self.first.value), ("second", self.second.value)]
        return cards.card("Compare panel", facts=facts, foot="No answers yet.")

    def _summary(self) -> str:
        return str(self._history.shown.summary())

    def _closing(self) -> None:
        self._history.close()
        self.controls.close()

    def __repr__(self) -> str:
        return f"ComparePanel({self.first.value!r}, {self.second.value!r}, votes={len(self._votes)})"
