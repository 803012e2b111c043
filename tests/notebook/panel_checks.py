"""What the tests of all panels look at: controls, traffic, widgets that are left."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets as W
import pytest

KINDS = (W.Button, W.ToggleButton, W.Dropdown, W.Text, W.Textarea, W.Checkbox, W.BoundedIntText, W.BoundedFloatText)


def walk(widget: Any) -> Iterator[Any]:
    """A widget and everything in it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


def check_controls(panel: Any, least: int) -> None:
    """Every control has a description, a tooltip and a hook; the status line is announced."""
    controls = [widget for widget in walk(panel) if isinstance(widget, KINDS)]
    assert len(controls) >= least
    for control in controls:
        assert control.description, control
        assert control.tooltip, control.description
        assert any(css.startswith("miinb-") for css in control._dom_classes), control.description
    assert 'role="status" aria-live="polite"' in panel.status.value


def until(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    """Wait for a condition."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def nothing_left() -> Iterator[None]:
    """What is made inside is closed at the end: no widget and no thread of a panel is left."""
    before = set(W.widgets.widget._instances)
    yield
    assert set(W.widgets.widget._instances) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("miinb-panel")]


def count_traffic(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each message that widgets send from now on, those of new ones too."""
    sent: list[int] = []
    opened = W.Widget.open

    def send(self: Any, msg: Any, buffers: Any = None) -> None:
        sent.append(len(json.dumps(msg, default=str)))

    def open_one(self: Any) -> None:
        sent.append(len(json.dumps(self.get_state(), default=str)))
        opened(self)

    monkeypatch.setattr(W.Widget, "_send", send)
    monkeypatch.setattr(W.Widget, "open", open_one)
    return sent


def html_of(panel: Any) -> str:
    """All HTML that a panel shows, its snapshot's too."""
    shown = "".join(widget.value for widget in walk(panel) if isinstance(widget, W.HTML))
    return shown + str(panel.snapshot().html)
