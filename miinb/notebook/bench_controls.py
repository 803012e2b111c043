"""Controls of the bench panel: the workload's fields, with the names of `BenchConfig`."""

from __future__ import annotations

from typing import Any

import ipywidgets as W

from miinb.bench.summary import task_kind
from miinb.commands.measuring import prompts_in
from miinb.commands.options import BENCH, floats, integers
from miinb.config import BenchConfig
from miinb.errors import InvalidValue
from miinb.notebook.controls import control, named

_HELP = {option.name: option.help[:1].upper() + option.help[1:] for option in BENCH}
_PROMPT_TOKENS = BenchConfig.model_fields["prompt_tokens"].default
#: How the requests come; the words are the fields of `BenchConfig`.
LOADS = ("concurrency", "rate")


class WorkloadControls:
    """The fields of one benchmark.

    Attributes:
        box: the widget that holds them.
    """

    def __init__(self) -> None:
        whole = W.BoundedIntText
        lengths = {"placeholder": "128, or 64-512"}
        self.prompt_tokens = control(
            W.Text, "prompt_tokens", _HELP["prompt_tokens"], value=str(_PROMPT_TOKENS), **lengths
        )
        self.new_tokens = control(W.Text, "new_tokens", _HELP["new_tokens"], value="64", **lengths)
        self.batch_size = control(whole, "batch_size", _HELP["batch_size"], value=1, min=1, max=1024)
        self._make_pictures()
        self.requests = control(
            W.Text, "requests", "Requests at each load; empty: enough for it", placeholder="enough for the load"
        )
        self.load = control(
            W.Dropdown,
            "load",
            "So many requests in flight, or so many arrivals a second",
            options=LOADS,
            value=LOADS[0],
        )
        self.loads = control(W.Text, "loads", "One point each: 1,4,16", value="1,4", placeholder="1,4,16")
        self.sweep = control(
            W.Checkbox, "sweep", "Instead of loads: double the load, from 1 on, until all are saturated"
        )
        self.slo = control(W.Text, "slo", f"{_HELP['slo']}; empty: none", placeholder="ttft=0.5,e2e=2")
        self.warmup = control(whole, "warmup", _HELP["warmup"], value=2, min=0, max=1000)
        self.seed = control(whole, "seed", _HELP["seed"], value=0, min=0, max=(1 << 31) - 1)
        self.price = control(W.Text, "price", f"{_HELP['price']}; empty: no cost", placeholder="no price")
        self.prompts = control(
            W.Textarea,
            "prompts",
            "Your own, one a line (or parts between lines of ---), taken in turn; empty: made of prompt_tokens",
            placeholder="one a line; empty: made of prompt_tokens",
            rows=2,
        )
        columns = (
            (self.prompt_tokens, self.new_tokens, self.batch_size, *self._pictures, self.requests),
            (self.load, self.loads, self.sweep, self.warmup),
            (self.seed, self.slo, self.price),
        )
        self.prompts.layout.width = "44em"
        grid = W.Box([W.VBox(column) for column in columns], layout={"flex_flow": "row wrap"})
        self._fields = [*(widget for column in columns for widget in column), self.prompts]
        self.box = named(W.VBox([grid, self.prompts]), "workload")
        self._kind = "text"

    def _make_pictures(self) -> None:
        """The fields of text-to-image."""

        def text(name: str, value: str, placeholder: str) -> W.Text:
            made: W.Text = control(W.Text, name, _HELP[name], value=value, placeholder=placeholder)
            return made

        self.num_images_per_prompt = text("num_images_per_prompt", "1", "1,8")
        self.num_inference_steps = text("num_inference_steps", "50", "50")
        self.guidance_scale = text("guidance_scale", "7.5", "7.5")
        self.width, self.height = (text(name, "", "the model's") for name in ("width", "height"))
        self._pictures = (
            self.num_images_per_prompt,
            self.num_inference_steps,
            self.guidance_scale,
            self.width,
            self.height,
        )

    def set_task(self, task: str) -> None:
        """Show the fields that this task has."""
        kind = self._kind = task_kind(task)
        shown = {self.prompt_tokens: kind != "image", self.new_tokens: kind == "text"}
        shown |= {self.batch_size: kind == "encoder", **dict.fromkeys(self._pictures, kind == "image")}
        for widget, there in shown.items():
            widget.layout.display = "" if there else "none"
        made = "built-in ones" if kind == "image" else "made of prompt_tokens"
        self.prompts.placeholder = f"one a line; empty: {made}"

    def values(self) -> dict[str, Any]:
        """Fields for `Session.bench`.

        Raises:
            InvalidValue: a number is none.
        """
        fields: dict[str, Any] = {"warmup": self.warmup.value}
        if self.seed.value:  # else each run has prompts of its own
            fields["seed"] = self.seed.value
        if self.prompts.value.strip():
            fields["prompts"] = prompts_in(self.prompts.value)
        elif self._kind != "image" and self.prompt_tokens.value.strip() != str(_PROMPT_TOKENS):
            fields["prompt_tokens"] = self.prompt_tokens.value.strip()  # else it is made to fit a short model
        if self._kind == "image":
            fields |= self._picture_values()
        else:
            own = self.batch_size if self._kind == "encoder" else self.new_tokens
            fields[own.description] = own.value
        if self.sweep.value:
            fields["sweep"] = self.load.value
        else:
            read = integers if self.load.value == "concurrency" else floats
            fields[self.load.value] = _read("loads", self.loads.value, read, "1,4,16")
        if self.slo.value.strip():
            fields["slo"] = self.slo.value.strip()
        if self.requests.value.strip():
            fields["requests"] = _read("requests", self.requests.value, int, "8")
        if self.price.value.strip():
            fields["price"] = _read("price", self.price.value, float, "2.5")
        return fields

    def _picture_values(self) -> dict[str, Any]:
        """Those of text-to-image; an empty size is the model's."""
        readers = {self.num_images_per_prompt: (integers, "1,8"), self.num_inference_steps: (int, "50")}
        readers |= {self.guidance_scale: (float, "7.5"), self.width: (int, "512"), self.height: (int, "512")}
        return {
            widget.description: _read(widget.description, widget.value, *how)
            for widget, how in readers.items()
            if widget.value.strip() or widget not in (self.width, self.height)
        }

    def set_busy(self, busy: bool) -> None:
        """Turn the fields on and off."""
        for widget in self._fields:
            widget.disabled = busy


def _read(name: str, text: str, read: Any, example: str) -> Any:
    try:
        found = read(text)
    except ValueError:
        found = None
    if found is None or found == []:
        raise InvalidValue(f"{name}: {text!r} cannot be read.", hint=f"Write it like {example}.")
    return found
