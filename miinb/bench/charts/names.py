"""Names in charts: arms, models, runs and loads as they can be drawn, and what bars and lines are grouped by."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from miinb.bench.charts.style import BASELINES
from miinb.bench.display import run_labels
from miinb.bench.summary import encodes, task_kind
from miinb.errors import InvalidValue, did_you_mean
from miinb.wording import one_line, shortened

#: What bars and lines can be grouped by: columns of the summary, and how a value reads.
BY: dict[str, Callable[[Any], str]] = {
    "arm": lambda value: shown(value),
    "model": lambda value: shown(short_model(value)),
    "task": str,
    "engine": lambda value: shown(value),
    "dtype": lambda value: shown(value),
    "n_gpus": lambda value: gpu_words(int(value)),
    "tp": "tensor_parallel {:g}".format,
    "replicas": lambda value: f"{value:g} replica{'s' * (value != 1)}",
    "batch_size": "batch size {:g}".format,
    "concurrency": "concurrency {:g}".format,
    "rate_rps": "{:g} requests/s".format,
    "run": str,
}


def check_by(frame: pd.DataFrame, by: str | None, chart: str) -> None:
    """Refuse what a chart cannot be grouped by.

    Raises:
        InvalidValue: there is no such column, or it is empty.
    """
    if by is None:
        return
    if not isinstance(by, str):
        raise InvalidValue(f"by: {by!r} is no name of a column.", hint=f"Give one of {', '.join(BY)}.")
    if by not in BY:
        raise InvalidValue(f"by: charts are not grouped by {by!r}.", hint=did_you_mean(by, BY))
    if by != "run" and not any(map(_known, frame[by])):
        raise InvalidValue(f"by: these runs have no {by}.", hint=f"charts.{chart} is grouped by: {', '.join(BY)}.")


def by_labels(frame: pd.DataFrame, by: str) -> pd.Series:
    """The label of each row's group."""
    if by == "run":
        return run_names(frame)
    labels = [BY[by](value) if _known(value) else f"no {by}" for value in frame[by]]
    return pd.Series(labels, index=frame.index, dtype=object)


def _known(value: Any) -> bool:
    return bool(pd.notna(value)) and value != ""


def in_order(frame: pd.DataFrame, by: str | None) -> pd.DataFrame:
    """The rows by their groups' numbers; as they are where groups have none."""
    if by is None or by not in frame or not pd.api.types.is_numeric_dtype(frame[by]):
        return frame
    rows = frame.sort_values(by, kind="stable")
    rows.attrs = frame.attrs
    return rows


def arms_in(frame: pd.DataFrame) -> list[str]:
    """The arms in drawing order: the baselines, then as they ran."""
    arms = list(dict.fromkeys(frame["arm"]))
    first = [name for name in BASELINES if name in arms]
    return first + [name for name in arms if name not in first]


def arm_names(frame: pd.DataFrame) -> dict[str, str]:
    """Arms as a chart can write them: in one line, short, and no two the same."""
    names: dict[str, str] = {}
    for arm in dict.fromkeys(str(arm) for arm in frame["arm"]):
        short = name = shown(arm)
        while name in names.values():
            name = f"{short} #{sum(other.startswith(short) for other in names.values()) + 1}"
        names[arm] = name
    return names


def arm_labels(frame: pd.DataFrame, by: str | None = None) -> list[str]:
    """Each row's arm as the chart names it; with the dtype where dtypes differ and `by` does not tell it."""
    names = arm_names(frame)
    dtypes = [str(dtype) if _known(dtype) else "" for dtype in frame["dtype"]]
    differ = by != "dtype" and len(set(dtypes) - {""}) > 1
    return [
        f"{names[arm]} ({shown(dtype)})" if differ and dtype and dtype not in arm else names[arm]
        for arm, dtype in zip(map(str, frame["arm"]), dtypes, strict=True)
    ]


def row_labels(frame: pd.DataFrame, *, gpus: bool = False, by: str | None = None) -> list[str]:
    """The same; with `gpus` also the arm's GPUs, where the rows differ in them.

    With `by` also what else varies, which is then in no heading.
    """
    names = arm_labels(frame, by)
    if gpus and by != "n_gpus" and frame["n_gpus"].nunique() > 1:
        names = [f"{name}, {gpu_words(int(count))}" for name, count in zip(names, frame["n_gpus"], strict=True)]
    if by is None:
        return names
    others = [part for key, part in _parts(frame, by).items() if key != by]
    return [", ".join(texts) for texts in zip(names, *others, strict=True)]


def _parts(frame: pd.DataFrame, by: str | None = None) -> dict[str, pd.Series]:
    """Labels of each row for what varies besides the arm: `by` first, then model, task, load and run."""
    loads = frame.apply(load_label, axis=1)
    found: dict[str, pd.Series] = {} if by is None else {by: by_labels(frame, by)}
    if by != "model" and frame["model"].nunique() > 1:
        found["model"] = frame["model"].map(short_model).map(shown)
    if by != "task" and frame["task"].nunique() > 1 and encoding(frame):
        found["task"] = frame["task"].astype(str)
    if by not in ("concurrency", "rate_rps") and loads.nunique() > 1:
        found["load"] = loads
    same = pd.DataFrame({"arm": frame["arm"], "model": frame["model"], "task": frame["task"], "load": loads, **found})
    if by != "run" and same.duplicated().any():
        found["run"] = run_names(frame)
    return found


def categories(frame: pd.DataFrame, by: str | None = None) -> pd.Series:
    """A label a row for what varies besides the arm: `by`, model, load and run, a line each."""
    parts = [part.astype(str) for part in _parts(frame, by).values()]
    if not parts:
        return pd.Series("", index=frame.index)
    return pd.Series(["\n".join(texts) for texts in zip(*parts, strict=True)], index=frame.index, dtype=object)


def run_names(frame: pd.DataFrame) -> pd.Series:
    """What each row's run is called, short."""
    return pd.Series([shown(name) for name in run_labels(frame)], index=frame.index, dtype=object)


def gpu_words(count: int) -> str:
    """How many GPUs: "no GPU", "1 GPU", "4 GPUs"."""
    return f"{count} GPU{'s' * (count != 1)}" if count else "no GPU"


def shown(name: object) -> str:
    """A name in one line of at most 32 characters; "(no name)" of none."""
    return shortened(one_line(str(name))) or "(no name)"


def joined(label: str, group: str) -> str:
    """An arm's label and its group (of `categories`) in one line."""
    return ", ".join([label, *filter(None, group.split("\n"))])


def wrapped(text: str, width: int = 40) -> str:
    """A label in several lines, so that it leaves room for the plot."""
    return "\n".join(textwrap.wrap(text, width)) or text


def legend_text(name: str) -> str:
    """The name for a legend: matplotlib leaves out those that begin with "_"."""
    return f"\u200b{name}" if name.startswith("_") else name


def load_label(row: Mapping[str, Any] | pd.Series) -> str:
    """A point's load in words: "concurrency 8", "2.5 requests/s"; of pictures "batch 4", or both."""
    load = f"concurrency {row['concurrency']:.0f}" if pd.notna(row["concurrency"]) else ""
    if pd.notna(row["rate_rps"]):
        load = f"{row['rate_rps']:g} requests/s"
    if task_kind(str(row.get("task"))) != "image" or pd.isna(row.get("batch_size")):
        return load
    return ", ".join([f"batch {row['batch_size']:g}", *([load] if load not in ("", "concurrency 1") else [])])


def load_mark(row: pd.Series) -> str:
    """A point's load as a mark beside it: "8", "2.5/s"."""
    load = f"{row['concurrency']:.0f}" if pd.notna(row["concurrency"]) else ""
    return f"{row['rate_rps']:g}/s" if pd.notna(row["rate_rps"]) else load


def short_model(model: object) -> str:
    """A hub name without its owner."""
    return one_line(str(model).rsplit("/", 1)[-1])


def picturing(frame: pd.DataFrame) -> bool:
    """Whether these are runs of text-to-image alone."""
    return bool(len(frame)) and all(task_kind(str(task)) == "image" for task in frame["task"].unique())


def encoding(frame: pd.DataFrame) -> bool:
    """Whether these are runs of encoder tasks alone."""
    return bool(len(frame)) and all(encodes(str(task)) for task in frame["task"].unique())
