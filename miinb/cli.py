"""The `miinb` program: the commands of the notebook in a terminal."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

from miinb import commands
from miinb.errors import ConfigError, MiinbError


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code: 0 done, 1 it failed, 2 it was asked for in a wrong way.

    Args:
        words: the command line without the program's name; None takes the process's.
    """
    words = list(sys.argv[1:] if words is None else words)
    try:
        code = _run(words)
        sys.stdout.flush()  # now, that a full disk is told like any other error
        return code
    except MiinbError as error:
        print(f"miinb: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        if error.errno != errno.EPIPE:
            print(f"miinb: the output cannot be written: {error.strerror}.", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h"):
        print(commands.overview("miinb"))
        return 0 if words else 2
    if words[0] == "--version":
        import miinb

        print(f"miinb {miinb.__version__}")
        return 0
    command = commands.find(words[0])
    if command.name == "demo":  # the demo has its own options
        from miinb.demo import main as demo

        return int(demo(words[1:]) or 0)
    if commands.wants_help(words[1:]):
        print(commands.help_text("miinb", command.name))
        return 0
    values = commands.parse(command, words[1:], prog="miinb")
    value = commands.execute(commands.Context(), command, values)
    if values.get("json"):
        print(commands.as_json(value))
    elif value is not None and not command.streams:
        commands.PlainScreen().show(_described(value))
    return 0


def _described(value: Any) -> str:
    """The plain-text form that the value shows in a notebook, else its text."""
    bundle = getattr(value, "_repr_mimebundle_", None)
    data = bundle() if bundle is not None else {}
    data = data[0] if isinstance(data, tuple) else data
    return str(data.get("text/plain") or value)


if __name__ == "__main__":
    sys.exit(main())
