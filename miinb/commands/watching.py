"""What the commands that look at a deployment do: `status`, once or again and again, and `logs`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from miinb.commands.context import ENDED, Context, named
from miinb.errors import InvalidValue

if TYPE_CHECKING:
    from miinb.messages import Status
    from miinb.session import Session

Values = Mapping[str, Any]

LEVELS = ("debug", "info", "warning", "error")
WATCH_S = 1.0
FOLLOW_S = 0.5
#: Lines of each log that are searched.
SEARCHED = 100_000
_HEAD = re.compile(r"==> (\S+) <==")
_STAMP = re.compile(r"\d{4}-\d\d-\d\d [\d:,.]+ \S+ (DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
_CRASH = re.compile(r"Traceback \(most recent call last\)|Fatal Python error|terminate called")


def status(context: Context, values: Values, body: str | None) -> Status:
    """How a deployment is; with --watch again each second, until the user stops it or the deployment has ended."""
    session = context.session(named(values, "status"))
    if not values["watch"]:
        return session.status()
    if values["json"]:
        raise InvalidValue("status: --watch and --json.", hint="Give one of them.")
    place = context.screen.place()
    found = session.status()
    try:
        while True:
            if not values.get("quiet"):
                place.show(found)
            if found.state in ENDED:
                return found
            time.sleep(WATCH_S)
            found = session.status()
    except KeyboardInterrupt:  # how a watch ends
        return found


def logs(context: Context, values: Values, body: str | None) -> str:
    """The end of a deployment's logs: of all lines, or of those that are asked for."""
    session = context.session(named(values, "logs"))
    wanted = _filter(values)
    count = 50 if values["lines"] is None else values["lines"]
    if count < 1:
        raise InvalidValue(f"--lines: {count} is less than 1.")
    if values["follow"] is not None:
        return _follow(context, session, values, wanted, count)
    if not (values["grep"] or values["level"]):
        return session.logs(count, rank=values["rank"])
    found = {name: wanted(lines)[-count:] for name, lines in _sections(session.logs(SEARCHED, rank=values["rank"]))}
    shown = "\n".join(_shown(name, [line for _, line in lines]) for name, lines in found.items() if lines)
    return shown or f"No line of the last {SEARCHED:,} of a log matches."


def _shown(name: str, lines: list[str]) -> str:
    return "\n".join([f"==> {name} <==", *lines])


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each log's name and lines."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if head := _HEAD.fullmatch(line):
            if name or lines:
                yield name, lines
            name, lines = head[1], []
        else:
            lines.append(line)
    if name or lines:
        yield name, lines


def _filter(values: Values) -> Callable[[list[str]], list[tuple[int, str]]]:
    """Chooses lines of a log, with their places; no blank ones. A line without a level has that of the one above it."""
    try:
        pattern = re.compile(values["grep"] or "")
    except re.error as error:
        raise InvalidValue(f"--grep: {values['grep']!r} is no regular expression: {error}.") from None
    least = LEVELS.index(values["level"]) if values["level"] else 0

    def chosen(lines: list[str]) -> list[tuple[int, str]]:
        found, level = [], len(LEVELS)
        for place, line in enumerate(lines):
            if stamp := _STAMP.match(line):
                level = LEVELS.index(stamp[1].lower()) if stamp[1] != "CRITICAL" else len(LEVELS)
            elif _CRASH.match(line):
                level = len(LEVELS)
            if line.strip() and level >= least and pattern.search(line):
                found.append((place, line))
        return found

    return chosen


def _follow(
    context: Context,
    session: Session,
    values: Values,
    wanted: Callable[[list[str]], list[tuple[int, str]]],
    count: int,
) -> str:
    """Show the last lines, then each new one, for as long as was asked; all that was shown."""
    end = time.monotonic() + values["follow"]
    seen: dict[str, int] = {}
    shown: list[str] = []
    above = ""
    try:
        while True:
            over = time.monotonic() >= end or session.state in ENDED  # before the last look: nothing is missed
            for name, lines in _sections(session.logs(SEARCHED, rank=values["rank"])):
                found = wanted(lines)
                fresh = [line for place, line in found if place >= seen[name]] if name in seen else []
                fresh = fresh if name in seen else [line for _, line in found[-count:]]
                seen[name] = len(lines)
                if fresh:
                    text = "\n".join(fresh) if name == above else _shown(name, fresh)
                    above = name
                    shown.append(text)
                    if not values.get("quiet"):
                        context.screen.show(text)
            if over:
                break
            time.sleep(min(FOLLOW_S, max(0.0, end - time.monotonic())))
    except KeyboardInterrupt:  # the Stop button ends it early
        pass
    return "\n".join(shown)
