"""Panels by kind: widgets around a deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets as W

from miinb.errors import InvalidValue, did_you_mean
from miinb.notebook.text_panel import TextPanel

if TYPE_CHECKING:
    from miinb.session import Session

PANELS = {"text": TextPanel}
#: Kinds of the contract that are not built yet.
LATER = ("image", "encoder", "compare", "bench", "server")


def panel(session: Session, kind: str | None = None) -> W.Widget:
    """A panel for a session.

    Args:
        session: the deployment.
        kind: "text"; None chooses by the deployment's task.

    Raises:
        InvalidValue: there is no such panel, or none for this task yet.
    """
    if kind is None and session.task in ("text-generation", "conversational"):
        kind = "text"
    if kind is None:
        raise InvalidValue(f"There is no panel for the task {session.task!r} yet.", hint="There is: text.")
    if kind in LATER:
        raise InvalidValue(f"The panel {kind!r} is not there yet.", hint="There is: text.")
    if kind not in PANELS:
        raise InvalidValue(f"There is no panel {kind!r}.", hint=did_you_mean(kind, PANELS))
    return PANELS[kind](session)
