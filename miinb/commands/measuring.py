"""What the commands on benchmarks, charts, models and the machine do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miinb.commands.context import Context
from miinb.commands.generating import parts_of
from miinb.commands.options import BENCH, given
from miinb.commands.screen import Table
from miinb.commands.settings import PREFIX, Settings, user_file
from miinb.errors import InvalidValue, MiinbError
from miinb.wording import size_words
from miinb.writing import HTML, check_file, check_folder

if TYPE_CHECKING:
    from miinb.bench.records import Runs

Values = Mapping[str, Any]


def bench(context: Context, values: Values, body: str | None) -> Runs:
    """Measure one deployment, or compare several on the same work."""
    import miinb

    fields = given(values, BENCH)
    if body is not None and body.strip():
        fields["prompts"] = prompts_in(body)
    if values["prompts"]:
        if "prompts" in fields:
            raise InvalidValue("bench: prompts in the cell and in a file.", hint="Give them in one place.")
        fields["prompts"] = Path(values["prompts"])
    if context.settings.price_usd_per_gpu_hour:
        fields.setdefault("price", context.settings.price_usd_per_gpu_hour)
    if values["plot"] and not context.in_notebook:
        raise InvalidValue("bench: --plot needs a notebook.", hint="--report FILE.html has the charts.")
    places = [("save", values["save"] or context.settings.run_dir), ("report", values["report"])]
    _check_places(places)  # a run that cannot be kept is not worth its time
    names, one = values["deployments"] or [values["deployment"]], values.get("deployment")
    if one and names != [one]:
        raise InvalidValue(f"bench: -s {','.join(names)} and -d {one}.", hint="Give one of them.")
    sessions = [context.session(name) for name in names]
    runs: Runs = sessions[0].bench(**fields) if len(sessions) == 1 else miinb.compare(sessions, **fields)
    kept = context.keep_run(fields.get("run"), runs)
    if fields.get("run") not in (None, kept) and not values.get("quiet"):
        context.screen.show(f"Kept as {kept}: there is a run {fields['run']} already.")
    if values["plot"]:
        _plot(context, runs)
    _write(context, values, runs, places)
    return runs


def _plot(context: Context, runs: Runs) -> None:
    """The chart that fits; of a run that was stopped before its first answer, why there is none."""
    from miinb.bench import charts

    try:
        chart = charts.draw(charts.fitting(runs), runs)
    except InvalidValue as error:
        context.screen.show(error.line())
    else:
        context.screen.show(chart.get_figure())


def _check_places(places: Sequence[tuple[str, str | None]]) -> None:
    for place, path in places:
        if path and place == "save":
            check_folder(path)
        elif path:
            check_file(path, HTML)


def _write(context: Context, values: Values, runs: Runs, places: Sequence[tuple[str, str | None]]) -> None:
    """Keep the run where the user wants it; where that fails (a full disk), it is shown before the error is told."""
    failed: list[MiinbError] = []
    for place, path in places:
        if not path:
            continue
        try:
            written = runs.save(path) if place == "save" else runs.report(path)
        except MiinbError as error:
            failed.append(error)
            continue
        if not values.get("quiet"):
            context.screen.show(f"{'Saved to' if place == 'save' else 'Report:'} {written}")
    if failed:
        if not values.get("quiet"):
            context.screen.show(runs)
        kept = f"The run is still here: {context.prog} runs save --to FOLDER" if context.in_notebook else ""
        raise MiinbError(" ".join(error.line() for error in failed), hint=kept)


def prompts_in(body: str) -> list[Any]:
    """Parts between lines of "---"; without such a line every line is a prompt. Where all are JSON objects, these."""
    lines = body.splitlines()
    texts = parts_of(body) if "---" in lines else [line for line in lines if line.strip()]
    if not all(text.lstrip().startswith("{") for text in texts):
        return texts
    try:
        return [json.loads(text) for text in texts]  # inputs of question-answering
    except ValueError:
        return texts


def compare(context: Context, values: Values, body: str | None) -> Runs:
    """`bench` on the deployments that the line names."""
    names = values["names"] or []
    if len(names) < 2:
        raise InvalidValue("compare: name two deployments or more.", hint=f"{context.prog} compare A B")
    return bench(context, {**values, "deployments": names}, body)


def models(context: Context, values: Values, body: str | None) -> Any:
    """Families and tasks, and what is optimized."""
    from miinb.families import families

    return families()


def env(context: Context, values: Values, body: str | None) -> Table:
    """Versions and hardware, as a benchmark records them."""
    from miinb.bench.environment import environment

    facts = environment()
    known = dict(facts)
    known["memory"] = size_words(known.pop("memory_bytes"))
    rows = [(key, text) for key, value in known.items() if (text := _flat(value))]
    return Table(("what", "value"), rows, title="Environment", records=facts)


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_flat, value)) or "none"
    return "" if value is None else str(value)


def gpus(context: Context, values: Values, body: str | None) -> Table:
    """The GPUs and their free memory."""
    from miinb import hardware

    machine = hardware.detect()
    rows = [
        (gpu.index, gpu.name, f"{size_words(gpu.free_bytes)} of {size_words(gpu.memory_bytes)} free")
        for gpu in machine.gpus
    ]
    memory = f"{size_words(machine.free_bytes)} of {size_words(machine.memory_bytes)} free"
    return Table(
        ("gpu", "name", "memory"),
        rows,
        title="GPUs" if rows else "",
        note=f"driver {machine.driver}"
        if rows
        else f"There is no GPU here; models run on the CPU: {machine.cpu}, {machine.cores} cores, {memory}.",
        records=machine.gpus,
    )


def doctor(context: Context, values: Values, body: str | None) -> Any:
    """Check that this machine can do its work."""
    import miinb

    return miinb.doctor()


def settings(context: Context, values: Values, body: str | None) -> Table:
    """The settings, their values and where each comes from."""
    rows = []
    for name, field in Settings.model_fields.items():
        rows.append((name, getattr(context.settings, name), context.sources[name], field.description))
    where = f"pyproject.toml [tool.miinb], {user_file()}, {PREFIX}NAME in the environment"
    note = f"Later ones win: {where}{', %config MiiMagics.NAME = VALUE' if context.in_notebook else ''}."
    columns = ("setting", "value", "from", "what it is")
    records = [dict(zip(("setting", "value", "from"), row[:3], strict=True)) for row in rows]
    return Table(columns, rows, title="Settings", note=note, records=records)


def demo(context: Context, values: Values, body: str | None) -> None:
    """The guided first run."""
    from miinb.demo import main

    main([])


#: Fields of a deployment that `check` takes.
CHECKED = ("task", "dtype", "kv_dtype", "device", "gpus", "revision", "trust_remote_code", "start_timeout_s")


def check(context: Context, values: Values, body: str | None) -> Table:
    """A model's layers and outputs beside transformers'; an error if they are not the same answer."""
    from miinb import checking

    if not values["model"]:
        raise InvalidValue("check: which model?", hint=f"{context.prog} check MODEL (a folder or a hub name).")
    fields = {name: values[name] for name in CHECKED if values.get(name) is not None}
    found = checking.check(values["model"], **fields)
    rows = [(f"layer {index}", f"{ours:.1e}", f"{plain:.1e}") for index, (ours, plain) in enumerate(found.layers)]
    rows.append(("logits" if found.tokens else "outputs", f"{found.logits[0]:.1e}", f"{found.logits[1]:.1e}"))
    cache = ", fp8 cache" if found.kv_dtype == "fp8" else ""
    title = f"{found.model}, {found.dtype}{cache} on {found.device}: {found.measure} from transformers in fp32"
    columns = ("after", "optimized", f"transformers {found.baseline_dtype}")
    note = found.verdict + (" (an earlier check of the same files and versions)" if found.cached else "")
    table = Table(columns, rows, title=title, note=note, records=(found,))
    if not found.passed:
        context.screen.show(table)
        raise MiinbError(f"{found.model}: {found.verdict}.", hint="engine='baseline' serves it with transformers.")
    return table
