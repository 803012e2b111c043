"""What tokens, texts and images cost at the price that the user gives, and which plan is the cheapest."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from miinb.bench.display import STYLE, run_labels, table_html
from miinb.bench.objectives import ATTAIN, rejudged
from miinb.bench.prices import usd_per_1k_images, usd_per_1k_texts, usd_per_mtok
from miinb.bench.records import NAN, Runs
from miinb.bench.summary import summarize, task_kind
from miinb.bench.workload import load_words
from miinb.bench_fields import read_slo, slo_words
from miinb.errors import InvalidValue
from miinb.wording import number, one_line

__all__ = ["CostTable", "table", "usd_per_1k_images", "usd_per_1k_texts", "usd_per_mtok"]

#: By kind of task: the column of the cost, that of the throughput, and their units.
_KINDS = {
    "text": ("usd_per_mtok", "output_tok_s", "million output tokens", "tokens/s"),
    "encoder": ("usd_per_1k_texts", "seq_s", "thousand texts", "texts/s"),
    "image": ("usd_per_1k_images", "img_s", "thousand images", "images/s"),
}
_PLAN = ("run_id", "name", "task", "model", "arm", "engine", "dtype", "tp", "replicas", "n_gpus")
_LOAD = ("concurrency", "rate_rps", "batch_size", "n", "n_failed")
_TIMES = ("e2e_p50_s", "ttft_p50_s", "tpot_p50_s", "slo_share", "goodput_req_s")


class CostTable(pd.DataFrame):  # type: ignore[misc, unused-ignore]
    """A frame of throughput and cost by plan and load; `answer` says which is the cheapest."""

    @property
    def _constructor(self) -> type[CostTable]:
        return CostTable

    @property
    def answer(self) -> str:
        """Which is the cheapest under the objectives, in a sentence (one for each kind of task)."""
        return str(self.attrs.get("answer", ""))

    def __repr__(self) -> str:
        return f"{narrow(self).to_string(index=False)}\n{self.answer}"

    def _repr_html_(self) -> str:
        answer = f"<p>{html.escape(self.answer)}</p>"
        return f'{STYLE}<div class="miinb-runs">{table_html(narrow(self))}{answer}</div>'


def narrow(costs: pd.DataFrame) -> pd.DataFrame:
    """The columns of a cost table that most readers want, as text; those that say nothing are left out."""
    if not {"cost_usd", "per", "fastest", "cheapest"} <= set(costs.columns):
        return pd.DataFrame(costs).astype(str)  # a part that a user took of it
    twice = [name for name in ("model", "arm", "dtype", "n_gpus", *_LOAD[:3]) if name in costs]
    runs = (
        run_labels(costs) if {"run_id", "name"} <= set(costs) and costs.duplicated(twice).any() else [""] * len(costs)
    )
    rows = [_shown(row, costs, run) for (_, row), run in zip(costs.iterrows(), runs, strict=True)]
    frame = pd.DataFrame(rows).fillna("")
    return frame[[name for name in frame.columns if (frame[name] != "").any()]]


def _short(model: object) -> str:
    return one_line(str(model).rsplit("/", 1)[-1])


def _shown(row: pd.Series, among: pd.DataFrame, run: str) -> dict[str, str]:
    many = {name: among[name].nunique() > 1 if name in among else False for name in ("model", "per", "batch_size")}
    rate = row.get("rate_rps", NAN)
    marks = {"cheapest": row["cheapest"], "fastest per GPU": row["fastest"], "misses the limits": not row["within"]}
    return {
        "run": run,
        "model": _short(row["model"]) if many["model"] else "",
        "plan": f"{one_line(str(row['arm']))} ({_machine(row)})",
        "load": f"{rate:g}/s" if pd.notna(rate) else _number(row, "concurrency"),
        row["unit"].removesuffix("/s"): _number(row, "batch_size") if many["batch_size"] else "",
        "throughput": f"{number(row['throughput'])} {row['unit']}",
        **{f"{text} ms": _ms(row, f"{name}_p50_s") for name, text in (("ttft", "TTFT"), ("tpot", "TPOT"))},
        "total ms": _ms(row, "e2e_p50_s"),
        "SLO met": f"{row['slo_share']:.0%}" if pd.notna(row.get("slo_share", NAN)) else "",
        "$": number(row["cost_usd"], ""),
        "per": str(row["per"]) if pd.notna(row["cost_usd"]) else "",
        "": ", ".join(text for text, there in marks.items() if there),
    }


def _number(row: pd.Series, name: str) -> str:
    return f"{row[name]:g}" if pd.notna(row.get(name, NAN)) else ""


def _ms(row: pd.Series, name: str) -> str:
    return number(row.get(name, NAN) * 1e3, "")


def table(runs: Any, slo: Any = None, *, price: float | None = None, attain: float = ATTAIN) -> CostTable:
    """Throughput and cost of each plan (engine, precision, GPUs) at each load, the cheapest of each task first.

    Args:
        runs: `Runs`, or a requests frame of them.
        slo: limits in seconds, as for `bench`; None takes those that the runs were measured with, if any.
        price: US dollars per GPU-hour, instead of the one that the runs were measured with.
        attain: share of the requests that has to meet the limits.

    Returns:
        A frame with `cost_usd` for one unit of `per`, `within` (meets the limits) and `cheapest`; where no price is
        known nothing is, and `fastest` is what has most throughput per GPU. `.answer` says it in words.

    Raises:
        InvalidValue: nothing was measured, or a limit, price or share that cannot be.
    """
    limits = read_slo(slo)
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise InvalidValue(f"price: 0 or more US dollars, not {price!r}.")
    if not 0 < attain <= 1:
        raise InvalidValue(f"attain: a share above 0 and up to 1, not {attain!r}.")
    requests = rejudged(runs.requests if isinstance(runs, Runs) else runs, limits, price)
    summary = summarize(requests)
    summary = summary[summary["n"] > 0].reset_index(drop=True)
    if summary.empty:
        raise InvalidValue("cost: no request succeeded.", hint="Look at runs.requests['error'].")
    known = summary["slo_share"].notna()
    rows = summary[[*_PLAN, *_LOAD, *_TIMES]].copy()
    kinds = [task_kind(str(task)) for task in summary["task"]]
    plain: list[dict[str, Any]] = [{str(k): v for k, v in row.items()} for row in summary.to_dict("records")]
    rows["throughput"] = [float(row[_KINDS[kind][1]]) for row, kind in zip(plain, kinds, strict=True)]
    rows["unit"] = [_KINDS[kind][3] for kind in kinds]
    rows["cost_usd"] = [float(row[_KINDS[kind][0]]) for row, kind in zip(plain, kinds, strict=True)]
    rows["per"] = [_KINDS[kind][2] for kind in kinds]
    rows["within"] = ~known | (summary["slo_share"] >= attain)
    rows["cheapest"] = rows["fastest"] = False
    order = rows["n_gpus"].clip(lower=1) / rows["throughput"]  # GPU-time of one unit
    rows = rows.assign(_priced=rows["cost_usd"].notna(), _order=rows["cost_usd"].fillna(order))
    by = ["per", "within", "_priced", "_order"]
    rows = rows.sort_values(by, ascending=[True, False, False, True], kind="stable")
    asked = limits or _asked(requests.attrs.get("env", {}))
    answers = []
    for _, mine in rows.groupby("per", sort=False):
        answers.append(_answer(mine, asked, attain))
        best = mine.iloc[0]
        if bool(best["within"]) and pd.notna(best["_order"]):
            rows.loc[mine.index[0], "cheapest" if bool(best["_priced"]) else "fastest"] = True
    always = ("cost_usd", "slo_share", "name")
    kept = [name for name in rows.columns if not name.startswith("_") and (name in always or rows[name].notna().any())]
    found = CostTable(rows[kept].reset_index(drop=True))
    found.attrs = {"answer": " ".join(answers), "definitions": summary.attrs["definitions"]}
    return found


def _asked(env: Mapping[str, Any]) -> dict[str, float]:
    """The objectives that all runs were measured with; {} where there are none or several."""
    found = [facts.get("workload", {}).get("slo") or {} for facts in env.values()]
    return dict(found[0]) if found and all(one == found[0] for one in found) else {}


def _answer(rows: pd.DataFrame, slo: Mapping[str, float], attain: float) -> str:
    """The first of the rows, which are sorted, in a sentence; what comes nearest where none is within the limits."""
    limits = f"{slo_words(slo)} for {attain:.0%} of the requests" if slo else "the objectives of the runs"
    bound = f" with {limits}" if slo or rows["slo_share"].notna().any() else ""
    best = rows.iloc[0]
    if not best["within"]:
        by = ["slo_share", "e2e_p50_s"] if "e2e_p50_s" in rows else ["slo_share"]
        near = rows.sort_values(by, ascending=[False, True][: len(by)], kind="stable").iloc[0]
        return f"No measured load meets {limits}: the nearest is {_words(near, rows)} with {near['slo_share']:.0%}."
    speed = f"{number(best['throughput'])} {best['unit']}"
    if pd.isna(best["cost_usd"]):
        hint = "no price was given, so nothing is called cheapest: runs.cost(price=2.5) takes yours, in US dollars"
        return f"Most throughput per GPU{bound}: {_words(best, rows)}, {speed}; {hint} per GPU-hour."
    cheapest = f"Cheapest{bound}: {_words(best, rows)}, ${number(best['cost_usd'])} per {best['per']} at {speed}."
    return " ".join([cheapest, *_provisos(rows)])


def _provisos(rows: pd.DataFrame) -> list[str]:
    """What the word cheapest leaves out."""
    found = []
    if unpriced := int(rows["cost_usd"].isna().sum()):
        found.append(f"Of {unpriced} of {len(rows)} rows no price is known.")
    with_gpus = rows["n_gpus"] > 0
    if with_gpus.any() and not with_gpus.all():
        found.append("A machine without a GPU is priced as one GPU.")
    return found


def _words(row: pd.Series, among: pd.DataFrame) -> str:
    """A plan and its load: "optimized (bf16, 2 GPUs) at concurrency 16"."""
    model = f"{_short(row['model'])} by " if among["model"].nunique() > 1 else ""
    rate = pd.notna(row["rate_rps"])
    load = row["rate_rps"] if rate else row["concurrency"]
    at = f" at {load_words('rate' if rate else 'concurrency', load)}" if pd.notna(load) else ""
    size = float(row["batch_size"]) if pd.notna(row["batch_size"]) else NAN
    what = str(row["unit"]).removesuffix("/s")
    batch = f", {size:g} {what} a request" if among["batch_size"].nunique() > 1 and size == size else ""
    return f"{model}{one_line(str(row['arm']))} ({_machine(row)}){at}{batch}"


def _machine(row: pd.Series) -> str:
    """Precision and devices of a plan: "bf16, 2 GPUs"."""
    gpus = int(row["n_gpus"])
    devices = f"{gpus} GPU{'s' * (gpus != 1)}" if gpus else "no GPU"
    copies = f"{row['replicas']:.0f} replicas" if row["replicas"] > 1 else ""
    return ", ".join(part for part in (one_line(str(row["dtype"] or "")), devices, copies) if part)
