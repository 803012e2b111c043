"""The exceptions of miinb: one tree, one line each in a notebook.

MiinbError
├── ConfigError               an option is wrong; nothing was started
│   ├── UnknownOption
│   └── InvalidValue
├── ModelError                the model cannot be used as asked
│   ├── ModelNotFound
│   ├── UnsupportedModel
│   ├── BrokenCheckpoint
│   └── MissingHead
├── StartError                a deployment did not start
│   ├── StartTimeout
│   ├── OutOfMemory
│   └── RankFailed
├── DeploymentNotFound
├── DeploymentExists
├── VersionMismatch
├── RequestError              one request failed; the deployment goes on
│   ├── InvalidRequest
│   ├── PromptTooLong
│   ├── QueueFull
│   ├── DeadlineExceeded
│   ├── Cancelled
│   ├── Unavailable
│   └── NonFinite
└── TargetError               Azure ML, Ray
Interrupted(KeyboardInterrupt)    the Stop button ended a request
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from typing import Any, Self


class MiinbError(Exception):
    """Base of every error that miinb raises.

    Attributes:
        message: what happened, in one sentence.
        hint: what to do about it, or "".
        details: longer text (a log's tail, a rank's traceback), shown only in full tracebacks and by `str(error)`.
        result: of a call for pictures, those that were complete by then (an `ImageResult`); else None.
    """

    #: `%config MiiMagics.short_errors = False` turns the one-line rendering off.
    short = True
    result: Any = None

    def __init__(self, message: str, *, hint: str = "", details: str = "") -> None:
        self.message = message
        self.hint = hint
        self.details = details
        super().__init__(message)

    def __str__(self) -> str:
        return "\n".join(part for part in (self.line(), self.details) if part)

    def line(self) -> str:
        """Message and hint on one line."""
        return f"{self.message} {self.hint}".strip()

    def of(self, what: str, *, hint: str = "") -> Self:
        """The same error, told of one thing among several, with more of a hint."""
        hints = " ".join(part for part in (self.hint, hint) if part)
        return type(self)(f"{what}: {self.message}", hint=hints, details=self.details)

    def _render_traceback_(self) -> list[str]:
        if not MiinbError.short:
            return "".join(traceback.format_exception(self)).splitlines()
        lines = [f"{type(self).__name__}: {self.line()}"]
        return lines + self.details.splitlines()[-30:]


class ConfigError(MiinbError):
    """An option is wrong; nothing was started."""


class UnknownOption(ConfigError):
    """An option that does not exist; the near name is in the hint."""


class InvalidValue(ConfigError):
    """An option with a value that it cannot have."""


class ModelError(MiinbError):
    """The model cannot be used as asked."""


class ModelNotFound(ModelError):
    """No folder of that path and no such name in the local cache."""


class UnsupportedModel(ModelError):
    """The model's kind or task is not supported."""


class BrokenCheckpoint(ModelError):
    """The checkpoint's files are damaged or do not belong together."""


class MissingHead(ModelError):
    """The checkpoint lacks the weights that the task needs."""


class StartError(MiinbError):
    """A deployment did not start."""


class StartTimeout(StartError):
    """Start-up took longer than `start_timeout_s`."""


class OutOfMemory(StartError):
    """The model does not fit."""


class RankFailed(StartError):
    """A rank ended during start-up; its traceback is in `details`."""


class DeploymentNotFound(MiinbError):
    """No running deployment of that name."""


class DeploymentExists(MiinbError):
    """The name is taken by a running deployment."""


class VersionMismatch(MiinbError):
    """The deployment was started by another version of miinb."""


class RequestError(MiinbError):
    """One request failed; the deployment goes on."""


class InvalidRequest(RequestError):
    """A request parameter is wrong; the message names the field."""


class PromptTooLong(RequestError):
    """Prompt and new tokens do not fit the model's context."""


class QueueFull(RequestError):
    """Too many requests wait; try again later."""


class DeadlineExceeded(RequestError):
    """The request's time limit passed."""


class Cancelled(RequestError):
    """The request was cancelled."""


class Unavailable(RequestError):
    """The deployment or the replica of this request is gone."""


class NonFinite(RequestError):
    """The model produced NaN or infinity for this request."""


class TargetError(MiinbError):
    """Azure ML or Ray refused."""


class Interrupted(KeyboardInterrupt):
    """The Stop button ended a request; the deployment lives on.

    Attributes:
        result: of pictures, those that were complete by then (an `ImageResult`); None: none was, or it was no request
            for pictures.
        hint: where these are.
    """

    def __init__(self, message: str, *, result: Any = None, hint: str = "") -> None:
        super().__init__(message)
        self.result = result
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.args[0]} {self.hint}".rstrip()

    def _render_traceback_(self) -> list[str]:
        return [f"Interrupted: {self}"]


def all_errors() -> dict[str, type[MiinbError]]:
    """Every class of the tree by name (the wire carries names, never classes)."""
    found: dict[str, type[MiinbError]] = {}
    todo: list[type[MiinbError]] = [MiinbError]
    while todo:
        cls = todo.pop()
        found[cls.__name__] = cls
        todo.extend(cls.__subclasses__())
    return found


def from_name(name: str, message: str, details: str = "", *, hint: str = "") -> MiinbError:
    """The error of that class name; a plain `MiinbError` with the name in its text if there is none."""
    cls = all_errors().get(name)
    if cls is None:
        return MiinbError(f"{name}: {message}", hint=hint, details=details)
    return cls(message, hint=hint, details=details)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint: the nearest known name, else the sorted list of known names."""
    names = sorted(known)
    found = near(name, names)
    return f"Did you mean {found!r}?" if found else f"Known: {', '.join(names)}."


def near(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, if one is."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)
