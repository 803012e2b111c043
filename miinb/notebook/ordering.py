"""What a user does in a panel reaches it in the order in which it was done."""

from __future__ import annotations

from typing import Any


def in_order(widget: Any) -> None:
    """Let all messages of a widget come to the thread that the front end has chosen, as those of the other widgets do.

    ipykernel 7.4 hands a message to the shell that has changed the widget last instead, the main one or a subshell,
    which are threads of their own: a field that a cell has made is heard in the main thread, a button that was clicked
    before in a subshell. A click then overtakes what was written before it, and fields wait until a running cell ends.

    Args:
        widget: with its channel to the front end; without one, or with another kernel, there is nothing to do.
    """
    if hasattr(widget.comm, "_reply_subshell_for"):
        widget.comm._reply_subshell_for = _as_sent


def _as_sent(data: Any, subshell_id: str | None) -> str | None:
    """The shell that the front end has sent a message to."""
    return subshell_id
