"""The one table of commands: `%mii`, `%%mii` and the `miinb` program are made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from miinb.commands import actions, generating, keeping, measuring, predicting, watching
from miinb.commands.context import Context
from miinb.commands.options import (
    BENCH,
    DEPLOYMENT,
    ENGINE,
    GENERATION,
    GREEDY,
    IMAGES,
    PLANNED,
    PREDICTION,
    TIMEOUT,
    Option,
    seconds,
    words,
)
from miinb.commands.parser import Command, build, parse, split, suggest, wants_help
from miinb.commands.reference import reference
from miinb.commands.screen import PlainScreen, Screen, Table, as_json, described
from miinb.commands.settings import PREFIX, Settings
from miinb.errors import InvalidValue, did_you_mean

__all__ = [
    "COMMANDS",
    "Command",
    "Context",
    "PlainScreen",
    "Screen",
    "Settings",
    "Table",
    "as_json",
    "described",
    "execute",
    "find",
    "help_text",
    "is_shown",
    "overview",
    "parse",
    "split",
    "suggest",
    "wants_help",
    "wants_json",
]

_WHICH = Option(
    "deployment",
    "the deployment (default: the only one, or that of `use` (in a notebook) or of the setting default_session)",
    short="d",
    names="deployments",
)
_NAME = Option("name", "the deployment", positional=True, names="deployments")
_PROMPT = Option("prompt", "the text", positional=True, many=True)
_BATCH = Option("batch", "several texts: one a line, or parts between lines of ---", choices=("lines", "parts"))
#: How an answer is asked for and shown.
_ANSWER = (
    Option("system", "instructions before the text, through the model's chat template"),
    TIMEOUT,
    Option("stream", "show the answer while it grows (the default for one answer)", read=None),
    Option("no_stream", "show the answer when it is complete", read=None, value=False, field="stream"),
    Option(
        "format",
        "plain text (the default), Markdown (in cells; without HTML, images and formulas), or print JSON",
        choices=generating.FORMATS,
    ),
)
_SEVERAL = Option("deployments", "compare these: A,B", read=words, short="s", names="deployments")
_JSON = Option("json", "print JSON", read=None)
_JSON_LINES = Option("json", "print a line of JSON for each input", read=None)
_LOAD = Option("load", "of the runs that were saved in this folder (or exported to this .jsonl file)")
#: Where the prompts of a benchmark come from besides the cell, and where it goes.
_KEPT = (
    Option("prompts", "a file of prompts: .jsonl or .csv (column prompt, or the task's inputs), .txt (a line each)"),
    Option("save", "keep the run in this folder"),
    Option("report", "write tables and charts to this HTML file"),
    Option("plot", "draw the chart that fits after the run (in a notebook), with -q too", read=None),
)
#: Where the inputs of predict come from besides the line and the cell.
_PLACES = (
    Option("question", "of the context that is the text (question-answering)"),
    Option("context", "in which the text is a question; - is the standard input (question-answering)"),
    Option("file", "take each line as an input, a text or JSON; - is the standard input; may be repeated", many=True),
)


def _help(context: Context, values: Mapping[str, Any], body: str | None) -> str:
    """All commands, or one of them."""
    if values["markdown"]:
        return reference(COMMANDS)
    return help_text(context.prog, values["command"])


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(
            "start",
            "start a deployment of a model",
            actions.start,
            (
                Option("model", "a folder or a hub name", positional=True),
                Option("config", "take options from this file, JSON or TOML; the cell's and the line's hold over them"),
                *DEPLOYMENT,
                *ENGINE,
            ),
            body="options as JSON or TOML, by their Python names; engine options in `options`",
            example="start ./SmolLM2-135M-Instruct --name chat",
        ),
        Command("attach", "join a running deployment", actions.attach, (_NAME,), example="attach chat"),
        Command("list", "show the running deployments", actions.list_deployments, (_JSON,)),
        Command(
            "use",
            f"choose the deployment for commands without -d (in a notebook; in a terminal: {PREFIX}DEFAULT_SESSION)",
            actions.use,
            (_NAME,),
            example="use chat",
        ),
        Command(
            "status",
            "show how a deployment is",
            watching.status,
            (_NAME, _WHICH, Option("watch", "show it anew each second, until stopped", read=None), _JSON),
            example="status chat --watch",
        ),
        Command(
            "plan",
            "show what was chosen for a deployment and why, or what would be for a model",
            actions.plan,
            (
                Option("subject", "a deployment, a folder or a hub name", positional=True, names="deployments"),
                _WHICH,
                *PLANNED,
                _JSON,
            ),
            example="plan ./SmolLM2-135M-Instruct --dtype int8",
        ),
        Command(
            "stop",
            "end a deployment",
            actions.stop,
            (
                _NAME,
                _WHICH,
                Option("all", "end all of them", read=None),
                Option("force", "also one that is still starting, or that another version started", read=None),
                Option("grace", "seconds for the requests in flight, which are canceled otherwise: 10, 1m", seconds),
            ),
            example="stop chat",
        ),
        Command(
            "restart",
            "stop a deployment and start it again as it was",
            actions.restart,
            (
                _NAME,
                _WHICH,
                Option("rolling", "one replica after another, while the others serve", read=None),
                Option("grace", "seconds for the requests in flight: 10 (default), 1m", seconds),
            ),
            example="restart chat --rolling",
        ),
        Command("keep", "let a deployment outlive this notebook", actions.keep, (_NAME, _WHICH)),
        Command(
            "logs",
            "show the end of a deployment's logs",
            watching.logs,
            (
                _NAME,
                _WHICH,
                Option("lines", "so many of each log", int, short="n", default=50),
                Option("rank", "of this rank alone", int),
                Option("level", "of this level and above", choices=watching.LEVELS),
                Option("grep", "only lines in which this regular expression is found"),
                Option("follow", "then show new lines for so long: 20, 20s, 5m", seconds),
            ),
            example="logs chat --level warning --follow 20s",
        ),
        Command(
            "gen",
            "write on after a prompt, or make pictures of it",
            generating.gen,
            (
                _PROMPT,
                _WHICH,
                *GENERATION,
                GREEDY,
                *IMAGES,
                _BATCH,
                Option("chat", "ask through the model's chat template; in a notebook `chat` also remembers", read=None),
                *_ANSWER,
            ),
            body="the prompt",
            example='gen "Once upon a time" -n 40',
            streams=True,
        ),
        Command(
            "chat",
            "talk with a model, turn by turn (in a terminal one turn, which nothing remembers)",
            generating.chat,
            (_PROMPT, _WHICH, *GENERATION, GREEDY, *_ANSWER),
            body="what you say",
            example='chat "Who wrote Faust?"',
            streams=True,
        ),
        Command("reset", "forget the conversation of chat (in a notebook)", generating.reset, (_NAME, _WHICH)),
        Command(
            "predict",
            "classify, find entities, answer questions, fill masks, embed",
            predicting.predict,
            (_PROMPT, _WHICH, *_PLACES, *PREDICTION, _BATCH, _JSON_LINES),
            body='the text (with --question its context), or JSON: {"question": "...", "context": "..."}',
            example='predict "Who wrote it?" --context "Ada Lovelace wrote it."',
        ),
        Command(
            "bench",
            "measure a deployment, or compare several",
            measuring.bench,
            (_WHICH, _SEVERAL, *BENCH, *_KEPT),
            body="the prompts, one a line, or parts between lines of ---",
            example="bench -s fast,plain --sweep concurrency --slo ttft=0.5,tpot=0.05",
        ),
        Command(
            "compare",
            "bench on the deployments that are named",
            measuring.compare,
            (Option("names", "the deployments", positional=True, many=True, names="deployments"), *BENCH, *_KEPT),
            body="the prompts, as for bench",
            example="compare fast plain",
        ),
        Command(
            "plot",
            "draw a benchmark run",
            keeping.plot,
            (
                Option("kind", "which chart", choices=keeping.CHARTS, positional=True),
                Option("run", "of this run, or of several: A,B (default: the last)", read=words, names="runs"),
                _LOAD,
                Option(
                    "metric",
                    "which time (latency, ecdf, frontier), rate (throughput and the scalings) or cost",
                    choices=keeping.METRICS,
                ),
                Option(
                    "by",
                    "what bars are grouped by, lines (ecdf, frontier) are told apart by, throughput scales with",
                    choices=keeping.GROUPS,
                ),
                Option("log", "a logarithmic axis (dots instead of bars)", read=None),
                Option("no_log", "no logarithmic axis", read=None, value=False, field="log"),
                Option("save", "write it to this file: .png, .svg, .pdf"),
            ),
            example="plot latency --metric ttft_s --by dtype",
        ),
        Command(
            "runs",
            "list, show, price, report, save, export, merge, load or drop benchmark runs",
            keeping.runs,
            (
                Option("what", "default: list", choices=keeping.RUNS, positional=True),
                Option("names", "the runs (default: the last)", positional=True, many=True, names="runs"),
                Option("to", "the folder, of export and report the file"),
                _LOAD,
                Option("format", "of export (default: the file's ending)", choices=keeping.FORMATS),
                *(replace(option, help=f"cost: {option.help}") for option in BENCH if option.name in ("slo", "price")),
                Option("attain", "cost: share of the requests that has to meet --slo (default: 0.9)", float),
            ),
            example="runs cost --slo ttft=0.5,tpot=0.05 --price 2.5",
        ),
        Command(
            "panel",
            "show a panel of widgets",
            actions.panel,
            (Option("kind", "default: by the task", choices=actions.PANELS, positional=True), _WHICH),
            example="panel compare -d chat",
        ),
        Command("models", "show families, tasks and what is optimized", measuring.models),
        Command(
            "check",
            "compare a model layer by layer with transformers",
            measuring.check,
            (
                Option("model", "a folder or a hub name", positional=True),
                *(option for option in DEPLOYMENT if option.name in measuring.CHECKED),
                _JSON,
            ),
            example="check ./SmolLM2-135M-Instruct --dtype bf16",
        ),
        Command("gpus", "show the GPUs and their memory", measuring.gpus, (_JSON,)),
        Command("env", "show versions and hardware", measuring.env, (_JSON,)),
        Command("doctor", "check that this machine is ready", measuring.doctor, (_JSON,)),
        Command("config", "show the settings and where each comes from", measuring.settings, (_JSON,)),
        Command("demo", "the guided first run, on a small real model", measuring.demo),
        Command(
            "help",
            "show all commands, or one",
            _help,
            (
                Option("command", "which", positional=True, names="commands"),
                Option("markdown", "all commands with their options, as a page of Markdown", read=None),
            ),
        ),
    )
}


def overview(prog: str) -> str:
    """All commands, a line each, as they are written in this place."""
    width = max(map(len, COMMANDS))
    lines = [f"{prog} COMMAND [OPTIONS]", ""]
    lines += [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", f"{prog} help COMMAND shows the options of one."]
    if prog.startswith("%"):
        lines += [
            f"%{prog} [NAME] [OPTIONS] takes the cell as the prompt for deployment NAME.",
            "{name} in a prompt or an option becomes the value of that variable; other braces stay as they are.",
            "-o VAR keeps the value in a variable, -q or a final ; shows nothing.",
        ]
    return "\n".join(lines)


def help_text(prog: str, name: str | None = None, extra: Sequence[Option] = ()) -> str:
    """Help of one command, or of all."""
    return build(find(name), prog=prog, extra=extra).format_help().rstrip() if name else overview(prog)


def wants_json(values: Mapping[str, Any]) -> bool:
    """Whether the command's value is to be printed as JSON."""
    return bool(values.get("json")) or values.get("format") == "json"


def is_shown(command: Command, values: Mapping[str, Any]) -> bool:
    """Whether the command has shown its value itself, while it came."""
    return command.streams or any(values.get(name) is not None for name in ("watch", "follow"))


def find(name: str) -> Command:
    """The command of that name.

    Raises:
        InvalidValue: there is none; the near name is in the hint.
    """
    if name not in COMMANDS:
        raise InvalidValue(f"There is no command {name!r}.", hint=did_you_mean(name, COMMANDS))
    return COMMANDS[name]


def execute(context: Context, command: Command, values: Mapping[str, Any], body: str | None = None) -> Any:
    """Run a command and give its value.

    Raises:
        InvalidValue: the command takes no cell.
        MiinbError: whatever the command itself says.
    """
    if body is not None and body.strip() and not command.body:
        raise InvalidValue(
            f"{command.name} takes no cell body.", hint=f"Write it on one line: {context.prog} {command.name}"
        )
    return command.run(context, values, body)
