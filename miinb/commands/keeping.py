"""What the commands on benchmark runs do that are there already: draw, show, price, save, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miinb.commands.context import Context
from miinb.commands.screen import Table
from miinb.errors import InvalidValue, did_you_mean
from miinb.wording import one_line

if TYPE_CHECKING:
    from miinb.bench.records import Runs

Values = Mapping[str, Any]

#: Kinds of charts; `bench.charts` has one for each (it loads matplotlib, so the names stand here too, held by a test).
CHARTS = (
    "latency",
    "throughput",
    "cost",
    "frontier",
    "ecdf",
    "batch_scaling",
    "parallel_scaling",
    "time_split",
    "memory",
    "waterfall",
    "quality",
    "images",
)
#: What charts measure, and what they are grouped by; each of them says which it takes (held by the same test).
METRICS = (
    *("e2e_s", "ttft_s", "tpot_s", "itl_s", "image_s"),
    *("output_tok_s", "total_tok_s", "req_s", "goodput_req_s", "seq_s", "img_s"),
    *("usd_per_mtok", "usd_per_1k_texts", "usd_per_1k_images"),
)
GROUPS = (
    *("arm", "model", "task", "engine", "dtype", "n_gpus", "tp", "replicas", "batch_size", "concurrency", "rate_rps"),
    *("run", "devices"),
)
FORMATS = ("jsonl", "csv", "parquet")


def plot(context: Context, values: Values, body: str | None) -> Any:
    """A chart of a benchmark run; the figure."""
    kind = values["kind"] or "latency"
    measured = _chosen(context, values["run"] or [], _folder(context, values))
    if not values["save"] and not context.in_notebook:
        raise InvalidValue("plot: where to?", hint=f"{context.prog} plot {kind} --save chart.png")
    from miinb.bench import charts

    options = {name: values[name] for name in ("metric", "by", "log") if values[name] is not None}
    figure = charts.draw(kind, measured, **options).get_figure()
    if values["save"]:
        charts.save(figure, values["save"])
        if not values.get("quiet"):
            context.screen.show(f"Saved {values['save']}.")
    return figure


def runs(context: Context, values: Values, body: str | None) -> Any:
    """List, show, merge, price, report, save, export, load or drop benchmark runs."""
    what = values["what"] or "list"
    if what == "list":
        return _list(context, _folder(context, values))
    action = ACTIONS.get(what)
    if action is None:
        return _load(context, values)
    return action(context, values, _chosen(context, values["names"] or [], _folder(context, values)))


def _folder(context: Context, values: Values) -> str | None:
    """Where the runs are: the folder of --load, or the one that keeps all runs if there are none in memory."""
    kept = context.settings.run_dir
    if values["load"] or context.runs or not kept or not any(Path(kept).glob("*/requests.jsonl")):
        return values["load"] or None
    return kept


def _chosen(context: Context, names: list[str], folder: str | None) -> Runs:
    """The runs of these names together; without, the last one, or all of a folder that was named."""
    import miinb

    if folder is None:
        if not context.runs and not context.in_notebook:  # another process measured
            hint = f"{context.prog} bench --save FOLDER keeps them, --load FOLDER finds them."
            raise InvalidValue("There are no runs here.", hint=hint)
        found = [context.run(name) for name in names] or [context.run()]
    else:
        saved = miinb.load_runs(folder)
        last = saved.select(max(saved.env)) if folder == context.settings.run_dir else saved  # ids sort by time
        found = [saved.select(name) for name in names] or [last]
    merged = found[0]
    for more in found[1:]:
        merged = merged + more
    return merged


def _list(context: Context, folder: str | None) -> Table:
    import miinb

    kept: Mapping[str, Runs] = context.runs
    if folder is not None:
        saved = miinb.load_runs(folder)
        names = [str(facts.get("name") or run_id) for run_id, facts in saved.env.items()]
        pairs = zip(names, saved.env, strict=True)
        kept = {run_id if names.count(name) > 1 else name: saved.select(run_id) for name, run_id in pairs}
    rows = [(one_line(key), _measured(run), _arms(run), _models(run), _created(run)) for key, run in kept.items()]
    note = "" if rows else f"There is no benchmark run yet. Make one: {context.prog} bench"
    columns = ("run", "requests", "arms", "model", "created")
    return Table(columns, rows, title="Benchmark runs" if rows else "", note=note)


def _measured(run: Runs) -> int:
    """How many requests it has, warm-ups not among them."""
    return int((~run.requests["warmup"]).sum())


def _arms(run: Runs) -> str:
    return ", ".join(one_line(str(arm)) for arm in run.requests["arm"].unique())


def _models(run: Runs) -> str:
    return ", ".join(sorted({one_line(str(model)) for model in run.requests["model"].dropna()}))


def _created(run: Runs) -> str:
    return min((str(facts.get("created") or "")[:19] for facts in run.env.values()), default="")


def _load(context: Context, values: Values) -> Runs:
    import miinb

    names, source = values["names"] or [], values["load"] or values["to"]
    if not source and names and Path(names[-1]).exists():
        *names, source = names
    if not source:
        raise InvalidValue("runs load: from where?", hint=f"{context.prog} runs load NAME --load FOLDER")
    loaded = miinb.load_runs(source)
    context.keep_run(names[0] if names else Path(source).stem, loaded)
    return loaded


def _show(context: Context, values: Values, run: Runs) -> Runs:
    return run


def _drop(context: Context, values: Values, run: Runs) -> str:
    names = values["names"] or [next(reversed(context.runs), "")]
    if values["load"] or not context.runs:
        raise InvalidValue(
            "runs drop: what is saved is not in memory.", hint="Remove the run's folder to delete a saved one."
        )
    if unknown := [name for name in names if name not in context.runs]:
        raise InvalidValue(f"runs drop: {unknown[0]!r} is not in memory.", hint=did_you_mean(unknown[0], context.runs))
    for name in names:
        context.runs.pop(name)
    return "Dropped."


def _merge(context: Context, values: Values, run: Runs) -> Runs:
    names = values["names"] or []
    if len(names) < 2:
        raise InvalidValue("runs merge: name two runs or more.", hint=f"{context.prog} runs merge A B")
    context.keep_run("+".join(names), run)
    return run


def _cost(context: Context, values: Values, run: Runs) -> Any:
    price = values["price"] if values["price"] is not None else context.settings.price_usd_per_gpu_hour or None
    return run.cost(values["slo"], price=price, **({"attain": values["attain"]} if values["attain"] else {}))


def _report(context: Context, values: Values, run: Runs) -> str:
    return f"Report: {run.report(values['to'] or 'report.html')}"


def _save(context: Context, values: Values, run: Runs) -> str:
    if not values["to"]:
        raise InvalidValue("runs save: where to?", hint=f"{context.prog} runs save NAME --to FOLDER")
    return f"Saved to {run.save(values['to'])}."


def _export(context: Context, values: Values, run: Runs) -> str:
    if not values["to"]:
        raise InvalidValue("runs export: where to?", hint=f"{context.prog} runs export NAME --to FILE.jsonl")
    ending = values["format"] or Path(values["to"]).suffix.removeprefix(".")
    if ending not in FORMATS:
        raise InvalidValue(f"runs export: which format is {values['to']!r}?", hint=f"--format {'|'.join(FORMATS)}")
    writers = {"jsonl": run.to_jsonl, "csv": run.to_csv, "parquet": run.to_parquet}
    return f"Exported to {writers[ending](values['to'])}."


#: What is done with runs that were chosen; `list` and `load` choose none.
ACTIONS: dict[str, Callable[[Context, Values, Runs], Any]] = {
    "show": _show,
    "cost": _cost,
    "report": _report,
    "save": _save,
    "export": _export,
    "merge": _merge,
    "drop": _drop,
}
RUNS = ("list", "load", *ACTIONS)
