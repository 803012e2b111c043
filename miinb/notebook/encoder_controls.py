"""Controls of the encoder panel: a task's inputs and its options, made from the table of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets as W

from miinb.commands.options import PREDICTION_HELP, words
from miinb.errors import InvalidValue
from miinb.notebook.controls import Fold, control, named, tick
from miinb.tasks import TASKS, TaskOption

#: Options that are always in sight; the others wait in an accordion.
MAIN = {
    "text-classification": ("top_k",),
    "token-classification": ("aggregation_strategy",),
    "question-answering": ("top_k", "handle_impossible_answer"),
    "fill-mask": ("top_k", "targets"),
    "feature-extraction": ("pooling", "normalize"),
}
#: What a panel begins with where the pipelines' default shows less than there is to see.
BEGIN: dict[str, dict[str, Any]] = {
    "text-classification": {"top_k": 5},
    "token-classification": {"aggregation_strategy": "simple"},
    "question-answering": {"top_k": 3},
    "fill-mask": {},
    "feature-extraction": {},
}
_PLACEHOLDERS = {
    "text-classification": "I liked every minute of it.",
    "token-classification": "Ada Lovelace lived in London.",
    "fill-mask": "Paris is the capital of [MASK].",
    "feature-extraction": "a text\nanother one\n(each line is a text; they are compared)",
}
_MODELS_OWN = "(the model's)"
_DEFAULT = "default"


def _widget(name: str, option: TaskOption, begin: Any) -> Any:
    text = PREDICTION_HELP[name]
    tooltip = text[:1].upper() + text[1:]
    if option.choices:
        choices = ((_MODELS_OWN,) if option.default is None else ()) + option.choices
        return control(W.Dropdown, name, tooltip, options=choices, value=begin or choices[0])
    if bool in option.kinds:
        return tick(name, tooltip, value=begin)
    if list in option.kinds:
        return control(W.Text, name, f"{tooltip}; a,b", value=",".join(begin or ()), placeholder="a,b")
    if begin is not None:
        return control(W.BoundedIntText, name, tooltip, value=begin, min=option.least, max=option.most)
    return control(W.Text, name, f"{tooltip}; empty: the default", placeholder=_DEFAULT)


class TaskOptions:
    """The options of an encoder task, with transformers' names.

    Attributes:
        controls: the widgets by name.
        box: the widget that holds them.
    """

    def __init__(self, task: str) -> None:
        self._known = TASKS[task].options
        self._begin = {name: option.default for name, option in self._known.items()} | BEGIN[task]
        self.controls = {name: _widget(name, option, self._begin[name]) for name, option in self._known.items()}
        for widget in self.controls.values():
            if not isinstance(widget, W.Checkbox):
                widget.style.description_width = "initial"  # some names are long
        main = [self.controls[name] for name in MAIN[task]]
        others = [widget for name, widget in self.controls.items() if name not in MAIN[task]]
        wrap = {"flex_flow": "row wrap", "align_items": "center"}
        more = Fold("More options", W.Box(others, layout=wrap), "more-options")
        self.box = W.VBox([W.Box(main, layout=wrap), more])

    def values(self) -> dict[str, Any]:
        """Options for `Session.predict`: those that differ from its defaults.

        Raises:
            InvalidValue: a number is none.
        """
        found = {name: self._value(name) for name in self._known}
        return {name: value for name, value in found.items() if value != self._known[name].default}

    def _value(self, name: str) -> Any:
        option, value = self._known[name], self.controls[name].value
        if option.choices:
            return None if value == _MODELS_OWN else value
        if list in option.kinds:
            given = words(value)
            return tuple(given) if given or option.default is not None else None
        if isinstance(value, str):
            return _whole(name, value)
        return value

    def load(self, options: Mapping[str, Any]) -> None:
        """Set the controls to the options of an earlier request."""
        for name, option in self._known.items():
            value = options.get(name, option.default)
            if list in option.kinds:
                value = ",".join(value or ())
            elif value is None:
                value = _MODELS_OWN if option.choices else ""
            widget = self.controls[name]
            widget.value = str(value) if isinstance(widget, W.Text) else value


def _whole(name: str, text: str) -> int | None:
    try:
        return int(text) if text.strip() else None
    except ValueError:
        raise InvalidValue(f"{name}: {text!r} is not a whole number.", hint="Leave it empty for the default.") from None


@dataclass(frozen=True)
class Given:
    """What the fields of `TaskInputs` held, and what of it goes to the model."""

    fields: Mapping[str, Any]
    inputs: Any

    @property
    def title(self) -> str:
        """The text, or the question."""
        return str(self.fields.get("question") or self.fields["text"])


class TaskInputs:
    """The text of a request; for question-answering question and context.

    Attributes:
        box: the widget that holds the fields of the task.
    """

    def __init__(self) -> None:
        wide = {"width": "auto"}
        self.text = named(W.Textarea(description="Text", tooltip="What the model reads", rows=4, layout=wide), "text")
        self.question = named(
            W.Text(
                description="Question",
                tooltip="What the context shall answer",
                placeholder="Who wrote it?",
                layout=wide,
            ),
            "question",
        )
        self.context = named(
            W.Textarea(
                description="Context",
                tooltip="The text with the answer in it",
                placeholder="Ada Lovelace wrote it in London.",
                rows=4,
                layout=wide,
            ),
            "context",
        )
        self.lines = tick("each line is a text", "Each line is a text of its own; off: all of it is one")
        self.box = W.VBox()
        self._task = ""

    def set_task(self, task: str) -> None:
        """Show the fields of this task; what is written in them stays."""
        if task != self._task:
            self._task = task
            self.text.placeholder = _PLACEHOLDERS.get(task, "")
            self.lines.value = task == "feature-extraction"
            self.box.children = [self.question, self.context] if self._pairs else [self.text, self.lines]

    @property
    def _pairs(self) -> bool:
        return self._task == "question-answering"

    def given(self) -> Given | None:
        """What is written in the fields; None while something is missing."""
        if self._pairs:
            pair = {"question": self.question.value, "context": self.context.value}
            return Given(pair, pair) if all(text.strip() for text in pair.values()) else None
        text, lines = self.text.value, self.lines.value
        inputs = [line for line in text.splitlines() if line.strip()] if lines else text
        return Given({"text": text, "lines": lines}, inputs) if text.strip() else None

    def load(self, fields: Mapping[str, Any]) -> None:
        """Write the fields of an earlier request."""
        for name, value in fields.items():
            getattr(self, name).value = value

    def clear(self) -> None:
        """Empty the fields."""
        self.text.value = self.question.value = self.context.value = ""

    def close(self) -> None:
        """Free the fields, those of other tasks too."""
        self.box.children = [self.question, self.context, self.text, self.lines]
