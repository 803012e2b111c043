"""Progress bars in a cell: text that is replaced and taken away at the end, not a widget.

tqdm's own notebook bars are widgets: what is left of them says "model not found" in a reopened notebook and in Voila.
"""

from __future__ import annotations

import io
from html import escape
from typing import Any

from IPython.display import display
from tqdm.std import tqdm

_STYLE = "margin:0;padding:0;background:none;color:inherit;opacity:.72"


class CellBar(tqdm):  # type: ignore[type-arg]
    """A bar in the running cell's output; takes tqdm's arguments."""

    monitor_interval = 0  # no thread of its own

    def __init__(self, *args: Any, **options: Any) -> None:
        self._handle: Any = None
        super().__init__(*args, **{"ncols": 80, **options, "file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm for each update, and with "" at the end of a bar that is not to be left."""
        text = str(self) if msg is None else msg
        data = {"text/plain": text, "text/html": f'<pre style="{_STYLE}">{escape(text)}</pre>' if text else ""}
        if self._handle is not None:
            self._handle.update(data, raw=True)
        elif text:
            self._handle = display(data, raw=True, display_id=True)
