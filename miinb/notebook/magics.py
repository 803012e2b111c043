"""`%load_ext miinb`: the magics %mii, %%mii, %miinb, %%miinb, and their completion."""

from __future__ import annotations

import keyword
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, magics_class, no_var_expand
from traitlets import Bool, Float, HasTraits, Int, Unicode
from traitlets.config.loader import DeferredConfig

from miinb import commands
from miinb.cell import quiet
from miinb.commands import settings
from miinb.commands.options import IN_CELLS, Names, Option
from miinb.commands.settings import Settings
from miinb.errors import InvalidValue, MiinbError, did_you_mean
from miinb.notebook import cards
from miinb.notebook.expansion import expand, looked_up
from miinb.notebook.streaming import CellScreen
from miinb.tasks import find_task

NAMES = ("mii", "miinb")


def _help_of(name: str) -> str:
    return f"{Settings.model_fields[name].description}"


@magics_class
class MiiMagics(Magics):  # type: ignore[misc]
    """The magics; their settings are `%config MiiMagics`."""

    default_session = Unicode("", help=_help_of("default_session")).tag(config=True)
    max_new_tokens = Int(0, min=0, help=_help_of("max_new_tokens")).tag(config=True)
    render_markdown = Bool(False, help=_help_of("render_markdown")).tag(config=True)
    stream_hz = Float(10.0, min=0.2, max=50, help=_help_of("stream_hz")).tag(config=True)
    short_errors = Bool(True, help=_help_of("short_errors")).tag(config=True)
    price_usd_per_gpu_hour = Float(0.0, min=0, help=_help_of("price_usd_per_gpu_hour")).tag(config=True)
    run_dir = Unicode("", help=_help_of("run_dir")).tag(config=True)
    start_timeout_s = Float(0.0, min=0, help=_help_of("start_timeout_s")).tag(config=True)

    def __init__(self, shell: InteractiveShell) -> None:
        found, sources = settings.load()  # before anything is registered: a wrong setting leaves nothing behind
        _drop_wrong(shell)
        super().__init__(shell)
        self.context = commands.Context(prog="%mii", settings=found, sources=sources)
        self.context.screen = CellScreen(live=_has_front_end(shell), hz=lambda: self.stream_hz)
        self._hidden: list[Any] = []
        configured = shell.config.get("MiiMagics", {})  # IPython's own files have the rank of %config
        for name in Settings.model_fields:
            if name in configured:
                self._settings_changed({"name": name, "new": getattr(self, name)})
            else:
                self.set_trait(name, getattr(found, name))
        MiinbError.short = self.short_errors
        self.observe(self._settings_changed, list(Settings.model_fields))

    def _settings_changed(self, change: Any) -> None:
        name = change["name"]
        self.context.settings = settings.changed(self.context.settings, name, change["new"])
        self.context.sources[name] = settings.MAGIC
        MiinbError.short = self.short_errors

    @no_var_expand  # type: ignore[untyped-decorator]
    def mii(self, line: str, cell: str | None = None) -> Any:
        """Commands of miinb; `%mii help` lists them, `%mii help COMMAND` explains one.

        `%%mii [NAME] [OPTIONS]` takes the cell as a prompt.
        """
        silent = line.rstrip().endswith(";")  # a quoted text ends with its quote
        words = commands.split(line.rstrip().removesuffix(";"))
        if cell is None and words[:1] in ([], ["--help"], ["-h"]):
            words = ["help"]
        words = self._cell_words(words) if cell is not None else words
        command = commands.find(words[0])
        if commands.wants_help(words[1:]):
            print(commands.help_text("%mii", command.name, IN_CELLS))
            return None
        expanded = _as_written if _is_raw(words) else self._expanded
        objects = {} if _is_raw(words) else {"look_up": self._looked_up}
        values = commands.parse(command, words[1:], prog="%mii", extra=IN_CELLS, expand=expanded, **objects)
        values["quiet"] = values["quiet"] or silent
        variable = values["output"]
        _check_variable(variable)
        cell = cell if cell is None else expanded(cell)
        if values["show"]:
            shown = cell if cell is not None else " ".join(values.get("prompt") or ())
            print(shown.removesuffix("\n"))
        measured = len(self.context.runs)
        try:
            with quiet() if values["quiet"] else nullcontext():
                value = commands.execute(self.context, command, values, cell)
        except MiinbError:
            if variable is not None and len(self.context.runs) > measured:  # a run that no disk would keep
                self.shell.user_ns[variable] = self.context.run()
            raise
        if variable is not None:
            self.shell.user_ns[variable] = value
        if commands.wants_json(values) and not values["quiet"]:
            print(commands.as_json(value))
            self._hide(value, "")
            return value
        return self._for_cell(value, streamed=commands.is_shown(command, values), quiet=values["quiet"])

    def _cell_words(self, words: list[str]) -> list[str]:
        """`%%mii [NAME] [OPTIONS]` is `gen` or `predict` `-d NAME OPTIONS`; a command's name goes before."""
        if not words or words[0].startswith("-"):
            return [self._asks(None), *words]
        if not _is_raw(words):
            words = [self._expanded(words[0]), *words[1:]]
        if words[0] in commands.COMMANDS:
            return words
        known = sorted({*self.context.sessions, *self.context.names()})
        if words[0] not in known:
            hint = did_you_mean(words[0], [*known, *commands.COMMANDS])
            raise InvalidValue(f"{words[0]!r} is neither a running deployment nor a command.", hint=hint)
        return [self._asks(words[0]), "-d", *words]

    def _asks(self, name: str | None) -> str:
        """The command that asks a deployment (None: the default) what its task is there for."""
        try:
            task = self.context.session(name).task
        except MiinbError:  # the command says so
            return "gen"
        return "gen" if find_task(task).streams or find_task(task).image else "predict"

    def _expanded(self, text: str) -> str:
        return expand(text, self.shell.user_ns)

    def _looked_up(self, text: str) -> Any:
        return looked_up(text, self.shell.user_ns)

    def _for_cell(self, value: Any, *, streamed: bool, quiet: bool) -> Any:
        """The magic's value. Text is printed; what was shown already is not shown again as the cell's output."""
        if isinstance(value, str):
            if not (quiet or streamed):
                self.context.screen.show(value)
            return None
        if value is not None and (streamed or quiet):
            self._hide(value, cards.timing_line(value) if hasattr(value, "timing") and not quiet else "")
        return value

    def _hide(self, value: Any, line: str) -> None:
        """Skip this object's display for the rest of this cell: `r = %mii gen …` and `_` work all the same.

        A terminal has written "Out[1]: " by then; there the line stands after it.
        """
        if not self._hidden:
            self.shell.events.register("post_run_cell", self._unhide)
        self._hidden.append(value)

        def show(shown: Any) -> None:
            if not any(shown is hidden for hidden in self._hidden):
                self.shell.display_pub.publish(self.shell.display_formatter.mimebundle_formatter(shown)[0])
            elif not _has_front_end(self.shell):
                print(line)

        self.shell.display_formatter.ipython_display_formatter.for_type(type(value), show)

    def _unhide(self, *_: Any) -> None:
        formatter = self.shell.display_formatter.ipython_display_formatter
        for value in self._hidden:
            formatter.type_printers.pop(type(value), None)
        self._hidden.clear()
        self.shell.events.unregister("post_run_cell", self._unhide)

    def names(self, kind: Names) -> Iterable[str]:
        """Names for completion; none when they cannot be had."""
        try:
            known = {
                "deployments": self.context.names,
                "runs": lambda: self.context.runs,
                "commands": commands.COMMANDS.keys,
            }
            return known[kind]() if kind else ()
        except Exception:  # completion must not fail while somebody types
            return ()

    def complete(self, text: str, *, cell: bool) -> tuple[list[str], str]:
        """What may follow `text` (the line after the magic's name), and the fragment that it replaces."""
        fragment = text.rpartition(" ")[2]
        before = text[: len(text) - len(fragment)].split()
        first: Iterable[str] = ()
        extra: tuple[Option, ...] = IN_CELLS
        if cell:
            first = self.names("deployments")
            if before and before[0] not in commands.COMMANDS:
                before = ["gen", *before]
            elif not before and fragment.startswith("-"):
                before = ["gen"]
        return commands.suggest(commands.COMMANDS, before, fragment, self.names, extra, first), fragment

    @context_matcher(identifier="miinb")  # type: ignore[untyped-decorator]
    def matcher(self, context: CompletionContext) -> SimpleMatcherResult:
        """IPython's completion (matcher interface 2) inside the magics; silent everywhere else."""
        line = context.text_until_cursor
        for name in NAMES:
            for prefix in (f"%%{name} ", f"%{name} "):
                cell = prefix.startswith("%%")
                place = line.rfind(prefix)
                if place < 0 or (cell and (place or context.cursor_line)):
                    continue
                found, fragment = self.complete(line[place + len(prefix) :], cell=cell)
                made = [SimpleCompletion(text=word, type="magic") for word in found]
                return {"completions": made, "matched_fragment": fragment, "suppress": True, "ordered": True}
        return {"completions": []}


def _check_variable(name: str | None) -> None:
    """Refuse what no cell could read again."""
    if name is None:
        return
    if keyword.iskeyword(name):
        raise InvalidValue(f"--output: {name!r} is a word of Python itself.", hint=f"Take another name: -o {name}_")
    if not name.isidentifier():
        hint = "A name has letters, digits and _, and begins with no digit: -o answer"
        raise InvalidValue(f"--output: {name!r} cannot be a variable's name.", hint=hint)


def _is_raw(words: list[str]) -> bool:
    return "--raw" in words[: words.index("--") if "--" in words else None]


def _as_written(text: str) -> str:
    return text


def _has_front_end(shell: InteractiveShell) -> bool:
    """Whether the shell is a kernel, whose front end can replace output that was shown."""
    return getattr(shell, "kernel", None) is not None


def _drop_wrong(shell: InteractiveShell) -> None:
    """Take wrong settings out of the shell's configuration, where %config leaves what it has refused, and say so."""
    configured, traits = shell.config.get("MiiMagics", {}), MiiMagics.class_traits(config=True)
    for name in [name for name in configured if name in Settings.model_fields]:
        value = configured[name]
        try:
            value = value.get_value(traits[name]) if isinstance(value, DeferredConfig) else value
            traits[name]._validate(HasTraits(), value)
        except Exception:  # whatever a trait or a conversion raises: the value cannot be had
            del configured[name]
            print(f"{settings.MAGIC}.{name}: {value!r} is not possible and was ignored.", file=sys.stderr)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """`%load_ext miinb`: registers the magics and their completion; silent. Earlier chats and runs are there again."""
    unload_ipython_extension(shell)
    magics = MiiMagics(shell)
    if earlier := shell.__dict__.pop("miinb_context", None):
        magics.context.take_over(earlier)
    MiiMagics.mii.__doc__ = commands.overview("%mii")  # `%mii?` shows the table
    shell.register_magics(magics)
    for name in NAMES:
        shell.register_magic_function(magics.mii, magic_kind="line_cell", magic_name=name)
    shell.Completer.custom_matchers.append(magics.matcher)
    shell.miinb_magics = magics


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take the magics and their completion away again. Deployments go on; the next load finds chats and runs."""
    magics = shell.__dict__.pop("miinb_magics", None)
    if magics is None:
        return
    shell.miinb_context = magics.context
    for kind in ("line", "cell"):
        for name in NAMES:
            shell.magics_manager.magics[kind].pop(name, None)
    shell.magics_manager.registry.pop("MiiMagics", None)
    shell.configurables[:] = [one for one in shell.configurables if one is not magics]
    shell.Completer.custom_matchers[:] = [
        one for one in shell.Completer.custom_matchers if getattr(one, "__self__", None) is not magics
    ]
