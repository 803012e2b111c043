"""The bench panel: a workload, a progress bar, and the table and the chart that grow as its points complete."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from miinb.bench.arms import BENCHED
from miinb.errors import MiinbError
from miinb.notebook import cards
from miinb.notebook.bench_controls import WorkloadControls
from miinb.notebook.cards import QUIET, escaped
from miinb.notebook.controls import button, named, save_link
from miinb.notebook.streaming import Throttle
from miinb.notebook.work_panel import ROW, WorkPanel
from miinb.wording import printable

if TYPE_CHECKING:
    from miinb.bench.records import Runs
    from miinb.session import Session

ALONE = "(nothing)"
_HZ = 4.0


def runs_card(runs: Runs) -> cards.Card:
    """The table of a run and its chart, static."""
    from miinb.bench.display import runs_html, runs_text

    html, words = chart_html(runs)
    card, _ = cards.card("", body=[runs_html(runs), html])
    return card, printable("\n".join(part for part in (runs_text(runs), words) if part))


def chart_html(runs: Runs) -> tuple[str, str]:
    """A chart as an image that needs no kernel, and the same in words; the reason where it cannot be drawn.

    It is the frontier; of text-to-image the images a second, with the pictures.
    """
    from miinb.bench import charts

    try:
        chart = charts.draw("images" if charts.fitting(runs) == "images" else "frontier", runs)
    except MiinbError as error:
        return f'<div style="{QUIET}">{escaped(error.line())}</div>', ""
    words = charts.alt_text(chart)
    data = base64.b64encode(charts.png(chart)).decode()
    look = "max-width:100%;width:44em;background:white"
    return f'<img class="miinb-chart" alt="{escaped(words)}" style="{look}" src="data:image/png;base64,{data}">', words


def _count(done: int, total: int) -> str:
    """How many requests; how many a sweep will have nobody knows."""
    return f"{done} of {total} requests" if total else f"{done} requests"


class BenchPanel(WorkPanel):
    """Measures a deployment, alone or beside another one, under a workload.

    `panel.runs` has the last run as `Runs`, from its first complete point on.

    Args:
        session: the deployment that it measures first; others can be chosen.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.runs: Runs | None = None
        self._make_controls(session)
        self.children = [
            W.Box([self.deployment, self.beside], layout=ROW),
            self.workload.box,
            W.Box([self.run, self.halt, self.pinning, self.files], layout=ROW),
            self.bar,
            self.output,
            W.Box([self.folder, self.saving], layout=ROW),
            self.status,
        ]
        self._chosen()
        self._set_busy(False)

    def _make_controls(self, session: Session) -> None:
        self._choose(
            session, "The deployment that is measured", tasks=BENCHED, own_task=session.task, on_change=self._chosen
        )
        self.beside = named(
            W.Dropdown(
                description="Beside",
                tooltip="Another deployment that does the same work, in turns",
                options=(ALONE,),
                layout={"width": "18em"},
            ),
            "beside",
        )
        self.workload = WorkloadControls()
        self.run = button("Run", "run", "Send the requests", self.measure, button_style="primary", icon="play")
        self.halt = self._halt("End it; what was measured so far stays", text="Cancel", css="cancel")
        self.pinning.tooltip = "Keep table and chart in the notebook, below the panel"
        self.bar = named(
            W.IntProgress(description="Progress", tooltip="Requests that are done", layout={"width": "44em"}),
            "progress",
        )
        self.folder = named(
            W.Text(description="Folder", tooltip="Where Save writes the run", value="runs", layout={"width": "26em"}),
            "folder",
        )
        self.saving = button("Save", "save", "Write the run to the folder; miinb.load_runs reads it", self.save)

    # What the buttons do; each may be called from any thread, and from code

    def measure(self, _: Any = None) -> None:
        """Run the workload as it stands. Returns at once; a benchmark that runs goes on."""
        with self._lock:
            if self._busy:
                return
            try:
                fields = self.workload.values()
            except MiinbError as error:
                self._say(error.line())
                return
            names = [self.deployment.value] + [self.beside.value] * (self.beside.value != ALONE)
            self.bar.value = 0  # table and chart stay until the new run has its own
            self._begin(lambda: self._measure(names, fields), "Preparing the requests …")

    def save(self, _: Any = None) -> None:
        """Write the last run to the folder. Returns at once."""

        def write() -> str:
            assert self.runs is not None
            return f"Saved to {self.runs.save(folder)}."

        with self._lock:
            folder = self.folder.value.strip()
            if self._busy:
                return
            if self.runs is None or not folder:
                self._say("There is no run to save yet." if folder else "Which folder?")
                return
            self._begin(write, "Saving …")

    # The worker

    def _measure(self, names: Sequence[str], fields: Mapping[str, Any]) -> str:
        import miinb

        sessions = [self._session(name) for name in names]
        stop, began, throttle = threading.Event(), time.monotonic(), Throttle(_HZ)
        self._cancel_with(stop.set)

        def progress(done: int, total: int, record: Any) -> None:
            if throttle.due("") or done == total:
                left = (time.monotonic() - began) / done * (total - done)
                about = f" · about {cards.duration(left)} left" if total else ""
                with self._lock:
                    self.bar.max, self.bar.value = max(total, done), done
                    if not stop.is_set():
                        self._say(f"{_count(done, total)}{about}")

        runs = miinb.compare(sessions, dict(fields), progress=progress, on_point=self._keep, stop=stop)
        (env,) = runs.env.values()
        if env["done"]:
            self._keep(runs)
        ended = "Cancelled" if env.get("interrupted") else "Ended early" if env.get("gone") else "Done"
        failed = f" ({env['failed']} failed)" if env.get("failed") else ""
        took = cards.duration(time.monotonic() - began)
        return f"{ended}: {_count(env['done'], env['total'])}{failed} in {took}."

    def _keep(self, runs: Runs) -> None:
        """Take the run so far and show it; the chart is drawn without the lock."""
        shown = runs_card(runs)[0]
        with self._lock:
            self.runs, self.output.value = runs, shown

    # What is shown; the lock is held

    def _chosen(self) -> None:
        """Show the fields of the chosen deployment's task, and what may stand beside it."""
        with self._lock:
            self.workload.set_task(self._choice.task)
            options = (ALONE, *self._choice.alike)
            if tuple(self.beside.options) != options:
                chosen = self.beside.value
                self.beside.options = options
                self.beside.value = chosen if chosen in options else ALONE

    def _set_busy(self, busy: bool) -> None:
        for widget in (self.run, self.deployment, self.beside, self.folder):
            widget.disabled = busy
        self.workload.set_busy(busy)
        self.halt.disabled = not busy
        self.pinning.disabled = self.saving.disabled = busy or self.runs is None
        if not busy:
            self._chosen()

    def _show(self) -> None:
        if self.runs is not None:
            self.files.value = save_link(self.runs.summary.to_csv(index=False), "summary.csv", "Save summary .csv")

    def _card(self) -> cards.Card | None:
        return runs_card(self.runs) if self.runs is not None else None

    def _empty_card(self) -> cards.Card:
        return cards.card("Bench panel", facts=[("deployment", self.deployment.value)], foot="Nothing measured yet.")

    def __repr__(self) -> str:
        return f"BenchPanel({self.deployment.value!r}, runs={self.runs is not None})"
