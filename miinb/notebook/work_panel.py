"""What every panel has: one worker, a line that says where it stands, pins that stay in the notebook, a clean end.

A click may come in any thread (Jupyter runs callbacks in subshell threads): callbacks take the panel's lock, start or
cancel the worker, and return. The worker owns the request; it changes traits at most ten times a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

import ipywidgets as W
from IPython import get_ipython
from IPython.display import display

import miinb
from miinb import cell
from miinb.errors import Cancelled, MiinbError
from miinb.notebook import cards
from miinb.notebook.controls import DeploymentChoice, button, close_tree, named, pin_button
from miinb.wording import printable

if TYPE_CHECKING:
    from miinb.session import Session

#: The layout of a row of controls: it wraps where the notebook is narrow.
ROW = {"flex_flow": "row wrap", "align_items": "center"}
_END_S = 10.0
#: What is pinned travels as a whole with each pin, and stays in the notebook.
_MOST_PINNED = 3_000_000

_T = TypeVar("_T")


class Snapshot:
    """A static card."""

    def __init__(self, html: str, text: str) -> None:
        self.html, self.text = html, text

    def __str__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return cards.bundle((self.html, self.text))


class WorkPanel(W.VBox):  # type: ignore[misc]
    """A panel that asks deployments in a thread of its own, one request at a time.

    Display it once. `pin()` writes what it shows as static output below the panel: it stays when the notebook is
    closed, the widgets do not. `close()` ends what runs and frees all widgets; in their place stays what
    was pinned, or else what was shown, as static output.

    A panel of a kind says in `_card` what it shows, in `_set_busy` which controls work when, and puts `output`,
    `status`, `pinning` and its own controls into `children`; what
    chooses a deployment goes into `_choices`. What begins with "_" is called with the lock held.

    Args:
        session: the deployment that it begins with.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        named(self, "panel")
        self._lock = threading.RLock()
        self._sessions: dict[str, Session] = {session.name: session}
        self._worker: threading.Thread | None = None
        self._stop = threading.Event()
        self._cancels: list[Callable[[], object]] = []
        self._choices: tuple[DeploymentChoice, ...] = ()
        self._pins: list[cards.Card] = []
        self._own_display: Any = None
        self._pin_display: Any = None
        self.output = named(W.HTML(layout={"width": "auto"}), "output")
        self.status = named(W.HTML(), "status")
        self.files = named(W.HTML(), "files")
        self.pinning = pin_button("Pin", "pin", "Keep this answer in the notebook, below the panel", self.pin)
        self._say("Ready.")

    # What a kind of panel says of itself

    def _card(self) -> cards.Card | None:
        """What is shown, static; None while there is nothing."""
        raise NotImplementedError

    def _empty_card(self) -> cards.Card:
        """What stands for the panel while there is nothing to show."""
        return cards.card(type(self).__name__, foot="No answer yet.")

    def _summary(self) -> str:
        """One line about what is shown; asked where there is something."""
        return ""

    def _set_busy(self, busy: bool) -> None:
        """Turn controls on and off: those that would do nothing now are off."""

    def _show(self) -> None:
        """Bring what the panel shows up to date, as the worker has ended."""

    def _closing(self) -> None:
        """Detach observers, and close widgets that are not among the children."""

    def _left_card(self) -> cards.Card | None:
        """What `snapshot` gives, and what a closed panel leaves."""
        return self._card()

    # What the buttons of all panels do; each may be called from any thread, and from code

    def stop(self, _: Any = None) -> None:
        """End the running request; what came so far stays."""
        with self._lock:
            self._stop.set()
            for cancel in self._cancels:
                cancel()
            if self._cancels:
                self._say("Stopping …")

    def pin(self, _: Any = None) -> None:
        """Write what is shown as static output below the panel."""
        with self._lock:
            card = self._card()
            self._pin(card, self._summary() if card is not None else "")

    def _pin(self, card: cards.Card | None, summary: str) -> None:
        """Write a card below the panel. The lock is held."""
        if card is None:
            self._say("There is nothing to pin yet.")
            return
        if sum(len(pinned[0]) for pinned in (*self._pins, card)) > _MOST_PINNED:
            self._say("There is no room for another pin: display(panel.snapshot()) shows this in another cell.")
            return
        self._pins.append(card)
        self._show_pins()
        self._say(" · ".join(part for part in (summary, "pinned below the panel") if part))

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the running request is complete; False when the time is over first."""
        worker = self._worker
        if worker is not None:
            worker.join(timeout_s)
        return self._worker is None

    def snapshot(self) -> Snapshot:
        """What is shown as a static object; display it in any cell."""
        with self._lock:
            return Snapshot(*(self._left_card() or self._empty_card()))

    def close(self) -> None:
        """End what runs and free every widget of the panel; what it showed stays as static output.

        A notebook that is opened again says of widgets that are still shown that it cannot find them.
        """
        if self.comm is None:
            return
        self.stop()
        self.wait(_END_S)
        self._leave_static()
        self._closing()
        for choice in self._choices:
            choice.close()
        children = (*self.children, self.output, self.status, self.files, self.pinning)  # a panel may leave some out
        super().close()
        for child in children:
            close_tree(child)
        self.layout.close()

    def _halt(self, tooltip: str, *, text: str = "Stop", css: str = "stop") -> Any:
        """A button that ends the running request."""
        return button(text, css, tooltip, self.stop, icon="stop", disabled=True)

    def _choose(
        self,
        session: Session,
        tooltip: str,
        *,
        tasks: Sequence[str],
        own_task: str,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Make `deployment`, the control of the one deployment that the panel asks; see `DeploymentChoice`."""
        self._choice = DeploymentChoice(
            *(session.name, "Deployment", "deployment", tooltip), own_task=own_task, tasks=tasks, on_change=on_change
        )
        self._choices = (self._choice,)
        self.deployment = self._choice.control

    def _can_ask(self, prompt: str) -> bool:
        """Whether to ask with this prompt now: nothing runs, and there is one; says so where there is none."""
        if not self._busy and not prompt.strip():
            self._say("Write a prompt first.")
            return False
        return not self._busy

    # The worker

    @property
    def _busy(self) -> bool:
        return self._worker is not None

    def _begin(self, work: Callable[[], str], said: str) -> None:
        """Start the worker.

        Args:
            work: runs in its thread, without the lock; gives the line to show at the end, or raises.
            said: the line to show until then.
        """
        self._stop.clear()
        self._set_busy(True)
        self._say(said)
        self._worker = threading.Thread(target=self._work, args=(work,), name="miinb-panel", daemon=True)
        self._worker.start()

    def _work(self, work: Callable[[], str]) -> None:
        try:
            with cell.quiet():
                said = work()
        except (Exception, KeyboardInterrupt) as error:
            said = said_of(error)
        for choice in self._choices:
            choice.look()
        with self._lock:
            self._worker = None
            self._cancels.clear()
            try:
                self._show()
                for choice in self._choices:
                    choice.refresh()
                self._set_busy(False)
            except Exception as error:  # the panel must not stay busy for a bug in what it shows
                said = said_of(error)
            self._say(said)

    def _cancel_with(self, cancel: Callable[[], object]) -> None:
        """What Stop calls too; at once where it came before there was something to stop. Takes the lock."""
        with self._lock:
            self._cancels.append(cancel)
            if self._stop.is_set():
                cancel()

    def _awaited(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """The answer to an awaitable call of a session, which Stop gives up. Of the worker: without the lock.

        Raises:
            Cancelled: it was given up; `result` has what of it was complete, where the call says so.
        """

        async def answer() -> _T:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None

            def cancel() -> None:
                with contextlib.suppress(RuntimeError):  # the loop has just ended
                    loop.call_soon_threadsafe(task.cancel)

            self._cancel_with(cancel)
            try:
                return await ask()
            except asyncio.CancelledError as stopped:
                given_up = Cancelled("The request was given up.")
                given_up.result = getattr(stopped.__cause__, "result", None)
                raise given_up from None

        return asyncio.run(answer())

    def _session(self, name: str) -> Session:
        """The session of a deployment; joins it if it is not known yet. Of the worker: without the lock."""
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = miinb.attach(name)
        return session

    # What is shown

    def _say(self, text: str) -> None:
        self.status.value = f'<div role="status" aria-live="polite">{escape(printable(text))}</div>'

    def _show_pins(self) -> None:
        html = "".join(card[0] for card in self._pins)
        text = "\n\n".join(card[1] for card in self._pins)
        data = {"text/html": html, "text/plain": text}
        if self._pin_display is not None:
            self._pin_display.update(data, raw=True)

    def _leave_static(self) -> None:
        if self._own_display is not None:
            with self._lock:
                card = None if self._pins else self._left_card()
            self._own_display.update(cards.bundle(card or ("", "")), raw=True)

    def _ipython_display_(self) -> None:
        """The widgets, and below them the place for what is pinned; without a front end a static card."""
        if getattr(get_ipython(), "kernel", None) is None:
            print(self.snapshot())
            return
        self._own_display = display(self._repr_mimebundle_(), raw=True, display_id=True)
        self._pin_display = display({"text/html": "", "text/plain": ""}, raw=True, display_id=True)
        self._show_pins()


def said_of(error: BaseException) -> str:
    """An error as the line of a panel."""
    if isinstance(error, MiinbError):
        return f"{type(error).__name__}: {error.line()}"
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    return f"Unexpected {type(error).__name__}: {error}"  # a bug; the user has to see it
