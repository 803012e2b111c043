"""What each command on deployments does. Every one is a few calls of the Python interface."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miinb.commands.context import ENDED, Context, named
from miinb.commands.options import DEPLOYMENT, ENGINE, given
from miinb.commands.screen import Table
from miinb.config import DeploymentConfig
from miinb.errors import DeploymentNotFound, InvalidValue, MiinbError, VersionMismatch
from miinb.tasks import TASKS
from miinb.wording import size_words

if TYPE_CHECKING:
    from miinb.messages import Plan, Status
    from miinb.session import Session

Values = Mapping[str, Any]

#: A text of TOML that begins with a table: "[options]".
_TABLE = re.compile(r"\[[A-Za-z_.-]+\]\s*(#.*)?$", re.MULTILINE)

#: Kinds of panels; `notebook.panels` has one for each (it loads ipywidgets: the names stand here too, held by a test).
PANELS = ("text", "image", "encoder", "compare", "bench", "server")


def start(context: Context, values: Values, body: str | None) -> Session:
    """Start a deployment, or find the one that the same command started before."""
    import miinb
    from miinb import commands  # whose table this function is in

    options: dict[str, Any] = {}
    if values["config"]:
        options = _options_of(_config_text(values["config"]), values["config"])
    if body and body.strip():
        options = _over(options, _options_of(body, "the cell"))
    options = _over(options, _deployment_options(values))
    if context.settings.start_timeout_s:
        options.setdefault("start_timeout_s", context.settings.start_timeout_s)
    if not context.in_notebook:
        options["persist"] = True
    if values["model"]:
        options["model"] = values["model"]
    if (name := options.get("name")) in commands.COMMANDS:
        raise InvalidValue(f"start: {name!r} is a command, and %%mii {name} would be that.", hint="Use another --name.")
    if "model" not in options:
        raise InvalidValue("start: which model?", hint=f"{context.prog} start MODEL (a folder or a hub name).")
    for name, config in context.configs.items():
        if config == options and context.sessions[name].state not in ENDED:
            return context.sessions[name]
    session: Session = miinb.Session(**options)
    context.sessions[session.name] = session
    context.configs[session.name] = options
    if not context.in_notebook:  # there the card of the session is enough, and plan() a cell away
        context.screen.show(session.plan())
    return session


def _deployment_options(values: Values) -> dict[str, Any]:
    """The fields of `DeploymentConfig` that the user gave."""
    options = given(values, DEPLOYMENT)
    if engine_options := given(values, ENGINE):
        options["options"] = engine_options
    return options


def _config_text(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidValue(f"start: {file} cannot be read: {why}.") from None


def _options_of(text: str, where: str) -> dict[str, Any]:
    """The options that a text of JSON or TOML gives; JSON is what begins with a brace or a bracket."""
    kind = "JSON" if text.lstrip()[:1] in ("{", "[") and not _TABLE.match(text.lstrip()) else "TOML"
    try:
        options = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except ValueError as error:
        raise InvalidValue(
            f"start: {where} is not {kind}: {error}.", hint='JSON: {"model": "..."}; TOML: model = "...".'
        ) from None
    if not isinstance(options, dict):
        raise InvalidValue(f'start: {where} has to be a JSON object: {{"model": "...", "dtype": "bf16"}}.')
    return options


def _over(options: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Options with others laid over them, the engine's one by one."""
    both = [part["options"] for part in (options, more) if isinstance(part.get("options"), dict)]
    engine = {"options": both[0] | both[1]} if len(both) == 2 else {}
    return options | more | engine


def attach(context: Context, values: Values, body: str | None) -> Session:
    """Join a running deployment."""
    import miinb

    session: Session = miinb.attach(_needed(values, "name", "attach"))
    context.sessions[session.name] = session
    return session


def _needed(values: Values, field: str, command: str) -> Any:
    if not values[field]:
        raise InvalidValue(f"{command}: which {field}?")
    return values[field]


def list_deployments(context: Context, values: Values, body: str | None) -> Table:
    """A table of this user's running deployments."""
    import miinb

    found = miinb.deployments()
    chosen = context.default or context.settings.default_session
    owners = [_owner(context, status) for status in found]
    rows = [
        (
            f"{status.name} *" if status.name == chosen else status.name,
            status.state,
            status.model,
            status.engine,
            status.dtype,
            _device(status),
            _duration(status.uptime_s),
            owner,
        )
        for status, owner in zip(found, owners, strict=True)
    ]
    columns = ("name", "state", "model", "engine", "dtype", "device", "up", "owner")
    note = "" if rows else f"No deployment is running. Start one: {context.prog} start MODEL"
    records = [{**asdict(status), "owner": owner} for status, owner in zip(found, owners, strict=True)]
    return Table(columns, rows, title="Deployments" if rows else "", note=note, records=records)


def _device(status: Status) -> str:
    """ "cpu", or the GPUs of all ranks: "cuda 0, 1"."""
    gpus = sorted({rank.gpu for rank in status.ranks if rank.gpu is not None})
    return f"{status.device} {', '.join(map(str, gpus))}" if gpus else status.device


def _owner(context: Context, status: Status) -> str:
    """The process with which a deployment ends, or "persistent"; "unknown" where it is gone already."""
    from miinb import registry

    if status.persist:
        return "persistent"
    parent = registry.parent(status.pid)
    if parent == os.getpid():
        return "this notebook" if context.in_notebook else "this process"
    return f"process {parent}" if parent else "unknown"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def use(context: Context, values: Values, body: str | None) -> str:
    """Choose the deployment that a notebook's commands take without -d."""
    if not context.in_notebook:
        raise InvalidValue("use: holds for a notebook; in a terminal each command begins anew.", hint=context.choice)
    session = context.session(_needed(values, "name", "use"))
    context.default = session.name
    return f"Commands without -d now go to {session.name}."


def plan(context: Context, values: Values, body: str | None) -> Plan:
    """What runs in a deployment and why, or what would be chosen for a model; the latter starts nothing."""
    from miinb.preparation import prepare

    subject, options = values["subject"], _deployment_options(values)
    deployment = named(values, "plan", "subject")
    if values["deployment"] or subject in (None, *context.sessions, *context.names()):
        if options:
            raise InvalidValue(
                f"plan: {next(iter(options))} goes with a model, not with a deployment.",
                hint="Give a folder or a hub name.",
            )
        return context.session(deployment).plan()
    return prepare(DeploymentConfig.parse({"model": subject, **options})).plan


def stop(context: Context, values: Values, body: str | None) -> str:
    """End a deployment (or all of them); all that can be ended is, whatever becomes of the others."""
    one = named(values, "stop")
    if values["all"] and one:
        raise InvalidValue(f"stop: {one!r} and --all.", hint="Give one of them.")
    if values["force"] and not (values["all"] or one):
        raise InvalidValue("stop: --force takes a name.", hint=f"{context.prog} stop NAME --force")
    done, failed = [], []
    for name in context.names() if values["all"] else [one]:
        try:
            done.append(_stop(context, name, force=values["force"], drain_s=values["grace"] or 0.0))
        except MiinbError as error:
            if not values["all"]:
                raise
            failed.append(error.of(name or ""))
    if failed:
        for text in done:
            context.screen.show(text)
        hint = "" if values["force"] else f"{context.prog} stop --all --force ends these too."
        raise MiinbError(" ".join(error.message for error in failed), hint=hint)
    return "\n".join(done) or "No deployment is running."


def _stop(context: Context, name: str | None, *, force: bool, drain_s: float) -> str:
    limits = {"drain_s": drain_s} if drain_s else {}
    try:
        session = context.session(name)
    except (DeploymentNotFound, VersionMismatch):
        if not force:
            raise
        return _force(context, name or "", limits)
    memory = _gpu_bytes(session)
    session.stop(**limits)
    context.forget(session.name)
    return f"Stopped {session.name}." + (f" {size_words(memory)} of GPU memory are free again." if memory else "")


def _force(context: Context, name: str, limits: dict[str, float]) -> str:
    """End one that nobody can join: it still starts or ends, or another version of miinb started it."""
    from miinb import registry
    from miinb.deployment import Deployment

    entry = {entry.name: entry for entry in registry.entries()}.get(name)
    if entry is None:
        raise DeploymentNotFound(f"There is no deployment {name!r}.")
    Deployment(entry).stop(**limits)
    context.forget(name)
    return f"Stopped {name}."


def _gpu_bytes(session: Session) -> int:
    return sum(rank.memory_bytes for rank in session.status().ranks if rank.gpu is not None)


def restart(context: Context, values: Values, body: str | None) -> Session:
    """The same configuration again."""
    name = named(values, "restart")
    ended = context.sessions.get(name or context.default)  # killed, perhaps: its handle begins it anew
    session = ended if ended is not None else context.session(name)
    limits = {} if values["grace"] is None else {"drain_s": values["grace"]}
    session.restart(rolling=values["rolling"], **limits)
    return session


def keep(context: Context, values: Values, body: str | None) -> str:
    """Let a deployment outlive this notebook."""
    session = context.session(named(values, "keep"))
    session.keep()
    return f"{session.name} now outlives this notebook; end it with: {context.prog} stop {session.name}"


def panel(context: Context, values: Values, body: str | None) -> Any:
    """A panel of widgets for a deployment."""
    if not context.in_notebook:
        raise InvalidValue("panel: panels need a notebook.", hint="There: %load_ext miinb, then %mii panel.")
    kind, name = values["kind"], values["deployment"]
    if kind == "compare" and not (name or context.default or context.settings.default_session):
        name = _first_generating()  # it asks two: that several run is no question
    return context.session(name).panel(kind)


def _first_generating() -> str | None:
    import miinb

    return next((one.name for one in miinb.deployments() if one.task in TASKS and TASKS[one.task].streams), None)
