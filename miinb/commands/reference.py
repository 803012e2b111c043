"""The reference page of all commands, made from their table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from miinb.commands.options import IN_CELLS, Option
from miinb.commands.parser import Command
from miinb.commands.settings import PREFIX, Settings

_HEAD = """# Commands

Made by `python -m miinb help --markdown`; a test keeps it true. In a notebook after `%load_ext miinb` a command
is written `%mii COMMAND` (or `%miinb`), in a terminal `miinb COMMAND`. `%%mii COMMAND` takes a cell;
`%%mii [NAME] [OPTIONS]` takes it as the text for deployment NAME: `gen` or `predict`, by the deployment's task.
Words and options come in any order; what stands behind `--` is never an option. Times are seconds, or `90s`, `30m`,
`2h`. `[tool.miinb]` and other places keep [settings](#settings).
"""
_IN_CELLS = "\n## Every command in a notebook\nA final `;` does what `-q` does.\n\n"
_SETTINGS = f"""
## Settings
From the weakest to the strongest source: the package, `[tool.miinb]` of the nearest `pyproject.toml` from the working
folder upwards, `config.toml` in the user's folder of settings (`%mii config` tells where), `{PREFIX}NAME` in the
environment, `%config MiiMagics.NAME = VALUE` (in a notebook), an argument. An unknown name or a wrong value in any of
them is an error that names the place (of an unknown `%config` name IPython warns). A relative `run_dir` of a file is
beside that file. Settings hold for commands, not for the Python interface.

| setting | default | is |
|---|---|---|
"""


def reference(commands: Mapping[str, Command]) -> str:
    """The page, as Markdown."""
    parts = [_HEAD, *map(_of_command, commands.values()), _IN_CELLS, _table(IN_CELLS), _SETTINGS]
    for name, field in Settings.model_fields.items():
        default = f"`{field.default}`" if field.default != "" else ""
        parts.append(f"| `{name}` | {default} | {_cell(field.description or '')} |\n")
    return "".join(parts).rstrip("\n")


def _of_command(command: Command) -> str:
    placed = [option for option in command.options if option.positional]
    named = [option for option in command.options if not option.positional]
    usage = " ".join([command.name, *(f"[{o.name.upper()}{' ...' * o.many}]" for o in placed)])
    text = f"\n## {command.name}\n{command.summary[:1].upper()}{command.summary[1:]}: `{usage}`\n"
    if command.body:
        text += f"\nThe cell's body: {command.body}.\n"
    if command.example:
        text += f"\nExample: `%mii {command.example}`\n"
    return text + ("\n" + _table([*placed, *named]) if command.options else "")


def _table(options: Iterable[Option]) -> str:
    rows = [f"| {_written(option)} | {_cell(option.described)} |\n" for option in options]
    return "".join(["| option | is |\n|---|---|\n", *rows])


def _written(option: Option) -> str:
    if option.positional:
        names = [f"`{option.name.upper()}`"]
    else:
        value = "" if option.read is None else " " + option.name.rpartition("_")[2].upper()
        names = [f"`{flag}{value}`" for flag in option.flags]
    choices = f": {' '.join(f'`{choice}`' for choice in option.choices)}" if option.choices else ""
    return ", ".join(names) + choices


def _cell(text: str) -> str:
    r"""Text inside a table: bars, brackets and underscores are only themselves."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
