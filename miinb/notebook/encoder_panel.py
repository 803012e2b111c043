"""The encoder panel: a text in; classes, entities, answers, fills or similarities out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from miinb.commands.screen import as_json
from miinb.errors import InvalidValue
from miinb.notebook import cards
from miinb.notebook.controls import button, close_tree, save_link
from miinb.notebook.encoder_controls import Given, TaskInputs, TaskOptions
from miinb.notebook.history import History
from miinb.notebook.prediction_cards import predictions_card, timing_line
from miinb.notebook.work_panel import ROW, WorkPanel
from miinb.predictions import PREDICTIONS
from miinb.wording import printable

if TYPE_CHECKING:
    from miinb.predictions import Predictions
    from miinb.session import Session

#: A file that is longer is not put into the notebook: it would travel with each update.
_MOST_BYTES = 100_000
#: What is surely longer is not even written.
_MOST_NUMBERS = 10_000
_TOO_LONG = "Too long for a link: panel.predictions.frame has the table."


@dataclass
class Asked:
    """One entry of the panel's history."""

    given: Given
    task: str
    options: Mapping[str, Any]
    deployment: str
    predictions: Predictions | None = None

    @property
    def settings(self) -> str:
        """The deployment and the options in one line."""
        return " · ".join([self.deployment, *(f"{name} {value}" for name, value in self.options.items())])

    def card(self) -> cards.Card:
        """Text and predictions, static."""
        if self.predictions is None:
            html, _ = cards.card("", body=[cards.pre(self.given.title)], foot=f"{self.settings} · no answer")
            return html, printable(f"{self.given.title}\n({self.settings} · no answer)")
        return predictions_card(self.predictions, self.settings)

    def footer(self) -> str:
        """How long it took."""
        return timing_line(self.predictions) if self.predictions is not None else "no answer"

    def files(self) -> str:
        """Links that save the predictions."""
        if self.predictions is None:
            return ""
        links = []
        if _numbers(self.predictions) > _MOST_NUMBERS:
            return _TOO_LONG
        for make, name in ((self.to_json, "predictions.json"), (self.to_csv, "predictions.csv")):
            text = make()
            if len(text) > _MOST_BYTES:
                return _TOO_LONG
            links.append(save_link(text, name, f"Save .{name.rpartition('.')[2]}"))
        return " &nbsp; ".join(links)

    def to_json(self) -> str:
        """Everything about the request and its answer."""
        assert self.predictions is not None
        lines = as_json(self.predictions).splitlines()
        known = {
            "deployment": self.deployment,
            "task": self.task,
            "inputs": self.predictions.inputs,
            "options": dict(self.options),
            "predictions": [json.loads(line)["predictions"] for line in lines],
            "timing": asdict(self.predictions.timing),
        }
        return json.dumps(known, indent=2, ensure_ascii=False)

    def to_csv(self) -> str:
        """The table of predictions; of embeddings a column for each number."""
        assert self.predictions is not None
        frame = self.predictions.frame
        if self.task == "feature-extraction":
            import pandas

            vectors = [
                pandas.DataFrame(one.embedding.reshape(-1, one.embedding.shape[-1])) for (one,) in self.predictions
            ]
            numbers = pandas.concat(vectors, keys=frame["input"], names=["input", "vector"]).reset_index()
            frame = frame.drop(columns="embedding").merge(numbers, on="input")
        return str(frame.to_csv(index=False))


def _numbers(predictions: Predictions) -> int:
    """How many numbers the answers have, about."""
    if predictions.task == "feature-extraction":
        return sum(int(one.embedding.size) for (one,) in predictions)
    return sum(1 for _ in predictions.each())


class EncoderPanel(WorkPanel):
    """A text, the task's options, and what an encoder says of it.

    `panel.predictions` has the shown answer as `Predictions`.

    Args:
        session: the deployment that it asks first; others of encoder tasks can be chosen.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._make_controls(session)
        self.children = [
            W.Box([self.deployment, *self._history.controls], layout=ROW),
            self.inputs.box,
            W.Box([self.run, self.halt, self.clear, self.pinning, self.files], layout=ROW),
            self._place,
            self.output,
            self.status,
        ]
        self._set_busy(False)
        self._chosen()

    def _make_controls(self, session: Session) -> None:
        self._choose(
            session,
            "The deployment that answers",
            tasks=tuple(PREDICTIONS),
            own_task=session.task,
            on_change=self._chosen,
        )
        self.inputs = TaskInputs()
        self.run = button("Predict", "predict", "Ask the model", self.predict, button_style="primary", icon="play")
        self.halt = self._halt("Give the request up")
        self.clear = button("Clear", "clear", "Empty text and answer; the history stays", self.reset)
        self._history = History(self._lock, lambda: self._busy, lambda asked: asked.given.title, self._go_back)
        self.past, self.previous, self.next = self._history.controls
        self.history: list[Asked] = self._history.entries
        self._options: dict[str, TaskOptions] = {}
        self._place = W.VBox()

    @property
    def task(self) -> str:
        """The task of the chosen deployment."""
        return self._choice.task

    @property
    def options(self) -> TaskOptions:
        """The controls of the task's options."""
        return self._options[self.task]

    @property
    def predictions(self) -> Predictions | None:
        """The shown answer; None while there is none."""
        return self._history.shown.predictions if self.history else None

    # What the buttons do; each may be called from any thread, and from code

    def predict(self, _: Any = None) -> None:
        """Ask the model with the text and options as they stand. Returns at once; a running request goes on."""
        with self._lock:
            if self._busy:
                return
            given = self.inputs.given()
            if given is None:
                two = self.task == "question-answering"
                self._say("Write a question and its context first." if two else "Write a text first.")
                return
            try:
                options = self.options.values()
            except InvalidValue as error:
                self._say(error.line())
                return
            asked = Asked(given, self.task, options, self.deployment.value)
            self._history.add(asked)
            self.output.value = self.files.value = ""
            self._begin(lambda: self._ask(asked), "Asking …")

    def reset(self, _: Any = None) -> None:
        """Empty the text and the answer."""
        with self._lock:
            if not self._busy:
                self.inputs.clear()
                self.output.value = self.files.value = ""
                self._say("Ready.")

    # The worker

    def _ask(self, asked: Asked) -> str:
        session = self._session(asked.deployment)
        asked.predictions = self._awaited(lambda: session.apredict(asked.given.inputs, **asked.options))
        return timing_line(asked.predictions)

    # What is shown; the lock is held

    def _set_busy(self, busy: bool) -> None:
        self.run.disabled = self.clear.disabled = self.deployment.disabled = busy
        self.halt.disabled = not busy
        self.pinning.disabled = busy or not self.history
        self._history.set_busy(busy)

    def _chosen(self) -> None:
        """Show the inputs and options of the chosen deployment's task."""
        with self._lock:
            self.inputs.set_task(self.task)
            if self.task not in self._options:
                self._options[self.task] = TaskOptions(self.task)
            self._place.children = [self.options.box]

    def _show(self) -> None:
        self._show_answer(self.history[-1])

    def _show_answer(self, asked: Asked) -> None:
        done = asked.predictions is not None
        self.output.value = predictions_card(asked.predictions)[0] if asked.predictions is not None else ""
        self.files.value = asked.files() if done else ""

    def _go_back(self, asked: Asked) -> None:
        if asked.deployment in self.deployment.options:
            self.deployment.value = asked.deployment
        if self.task == asked.task:
            self.inputs.load(asked.given.fields)
            self.options.load(asked.options)
        self._show_answer(asked)
        self._say(asked.footer())

    def _card(self) -> cards.Card | None:
        return self._history.shown.card() if self.history else None

    def _empty_card(self) -> cards.Card:
        facts = [("deployment", self.deployment.value), ("task", self.task)]
        return cards.card("Encoder panel", facts=facts, foot="No answer yet.")

    def _summary(self) -> str:
        return str(self._history.shown.footer())

    def _closing(self) -> None:
        self._history.close()
        self.inputs.close()
        for options in self._options.values():
            close_tree(options.box)

    def __repr__(self) -> str:
        return f"EncoderPanel({self.deployment.value!r}, answers={len(self.history)})"
