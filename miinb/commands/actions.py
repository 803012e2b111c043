"""What each command on deployments and text does. Every one is a few calls of the Python interface."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miinb.commands.context import ENDED, Context
from miinb.commands.options import DEPLOYMENT, ENGINE, GENERATION, given
from miinb.commands.screen import Table
from miinb.config import DeploymentConfig
from miinb.errors import InvalidRequest, InvalidValue
from miinb.tasks import TASKS, find_task

if TYPE_CHECKING:
    from miinb.messages import Plan
    from miinb.results import Result
    from miinb.session import Session

Values = Mapping[str, Any]

#: Kinds of panels; `notebook.panels` has one for each (it loads ipywidgets: the names stand here too, held by a test).
PANELS = ("text", "encoder", "compare", "bench", "server")


def start(context: Context, values: Values, body: str | None) -> Session:
    """Start a deployment, or find the one that the same command started before."""
    import miinb

    options = _deployment_options(values)
    if context.settings.start_timeout_s:
        options.setdefault("start_timeout_s", context.settings.start_timeout_s)
    if not context.in_notebook:
        options["persist"] = True
    if body and body.strip():
        options = _options_of_body(body) | options
    if values["model"]:
        options["model"] = values["model"]
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


def _options_of_body(body: str) -> dict[str, Any]:
    try:
        options = json.loads(body)
    except ValueError as error:
        raise InvalidValue(f"start: the cell is not JSON: {error}.") from None
    if not isinstance(options, dict):
        raise InvalidValue('start: the cell has to be a JSON object: {"model": "...", "dtype": "bf16"}.')
    return options


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
    rows = [
        (
            f"{status.name} *" if status.name == chosen else status.name,
            status.state,
            status.model,
            status.engine,
            status.dtype,
            status.device,
            _duration(status.uptime_s),
            "yes" if status.persist else "no",
        )
        for status in found
    ]
    columns = ("name", "state", "model", "engine", "dtype", "device", "up", "persistent")
    note = "" if rows else f"No deployment is running. Start one: {context.prog} start MODEL"
    return Table(columns, rows, title="Deployments" if rows else "", note=note, records=found)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def use(context: Context, values: Values, body: str | None) -> str:
    """Choose the deployment that commands take without -d."""
    session = context.session(_needed(values, "name", "use"))
    context.default = session.name
    return f"Commands without -d now go to {session.name}."


def status(context: Context, values: Values, body: str | None) -> Any:
    """How a deployment is."""
    return context.session(values["name"] or values["deployment"]).status()


def plan(context: Context, values: Values, body: str | None) -> Plan:
    """What runs in a deployment and why, or what would be chosen for a model; the latter starts nothing."""
    from miinb.preparation import prepare

    subject, options = values["subject"], _deployment_options(values)
    if subject in (None, *context.sessions, *context.names()):
        if options:
            raise InvalidValue(
                f"plan: {next(iter(options))} goes with a model, not with a deployment.",
                hint="Give a folder or a hub name.",
            )
        return context.session(subject or values["deployment"]).plan()
    if values["deployment"]:
        raise InvalidValue(f"plan: {subject!r} and -d {values['deployment']}.", hint="Give one of them.")
    return prepare(DeploymentConfig.parse({"model": subject, **options})).plan


def stop(context: Context, values: Values, body: str | None) -> str:
    """End a deployment (or all of them)."""
    named = values["name"] or values["deployment"]
    names = context.names() if values["all"] else [context.session(named).name]
    for name in names:
        context.session(name).stop()
        context.forget(name)
    return f"Stopped {', '.join(names)}." if names else "No deployment is running."


def restart(context: Context, values: Values, body: str | None) -> Session:
    """The same configuration again."""
    session = context.session(values["name"] or values["deployment"])
    session.restart()
    return session


def keep(context: Context, values: Values, body: str | None) -> str:
    """Let a deployment outlive this notebook."""
    session = context.session(values["name"] or values["deployment"])
    session.keep()
    return f"{session.name} now outlives this notebook; end it with: {context.prog} stop {session.name}"


def logs(context: Context, values: Values, body: str | None) -> str:
    """The end of a deployment's logs."""
    session = context.session(values["name"] or values["deployment"])
    return session.logs(values["lines"] or 50, rank=values["rank"])


def _text(context: Context, values: Values, body: str | None, command: str) -> str:
    words = " ".join(values["prompt"] or ())
    if words and body is not None:
        raise InvalidValue(
            f"{command}: a prompt on the line and in the cell.", hint="Give one of them; a deployment goes after -d."
        )
    text = body.removesuffix("\n") if body is not None else words
    if not text.strip():
        raise InvalidValue(f"{command}: the prompt is empty.", hint=f'{context.prog} {command} "Once upon a time"')
    return text


def _generating(context: Context, values: Values) -> Session:
    """The deployment that is asked. Raises InvalidRequest, before anything is shown, where it generates no text."""
    session = context.session(values["deployment"])
    if not find_task(session.task).streams:
        raise InvalidRequest(f"{session.name} serves {session.task}.", hint="Use predict.")
    return session


def _generation(context: Context, values: Values) -> dict[str, Any]:
    options = given(values, GENERATION)
    if context.settings.max_new_tokens:
        options.setdefault("max_new_tokens", context.settings.max_new_tokens)
    return options


def gen(context: Context, values: Values, body: str | None) -> Result:
    """New text after a prompt, shown while it grows."""
    text = _text(context, values, body, "gen")
    session = _generating(context, values)
    options = _generation(context, values)
    prompts = _batch(text, values["batch"])
    if len(prompts) > 1 or options.get("num_return_sequences", 1) > 1 or values["no_stream"] or values.get("quiet"):
        result: Result = session.generate(prompts if len(prompts) > 1 else prompts[0], **options)
        if not values.get("quiet"):
            context.screen.show(result)
        return result
    shown: Result = context.screen.stream(session.stream(prompts[0], **options))
    return shown


def _batch(text: str, how: str | None) -> list[str]:
    if how == "lines":
        return [line for line in text.splitlines() if line.strip()]
    if how == "parts":
        parts = ("\n" + text + "\n").split("\n---\n")
        return [part.strip("\n") for part in parts if part.strip()]
    return [text]


def chat(context: Context, values: Values, body: str | None) -> Result:
    """The next turn of a conversation; `reset` begins a new one."""
    text = _text(context, values, body, "chat")
    session = _generating(context, values)
    turns = list(context.chats.get(session.name, ()))
    if values["system"]:
        turns = [{"role": "system", "content": values["system"]}, *(t for t in turns if t["role"] != "system")]
    turns.append({"role": "user", "content": text})
    options = _generation(context, values)
    if values.get("quiet") or options.get("num_return_sequences", 1) > 1:  # the texts of several would mix
        result: Result = session.chat(turns, **options)
        if not values.get("quiet"):
            context.screen.show(result)
    else:
        result = context.screen.stream(session.stream(turns, **options))
    # what no longer fits the context is forgotten here too, so that a long conversation does not grow without end
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    kept = [*system, *turns[len(system) + result.dropped_messages :]]
    context.chats[session.name] = [*kept, {"role": "assistant", "content": result.text}]
    return result


def reset(context: Context, values: Values, body: str | None) -> str:
    """Forget the conversation with a deployment."""
    session = context.session(values["name"] or values["deployment"])
    context.chats.pop(session.name, None)
    return f"The conversation with {session.name} begins anew."


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
