"""The text panel: a prompt and an answer that grows, or a conversation."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from miinb.notebook import cards
from miinb.notebook.controls import (
    GENERATING,
    GenerationControls,
    button,
    named,
    prompt_area,
    save_link,
)
from miinb.notebook.conversation import Answer, Earlier
from miinb.notebook.history import History
from miinb.notebook.streaming import Throttle
from miinb.notebook.work_panel import ROW, WorkPanel

if TYPE_CHECKING:
    from miinb.session import Session

#: Larger files are not sent with each answer, but when somebody asks for them.
_FILES_BYTES = 6_000


class TextPanel(WorkPanel):
    """Prompt, parameters, an answer that grows, and a history.

    With "chat" on, answers add up to a conversation, which stands above the prompt; what is shown is what the next
    message goes on with. "New chat" begins another one, "Regenerate" asks for the last answer again, in its place.
    A stopped answer stays with the text that it has; one that failed, or was stopped before its first token, leaves the
    conversation as it was and its prompt in the field. Another deployment goes on with the same conversation. Other
    instructions ("system") stand before the whole of it from the next message on. An answer chosen from the history
    brings back the conversation up to it; going on from there makes another one beside it.

    Args:
        session: the deployment that it asks first; others can be chosen.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._shown: Answer | None = None  # what is on the screen
        self._asked: Answer | None = None  # what the worker asks for
        self._sent = ""  # what was taken out of the prompt's field for that
        self._make_controls(session)
        self._make_places()
        self.children = [
            self._head,
            self.prompt,
            W.Box([self.run, self.halt, self.again, self.clear, self.pinning, self.filing, self.files], layout=ROW),
            self.controls.box,
            self._scroller,
            self.status,
        ]
        self._switched()
        self._set_busy(False)

    def _make_controls(self, session: Session) -> None:
        self._choose(
            session,
            "The deployment that answers",
            tasks=GENERATING,
            own_task="text-generation",
            on_change=self._another,
        )
        self.prompt = prompt_area("The text that the model continues")
        self.run = button("Generate", "generate", "Ask the model", self.generate, button_style="primary", icon="play")
        self.halt = self._halt("End the answer; the text so far stays")
        self.again = button(
            "Regenerate", "regenerate", "The same prompt again (another seed unless locked)", self.regenerate
        )
        self.clear = button("Clear", "clear", "", self.reset)
        self.filing = button("Files …", "make-files", "Make links that save what is shown", self.make_files)
        self._history = History(self._lock, lambda: self._busy, lambda answer: answer.prompt, self._go_back)
        self.past, self.previous, self.next = self._history.controls
        self.history: list[Answer] = self._history.entries
        self.controls = GenerationControls()
        self.controls.chat.observe(self._switched, "value")

    def _make_places(self) -> None:
        """Where answers are shown; a conversation has a height, and stays scrolled to its end."""
        self._earlier = Earlier()
        self.asked = named(W.HTML(layout={"width": "auto", "flex": "0 0 auto"}), "asked")
        self.output.layout.flex = "0 0 auto"
        column = W.VBox([self._earlier.box, self.asked, self.output], layout={"flex": "0 0 auto"})
        self._scroller = W.Box([column], layout={"flex_flow": "column-reverse nowrap", "flex": "0 0 auto"})
        self._head = W.Box([self.deployment, *self._history.controls], layout=ROW)

    # What the buttons do; each may be called from any thread, and from code.

    def generate(self, _: Any = None) -> None:
        """Ask the model with the prompt and parameters as they stand. Returns at once; a running answer goes on."""
        with self._lock:
            text = self.prompt.value
            if not self._can_ask(text):
                return
            if self.controls.chat.value:
                self._sent, self.prompt.value = text, ""
            self._ask(text, self._shown)

    def regenerate(self, _: Any = None) -> None:
        """The prompt of the shown answer again, with the parameters as they stand; in a chat in its place."""
        with self._lock:
            if self._shown is None or self._busy:
                return
            if not self.controls.chat.value:
                self.prompt.value = self._shown.prompt
            self._ask(self._shown.prompt, self._shown.before)

    def reset(self, _: Any = None) -> None:
        """Empty the prompt and the answer; a chat begins anew. The history stays."""
        with self._lock:
            if not self._busy:
                self.prompt.value = ""
                self._history.deselect()
                self._show_answer(None)
                self._say("Ready.")

    def make_files(self, _: Any = None) -> None:
        """Make the links that save what is shown, however large it is."""
        with self._lock:
            if self._shown is not None and not self._busy:
                self._show_files(self._shown, asked_for=True)

    def _ask(self, prompt: str, before: Answer | None) -> None:
        """Ask for a prompt; in a chat after an answer that was there before."""
        before = before if self.controls.chat.value and before is not None and before.is_chat else None
        request = self.controls.request(prompt, before.turns if before else ())
        answer = self._asked = Answer(prompt, request, self.controls.values(), self.deployment.value, before)
        self._lay_out(answer)
        self._begin(lambda: self._answer(answer), "Waiting for the first token …")

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
        answer.text, answer.result = stream.result.text, stream.result
        seed = f" · seed {answer.parameters['seed']}" if "seed" in answer.parameters else ""
        return cards.timing_line(stream.result) + seed

    # What is shown; the lock is held

    def _set_busy(self, busy: bool) -> None:
        self.run.disabled = self.clear.disabled = busy
        self.halt.disabled = not busy
        self.again.disabled = self.pinning.disabled = busy or self._shown is None
        self._history.set_busy(busy)

    def _show(self) -> None:
        answer, sent = self._asked, self._sent
        self._asked, self._sent = None, ""
        if answer is None:
            return
        if answer.is_chat and not answer.counts:
            self.prompt.value = "\n".join(text for text in (sent, self.prompt.value) if text)
            self._show_answer(self._shown)
        else:
            self._history.add(answer)
            self._show_answer(answer)

    def _show_answer(self, answer: Answer | None) -> None:
        """This is on the screen from now on, and what a chat goes on with."""
        self._shown = answer
        self._lay_out(answer)
        self._show_files(answer)
        self._set_busy(False)

    def _lay_out(self, answer: Answer | None) -> None:
        """Everything around the answer, and its text so far; no files."""
        is_chat = answer is not None and answer.is_chat
        self._earlier.show(answer.conversation[:-1] if is_chat and answer else ())
        self.asked.value = answer.asked_html() if is_chat and answer else ""
        self._show_text(answer)
        self.files.value = ""
        self.filing.layout.display = "none"

    def _show_text(self, answer: Answer | None) -> None:
        self.output.value = answer.answer_html() if answer is not None and answer.text else ""

    def _show_files(self, answer: Answer | None, *, asked_for: bool = False) -> None:
        if answer is None:
            return
        name = "conversation" if answer.is_chat else "answer"
        files = {"txt": answer.to_text(), "json": answer.to_json()}
        small = sum(map(len, files.values())) <= _FILES_BYTES
        self.filing.layout.display = None if not small and not asked_for else "none"
        if small or asked_for:
            links = (save_link(text, f"{name}.{kind}", f"Save .{kind}") for kind, text in files.items())
            self.files.value = " &nbsp; ".join(links)

    def _switched(self, _: Any = None) -> None:
        """A chat's prompt stands below what was said."""
        with self._lock:
            chat = self.controls.chat.value
            self.prompt.placeholder = "Write a message" if chat else "Once upon a time"
            self.run.description = "Send" if chat else "Generate"
            self.again.tooltip = "The last answer" if chat else "The same prompt"
            self.again.tooltip += " again (another seed unless locked)"
            self.clear.description = "New chat" if chat else "Clear"
            self.clear.tooltip = "Begin another conversation" if chat else "Empty prompt and answer"
            self.clear.tooltip += "; the history stays"
            self._head.layout.order = "-2" if chat else None
            self._scroller.layout.order = "-1" if chat else None
            self._scroller.layout.max_height = "32em" if chat else None
            self._scroller.layout.overflow = "auto" if chat else None

    def _another(self) -> None:
        """The user has chosen another deployment."""
        with self._lock:
            if not self._busy and self.controls.chat.value and self._shown is not None and self._shown.is_chat:
                self._say(f"{self.deployment.value} goes on with this conversation; New chat begins another one.")

    def _go_back(self, answer: Answer) -> None:
        self.prompt.value = "" if answer.is_chat else answer.prompt
        self.controls.load(answer.parameters, answer.request)
        self._show_answer(answer)
        self._say(answer.footer())

    def _card(self) -> cards.Card | None:
        answer = self._asked or self._shown
        return answer.card() if answer is not None else None

    def _empty_card(self) -> cards.Card:
        return cards.card("Text panel", facts=[("deployment", self.deployment.value)], foot="No answer yet.")

    def _summary(self) -> str:
        return self._shown.footer() if self._shown is not None else ""

    def _closing(self) -> None:
        self._history.close()
        self.controls.close()

    def __repr__(self) -> str:
        return f"TextPanel({self.deployment.value!r}, answers={len(self.history)})"
