"""The `miinb` program: the commands of the notebook in a terminal."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence

from miinb.errors import ConfigError, Interrupted, MiinbError


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code: 0 done, 1 it failed, 2 it was asked for in a wrong way, 130 Ctrl-C.

    Args:
        words: the command line without the program's name; None takes the process's.
    """
    words = list(sys.argv[1:] if words is None else words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks is shown all the same
    try:
        code = _run(words)
        sys.stdout.flush()  # now, that a full disk is told like any other error
        return code
    except MiinbError as error:
        print(f"miinb: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as stop:
        words = f"{stop}" if isinstance(stop, Interrupted) else "stopped."
        print(f"\nmiinb: {words}" if sys.stderr.isatty() else f"miinb: {words}", file=sys.stderr)  # behind its "^C"
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        if error.errno != errno.EPIPE:
            print(f"miinb: the output cannot be written: {error.strerror}.", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 1


def _run(words: list[str]) -> int:
    from miinb import commands  # takes a third of a second, in which Ctrl-C may come
    from miinb.commands.settings import load

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
    context = commands.Context()
    if command.name not in ("help", "doctor"):  # these two help where a setting is wrong
        context.settings, context.sources = load()
    value = commands.execute(context, command, values)
    if commands.wants_json(values):
        print(commands.as_json(value))
    elif value is not None and not commands.is_shown(command, values):
        commands.PlainScreen().show(commands.described(value))
    return 0


if __name__ == "__main__":
    sys.exit(main())
