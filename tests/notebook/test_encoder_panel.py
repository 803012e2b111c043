from __future__ import annotations

import csv
import io
import json
import re
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from encoder_standin import EncoderStandIn
from panel_checks import check_controls, html_of, nothing_left, until
from standin import StandIn

import miinb
from miinb import Session
from miinb.demo import tiny_encoder
from miinb.errors import InvalidValue, QueueFull
from miinb.notebook.encoder_panel import EncoderPanel
from miinb.notebook.panels import panel
from miinb.predictions import PREDICTIONS

Make = Callable[..., tuple[EncoderStandIn, EncoderPanel]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[EncoderPanel] = []
    running: list[Any] = []
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [one.status() for one in running])
    monkeypatch.setitem(vars(miinb), "attach", lambda name: next(one for one in running if one.name == name))

    def one(task: str, *others: Any, **fields: Any) -> tuple[EncoderStandIn, EncoderPanel]:
        session = EncoderStandIn(task=task, **fields)
        running.extend([session, *others])
        made.append(panel(session))
        return session, made[-1]

    yield one
    for shown in made:
        shown.close()


def ask(shown: EncoderPanel, text: str = "Ada Lovelace lived in London.") -> None:
    shown.inputs.text.value = text
    shown.inputs.question.value = shown.inputs.context.value = text
    shown.run.click()
    assert shown.wait(10)


def saved(shown: EncoderPanel) -> dict[str, str]:
    """The files behind the links, by the ending of their names."""
    links = re.findall(r'download="\w+\.(\w+)"[^>]*base64,([^"]*)"', shown.files.value)
    return {kind: b64decode(data).decode() for kind, data in links}


@pytest.mark.parametrize("task", sorted(PREDICTIONS))
def test_each_task_shows_its_answer_and_saves_it(make: Make, task: str) -> None:
    session, shown = make(task)
    ask(shown, "one text\nanother")
    words = {
        "text-classification": "0.9000",
        "token-classification": "PER 1",
        "question-answering": "0.8000",
        "fill-mask": "Paris",
        "feature-extraction": "cosine similarity",
    }
    assert words[task] in shown.output.value
    assert "in all" in shown.status.value
    assert shown.predictions is not None
    assert len(shown.predictions) == (2 if task == "feature-extraction" else 1)
    files = saved(shown)
    assert json.loads(files["json"])["task"] == task
    rows = list(csv.DictReader(io.StringIO(files["csv"])))
    assert len(rows) == sum(1 for _ in shown.predictions.each())
    assert words[task] in shown.snapshot().html
    check_controls(shown, 12)
    assert session.asked


def test_an_empty_panel_says_that_there_is_nothing_to_pin(make: Make) -> None:
    _, shown = make("fill-mask")
    shown.pin()
    assert "nothing to pin" in shown.status.value


@pytest.mark.parametrize("task", sorted(PREDICTIONS))
def test_hostile_text_is_no_markup(make: Make, task: str) -> None:
    probe = "<img src=x onerror=alert(1)>"
    _, shown = make(task, evil=probe)
    ask(shown, f"{probe}\n{probe}\x1b[31m")
    shown.pin()
    assert "<img" not in html_of(shown)
    assert "\x1b" not in html_of(shown) + shown.snapshot().text
    assert "&lt;img" in shown.output.value


def test_options_reach_the_request(make: Make) -> None:
    session, shown = make("token-classification")
    controls = shown.options.controls
    assert set(controls) == {"aggregation_strategy", "ignore_labels", "stride", "truncation"}
    ask(shown)
    assert session.asked[-1][1] == {"aggregation_strategy": "simple"}
    controls["aggregation_strategy"].value = "none"
    controls["ignore_labels"].value = "O, MISC"
    controls["stride"].value = " 4"
    controls["truncation"].value = True
    ask(shown)
    assert session.asked[-1][1] == {"ignore_labels": ("O", "MISC"), "stride": 4, "truncation": True}
    controls["stride"].value = "four"
    ask(shown)
    assert "stride: &#x27;four&#x27; is not a whole number" in shown.status.value
    assert len(session.asked) == 2


def test_history_brings_text_options_and_answer_back(make: Make) -> None:
    _, shown = make("text-classification")
    shown.options.controls["top_k"].value = 1
    ask(shown, "first")
    shown.options.controls["top_k"].value = 2
    shown.options.controls["function_to_apply"].value = "sigmoid"
    shown.inputs.lines.value = True
    ask(shown, "second\nthird")
    shown.previous.click()
    assert shown.inputs.text.value == "first"
    assert not shown.inputs.lines.value
    assert shown.options.controls["top_k"].value == 1
    assert shown.options.controls["function_to_apply"].value == "(the model's)"
    assert shown.predictions is not None
    assert shown.predictions.inputs == ["first"]
    shown.next.click()
    assert shown.options.values() == {"top_k": 2, "function_to_apply": "sigmoid"}


def test_stop_gives_a_request_up(make: Make) -> None:
    session, shown = make("fill-mask", gate=threading.Event())
    shown.inputs.text.value = "a"
    shown.run.click()
    assert shown.run.disabled
    until(lambda: session.asked)
    shown.halt.click()
    assert shown.wait(10)
    assert "given up" in shown.status.value
    assert not shown.run.disabled
    shown.pin()
    assert "no answer" in shown.snapshot().text


def test_another_deployment_brings_its_own_fields(make: Make) -> None:
    other = EncoderStandIn(name="answers", task="question-answering")
    _, shown = make("text-classification", other, StandIn(name="stories"))
    assert shown.deployment.options == ("answers", "tiny")
    shown.deployment.value = "answers"
    assert shown.inputs.box.children == (shown.inputs.question, shown.inputs.context)
    shown.run.click()
    assert "a question and its context" in shown.status.value
    ask(shown, "Who?")
    assert other.asked == [({"question": "Who?", "context": "Who?"}, {"top_k": 3})]
    shown.deployment.value = "tiny"
    shown.history.append(shown.history[0])
    shown._history.refresh()
    shown.previous.click()
    assert shown.deployment.value == "answers"


def test_errors_are_a_line_and_free_the_panel(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: Any, inputs: Any, **_: Any) -> None:
        raise QueueFull("1024 <requests> wait.", hint="Try again later.")

    _, shown = make("text-classification")
    monkeypatch.setattr(EncoderStandIn, "apredict", refuse)
    ask(shown)
    assert "QueueFull: 1024 &lt;requests&gt; wait. Try again later." in shown.status.value
    assert not shown.run.disabled


def test_large_answers_are_no_link(make: Make) -> None:
    _, shown = make("feature-extraction")
    ask(shown, "\n".join(f"text {i}" for i in range(3000)))
    assert "panel.predictions.frame" in shown.files.value
    assert sum(len(widget) for widget in (shown.files.value, shown.output.value)) < 60_000


def test_close_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [EncoderStandIn(name=task, task=task) for task in PREDICTIONS]
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [one.status() for one in others])
    with nothing_left():
        shown = panel(EncoderStandIn(gate=threading.Event()))
        for other in others:
            shown.deployment.value = other.name
        shown.deployment.value = "tiny"
        shown.inputs.text.value = "a"
        shown.run.click()
        shown.close()


def test_a_panel_that_does_not_fit_the_task_is_refused(make: Make) -> None:
    with pytest.raises(InvalidValue, match="'text'"):
        panel(StandIn(), "encoder")
    with pytest.raises(InvalidValue, match="'encoder'"):
        panel(EncoderStandIn(), "text")


def test_a_real_deployment_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tiny_encoder("token-classification")
    with Session(folder, name="names", device="cpu", options={"threads": 1}) as session:
        shown = session.panel()
        ask(shown, "Ada Lovelace lived in London.")
        assert "in all" in shown.status.value
        assert shown.predictions is not None
        assert [one.entity for one in shown.predictions[0]]
        shown.close()
        measured = session.panel("bench")
        measured.workload.loads.value, measured.workload.batch_size.value = "1,2", 2
        measured.run.click()
        assert measured.wait(60)
        assert "Done: " in measured.status.value
        assert list(measured.runs.summary["batch_size"]) == [2, 2]
        measured.close()
