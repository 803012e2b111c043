"""The text panel's answers, and the conversations that they make: what was said before, shown above the newest one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from miinb.notebook import cards
from miinb.notebook.controls import close_tree, named
from miinb.wording import printable

if TYPE_CHECKING:
    from miinb.results import Result

_YOURS = "background:rgba(128,128,128,.12);border-radius:6px;padding:.4em .9em;margin:.5em 0 .25em;max-width:72em"
_ANSWER = "padding:.1em .9em .4em;max-width:72em;line-height:1.45"


@dataclass(eq=False)
class Answer:
    """One entry of a panel's history.

    Attributes:
        prompt: what the user wrote.
        request: what the deployment got: the prompt, or the conversation up to it.
        parameters: of the generation.
        deployment: its name.
        before: the answer that a conversation goes on from; None at its begin.
        text: the answer's so far.
        result: the whole answer; None while it grows, and if it failed.
    """

    prompt: str
    request: str | list[dict[str, str]]
    parameters: dict[str, Any]
    deployment: str
    before: Answer | None = None
    text: str = ""
    result: Result | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it was asked through the chat template."""
        return not isinstance(self.request, str)

    @property
    def counts(self) -> bool:
        """Whether there is something to go on from: a stopped answer counts with the text that it has."""
        return self.result is not None and bool(self.text or "cancelled" not in self.result.finish_reasons)

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation with this answer, without instructions; nothing if it is none."""
        if isinstance(self.request, str):
            return []
        said = [turn for turn in self.request if turn["role"] != "system"]
        return [*said, {"role": "assistant", "content": self.text}]

    @property
    def system(self) -> str:
        """The instructions of a conversation."""
        if isinstance(self.request, str):
            return ""
        return "".join(turn["content"] for turn in self.request if turn["role"] == "system")

    @property
    def conversation(self) -> list[Answer]:
        """The answers from the first one to this."""
        found, at = [self], self.before
        while at is not None:
            found.append(at)
            at = at.before
        return found[::-1]

    def footer(self) -> str:
        """How long it took."""
        return cards.timing_line(self.result) if self.result else "no answer"

    def head(self) -> str:
        """Who answered, in a line of text."""
        stopped = self.result is not None and "cancelled" in self.result.finish_reasons
        return f"Assistant · {self.deployment}{' · stopped' * stopped}"

    def asked_html(self) -> str:
        """What the user wrote, and the line above the answer; instructions where they begin or change."""
        changed = self.system != (self.before.system if self.before else "")
        told = f'<div style="{cards.QUIET}">System</div>{cards.pre(self.system or "(nothing)")}' if changed else ""
        yours = f'<div style="{_YOURS}">{told}<div style="{cards.QUIET}">You</div>{cards.pre(self.prompt)}</div>'
        return f'{yours}<div style="{cards.QUIET};padding:0 .9em">{cards.escaped(self.head())}</div>'

    def answer_html(self) -> str:
        """The answer as far as it is there."""
        text = cards.pre(self.text)
        return f'<div style="{_ANSWER}">{text}</div>' if self.is_chat else cards.box(text)

    def card(self) -> cards.Card:
        """Prompt and answer, or the whole conversation, static."""
        settings = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        foot = f"{self.deployment} · {self.footer()} · {settings}"
        if self.is_chat:
            body = [one.asked_html() + one.answer_html() for one in self.conversation]
            return cards.card("", body=body, foot=foot)[0], printable(f"{self.to_text()}\n({foot})")
        prompt = f'<div style="opacity:.72">{cards.pre(self.prompt)}</div><hr style="opacity:.35;margin:.4em 0">'
        html, _ = cards.card("", body=[prompt, cards.pre(self.text)], foot=foot)
        return html, printable(f"> {self.prompt}\n{self.text}\n({foot})")

    def to_text(self) -> str:
        """The answer; of a conversation all that was said."""
        if not self.is_chat:
            return self.text
        system = [f"System: {self.system}"] if self.system else []
        said = (part for one in self.conversation for part in (f"You: {one.prompt}", f"{one.head()}: {one.text}"))
        return "\n\n".join([*system, *said])

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


class Earlier:
    """The answers of a conversation above the newest one, a widget each: every one of them is sent once.

    Attributes:
        box: the widget that holds them.
    """

    def __init__(self) -> None:
        self.box = named(W.VBox(layout={"flex": "0 0 auto"}), "conversation")
        self._shown: list[Answer] = []

    def show(self, answers: Sequence[Answer]) -> None:
        """Show these; those that are shown already stay as they are."""
        pairs = zip(self._shown, answers, strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old is not new), min(len(self._shown), len(answers)))
        kept, gone = self.box.children[:same], self.box.children[same:]
        made = [W.HTML(one.asked_html() + one.answer_html(), layout={"width": "auto"}) for one in answers[same:]]
        self._shown = list(answers)
        if made or gone:
            self.box.children = (*kept, *made)
        for widget in gone:
            close_tree(widget)
