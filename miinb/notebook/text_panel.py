"""The text panel: a prompt, and an answer that grows."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from miinb.notebook import cards
from miinb.notebook.controls import (
    GENERATING,
    DeploymentChoice,
    GenerationControls,
    button,
    prompt_area,
    save_link,
)
from miinb.notebook.history import History
from miinb.notebook.streaming import Throttle
from miinb.notebook.work_panel import ROW, WorkPanel
from miinb.wording import printable

if TYPE_CHECKING:
    from miinb.results import Result
    from miinb.session import Session


@dataclass
class Answer:
    """One entry of a panel's history."""

    prompt: str
    request: str | list[dict[str, str]]  # the prompt, or the conversation around it
    parameters: dict[str, Any]
    deployment: str
    text: str = ""
    result: Result | None = None

    def card(self) -> cards.Card:
        """Prompt and answer, static."""
        line = self.footer()
        settings = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        prompt = f'<div style="opacity:.72">{cards.pre(self.prompt)}</div><hr style="opacity:.35;margin:.4em 0">'
        body = [prompt, cards.pre(self.text)]
        html, _ = cards.card("", body=body, foot=f"{self.deployment} · {line} · {settings}")
        return html, printable(f"> {self.prompt}\n{self.text}\n({self.deployment} · {line} · {settings})")

    def footer(self) -> str:
        """How long it took."""
        return cards.timing_line(self.result) if self.result else "no answer"

    def to_json(self) -> str:
        """Everything about the answer, for the download."""
        known = {
            "deployment": self.deployment,
            "request": self.request,
            "parameters": self.parameters,
            "text": self.text,
        }
        if self.result is not None:
            known |= {"usage": asdict(self.result.usage), "timing": asdict(self.result.timing)}
        return json.dumps(known, indent=2, ensure_ascii=False)


class TextPanel(WorkPanel):
    """Prompt, parameters, an answer that grows, and a history.

    Args:
        session: the deployment that it asks first; others can be chosen.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._make_controls(session)
        self.children = [
            W.Box([self.deployment, *self._history.controls], layout=ROW),
            self.prompt,
            W.Box([self.run, self.halt, self.again, self.clear, self.pinning, self.files], layout=ROW),
            self.controls.box,
            self.output,
            self.status,
        ]
        self._set_busy(False)

    def _make_controls(self, session: Session) -> None:
        self._choice = DeploymentChoice(
            session.name,
            "Deployment",
            "deployment",
            "The deployment that answers",
            own_task="text-generation",
            tasks=GENERATING,
        )
        self._choices = (self._choice,)
        self.deployment = self._choice.control
        self.prompt = prompt_area("The text that the model continues")
        self.run = button("Generate", "generate", "Ask the model", self.generate, button_style="primary", icon="play")
        self.halt = self._halt("End the answer; the text so far stays")
        self.again = button(
            "Regenerate", "regenerate", "The same prompt again (another seed unless locked)", self.regenerate
        )
        self.clear = button("Clear", "clear", "Empty prompt and answer; the history stays", self.reset)
        self._history = History(self._lock, lambda: self._busy, lambda answer: answer.prompt, self._go_back)
        self.past, self.previous, self.next = self._history.controls
        self.history: list[Answer] = self._history.entries
        self.controls = GenerationControls()

    # What the buttons do; each may be called from any thread, and from code.

    def generate(self, _: Any = None) -> None:
        """Ask the model with the prompt and parameters as they stand. Returns at once; a running answer goes on."""
        with self._lock:
            if self._busy:
                return
            text = self.prompt.value
            if not text.strip():
                self._say("Write a prompt first.")
                return
            answer = Answer(text, self.controls.request(text), self.controls.values(), self.deployment.value)
            self._history.add(answer)
            self.output.value = self.files.value = ""
            self._begin(lambda: self._answer(answer), "Waiting for the first token …")

    def regenerate(self, _: Any = None) -> None:
        """The last prompt again, with the parameters as they stand."""
        with self._lock:
            if self.history and not self._busy:
                self.prompt.value = self._history.shown.prompt
            self.generate()

    def reset(self, _: Any = None) -> None:
        """Empty the prompt and the answer."""
        with self._lock:
            if not self._busy:
                self.prompt.value = self.output.value = self.files.value = ""
                self._say("Ready.")

    # The worker

    def _answer(self, answer: Answer) -> str:
        stream = self._session(answer.deployment).stream(answer.request, **answer.parameters)
        self._cancel_with(stream.cancel)
        throttle, tokens, began = Throttle(frugal=True), 0, time.monotonic()
        for chunk in stream:
            answer.text += chunk.text
            tokens += len(chunk.token_ids)
            if throttle.due(answer.text, tokens):
                with self._lock:
                    self._show_text(answer)
                    if not self._stop.is_set():
                        self._say(f"{tokens} tokens · {time.monotonic() - began:.1f} s")
        answer.result = stream.result
        answer.text = stream.result.text
        seed = f" · seed {answer.parameters['seed']}" if "seed" in answer.parameters else ""
        return cards.timing_line(stream.result) + seed

    # What is shown; the lock is held

    def _set_busy(self, busy: bool) -> None:
        self.run.disabled = self.clear.disabled = busy
        self.halt.disabled = not busy
        self.again.disabled = self.pinning.disabled = busy or not self.history
        self._history.set_busy(busy)

    def _show(self) -> None:
        self._show_answer(self.history[-1])

    def _show_text(self, answer: Answer) -> None:
        self.output.value = cards.box(cards.pre(answer.text)) if answer.text else ""

    def _show_answer(self, answer: Answer) -> None:
        self._show_text(answer)
        self.files.value = " &nbsp; ".join(
            [
                save_link(answer.text, "answer.txt", "Save .txt"),
                save_link(answer.to_json(), "answer.json", "Save .json"),
            ]
        )

    def _go_back(self, answer: Answer) -> None:
        self.prompt.value = answer.prompt
        self.controls.load(answer.parameters, answer.request)
        self._show_answer(answer)
        self._say(answer.footer())

    def _card(self) -> cards.Card | None:
        return self._history.shown.card() if self.history else None

    def _empty_card(self) -> cards.Card:
        return cards.card("Text panel", facts=[("deployment", self.deployment.value)], foot="No answer yet.")

    def _summary(self) -> str:
        return str(self._history.shown.footer())

    def _closing(self) -> None:
        self._history.close()
        self.controls.close()

    def __repr__(self) -> str:
        return f"TextPanel({self.deployment.value!r}, answers={len(self.history)})"
