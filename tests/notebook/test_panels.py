from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import ipywidgets as W
import pytest
from encoder_standin import EncoderStandIn
from panel_checks import count_traffic
from standin import StandIn

import miinb
from miinb.commands import actions
from miinb.errors import InvalidValue, QueueFull
from miinb.notebook import streaming
from miinb.notebook.panels import PANELS, panel
from miinb.notebook.text_panel import TextPanel


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    one = StandIn()
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [one.status()])
    return one


@pytest.fixture
def shown(session: StandIn) -> Iterator[TextPanel]:
    made = panel(session)
    yield made
    made.close()


def answered(shown: TextPanel, prompt: str = "Hi") -> None:
    shown.prompt.value = prompt
    shown.run.click()
    assert shown.wait(10)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_generate_shows_the_answer_and_its_timing(shown: TextPanel, session: StandIn) -> None:
    answered(shown)
    assert "Once upon a time" in shown.output.value
    assert "4 tokens · first token 35 ms" in shown.status.value
    assert session.calls == [("stream", "Hi", {"max_new_tokens": 128})]
    assert not shown.run.disabled
    assert shown.halt.disabled


def test_text_of_the_model_is_escaped_everywhere(shown: TextPanel, session: StandIn) -> None:
    session.words = ["<img src=x onerror=alert(1)>", "\x1b[31m"]
    answered(shown, "<script>alert(2)</script>")
    shown.pin()
    html = shown.output.value + shown.status.value + shown.files.value + shown.snapshot().html
    assert "<img" not in html
    assert "<script" not in html
    assert "\x1b" not in html + shown.snapshot().text
    assert "&lt;img" in shown.output.value


def test_stop_ends_the_answer_and_keeps_its_text(shown: TextPanel, session: StandIn) -> None:
    session.gate = threading.Event()
    shown.prompt.value = "Hi"
    shown.run.click()
    assert shown.run.disabled
    shown.halt.click()
    assert shown.wait(10)
    assert "stopped" in shown.status.value
    assert not shown.run.disabled


def test_clicks_from_two_threads_start_one_request(shown: TextPanel, session: StandIn) -> None:
    session.gate = threading.Event()
    shown.prompt.value = "Hi"
    clicks = [threading.Thread(target=shown.run.click) for _ in range(8)]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join(10)
    session.gate.set()
    assert shown.wait(10)
    assert len(session.calls) == 1


def test_updates_are_few_however_many_tokens_come(shown: TextPanel, session: StandIn) -> None:
    session.words = ["chapter "] * 400
    session.delay_s = 0.001
    updates: list[Any] = []
    shown.output.observe(updates.append, "value")
    began = time.monotonic()
    answered(shown)
    assert len(updates) <= 10 * (time.monotonic() - began) + 4
    assert shown.output.value.count("chapter") == 400


def test_an_error_is_one_escaped_line_and_frees_the_panel(shown: TextPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: StandIn, prompt: str, **_: Any) -> None:
        raise QueueFull("1024 <requests> wait.", hint="Try again later.")

    monkeypatch.setattr(StandIn, "stream", refuse)
    answered(shown)
    assert "QueueFull: 1024 &lt;requests&gt; wait. Try again later." in shown.status.value
    assert not shown.run.disabled


def test_parameters_reach_the_request_and_the_seed_changes_unless_locked(shown: TextPanel, session: StandIn) -> None:
    controls = shown.controls
    assert controls.temperature.disabled
    controls.do_sample.value = True
    assert not controls.temperature.disabled
    controls.temperature.value, controls.top_k.value, controls.stop.value = 0.7, 40, "\\n\nEND"
    answered(shown)
    shown.again.click()
    assert shown.wait(10)
    controls.lock.value = True
    shown.again.click()
    assert shown.wait(10)
    first, second, third = (parameters for _, _, parameters in session.calls)
    assert first["temperature"] == 0.7
    assert first["top_k"] == 40
    assert first["stop"] == ["\n", "END"]
    assert first["seed"] != second["seed"] == third["seed"]


def test_history_brings_prompt_parameters_and_answer_back(shown: TextPanel, session: StandIn) -> None:
    shown.controls.max_new_tokens.value = 5
    answered(shown, "first")
    shown.controls.max_new_tokens.value = 9
    session.words = ["another"]
    answered(shown, "second")
    shown.previous.click()
    assert shown.prompt.value == "first"
    assert shown.controls.max_new_tokens.value == 5
    assert "Once upon" in shown.output.value
    shown.next.click()
    assert shown.prompt.value == "second"
    assert "another" in shown.output.value


def test_chat_goes_through_the_template(shown: TextPanel, session: StandIn) -> None:
    assert shown.controls.system.disabled
    shown.controls.chat.value = True
    shown.controls.system.value = "Be short."
    answered(shown, "Why?")
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    assert session.calls[0][1] == turns


def test_history_brings_chat_and_instructions_back(shown: TextPanel, session: StandIn) -> None:
    controls = shown.controls
    controls.chat.value, controls.system.value = True, "Be short."
    answered(shown, "Why?")
    controls.system.value = ""
    answered(shown, "And now?")
    controls.chat.value, controls.system.value = False, "Be long."
    answered(shown, "Plain")
    shown.previous.click()
    assert (controls.chat.value, controls.system.value) == (True, "")
    shown.previous.click()
    shown.again.click()
    assert shown.wait(10)
    assert session.calls[-1][1] == session.calls[0][1]
    shown.previous.click()
    assert (shown.prompt.value, controls.chat.value) == ("Plain", False)


def test_an_empty_prompt_asks_for_one(shown: TextPanel, session: StandIn) -> None:
    shown.run.click()
    assert "Write a prompt first" in shown.status.value
    assert not session.calls


def test_every_control_has_a_name_a_tooltip_and_a_hook(shown: TextPanel) -> None:
    def walk(widget: Any) -> Iterator[Any]:
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    kinds = (W.Button, W.Dropdown, W.Textarea, W.Checkbox, W.BoundedIntText, W.BoundedFloatText)
    controls = [widget for widget in walk(shown) if isinstance(widget, kinds)]
    assert len(controls) >= 18
    for control in controls:
        assert control.description
        assert control.tooltip
        assert any(css.startswith("miinb-") for css in control._dom_classes)
    assert 'role="status" aria-live="polite"' in shown.status.value


def test_a_fold_shows_and_hides_what_is_in_it(shown: TextPanel) -> None:
    fold = shown.controls.box
    (content,) = fold.children[1:]
    for unfolded, display, icon, tooltip in (
        (False, "none", "caret-right", "Show parameters"),
        (True, None, "caret-down", "Hide parameters"),
        (False, "none", "caret-right", "Show parameters"),
    ):
        fold.switch.value = unfolded
        assert fold.unfolded == unfolded
        assert (content.layout.display, fold.switch.icon, fold.switch.tooltip) == (display, icon, tooltip)


def test_close_ends_the_request_and_leaves_no_widget(session: StandIn) -> None:
    before = set(W.widgets.widget._instances)
    made = panel(session)
    session.gate = threading.Event()
    made.prompt.value = "Hi"
    made.run.click()
    until(lambda: bool(session.calls))
    made.close()
    assert set(W.widgets.widget._instances) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "miinb-panel"]


def test_without_a_front_end_it_is_a_static_card(shown: TextPanel, capsys: pytest.CaptureFixture[str]) -> None:
    answered(shown)
    shown._ipython_display_()
    assert "> Hi\nOnce upon a time\n(tiny · 4 tokens" in capsys.readouterr().out


def test_unknown_panels_name_the_near_one(session: StandIn) -> None:
    with pytest.raises(InvalidValue, match="'text'"):
        panel(session, "txt")
    with pytest.raises(InvalidValue, match="'compare'"):
        panel(session, "comparison")


def test_the_command_offers_every_kind() -> None:
    assert tuple(PANELS) == actions.PANELS


@pytest.mark.parametrize("kind", ["encoder", "compare", "server"])
def test_clicks_from_many_threads_are_one_request(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    session = EncoderStandIn(gate=gate) if kind == "encoder" else StandIn(gate=gate)
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [session.status()])
    made = panel(session, kind)
    if kind == "encoder":
        made.inputs.text.value = "Hi"
    if kind == "compare":
        made.prompt.value = "Hi"
    click = made.again.click if kind == "server" else made.run.click
    clicks = [threading.Thread(target=click) for _ in range(8)]
    for one in clicks:
        one.start()
    for one in clicks:
        one.join(10)
    gate.set()
    assert made.wait(10)
    asked = session.asked if isinstance(session, EncoderStandIn) else session.calls
    assert len(asked) == (2 if kind == "compare" else 1)
    made.close()


@pytest.mark.parametrize("tokens_a_second", [10, 80, 1000])
def test_400_tokens_are_at_most_60_kilobytes(
    shown: TextPanel, session: StandIn, monkeypatch: pytest.MonkeyPatch, tokens_a_second: int
) -> None:
    session.words, session.delay_s = ["words "] * 400, 0.0005
    ticks = itertools.count()  # the clock is read at each token
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / tokens_a_second)
    monkeypatch.setattr(streaming, "time", clock)
    updates: list[Any] = []
    sent = count_traffic(monkeypatch)
    shown.output.observe(updates.append, "value")
    answered(shown)
    assert sum(sent) < 60_000
    assert len(updates) > min(20, 4000 / tokens_a_second)
