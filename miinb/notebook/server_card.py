"""The server card: how a deployment is, once a second, with its plan, its logs, and buttons to end or begin it anew."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets as W

import miinb
from miinb import hardware
from miinb.errors import MiinbError
from miinb.messages import Status
from miinb.notebook import cards
from miinb.notebook.cards import QUIET, escaped
from miinb.notebook.controls import Fold, button, named
from miinb.notebook.work_panel import ROW, WorkPanel, said_of
from miinb.wording import size_words

if TYPE_CHECKING:
    from miinb.session import Session

#: States in words; those that need none are left out.
SAID = {
    "starting": "It is starting.",
    "draining": "It is ending: it takes no new requests.",
    "stopped": "It has stopped: no process is left. Restart begins it anew.",
    "failed": "It could not go on; the logs say why. Restart begins it anew.",
    "lost": "It is lost: it was killed, or does not answer. Restart begins it anew.",
}
ENDED = ("stopped", "failed", "lost")
_LOG_LINES = 50
_LOG_LOOK = "max-height:24em;overflow-y:auto"


@functools.cache
def _gpus() -> dict[int, hardware.Gpu]:
    """The GPUs by the index that ranks tell."""
    return {gpu.physical: gpu for gpu in hardware.detect().gpus}


def memory_html(status: Status) -> str:
    """A bar for each GPU, with what the deployment has reserved of it."""
    held: dict[int, int] = defaultdict(int)
    for rank in status.ranks:
        if rank.gpu is not None:
            held[rank.gpu] += rank.memory_bytes
    if not any(held.values()):
        return ""
    known = _gpus()
    lines = []
    for index, count in sorted(held.items()):
        gpu = known.get(index)
        name = f"GPU {index}" + (f" ({gpu.name})" if gpu else "")
        of = f" of {size_words(gpu.memory_bytes)}" if gpu else ""
        bar = cards.bar(count / gpu.memory_bytes) if gpu else ""
        lines.append(f"<div>{escaped(f'memory of {name}: {size_words(count)}{of}')} {bar}</div>")
    return "".join(lines)


def server_card(status: Status) -> cards.Card:
    """A deployment at this moment, with its memory and, while it starts, how far it is."""
    ended = status.state in ENDED
    apart = ("phase", *(("processes", "requests", "up", "memory") if ended else ()))
    facts = [fact for fact in cards.status_facts(status) if fact[0] not in apart]
    body = []
    said = SAID.get(status.state, "")
    if status.phase is not None and status.state == "starting":
        phase = status.phase
        count = f" {phase.done} of {phase.total}" if phase.total else ""
        said = " ".join(part for part in (said, f"Phase: {phase.name}{count} {phase.text}".strip()) if part)
        body.append(cards.bar(phase.done / phase.total) if phase.total else "")
    bars = "" if ended else memory_html(status)
    words = [f'<div style="margin:.3em 0">{escaped(said)}</div>'] if said else []
    title = f"Deployment {status.name}"
    shown = [fact for fact in facts if not bars or fact[0] != "memory"]
    html, _ = cards.card(title, status.state, facts=shown, body=[*words, *body, bars])
    _, text = cards.card(title, status.state, facts=facts, foot=said)
    return html, text


class ServerCard(WorkPanel):
    """How a deployment is. It looks once a second while it is displayed, for ten minutes; Refresh goes on.

    `end()`, `restart()` and `keep()` act on the deployment; `close()` closes the card alone.

    Args:
        session: the deployment.
        every_s: seconds between two looks.
        for_s: seconds after which it looks no more.
    """

    _view_count: int | None  # a trait of every widget: how often a front end shows it

    def __init__(self, session: Session, *, every_s: float = 1.0, for_s: float = 600.0) -> None:
        super().__init__(session)
        self._shown = session
        self._every_s, self._for_s = every_s, for_s
        self._looker: threading.Thread | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        self._end = 0.0
        self._seen = self._restarting = self._has_plan = False
        self._confirmed: Callable[[], None] = lambda: None
        self._make_controls()
        self.children = [
            self.output,
            W.Box([self.ending, self.again, self.keeping, self.fresh, self.pinning], layout=ROW),
            self.confirmation,
            self.plan,
            self.logs,
            self.status,
        ]
        self._last = session.status()
        self._set_busy(False)
        self._show()

    def _make_controls(self) -> None:
        self.ending = button("Stop", "stop", "End the deployment; asks first", self.ask_to_end, icon="stop")
        self.again = button("Restart", "restart", "End it and start it again as it was", self.ask_to_restart)
        self.keeping = button("Keep", "keep", "Let it outlive this notebook, until it is idle too long", self.keep)
        self.fresh = button("Refresh", "refresh", "Look now, and for ten minutes more", self.watch)
        self.question = named(W.HTML(), "question")
        self.yes = button("Yes", "yes", "Do it", self._agreed, button_style="danger")
        self.no = button("No", "no", "Leave it as it is", self._declined)
        self.confirmation = W.Box([self.question, self.yes, self.no], layout={**ROW, "display": "none"})
        self.plan_text, self.logs_text = W.HTML(), W.HTML()
        self.plan, self.logs = Fold("Plan", self.plan_text, "plan"), Fold("Logs", self.logs_text, "logs")
        for fold in (self.plan, self.logs):
            fold.switch.observe(self.watch, "value")

    # What the buttons do; each may be called from any thread, and from code

    def ask_to_end(self, _: Any = None) -> None:
        """Ask whether to end the deployment; Yes does."""
        self._ask(f"Stop {self._shown.name}? {self._running()}", self.end)

    def ask_to_restart(self, _: Any = None) -> None:
        """Begin it anew; asks first where requests are running."""
        with self._lock:
            if self._last.in_flight + self._last.queued and self._last.state not in ENDED:
                self._ask(f"Restart {self._shown.name}? {self._running()}", self.restart)
            else:
                self.restart()

    def end(self) -> None:
        """End the deployment. Returns at once."""
        self._act(lambda: self._shown.stop(), f"Stopping {self._shown.name} …", f"{self._shown.name} has stopped.")

    def restart(self) -> None:
        """End it and start it again as it was. Returns at once."""

        def again() -> None:
            self._restarting = True
            try:
                self._shown.restart(drain_s=0.0)  # who has pressed Yes knows what is lost
            finally:
                self._restarting = self._has_plan = False

        self._act(again, f"Restarting {self._shown.name} …", f"{self._shown.name} runs again.")

    def keep(self, _: Any = None) -> None:
        """Let it outlive this notebook. Returns at once."""
        said = f"{self._shown.name} now outlives this notebook."
        self._act(lambda: self._shown.keep(), "Keeping it …", said)

    def watch(self, _: Any = None) -> None:
        """Look now and go on looking, for ten minutes more."""
        with self._lock:
            self._end = time.monotonic() + self._for_s
            self._wake.set()
            if self._looker is None and not self._closed.is_set():
                self._looker = threading.Thread(target=self._look_on, name="miinb-panel-card", daemon=True)
                self._looker.start()

    def _ask(self, question: str, action: Callable[[], None]) -> None:
        with self._lock:
            if self._busy:
                return
            self._confirmed = action
            self.question.value = f"<b>{escaped(question)}</b>&nbsp;"
            self.confirmation.layout.display = "flex"
            self._say(question)

    def _running(self) -> str:
        count = self._last.in_flight + self._last.queued
        return f"{count} request{'s' * (count != 1)} would be lost." if count else "No request is running."

    def _agreed(self, _: Any = None) -> None:
        with self._lock:
            action = self._confirmed
            self._declined()
            action()

    def _declined(self, _: Any = None) -> None:
        with self._lock:
            self._take_back()
            self._say("Nothing was changed.")

    def _take_back(self) -> None:
        """Ask no more. The lock is held."""
        self._confirmed = lambda: None
        self.confirmation.layout.display = "none"

    def _act(self, action: Callable[[], object], during: str, after: str) -> None:
        def work() -> str:
            try:
                action()
            finally:
                now = self._shown.status()
                with self._lock:
                    self._last = now
                self.watch()
            return after

        with self._lock:
            if not self._busy:
                self._begin(work, during)

    # The thread that looks

    def _look_on(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self._every_s)
            self._wake.clear()
            with self._lock:
                if time.monotonic() >= self._end or self._closed.is_set():
                    self._looker = None
                    self._show(" It is no longer refreshed: press Refresh.")
                    return
            if self._displayed:
                self._look()

    @property
    def _displayed(self) -> bool:
        """Whether the card is in sight, where the front end says so; where it never does, it is."""
        self._seen = self._seen or bool(self._view_count)
        return not self._seen or bool(self._view_count)

    def _look(self) -> None:
        """One look, without the lock: the deployment may take seconds to answer."""
        try:
            now = self._status_now()
            plan = self._plan_now() if self.plan.unfolded else ""
            logs = self._logs_now() if self.logs.unfolded else ""
        except Exception as error:  # it may end between two questions; the next look tells
            with self._lock:
                self._say(said_of(error))
            return
        with self._lock:
            changed, self._last = now.state != self._last.state, now
            self._show()
            if plan:
                self.plan_text.value = plan
            if logs:
                self.logs_text.value = logs
            if not self._busy:
                self._set_busy(False)
                if now.state in ENDED:
                    self._take_back()
                if changed:
                    self._say(SAID.get(now.state, f"It is {now.state}."))

    def _status_now(self) -> Status:
        if self._restarting:  # the session knows the new deployment only when that is ready
            running = [one for one in miinb.deployments() if one.name == self._last.name]
            if running:
                return running[0]
        return self._shown.status()

    def _plan_now(self) -> str:
        if self._has_plan or self._last.state in (*ENDED, "starting"):
            return ""
        html = cards.plan_card(self._shown.plan())[0]
        self._has_plan = True
        return html

    def _logs_now(self) -> str:
        try:
            text = self._shown.logs(_LOG_LINES)
        except (MiinbError, OSError) as error:  # its folder goes with it
            text = str(error)
        return f'<div tabindex="0" style="{_LOG_LOOK}">{cards.pre(text or "There are no logs (any more).")}</div>'

    # What is shown; the lock is held

    def _set_busy(self, busy: bool) -> None:
        over = self._last.state in ENDED
        self.ending.disabled = busy or over
        self.again.disabled = busy
        self.keeping.disabled = busy or over or self._last.persist
        self.yes.disabled = self.no.disabled = busy

    def _show(self, more: str = "") -> None:
        note = f'<div style="{QUIET}">{escaped(more)}</div>' if more else ""
        self.output.value = server_card(self._last)[0] + note

    def _card(self) -> cards.Card:
        html, text = server_card(self._last)
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        return f'{html}<div style="{QUIET}">{at}</div>', f"{text}\n({at})"

    def _summary(self) -> str:
        return self._last.state

    def _closing(self) -> None:
        self._closed.set()
        self._wake.set()
        looker = self._looker
        if looker is not None:
            looker.join(10.0)
        for fold in (self.plan, self.logs):
            fold.switch.unobserve_all()

    def _ipython_display_(self) -> None:
        if self._view_count is None:
            self._view_count = 0  # from now on the front end counts
        super()._ipython_display_()
        self.watch()

    def __repr__(self) -> str:
        return f"ServerCard({self._last.name!r}, {self._last.state!r})"
