"""Parts of panels: named controls with tooltips, which deployment, a generation's parameters, links that save text."""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as W

import miinb
from miinb.commands.options import escapes
from miinb.errors import MiinbError
from miinb.notebook.ordering import in_order
from miinb.tasks import TASKS

#: Tasks whose answers are text.
GENERATING = tuple(task.name for task in TASKS.values() if task.streams)
#: Tasks whose answers are pictures.
PICTURING = tuple(task.name for task in TASKS.values() if task.image)
_LAYOUT = {"width": "19em"}
_STYLE = {"description_width": "10em"}


def named(widget: Any, css: str) -> Any:
    """Give a widget the class that tests and style sheets find it by, and its place in the order of what is done."""
    widget.add_class(f"miinb-{css}")
    in_order(widget)
    return widget


def button(text: str, css: str, tooltip: str, on_click: Callable[[Any], None], **traits: Any) -> Any:
    """A button with a tooltip."""
    made = named(W.Button(description=text, tooltip=tooltip, **traits), css)
    made.layout.width = "auto"
    made.on_click(on_click)
    return made


def pin_button(text: str, css: str, tooltip: str, on_click: Callable[[Any], None]) -> Any:
    """A button that pins static output below the panel; hidden in Voila, whose pages show no later output."""
    made = button(text, css, tooltip, on_click, icon="thumb-tack")
    if os.environ.get("SERVER_SOFTWARE", "").startswith("voila/"):
        made.layout.display = "none"
    return made


def prompt_area(tooltip: str, *, example: str = "Once upon a time", rows: int = 4) -> Any:
    """Where a prompt is written."""
    look = {"placeholder": example, "rows": rows, "layout": {"width": "auto"}}
    return named(W.Textarea(description="Prompt", tooltip=tooltip, **look), "prompt")


def save_link(content: str | bytes, filename: str, label: str) -> str:
    """HTML of a link that saves this text or file, which travels inside it."""
    data = base64.b64encode(content.encode("utf-8", "replace") if isinstance(content, str) else content).decode()
    href = f"data:application/octet-stream;base64,{data}"
    name = f'download="{escape(filename)}" class="miinb-save" style="text-decoration:underline"'
    return f'<a {name} href="{href}">{escape(label)}</a>'


def control(kind: Any, name: str, tooltip: str, **traits: Any) -> Any:
    """A labeled control; its class is the name with dashes."""
    css = name.replace("_", "-").replace(" ", "-")
    return named(kind(description=name, tooltip=tooltip, style=_STYLE, layout=_LAYOUT, **traits), css)


def tick(name: str, tooltip: str, **traits: Any) -> Any:
    """A checkbox as wide as its words, for a row among other controls; its class is the name with dashes."""
    css = name.replace("_", "-").replace(" ", "-")
    made = W.Checkbox(description=name, tooltip=tooltip, indent=False, layout={"width": "auto"}, **traits)
    made.layout.margin = "2px 1.2em 2px 2px"
    return named(made, css)


class Fold(W.VBox):  # type: ignore[misc]
    """A part of a panel that a button shows and hides: ipywidgets' Accordion cannot be reached by the keyboard.

    Args:
        title: on the button.
        content: what it shows.
        css: the hook of the whole.

    Attributes:
        switch: the button; its value says whether the content is shown.
    """

    def __init__(self, title: str, content: Any, css: str) -> None:
        self._content = content
        self.switch = named(W.ToggleButton(description=title, layout={"width": "auto"}), f"{css}-switch")
        super().__init__([self.switch, content])
        self.layout.align_items = "flex-start"
        content.layout.align_self = "stretch"
        content.layout.padding = "6px 0"
        named(self, css)
        self.switch.observe(self._switched, "value")
        self._switched()

    @property
    def unfolded(self) -> bool:
        """Whether its content is shown."""
        return bool(self.switch.value)

    def _switched(self, _: Any = None) -> None:
        title = self.switch.description
        self.switch.icon = "caret-down" if self.unfolded else "caret-right"
        self.switch.tooltip = f"Hide {title.lower()}" if self.unfolded else f"Show {title.lower()}"
        self._content.layout.display = None if self.unfolded else "none"


class DeploymentChoice:
    """Which deployment is asked, of those that run.

    Args:
        chosen: the first; it is offered as long as it is chosen, whatever became of it.
        label: the control's description.
        css: its hook.
        tooltip: what it is for.
        own_task: of the first.
        tasks: deployments of other tasks are not offered.
        on_change: called when the user has chosen another one.

    Attributes:
        control: the widget.
    """

    def __init__(
        self,
        chosen: str,
        label: str,
        css: str,
        tooltip: str,
        *,
        own_task: str,
        tasks: Sequence[str],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._tasks, self._on_change = tasks, on_change
        self._known = {chosen: own_task}
        self._running: dict[str, str] = {}
        self.look()
        names = self._names(chosen)
        layout = {"width": "18em"}
        self.control = named(
            W.Dropdown(options=names, value=chosen, description=label, tooltip=tooltip, layout=layout), css
        )
        self._last = chosen
        self.control.observe(self._changed, "value")

    @property
    def task(self) -> str:
        """Of the chosen deployment."""
        return self._known[self.control.value]

    @property
    def others(self) -> list[str]:
        """The names that are offered besides the chosen one."""
        return [name for name in self.control.options if name != self.control.value]

    @property
    def alike(self) -> list[str]:
        """Those of them that serve the task of the chosen one."""
        return [name for name in self.others if self._known.get(name) == self.task]

    def look(self) -> None:
        """Ask which deployments run. Takes seconds where one is lost: not for a callback."""
        try:
            self._running = {one.name: one.task for one in miinb.deployments() if one.task in self._tasks}
        except (MiinbError, OSError):
            self._running = {}

    def refresh(self) -> None:
        """Offer what ran at the last look; the choice stays."""
        chosen = self._last
        if tuple(names := self._names(chosen)) != tuple(self.control.options):
            self._last = ""  # new options choose the first of them for a moment
            self.control.options = names
            self.control.value = self._last = chosen

    def close(self) -> None:
        """Detach the observer."""
        self.control.unobserve_all()

    def _changed(self, change: Any) -> None:
        if self._last and change["new"] and change["new"] != self._last:
            self._last = change["new"]
            self._on_change()

    def _names(self, own: str) -> list[str]:
        self._known = {own: self._known[own], **self._running}
        return sorted(self._known)


class GenerationControls:
    """The parameters of one generation as controls, with transformers' names.

    Attributes:
        box: the widget that holds them.
    """

    def __init__(self) -> None:
        whole, real, most = W.BoundedIntText, W.BoundedFloatText, 1 << 20
        self.max_new_tokens = control(whole, "max_new_tokens", "Most new tokens", value=128, min=1, max=most)
        self.do_sample = control(W.Checkbox, "do_sample", "Draw tokens at random; off: the most likely one")
        self.temperature = control(
            real, "temperature", "Above 1 more random, below 1 less", value=1.0, min=0.01, max=100, step=0.1
        )
        self.top_p = control(
            real, "top_p", "Draw among tokens of this total probability", value=1.0, min=0.01, max=1, step=0.05
        )
        self.top_k = control(whole, "top_k", "Draw among so many tokens; 0: all", value=0, min=0, max=most)
        self.repetition_penalty = control(
            real, "repetition_penalty", "Above 1: fewer repetitions", value=1.0, min=0.01, max=100, step=0.05
        )
        self.seed = control(whole, "seed", "Same seed, same answer", value=0, min=0, max=(1 << 31) - 1)
        self.lock = control(W.Checkbox, "lock seed", "Keep the seed; off: a new one for each answer")
        self.stop = control(
            W.Textarea, "stop strings", "Texts that end the answer; \\n is a line end", rows=2, placeholder="one a line"
        )
        self.chat = control(W.Checkbox, "chat", "Ask through the model's chat template")
        self.system = control(
            W.Text,
            "system",
            "Instructions before a chat; a change counts from the next answer on",
            placeholder="Be brief.",
        )
        self.stop.layout.width = self.system.layout.width = "30em"
        columns = (
            (self.max_new_tokens, self.repetition_penalty, self.stop, self.chat, self.system),
            (self.do_sample, self.temperature, self.top_p, self.top_k, self.seed, self.lock),
        )
        grid = W.Box([W.VBox(column) for column in columns], layout={"flex_flow": "row wrap"})
        self.box = Fold("Parameters", grid, "parameters")
        self.do_sample.observe(self._switched, "value")
        self.chat.observe(self._switched, "value")
        self._switched()

    def _switched(self, _: Any = None) -> None:
        """Controls that would not be read are off."""
        self.system.disabled = not self.chat.value
        for control in (self.temperature, self.top_p, self.top_k, self.seed, self.lock):
            control.disabled = not self.do_sample.value

    def values(self) -> dict[str, Any]:
        """Parameters for `Session.stream`; draws a new seed first unless it is locked."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens.value}
        if self.repetition_penalty.value != 1.0:
            chosen["repetition_penalty"] = self.repetition_penalty.value
        if stops := [escapes(line) for line in self.stop.value.split("\n") if line]:
            chosen["stop"] = stops
        if self.do_sample.value:
            if not self.lock.value:
                self.seed.value = random.randrange(1 << 31)
            chosen |= {"do_sample": True, "seed": self.seed.value}
            for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
                if (value := getattr(self, name).value) != neutral:
                    chosen[name] = value
        return chosen

    def request(self, prompt: str, turns: Sequence[dict[str, str]] = ()) -> str | list[dict[str, str]]:
        """What `Session.stream` gets for a prompt: the text itself, or a conversation.

        Args:
            prompt: what the user wrote.
            turns: what was said before in a chat.
        """
        if not self.chat.value:
            return prompt
        system = [{"role": "system", "content": self.system.value}] if self.system.value.strip() else []
        return [*system, *turns, {"role": "user", "content": prompt}]

    def load(self, values: Mapping[str, Any], request: str | Sequence[Mapping[str, str]] = "") -> None:
        """Set the controls to the parameters of an earlier answer, and to how its prompt was sent: plain, or a chat."""
        self.chat.value = not isinstance(request, str)
        if not isinstance(request, str):
            self.system.value = "".join(turn["content"] for turn in request if turn["role"] == "system")
        self.max_new_tokens.value = values["max_new_tokens"]
        self.do_sample.value = values.get("do_sample", False)
        for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0), ("repetition_penalty", 1.0)):
            getattr(self, name).value = values.get(name, neutral)
        self.seed.value = values.get("seed", self.seed.value)
        lines = (
            text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") for text in values.get("stop", ())
        )
        self.stop.value = "\n".join(lines)

    def close(self) -> None:
        """Detach the observers."""
        self.do_sample.unobserve_all()
        self.chat.unobserve_all()


def close_tree(widget: Any) -> None:
    """Close a widget with everything in it: children, layouts and styles are widgets of their own."""
    for child in getattr(widget, "children", ()):
        close_tree(child)
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None)):
        if isinstance(part, W.Widget):
            part.close()
    widget.close()
