"""Panels by kind: widgets around a deployment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from miinb.errors import InvalidValue, did_you_mean
from miinb.notebook.bench_panel import BenchPanel
from miinb.notebook.compare_panel import ComparePanel
from miinb.notebook.controls import GENERATING, PICTURING
from miinb.notebook.encoder_panel import EncoderPanel
from miinb.notebook.image_compare_panel import ImageComparePanel
from miinb.notebook.image_panel import ImagePanel
from miinb.notebook.server_card import ServerCard
from miinb.notebook.text_panel import TextPanel
from miinb.notebook.work_panel import WorkPanel
from miinb.predictions import PREDICTIONS

if TYPE_CHECKING:
    from miinb.session import Session

PANELS: dict[str, Callable[[Session], WorkPanel]] = {
    "text": TextPanel,
    "image": ImagePanel,
    "encoder": EncoderPanel,
    "compare": ComparePanel,
    "bench": BenchPanel,
    "server": ServerCard,
}
#: The same of tasks whose answers are pictures.
_OF_PICTURES: dict[str, Callable[[Session], WorkPanel]] = {"compare": ImageComparePanel}
#: What a deployment must serve for a panel; the others take any.
TASKS_OF: dict[str, Sequence[str]] = {
    "text": GENERATING,
    "image": PICTURING,
    "encoder": tuple(PREDICTIONS),
    "compare": (*GENERATING, *PICTURING),
}
#: Kinds that are chosen by the task.
OWN = ("text", "image", "encoder")


def panel(session: Session, kind: str | None = None) -> WorkPanel:
    """A panel for a session.

    Args:
        session: the deployment.
        kind: "text", "image", "encoder", "compare", "bench" or "server"; None chooses one of the first three by the
            task.

    Raises:
        InvalidValue: there is no such panel, or it is none for this task.
    """
    there = f"There is: {', '.join(PANELS)}."
    if kind is None:
        kind = next((one for one in OWN if session.task in TASKS_OF[one]), None)
    if kind is None:
        raise InvalidValue(f"There is no panel for the task {session.task!r} yet.", hint=there)
    if kind not in PANELS:
        raise InvalidValue(f"There is no panel {kind!r}.", hint=did_you_mean(kind, PANELS))
    if kind in TASKS_OF and session.task not in TASKS_OF[kind]:
        own = next((one for one in OWN if session.task in TASKS_OF[one]), "server")
        raise InvalidValue(f"panel: {kind!r} is not for {session.task}.", hint=f"{session.name} has {own!r}.")
    of_task = _OF_PICTURES if session.task in PICTURING else {}
    return of_task.get(kind, PANELS[kind])(session)
