"""From words to a command and its values, and from half a line to what may come next."""

from __future__ import annotations

import argparse
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from miinb.commands.options import Names, Option, read_value
from miinb.errors import ConfigError, InvalidValue, UnknownOption, did_you_mean

if TYPE_CHECKING:
    from miinb.commands.context import Context


@dataclass(frozen=True)
class Command:
    """A row of the table of commands.

    Attributes:
        name: the word that calls it.
        summary: one line for help.
        run: does it: (context, values by field name, body) -> the command's value.
        options: what it takes.
        body: what a cell's body means to it; "" when it takes none.
        example: one line that works.
        streams: its answer is shown while it grows; a notebook does not show it a second time.
    """

    name: str
    summary: str
    run: Callable[[Context, Mapping[str, Any], str | None], Any]
    options: tuple[Option, ...] = ()
    body: str = ""
    example: str = ""
    streams: bool = False


class _Parser(argparse.ArgumentParser):
    """Raises instead of leaving the process; unknown options name the near one."""

    def error(self, message: str) -> NoReturn:
        text = message[:1].upper() + message[1:].rstrip(".")
        raise ConfigError(f"{self.prog}: {text}.", hint=f"See {self.prog} --help.")


def _in_order(words: Sequence[str], options: Sequence[Option]) -> tuple[list[str], list[str]]:
    """Options with their values, and the words that have a place: argparse takes these only in one piece.

    A value may begin with a dash (`--stop ---`, `--presence-penalty -0.5`), unless it reads like an option.
    """
    known = {flag: option for option in options for flag in option.flags}
    named: list[str] = []
    placed: list[str] = []
    left = deque(words)
    while left:
        word = left.popleft()
        if word == "--":
            placed += left
            break
        if not _reads_as_option(word):
            placed.append(word)
        elif word not in known or known[word].read is None or not left or left[0] == "--":
            named.append(word)
        elif left[0].partition("=")[0] in known:
            named.append(word)  # argparse says that the value is missing
        else:
            named.append(f"{word}={left.popleft()}")
    return named, placed


def _reads_as_option(word: str) -> bool:
    """As argparse sees it: a dash and no space, and not a negative number."""
    return len(word) > 1 and word[0] == "-" and " " not in word and not word[1:].replace(".", "", 1).isdigit()


def _as_written(text: str) -> str:
    return text


def _no_object(text: str) -> Any:
    return None


def build(
    command: Command,
    *,
    prog: str,
    extra: Sequence[Option] = (),
    expand: Callable[[str], str] = _as_written,
    look_up: Callable[[str], Any] = _no_object,
) -> argparse.ArgumentParser:
    """The argparse parser of a command. `extra` are options of the place (notebook or terminal)."""
    epilog = "\n".join(
        part
        for part in (
            f"The cell's body: {command.body}." if command.body and prog.startswith("%") else "",
            f"Example: {prog} {command.example}" if command.example else "",
        )
        if part
    )
    parser = _Parser(
        prog=f"{prog} {command.name}",
        description=command.summary[:1].upper() + command.summary[1:] + ".",
        epilog=epilog,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option in (*command.options, *extra):
        _add(parser, option, expand, look_up)
    return parser


def _add(
    parser: argparse.ArgumentParser, option: Option, expand: Callable[[str], str], look_up: Callable[[str], Any]
) -> None:
    text = option.described.replace("%", "%%")
    if option.read is None:
        parser.add_argument(
            *option.flags, dest=option.target, action="store_const", const=option.value, default=None, help=text
        )
        return

    def read(value: str) -> Any:
        found = look_up(value) if option.objects else None
        return read_value(option, expand(value)) if found is None or isinstance(found, str) else found

    shown = "{" + ",".join(option.choices) + "}" if option.choices else option.name.upper()
    if option.positional:
        parser.add_argument(
            option.name, nargs="*" if option.many else "?", default=None, type=read, metavar=shown, help=text
        )
        return
    action = "append" if option.many else "store"
    shown = shown if option.choices else option.name.rpartition("_")[2].upper()
    parser.add_argument(
        *option.flags, dest=option.target, action=action, default=None, type=read, metavar=shown, help=text
    )


def parse(
    command: Command,
    words: Sequence[str],
    *,
    prog: str,
    extra: Sequence[Option] = (),
    expand: Callable[[str], str] = _as_written,
    look_up: Callable[[str], Any] = _no_object,
) -> dict[str, Any]:
    """Values by field name; None for what was not given.

    Args:
        expand: sees each value's text before it is read.
        look_up: of options that take objects: the object that a value's text names, or None.

    Raises:
        UnknownOption: no such option; the near one is in the hint.
        InvalidValue: a value of the wrong form.
        ConfigError: a word too many or a value missing.
    """
    parser = build(command, prog=prog, extra=extra, expand=expand, look_up=look_up)
    options = (*command.options, *extra)
    named, placed = _in_order(words, options)
    values, rest = parser.parse_known_args([*named, "--", *placed] if placed else named)
    for word in named:
        if word in rest:
            known = [flag for option in options for flag in option.flags]
            name = word.partition("=")[0]
            hint = did_you_mean(name, known) if known else f"{command.name} takes none."
            raise UnknownOption(f"{parser.prog}: there is no option {name!r}.", hint=hint)
    for word in rest:
        if word != "--":
            raise InvalidValue(f"{parser.prog}: there is no place for {word!r}.", hint=f"See {parser.prog} --help.")
    return vars(values)


def wants_help(words: Sequence[str]) -> bool:
    """Whether the words ask for help: --help or -h, before a "--"."""
    named = words[: words.index("--")] if "--" in words else words
    return any(word in ("--help", "-h") for word in named)


def split(line: str) -> list[str]:
    """The words of a line, quotes as in a shell.

    Raises:
        InvalidValue: a quote is not closed.
    """
    try:
        return shlex.split(line)
    except ValueError:
        raise InvalidValue(
            f"A quote is not closed in: {line.strip()}", hint='Put the text in double quotes: "What\'s up?"'
        ) from None


def suggest(
    commands: Mapping[str, Command],
    before: Sequence[str],
    fragment: str,
    names: Callable[[Names], Iterable[str]],
    extra: Sequence[Option] = (),
    first: Iterable[str] = (),
) -> list[str]:
    """What can stand where `fragment` begins: commands, options or values.

    Args:
        commands: the table.
        before: the whole words before the fragment.
        fragment: the word under the cursor so far.
        names: makes the names of deployments, commands, runs.
        extra: options of the place.
        first: words besides the commands that may come first (a cell may begin with a deployment).
    """
    if not before:
        return sorted(word for word in (*commands, *first) if word.startswith(fragment))
    command = commands.get(before[0])
    if command is None:
        return []
    options = (*command.options, *extra)
    last = next((option for option in options if before[-1] in option.flags), None)
    if last is not None and last.read is not None:
        return _values(last, fragment, names)
    if fragment.startswith("-"):
        used = {word for word in before if word.startswith("-")}
        fresh = [option for option in options if option.flags and (option.many or not used & set(option.flags))]
        return sorted(flag for option in fresh for flag in option.flags if flag.startswith(fragment))
    valued = {flag for option in options if option.read is not None for flag in option.flags}
    placed = [word for i, word in enumerate(before[1:]) if not word.startswith("-") and before[i] not in valued]
    places = [option for option in options if option.positional]
    index = min(len(placed), len(places) - 1)
    if not places or (len(placed) >= len(places) and not places[-1].many):
        return []
    return _values(places[index], fragment, names)


def _values(option: Option, fragment: str, names: Callable[[Names], Iterable[str]]) -> list[str]:
    known = option.choices or (names(option.names) if option.names else ())
    return sorted(word for word in known if word.startswith(fragment))
