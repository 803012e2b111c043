"""The text panel. Controls are widgets; what shall last is pinned as static output.

A click may come in any thread (Jupyter runs callbacks in subshell threads): callbacks take the panel's lock, start or
cancel the worker, and return. The worker owns the request; it changes traits at most ten times a second.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as W
from IPython import get_ipython
from IPython.display import display

import miinb
from miinb.commands.screen import printable
from miinb.errors import MiinbError
from miinb.notebook import cards
from miinb.notebook.controls import GenerationControls, button, close_tree, named, save_link
from miinb.notebook.streaming import Throttle

if TYPE_CHECKING:
    from miinb.results import Result
    from miinb.session import Session

_ROW = {"flex_flow": "row wrap", "align_items": "center"}
_HISTORY = 50


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


class TextPanel(W.VBox):  # type: ignore[misc]
    """Prompt, parameters, an answer that grows, and a history.

    Display it once. `pin()` writes the answer as static output below the panel: it stays when the notebook is closed,
    the widgets do not. `close()` ends a running request and frees all widgets.

    Args:
        session: the deployment that it asks first; others can be chosen.
    """

    def __init__(self, session: Session) -> None:
        self._sessions: dict[str, Session] = {session.name: session}
        self._lock = threading.RLock()
        self._worker: threading.Thread | None = None
        self._stream: Any = None
        self._stop = threading.Event()
        self._pins: list[cards.Card] = []
        self._pin_display: Any = None
        self.history: list[Answer] = []
        self._make_controls(session)
        rows = [
            W.Box([self.deployment, self.past, self.previous, self.next], layout=_ROW),
            self.prompt,
            W.Box([self.run, self.halt, self.again, self.clear, self.pinning, self.files], layout=_ROW),
            self.controls.box,
            self.output,
            self.status,
        ]
        super().__init__(rows)
        self.add_class("miinb-panel")
        self._show_past()
        self._set_busy(False)

    def _make_controls(self, session: Session) -> None:
        self.deployment = named(
            W.Dropdown(
                options=self._names(session.name),
                value=session.name,
                description="Deployment",
                tooltip="The deployment that answers",
                layout={"width": "18em"},
            ),
            "deployment",
        )
        self.prompt = named(
            W.Textarea(
                description="Prompt",
                tooltip="The text that the model continues",
                placeholder="Once upon a time",
                rows=4,
                layout={"width": "auto"},
            ),
            "prompt",
        )
        self.run = button("Generate", "generate", "Ask the model", self.generate, button_style="primary", icon="play")
        self.halt = button(
            "Stop", "stop", "End the answer; the text so far stays", self.stop, icon="stop", disabled=True
        )
        self.again = button(
            "Regenerate", "regenerate", "The same prompt again (another seed unless locked)", self.regenerate
        )
        self.clear = button("Clear", "clear", "Empty prompt and answer; the history stays", self.reset)
        self.pinning = button(
            "Pin", "pin", "Keep this answer in the notebook, below the panel", self.pin, icon="thumb-tack"
        )
        self.past = named(
            W.Dropdown(description="History", tooltip="Earlier prompts and answers", layout={"width": "22em"}),
            "history",
        )
        self.previous = button("◀", "previous", "Earlier answer", lambda _: self._step(-1))
        self.next = button("▶", "next", "Later answer", lambda _: self._step(1))
        self.files = named(W.HTML(), "files")
        self.output = named(W.HTML(layout={"width": "auto"}), "output")
        self.status = named(W.HTML(), "status")
        self.controls = GenerationControls()
        self.past.observe(self._past_chosen, "index")
        self._say("Ready.")

    def _names(self, own: str) -> list[str]:
        try:
            return sorted({own, *(deployment.name for deployment in miinb.deployments())})
        except MiinbError:
            return [own]

    # What the buttons do; each may be called from any thread, and from code.

    def generate(self, _: Any = None) -> None:
        """Ask the model with the prompt and parameters as they stand. Returns at once; a running answer goes on."""
        with self._lock:
            if self._worker is not None:
                return
            text = self.prompt.value
            if not text.strip():
                self._say("Write a prompt first.")
                return
            self._begin(Answer(text, self.controls.request(text), self.controls.values(), self.deployment.value))

    def regenerate(self, _: Any = None) -> None:
        """The last prompt again, with the parameters as they stand."""
        with self._lock:
            if self.history and self._worker is None:
                self.prompt.value = self.history[self._index()].prompt
            self.generate()

    def stop(self, _: Any = None) -> None:
        """End the running answer; the text so far stays."""
        with self._lock:
            self._stop.set()
            if self._stream is not None:
                self._stream.cancel()
                self._say("Stopping …")

    def reset(self, _: Any = None) -> None:
        """Empty the prompt and the answer."""
        with self._lock:
            if self._worker is None:
                self.prompt.value = self.output.value = self.files.value = ""
                self._say("Ready.")

    def pin(self, _: Any = None) -> None:
        """Write the shown answer as static output below the panel."""
        with self._lock:
            if not self.history:
                self._say("There is nothing to pin yet.")
                return
            answer = self.history[self._index()]
            self._pins.append(answer.card())
            self._show_pins()
            self._say(f"{answer.footer()} · pinned below the panel")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the running answer is complete; False when the time is over first."""
        worker = self._worker
        if worker is not None:
            worker.join(timeout_s)
        return self._worker is None

    def snapshot(self) -> Snapshot:
        """The shown answer as a static object; display it in any cell."""
        with self._lock:
            shown = self.history[self._index()].card() if self.history else self._empty_card()
        return Snapshot(*shown)

    def close(self) -> None:
        """End a running answer and free every widget of the panel."""
        if self.comm is None:
            return
        self.stop()
        self.wait(10.0)
        self.past.unobserve_all()
        self.controls.close()
        children = self.children
        super().close()
        for child in children:
            close_tree(child)
        self.layout.close()

    # The worker

    def _begin(self, answer: Answer) -> None:
        self._stop.clear()
        self.history.append(answer)
        del self.history[:-_HISTORY]
        self.output.value = self.files.value = ""
        self._set_busy(True)
        self._show_past()
        self._say("Waiting for the first token …")
        self._worker = threading.Thread(target=self._work, args=(answer,), name="miinb-panel", daemon=True)
        self._worker.start()

    def _work(self, answer: Answer) -> None:
        try:
            said = self._answer(answer)
        except MiinbError as error:
            said = f"{type(error).__name__}: {error.line()}"
        except Exception as error:  # a bug; the panel must not stay busy, and the user has to see it
            said = f"Unexpected {type(error).__name__}: {error}"
        with self._lock:
            self._stream = self._worker = None
            self._show_answer(answer)
            self._set_busy(False)
            self._say(said)

    def _answer(self, answer: Answer) -> str:
        session = self._sessions.get(answer.deployment)
        if session is None:
            session = self._sessions[answer.deployment] = miinb.attach(answer.deployment)
        stream = session.stream(answer.request, **answer.parameters)
        with self._lock:
            self._stream = stream
            if self._stop.is_set():  # Stop came before there was something to stop
                stream.cancel()
        throttle, tokens, began = Throttle(), 0, time.monotonic()
        for chunk in stream:
            answer.text += chunk.text
            tokens += len(chunk.token_ids)
            if throttle.due(answer.text):
                with self._lock:
                    self.output.value = cards.box(cards.pre(answer.text)) if answer.text else ""
                    if not self._stop.is_set():
                        self._say(f"{tokens} tokens · {time.monotonic() - began:.1f} s")
        answer.result = stream.result
        answer.text = stream.result.text
        seed = f" · seed {answer.parameters['seed']}" if "seed" in answer.parameters else ""
        return cards.timing_line(stream.result) + seed

    # What is shown; the lock is held

    def _say(self, text: str) -> None:
        self.status.value = f'<div role="status" aria-live="polite">{escape(printable(text))}</div>'

    def _set_busy(self, busy: bool) -> None:
        self.run.disabled = self.clear.disabled = busy
        self.halt.disabled = not busy
        for control in (self.again, self.pinning, self.past, self.previous, self.next):
            control.disabled = busy or not self.history
        if not busy and self.deployment.value:
            names = self._names(self.deployment.value)
            if tuple(names) != tuple(self.deployment.options):
                chosen = self.deployment.value
                self.deployment.options = names
                self.deployment.value = chosen

    def _show_answer(self, answer: Answer) -> None:
        self.output.value = cards.box(cards.pre(answer.text)) if answer.text else ""
        self.files.value = " &nbsp; ".join(
            [
                save_link(answer.text, "answer.txt", "Save .txt"),
                save_link(answer.to_json(), "answer.json", "Save .json"),
            ]
        )

    def _index(self) -> int:
        chosen = self.past.index
        return chosen if chosen is not None and chosen < len(self.history) else len(self.history) - 1

    def _show_past(self) -> None:
        """The history's entries, the newest chosen, without acting on the choice."""
        self.past.unobserve(self._past_chosen, "index")
        shown = [(f"{i + 1}: {' '.join(answer.prompt.split())[:40]}", i) for i, answer in enumerate(self.history)]
        self.past.options = shown
        self.past.index = len(shown) - 1 if shown else None
        self.past.observe(self._past_chosen, "index")

    def _past_chosen(self, change: Any) -> None:
        with self._lock:
            if self._worker is not None or change["new"] is None or change["new"] >= len(self.history):
                return
            answer = self.history[change["new"]]
            self.prompt.value = answer.prompt
            self.controls.load(answer.parameters)
            self._show_answer(answer)
            self._say(answer.footer())

    def _step(self, by: int) -> None:
        with self._lock:
            if self.history and self._worker is None:
                self.past.index = min(max(self._index() + by, 0), len(self.history) - 1)

    def _empty_card(self) -> cards.Card:
        return cards.card("Text panel", facts=[("deployment", self.deployment.value)], foot="No answer yet.")

    def _show_pins(self) -> None:
        html = "".join(card[0] for card in self._pins)
        text = "\n\n".join(card[1] for card in self._pins)
        data = {"text/html": html, "text/plain": text}
        if self._pin_display is not None:
            self._pin_display.update(data, raw=True)

    def __repr__(self) -> str:
        return f"TextPanel({self.deployment.value!r}, answers={len(self.history)})"

    def _ipython_display_(self) -> None:
        """The widgets, and below them the place for pinned answers; without a front end a static card."""
        if getattr(get_ipython(), "kernel", None) is None:
            print(self.snapshot())
            return
        display(self._repr_mimebundle_(), raw=True)
        self._pin_display = display({"text/html": "", "text/plain": ""}, raw=True, display_id=True)
        self._show_pins()


class Snapshot:
    """A static card."""

    def __init__(self, html: str, text: str) -> None:
        self.html, self.text = html, text

    def __str__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return cards.bundle((self.html, self.text))
