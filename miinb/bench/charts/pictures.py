"""The chart of text-to-image: images a second and seconds an image by batch, and under them what the arms made."""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from miinb.bench.charts import frames, names
from miinb.bench.charts.grouped import Bars
from miinb.bench.charts.measures import RATES, per_gpu
from miinb.bench.charts.style import INK, SOFT, WIDTH_IN, ChartAxes
from miinb.bench.pixels import Pixels
from miinb.bench.thumbnails import pictures_in
from miinb.wording import number, one_line, shortened

#: Points: a picture's longer side, between two of them, and a line of text above each row.
SIDE, GAP, LINE = 112.0, 8.0, 13.0
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
    bars.notes = {index: f"{_seconds(s)} an image" for index, s in rows["image_p50_s"].dropna().items()}
    bars.on_log_axis(log, HIDDEN_FROM)
    made = _pictures(rows) if pictures else {}
    below = _height(made)
    ax = bars.draw(ax, 1.0, RATES["img_s"].unit, below_in=below / 72)
    ax.set_xlabel(words + " (log axis)" * bars.dots, fontsize=9, color=INK)
    if made:
        _show(ax, made, names.arm_names(rows))
    what = "Images over the time of all requests; seconds an image are medians of a request's time over its images"
    ax = bars.finish(ax, words, what, below=below)
    if made:
        shared = len(next(iter(made.values())))
        ax._miinb_alt.append(f"Below the bars, {shared} pictures of each arm: {', '.join(map(names.shown, made))}.")
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


def _height(made: Rows) -> float:
    """Points that the pictures take."""
    shown = min(len(made), MOST_ARMS)
    return shown * (SIDE + LINE + GAP) + 3 * LINE if shown else 0.0


def _show(ax: Any, made: Rows, arms: dict[str, str]) -> None:
    """A row of pictures an arm below the axis' label, the prompts above the first."""
    shown = dict(list(made.items())[:MOST_ARMS])
    own = isinstance(ax, ChartAxes)
    width = WIDTH_IN * 72 if own else ax.get_position().width * ax.figure.get_figwidth() * 72
    columns = max(1, min(MOST_COLUMNS, int((width - 2 * GAP) // (SIDE + GAP))))
    step = (width - 2 * GAP) / MOST_COLUMNS if own else SIDE + GAP
    down = 6.0
    for place, (facts, _) in enumerate(next(iter(shown.values()))[:columns]):
        _write(ax, place * step, down, "\n".join(_title(facts)), own, size=7.5)
    down += 3 * LINE - 6
    for arm, pictures in shown.items():
        _write(ax, 0, down, arms.get(arm, names.shown(arm)), own, weight="bold")
        for place, (_, pixels) in enumerate(pictures[:columns]):
            _picture(ax, pixels, place * step, down + LINE, own)
        down += SIDE + LINE + GAP


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


def _picture(ax: Any, pixels: Pixels, right: float, down: float, own: bool) -> None:
    """A picture of `SIDE` points on its longer side."""
    image = OffsetImage(pixels, zoom=SIDE / max(pixels.shape[:2]), interpolation="antialiased", dpi_cor=True)
    look: dict[str, Any] = {"frameon": False, "pad": 0.0, "box_alignment": (0, 1)}
    box = AnnotationBbox(image, xybox=(right, -down), boxcoords="offset points", **_place(ax, own), **look)
    box.set_gid("miinb-picture")
    ax.add_artist(box)
