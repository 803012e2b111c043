"""What a session does with the notebook cell that it is called from: progress lines, and the Stop button."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from miinb.image_messages import ImagesProgress
from miinb.messages import Phase

if TYPE_CHECKING:
    from miinb.streams import Stream

_BAR = "{desc} {bar} {elapsed}"
_COUNT = "{desc}: {n_fmt} done, {elapsed}"
_STEPS = "{desc}: step {n_fmt} of {total_fmt} {bar} {elapsed}"
_PHASES = ("start", "load", "compile", "verify", "capture", "ready")

#: Whether work shows no lines: that of a panel has its own place for them.
_quiet: ContextVar[bool] = ContextVar("miinb_quiet", default=False)
#: Streams that cells have opened and may have left open.
_open_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


def end_with_cell(stream: Stream) -> None:
    """See that the Stop button ends the stream also when it hits the cell's own code between two chunks.

    The traceback that IPython keeps would hold the abandoned iterator, and so its slot in the model.
    """
    shell = _shell() if "IPython" in sys.modules else None
    if shell is None or threading.current_thread() is not threading.main_thread():
        return
    shell.events.register("post_run_cell", _cell_ended)  # once: the same function is not added again
    _open_streams.add(stream)


def _cell_ended(result: Any) -> None:
    if isinstance(result.error_in_exec, KeyboardInterrupt):
        for stream in list(_open_streams):
            stream.cancel()
    _open_streams.clear()


@contextmanager
def quiet() -> Iterator[None]:
    """No lines of progress in this thread: what runs for a widget has no cell of its own to show them in."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def bar(**options: Any) -> Any:
    """A bar of tqdm's, with its options: replaced text in a notebook and on a terminal, nothing elsewhere."""
    if _quiet.get() or not (_in_notebook() or sys.stderr.isatty()):
        options["disable"] = True
    elif _in_notebook():
        from miinb.notebook.bars import CellBar

        return CellBar(**options)
    from tqdm.std import tqdm

    return tqdm(**options)


@contextmanager
def progress(name: str) -> Iterator[Callable[[Phase], None]]:
    """A bar of the start's phases."""
    with bar(total=len(_PHASES), leave=False, bar_format=_BAR) as shown:

        def on_phase(phase: Phase) -> None:
            if phase.name in _PHASES:
                shown.n = _PHASES.index(phase.name) + min(1.0, phase.done / max(1, phase.total))
            shown.set_description(f"{name}: {phase.name} {phase.text}".strip(), refresh=True)

        yield on_phase
        shown.n = len(_PHASES)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """A line that counts what is done, of work that takes longer than a second; nothing in a pipe."""
    line: Any = None

    def advance(count: int) -> None:
        nonlocal line
        if line is None:
            line = bar(desc=what, delay=1.0, leave=False, bar_format=_COUNT)
        line.update(count)

    try:
        yield advance
    finally:
        if line is not None:
            line.close()


@contextmanager
def steps(what: str) -> Iterator[Callable[[ImagesProgress], None]]:
    """A bar of the steps of pictures, where they take longer than a second; nothing in a pipe."""
    line: Any = None

    def on_progress(progress: ImagesProgress) -> None:
        nonlocal line
        if line is None:
            line = bar(desc=what, total=progress.total, delay=1.0, leave=False, bar_format=_STEPS)
        line.update(progress.step - line.n)

    try:
        yield on_progress
    finally:
        if line is not None:
            line.close()


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules and "IPKernelApp" in str(getattr(_shell(), "config", ""))


def _shell() -> Any:
    from IPython.core.getipython import get_ipython

    return get_ipython()
