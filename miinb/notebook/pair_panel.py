"""What panels that compare have: two deployments, one request, times in words, votes without knowing which is which."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from miinb.errors import InvalidRequest, InvalidValue, MiinbError
from miinb.notebook import cards
from miinb.notebook.controls import DeploymentChoice, button, named, save_link, tick
from miinb.notebook.history import History
from miinb.notebook.pair_cards import Side, Sides
from miinb.notebook.work_panel import ROW, WorkPanel

if TYPE_CHECKING:
    import pandas

    from miinb.session import Session

#: Votes and the words on their buttons.
VOTES = {"left": "Left is better", "right": "Right is better", "tie": "Tie", "both bad": "Both bad"}
#: Columns of votes; panels of a kind may have more before the last one.
VOTE_COLUMNS = ("t", "prompt", "left", "right", "vote", "winner", "blind", "seed", "left_e2e_s", "right_e2e_s")
SIDE = {"flex": "1 1 20em", "min_width": "0", "width": "auto"}


@dataclass
class Pair:
    """One entry of the panel's history: a prompt and its two answers. A kind says how it is shown."""

    prompt: str
    request: Any
    parameters: dict[str, Any]
    sides: Sides  # as they are shown, left first
    blind: bool
    swapped: bool = False  # the second deployment is on the left
    vote: str = ""

    # What a kind says of itself

    def speed_of(self, sides: Sides, names: Sequence[str]) -> str:
        """How fast the second is beside the first, in a sentence; "" where there is nothing to compare."""
        raise NotImplementedError

    def card(self) -> cards.Card:
        """Prompt and answers, static."""
        raise NotImplementedError

    def facts(self) -> list[dict[str, Any]]:
        """What the download says of each side besides names, errors and times."""
        return [{}, {}]

    # What all have

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
        return self.speed_of((first, second), self.names[::turn])

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

    def foot(self) -> str:
        """The last line of a card."""
        settings = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return " · ".join(part for part in (settings, f"vote: {self.vote}" if self.vote else "") if part)

    def to_json(self) -> str:
        """Everything about the pair, for the download."""
        sides = [
            {"deployment": side.deployment}
            | facts
            | {
                "error": side.error,
                "timing": asdict(side.result.timing) if side.result else None,
                "usage": asdict(side.result.usage) if side.result else None,
            }
            for side, facts in zip(self.sides, self.facts(), strict=True)
        ]
        known = {"request": self.request, "parameters": self.parameters, "blind": self.blind, "vote": self.vote}
        return json.dumps({**known, "left": sides[0], "right": sides[1]}, indent=2, ensure_ascii=False)

    def row(self) -> dict[str, Any]:
        """The vote as a row of `panel.votes`."""
        left, right = self.sides
        winner = {"left": left.deployment, "right": right.deployment}.get(self.vote, "")
        values = (
            *(datetime.now(UTC), self.prompt, left.deployment, right.deployment, self.vote, winner, self.blind),
            *(self.parameters.get("seed"), left.e2e_s, right.e2e_s),
        )
        return dict(zip(VOTE_COLUMNS, values, strict=True)) | {"parameters": json.dumps(self.parameters)}


class PairPanel(WorkPanel):
    """Two deployments answer the same prompt with the same parameters and seed, one after the other.

    "blind" shuffles the sides and hides names and times until you vote. `panel.votes` has the votes. A kind makes
    `prompt`, `controls`, `left` and `right`, and puts what it shows into `children`.

    Args:
        session: the first deployment; the second is another that runs, if there is one.
        task: of the first; deployments of other `tasks` are not offered.
    """

    _COLUMNS: Sequence[str] = (*VOTE_COLUMNS, "parameters")

    prompt: Any
    controls: Any

    def __init__(self, session: Session, task: str, tasks: Sequence[str]) -> None:
        super().__init__(session)
        self._votes: list[dict[str, Any]] = []
        self._make_choices(session, task, tasks)
        self.run = button("Compare", "compare", "Ask both models", self.compare, button_style="primary", icon="play")
        self.halt = self._halt("End the answers; what is there so far stays")
        self._history = History(self._lock, lambda: self._busy, lambda pair: pair.prompt, self._go_back)
        self.past, self.previous, self.next = self._history.controls
        self.left, self.right = (named(W.HTML(layout=SIDE), css) for css in ("left", "right"))
        self.ballot = {
            vote: button(words, f"vote-{vote.replace(' ', '-')}", "Vote, and see which is which", self._voter(vote))
            for vote, words in VOTES.items()
        }
        self._head = W.Box([self.first, self.second, self.together, self.blind], layout=ROW)
        self._past = W.Box(self._history.controls, layout=ROW)
        self._acts = W.Box([self.run, self.halt, self.pinning, self.files], layout=ROW)
        self._both = W.Box([self.left, self.right], layout={"flex_flow": "row wrap", "align_items": "stretch"})
        self._ballot = W.Box(list(self.ballot.values()), layout=ROW)

    def _make_choices(self, session: Session, task: str, tasks: Sequence[str]) -> None:
        def choice(name: str, label: str, css: str) -> DeploymentChoice:
            return DeploymentChoice(name, label, css, f"{label} to compare", own_task=task, tasks=tasks)

        first = choice(session.name, "First", "first")
        second = choice((first.others or [session.name])[0], "Second", "second")
        self._choices = (first, second)
        self.first, self.second = first.control, second.control
        self.together = tick("at the same time", "Off: one after the other, so that neither slows the other")
        self.blind = tick("blind", "Shuffle the sides, and hide names and times until you have voted")

    def _complete(self) -> None:
        """Called at the end of a kind's `__init__`."""
        self._set_busy(False)
        if not self._choices[1].others:
            self._say("Ready. Only one deployment runs: start another one to compare it with.")

    # What a kind does; the first with the lock held, the second in the worker without it

    def _pair(self, text: str, sides: Sides, swapped: bool) -> Any:
        """The pair of a prompt. Raises a MiinbError for parameters that do not go together."""
        raise NotImplementedError

    def _ask(self, pair: Any, number: int, session: Session) -> None:
        """Fill in `pair.sides[number].result`."""
        raise NotImplementedError

    def _show_side(self, pair: Any, number: int) -> None:
        """Show one side as far as it is there."""
        raise NotImplementedError

    def _show_both(self, pair: Any) -> None:
        """Show what is said of both sides together."""
        raise NotImplementedError

    @property
    def votes(self) -> pandas.DataFrame:
        """One row a vote, oldest first; `winner` is a deployment's name, "" for a tie and where both are bad."""
        import pandas

        return pandas.DataFrame(self._votes, columns=list(self._COLUMNS))

    @property
    def history(self) -> list[Any]:
        """The pairs, oldest first."""
        return self._history.entries

    # What the buttons do; each may be called from any thread, and from code

    def compare(self, _: Any = None) -> None:
        """Ask both with the prompt and parameters as they stand. Returns at once; what runs goes on."""
        with self._lock:
            text = self.prompt.value
            if not self._can_ask(text):
                return
            sides = (Side(self.first.value), Side(self.second.value))
            swapped = self.blind.value and random.random() < 0.5
            if swapped:
                sides = (sides[1], sides[0])
            try:
                pair = self._pair(text, sides, swapped)
            except (InvalidValue, InvalidRequest) as error:
                self._say(error.line())
                return
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
            self._ask(pair, number, session)
        except MiinbError as error:
            if not self._stop.is_set():
                side.error = f"{type(error).__name__}: {error.line()}"

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
        for number in (0, 1):
            self._show_side(pair, number)
        self._show_both(pair)
        links: Sequence[str] = ()
        if pair.complete and pair.revealed:
            links = (save_link(pair.to_json(), "comparison.json", "Save .json"),)
        if self._votes:
            links = (*links, save_link(self.votes.to_csv(index=False), "votes.csv", "Save votes .csv"))
        self.files.value = " &nbsp; ".join(links)

    def _go_back(self, pair: Pair) -> None:
        self.prompt.value = pair.prompt
        self._load(pair)
        self._show_pair(pair)
        self._set_busy(False)
        self._say(pair.summary())

    def _load(self, pair: Any) -> None:
        """Set the controls to a pair's parameters."""
        raise NotImplementedError

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
        return f"{type(self).__name__}({self.first.value!r}, {self.second.value!r}, votes={len(self._votes)})"
