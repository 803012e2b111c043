"""What the commands act on: this process's deployments, its last runs, and the user's settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from miinb.commands.screen import PlainScreen, Screen
from miinb.commands.settings import PACKAGE, PREFIX, Settings
from miinb.errors import DeploymentNotFound, InvalidValue, did_you_mean

if TYPE_CHECKING:
    from miinb.bench.records import Runs
    from miinb.session import Session

#: The word that stands for the standard input.
STDIN = "-"
#: States in which a session takes no more requests; its handle is forgotten.
ENDED = ("stopped", "failed", "lost")


@dataclass
class Context:
    """State of one notebook's magics, or of one call in a terminal.

    Attributes:
        screen: where things are shown.
        settings: read at each command, so changes act at once.
        sources: where each setting comes from.
        prog: how commands are written here ("%mii" or "miinb"), for help and hints.
        sessions: deployments that this context started or attached, by name.
        configs: the options with which it started them: the same `start` again finds the running one.
        default: the deployment of `use`.
        runs: benchmark runs by name, oldest first.
        chats: the messages of `chat`, by deployment.
    """

    screen: Screen = field(default_factory=PlainScreen)
    settings: Settings = field(default_factory=Settings)
    sources: dict[str, str] = field(default_factory=lambda: dict.fromkeys(Settings.model_fields, PACKAGE))
    prog: str = "miinb"
    sessions: dict[str, Session] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    default: str = ""
    runs: dict[str, Runs] = field(default_factory=dict)
    chats: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def take_over(self, earlier: Context) -> None:
        """Go on with the deployments, runs and chats of another context; settings and screen stay this one's."""
        for name in ("sessions", "configs", "default", "runs", "chats"):
            setattr(self, name, getattr(earlier, name))

    @property
    def in_notebook(self) -> bool:
        """Cells, widgets and variables are there."""
        return self.prog.startswith("%")

    @property
    def choice(self) -> str:
        """How a deployment is chosen, once and for all that follows: a hint."""
        lasting = f"{self.prog} use NAME" if self.in_notebook else f"export {PREFIX}DEFAULT_SESSION=NAME"
        return f"Choose with -d NAME, or for all that follows: {lasting}."

    def forget(self, name: str) -> None:
        """Drop what is known of an ended deployment."""
        for kept in (self.sessions, self.configs, self.chats):
            kept.pop(name, None)
        if self.default == name:
            self.default = ""

    def names(self) -> list[str]:
        """Names of all running deployments of this user, sorted."""
        import miinb

        return sorted(deployment.name for deployment in miinb.deployments())

    def session(self, name: str | None = None) -> Session:
        """The deployment of that name; without one the default, or the only one that runs.

        Raises:
            DeploymentNotFound: there is none; the hint says what to do.
            InvalidValue: several run and none was chosen.
        """
        name = name or self.default or self.settings.default_session or self._only()
        known = self.sessions.get(name)
        if known is not None and known.state not in ENDED:
            return known
        if known is not None:
            self.forget(name)
        import miinb

        session: Session = miinb.attach(name)
        self.sessions[name] = session
        return session

    def _only(self) -> str:
        own = [name for name, session in self.sessions.items() if session.state not in ENDED]
        running = own or self.names()
        if not running:
            raise DeploymentNotFound("No deployment is running.", hint=f"Start one: {self.prog} start MODEL.")
        if len(running) > 1:
            raise InvalidValue(
                f"Several deployments are running: {', '.join(sorted(running))}.",
                hint=self.choice,
            )
        return running[0]

    def keep_run(self, name: str | None, run: Runs) -> str:
        """Keep a benchmark run under this name, with a number behind it where another one has it; the name."""
        wanted, number = name or "run", 1 if name else len(self.runs) + 1
        kept = name or f"run-{number}"
        while kept in self.runs:
            number += 1
            kept = f"{wanted}-{number}"
        self.runs[kept] = run
        return kept

    def run(self, name: str | None = None) -> Runs:
        """The benchmark run of that name; the last one without."""
        if not self.runs:
            raise InvalidValue("There is no benchmark run yet.", hint=f"Make one: {self.prog} bench.")
        name = name or next(reversed(self.runs))
        if name not in self.runs:
            raise InvalidValue(f"There is no run {name!r}.", hint=did_you_mean(name, self.runs))
        return self.runs[name]


def named(values: Mapping[str, Any], command: str, field: str = "name") -> str | None:
    """The deployment that a line names, by its place or after -d. Raises InvalidValue where these are two."""
    name: str | None = values[field]
    deployment: str | None = values["deployment"]
    if name and deployment and name != deployment:
        raise InvalidValue(f"{command}: {name!r} and -d {deployment}.", hint="Give one of them.")
    return name or deployment


def stdin(context: Context, command: str) -> TextIO:
    """The standard input. Raises InvalidValue in a notebook, which has none."""
    if context.in_notebook:
        raise InvalidValue(f"{command}: a notebook has no standard input.", hint="Write the text into the cell.")
    return sys.stdin
