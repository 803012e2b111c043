"""The chart of text-to-image: images a second and seconds an image by batch, and under them what the arms made."""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from miinb.bench.charts import frames, names
from miinb.bench.charts.grouped import Bars
from miinb.bench.charts.measures import RATES, per_gpu
from miinb.bench.charts.style import INK, SOFT, WIDTH_IN
from miinb.bench.pixels import Pixels
from miinb.bench.thumbnails import pictures_in
from miinb.wording import number, one_line, shortened

#: Points: a picture's longer side, between two of them, and a line of text above each row.
SIDE, GAP, LINE = 112.0, 8.0, 13.0
#: Within axes that are not the chart's own: no smaller pictures, their share of the height, points for long labels.
LEAST_SIDE, SHARE, WIDE = 24.0, 0.4, 360.0
#: Arms whose pictures are shown, and pictures of each.
MOST_ARMS, MOST_COLUMNS = 3, 4
#: Characters of a line of a prompt above its picture; it has two, and a third one has the seed.
_PROMPT = 30
HIDDEN_FROM = 200.0  # spread of rates from which the smallest bar cannot be seen

Rows = dict[str, list[tuple[dict[str, Any], Pixels]]]


def images(frame: Any, *, ax: Any = None, by: str | None = None, log: bool | None = None, pictures: bool = True) -> Any:
    """Images a second of each arm and batch with the seconds per image beside them; under the bars the arms' pictures.

    The pictures are of the same prompts and seeds for all arms, as the (first) run kept them.

    Args:
        frame: runs, requests or a summary of text-to-image.
        ax: axes to draw on; None makes a figure.
        by: what the bars are grouped by, as for `latency`; None: by batch, load, model or run, whatever varies.
        log: dots on a logarithmic axis; None where bars would be too small to see.
        pictures: show them, where the runs have some.
    """
    rows = frames.summary_of(frame, "images")
    rows = frames.require(rows, ["img_s"], "images", "Only text-to-image runs have images.", "images per second")
    values, words = per_gpu(rows, "img_s")
    names.check_by(rows, by, "images")
    rows = names.in_order(rows.assign(value=values), by)
    bars = Bars(rows, rows["value"], lower_is_better=False, gpus=True, by=by)
    bars.on_log_axis(log, HIDDEN_FROM)
    sheet = _Sheet(_pictures(rows) if pictures else {}, ax)
    if ax is None or sheet.width >= WIDE:
        bars.notes = {index: f"{_seconds(s)} an image" for index, s in rows["image_p50_s"].dropna().items()}
    ax = bars.draw(ax, 1.0, RATES["img_s"].unit, below_in=sheet.height / 72)
    ax.set_xlabel(words + " (log axis)" * bars.dots, fontsize=9, color=INK)
    sheet.show(ax, names.arm_names(rows))
    what = "Images over the time of all requests"
    what += "; seconds an image are medians of a request's time over its images" if bars.notes else ""
    ax = bars.finish(ax, words, what, below=sheet.height)
    if sheet.made:
        shown = ", ".join(map(names.shown, sheet.made))
        ax._miinb_alt.append(f"Below the bars, {sheet.columns} pictures of each arm: {shown}.")
    return ax


def _seconds(value: float) -> str:
    return f"{number(value)} s" if value >= 1 else f"{number(value * 1e3)} ms"


def _pictures(rows: pd.DataFrame) -> Rows:
    """The pictures of the drawn arms, of the first run that has some; each arm's in the same order."""
    env = rows.attrs.get("env", {})
    for run_id in dict.fromkeys(rows["run_id"].dropna()):
        arms = names.arms_in(rows[rows["run_id"] == run_id])
        found: Rows = {}
        for facts, pixels in pictures_in(env.get(run_id, {})):
            if facts.get("arm") in arms:
                found.setdefault(str(facts["arm"]), []).append((facts, pixels))
        if found:
            return {arm: found[arm][:MOST_COLUMNS] for arm in arms if arm in found}
    return {}


class _Sheet:
    """The pictures below the bars: a row an arm, the prompts above the first; in a figure of its own a large one.

    Attributes:
        made: pictures by arm; {}: there is no room, or there are none.
        columns: pictures of a row.
        width, height: points of all of it.
    """

    def __init__(self, made: Rows, ax: Any) -> None:
        self.made = dict(list(made.items())[:MOST_ARMS])
        self.own = not isinstance(ax, Axes)
        self.columns = max((len(row) for row in self.made.values()), default=0)
        self.width, self.side, self._titles = WIDTH_IN * 72, SIDE, 0
        if self.own:
            self._titles = max((len(_title(facts)) for row in self.made.values() for facts, _ in row), default=0)
        else:
            box, (width, height) = ax.get_position(), ax.figure.get_size_inches()
            self.width = box.width * width * 72
            tall = SHARE * box.height * height * 72 / max(len(self.made), 1) - LINE - GAP
            self.side = min(SIDE, tall, self.width / max(self.columns, 1) - GAP)
        if self.side < LEAST_SIDE:
            self.made = {}
        self._step = (self.width - 2 * GAP) / MOST_COLUMNS if self.own else self.side + GAP
        rows = len(self.made) * (self.side + LINE + GAP)
        self.height = rows + 6 + self._titles * LINE if self.made else 0.0

    def show(self, ax: Any, arms: dict[str, str]) -> None:
        """Draw it below the axis' label; `arms` are the arms' names."""
        down = 6.0
        if self.own and self.made:
            for place, (facts, _) in enumerate(next(iter(self.made.values()))):
                _write(ax, place * self._step, down, "\n".join(_title(facts)), self.own, size=7.5)
            down += self._titles * (LINE - 1.5)
        for arm, pictures in self.made.items():
            _write(ax, 0, down, arms.get(arm, names.shown(arm)), self.own, weight="bold")
            for place, (_, pixels) in enumerate(pictures):
                _picture(ax, pixels, self.side, place * self._step, down + LINE, self.own)
            down += self.side + LINE + GAP


def _title(facts: dict[str, Any]) -> list[str]:
    """A picture's prompt in two short lines, and its seed."""
    words = one_line(str(facts.get("prompt") or ""))
    lines = textwrap.wrap(words, _PROMPT, max_lines=2, placeholder=" …") or [""]
    seed = [] if facts.get("seed") is None else [f"seed {facts['seed']}"]
    return [*(shortened(line, _PROMPT + 2) for line in lines), *seed]


def _place(ax: Any, own: bool) -> dict[str, Any]:
    """Where offsets begin: the left edge of the figure (of foreign axes: of the plot), and the axis' label."""
    return {
        "xy": (0.012 if own else 0.0, 0),
        "xycoords": ("figure fraction" if own else "axes fraction", ax.xaxis.label),
    }


def _write(
    ax: Any, right: float, down: float, text: str, own: bool, *, size: float = 8.5, weight: str = "normal"
) -> None:
    look: dict[str, Any] = {"fontsize": size, "fontweight": weight, "color": SOFT, "va": "top", "parse_math": False}
    ax.annotate(text, xytext=(right, -down), textcoords="offset points", gid="miinb-caption", **_place(ax, own), **look)


def _picture(ax: Any, pixels: Pixels, side: float, right: float, down: float, own: bool) -> None:
    """A picture of `side` points on its longer side."""
    image = OffsetImage(pixels, zoom=side / max(pixels.shape[:2]), interpolation="antialiased", dpi_cor=True)
    look: dict[str, Any] = {"frameon": False, "pad": 0.0, "box_alignment": (0, 1)}
    box = AnnotationBbox(image, xybox=(right, -down), boxcoords="offset points", **_place(ax, own), **look)
    box.set_gid("miinb-picture")
    ax.add_artist(box)
