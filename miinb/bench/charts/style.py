"""How every chart looks: colors, sizes, title, caption, footer, alternative text, PNG and SVG."""

from __future__ import annotations

import base64
import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from miinb.errors import InvalidValue
from miinb.wording import one_line
from miinb.writing import writing

#: Okabe and Ito's colors, told apart by nearly all eyes (jfly.uni-koeln.de/color).
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
BASELINES = {
    "baseline": {"facecolor": "#b9b9b9", "edgecolor": "#5f5f5f", "hatch": "////"},
    "baseline-best": {"facecolor": "#dcdcdc", "edgecolor": "#7a7a7a", "hatch": "...."},
    "baseline-sorted": {"facecolor": "#cccccc", "edgecolor": "#6b6b6b", "hatch": "----"},
    "baseline-continuous": {"facecolor": "#dcdcdc", "edgecolor": "#7a7a7a", "hatch": "\\\\\\\\"},
}
PUBLISHED = {"hatch": "xx"}
#: How the name of an arm ends that was not measured in the run.
ELSEWHERE = "(another run)"
OTHER = "#cfcfcf"
#: Parts of a request's time, in the order they happen; neighbors differ in brightness too, for prints without color.
PARTS = {
    "queue": ("queue", "#F0E442"),
    "preprocess": ("tokenize", "#56B4E9"),
    "model": ("model", "#0072B2"),
    "postprocess": ("detokenize", "#E69F00"),
    "rest": ("transport and client", OTHER),
}
#: The same of text-to-image.
IMAGE_PARTS = {
    "queue": PARTS["queue"],
    "text_encode": ("text encoder", PARTS["preprocess"][1]),
    "steps": ("steps", PARTS["model"][1]),
    "vae": ("VAE decoder", "#009E73"),
    "postprocess": ("picture file", PARTS["postprocess"][1]),
    "rest": PARTS["rest"],
}
INK, SOFT, GRID = "#1a1a1a", "#4d4d4d", "#dddddd"
WIDTH_IN = 7.4
WRAP = 122
DPI = 144
#: Of a logarithmic axis: as many as have room in a narrow panel.
MOST_TICKS = 7


class _Shown:
    """What shows itself in a notebook as an image with an alternative text."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        text = alt_text(self)
        image = base64.b64encode(png(self)).decode()
        width = round(WIDTH_IN * DPI / 1.5)
        return {"image/png": image, "text/plain": text}, {"image/png": {"alt": text, "width": width}}


class ChartAxes(_Shown, Axes):
    """Axes of a chart that has a figure of its own."""


class ChartFigure(_Shown, Figure):
    """The figure of such a chart."""


def new_axes(ax: Any, height_in: float = 4.2) -> Any:
    """`ax` itself, or the axes of a new figure of the charts' width."""
    if ax is None:
        ax = new_panels([height_in])[0]
    if not isinstance(ax, Axes):
        raise InvalidValue(f"ax: {type(ax).__name__} is no matplotlib Axes.", hint="Give one of plt.subplots().")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#999999")
    ax.tick_params(labelsize=9, color="#999999", labelcolor=INK)
    ax.set_axisbelow(True)
    return ax


def new_panels(heights_in: Sequence[float]) -> list[Any]:
    """Axes one above the other in a new figure of the charts' width."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = ChartFigure(figsize=(WIDTH_IN, sum(heights_in)), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights_in), 1, height_ratios=list(heights_in))
    return [figure.add_subplot(grid[row, 0], axes_class=ChartAxes) for row in range(len(heights_in))]


def finish(
    ax: Any,
    *,
    title: str,
    subtitle: str,
    caption: Iterable[str],
    footer: str,
    legend_above: bool = False,
    below: float = 0.0,
) -> Any:
    """Title, subtitle, and below the axes the caption and the footer; they also make the alternative text.

    `below` are points that something else takes between the axes and the caption.
    """
    title, subtitle, footer = one_line(title), one_line(subtitle), one_line(footer)
    lines = [one_line(text) for text in caption if text]
    own = isinstance(ax, ChartAxes)  # the figure is this chart's alone: the caption may use its whole width
    width = WRAP if own else max(int(WRAP * ax.get_position().width * ax.figure.get_figwidth() / WIDTH_IN), 30)
    below_title = textwrap.wrap(subtitle, int(width * 0.8))
    lift, size = (24 if legend_above else 8), (12.5 if own else 11)
    heading = "\n".join(textwrap.wrap(title, int(width * 0.55)))
    pad = lift + 14 * len(below_title) + 2
    ax.set_title(heading, loc="left", fontsize=size, fontweight="bold", color=INK, pad=pad, parse_math=False)
    if subtitle:
        ax.annotate(
            *("\n".join(below_title), (0, 1)),
            xycoords="axes fraction",
            xytext=(0, lift),
            textcoords="offset points",
            fontsize=9,
            color=SOFT,
        )
    write_below(ax, [*lines, footer], width, below)
    read_literally(ax)
    ax.set_gid("miinb-chart")
    ax._miinb_alt = [f"{title} ({subtitle})." if subtitle else f"{title}.", *lines]
    return ax


def read_literally(ax: Any) -> None:
    """Let no text of the axes be read as a formula: names and prices have dollar signs."""
    legend = ax.get_legend()
    ticks = [*ax.get_xticklabels(), *ax.get_yticklabels()]
    for text in (*ax.texts, *ticks, *(legend.get_texts() if legend else ())):
        text.set_parse_math(False)


def name_panel(ax: Any, name: str) -> None:
    """Write a panel's name above it, and begin its alternative text with it."""
    ax.annotate(
        *(name, (0, 1)),
        xycoords="axes fraction",
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9.5,
        fontweight="bold",
        color=SOFT,
        parse_math=False,
    )
    ax._miinb_alt = [f"{name}."]


def write_below(ax: Any, lines: Iterable[str], width: int = WRAP, below: float = 0.0) -> None:
    """Lines of small text below the axes, wrapped to `width` characters, `below` points further down."""
    wrapped = [part for line in lines if line for part in textwrap.wrap(line, width)]
    if not wrapped:
        return
    own = isinstance(ax, ChartAxes)
    ax.annotate(
        *("\n".join(wrapped), (0.012 if own else 0, 0)),
        xycoords=("figure fraction" if own else "axes fraction", ax.xaxis.label),
        xytext=(0, -8 - below),
        textcoords="offset points",
        va="top",
        fontsize=8,
        linespacing=1.45,
        color=SOFT,
        gid="miinb-caption",
        parse_math=False,
    )


def alt_text(chart: Any) -> str:
    """What a chart (its axes or its figure) shows, in words: title, drawn values, caption."""
    texts = []
    for ax in chart.axes if isinstance(chart, Figure) else [chart]:
        head = list(getattr(ax, "_miinb_alt", [ax.get_title(loc="left")]))
        values = [f"{getattr(t, 'miinb_whose', '')}{t.get_text()}" for t in ax.texts if t.get_gid() == "miinb-value"]
        texts.append(" ".join([*head[:1], *(["; ".join(values) + "."] if values else []), *head[1:]]))
    return " ".join(texts)


def png(chart: Any) -> bytes:
    """The chart (its axes or its figure) as PNG."""
    return _rendered(chart, "png")


def svg(chart: Any) -> str:
    """The chart (its axes or its figure) as SVG text."""
    return _rendered(chart, "svg").decode()


def _rendered(chart: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Description": alt_text(chart)} | ({"Date": None} if kind == "svg" else {})
    _write(chart, buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _write(chart: Any, target: Any, **options: Any) -> None:
    """`savefig`, silent about characters that the font has not: they are boxes here, and in the alternative text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        chart.get_figure(root=True).savefig(target, dpi=DPI, **options)


def save(chart: Any, path: str | Path) -> Path:
    """Write the chart (its axes or its figure); the ending chooses the format (.png, .svg, .pdf).

    Raises:
        InvalidValue: the ending is not known, or the file cannot be written.
    """
    target = Path(path)
    kind = target.suffix.removeprefix(".").lower() or "png"
    figure = chart.get_figure(root=True)
    if kind not in figure.canvas.get_supported_filetypes():
        raise InvalidValue(f"{path}: there are no charts of the kind {kind!r}.", hint="Use .png, .svg or .pdf.")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if kind in ("png", "svg"):
            target.write_bytes(_rendered(chart, kind))
        else:
            _write(figure, target)
    return target


def arm_style(arm: str, arms: Sequence[str]) -> dict[str, Any]:
    """Bar style of an arm: baselines grey and hatched, published ones hatched, the others in color, in order."""
    if arm in BASELINES:
        return {**BASELINES[arm], "linewidth": 0.8}
    if arm.endswith(ELSEWHERE):
        return {"facecolor": "#ffffff", "edgecolor": SOFT, "linestyle": ":", "linewidth": 1.4}
    others = [name for name in arms if name not in BASELINES]
    color = OKABE_ITO[others.index(arm) % len(OKABE_ITO)]
    if arm.endswith("(2022)"):
        if "baseline" in arm:
            return {"facecolor": "#ffffff", "edgecolor": "#5f5f5f", "hatch": "////", "linewidth": 0.8}
        return {"facecolor": "#ffffff", "edgecolor": color, "linewidth": 0.8, **PUBLISHED}
    return {"facecolor": color, "edgecolor": "white", "linewidth": 0.5}


def line_style(arm: str, arms: Sequence[str]) -> dict[str, Any]:
    """Line style of an arm: baselines grey and dashed."""
    if arm in BASELINES:
        color, dashes = ("#6b6b6b", "--") if arm == "baseline" else ("#a3a3a3", ":")
        return {"color": color, "linestyle": dashes, "marker": "s", "linewidth": 1.8, "markersize": 5}
    style = arm_style(arm, arms)
    color = style["facecolor"] if style["facecolor"] != "#ffffff" else style["edgecolor"]
    return {"color": color, "linestyle": "-", "marker": "o", "linewidth": 1.8, "markersize": 5}


def time_unit(largest_s: float) -> tuple[float, str]:
    """Factor and unit for an axis of times: seconds from 1 s on, else milliseconds."""
    return (1.0, "s") if largest_s >= 1.0 else (1e3, "ms")


def unit_word(unit: str) -> str:
    """The unit of `time_unit` as a word."""
    return {"s": "seconds", "ms": "milliseconds"}[unit]


def plain_log_ticks(ax: Any, low: float, high: float) -> None:
    """A logarithmic x axis from `low` to `high` with ticks at 1, 2, 5 times powers of ten, as plain numbers.

    Where these are too many they are at 1 and 3 times, or at powers of ten alone. An axis that has not three of them
    is short: round numbers at equal steps.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in decades for m in steps if low <= m * 10.0**e <= high]
        if len(ticks) <= MOST_TICKS:
            break
    if len(ticks) < 3:
        ticks = _even_ticks(low, high)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_xticks(ticks, [f"{tick:,.3g}" if tick < 1000 else f"{tick:,.0f}" for tick in ticks])
    ax.minorticks_off()


def near_ticks(axis: Any) -> None:
    """Round numbers on a logarithmic axis that has fewer than three powers of two to tell."""
    low, high = axis.get_view_interval()
    if high / low < 8:
        axis.set_ticks(_even_ticks(low, high))


def _even_ticks(low: float, high: float) -> list[float]:
    """Round numbers at equal steps."""
    return [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high] or [low, high]


def plain_numbers(axis: Any) -> None:
    """Tick labels with thousands separators and no needless zeros."""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
