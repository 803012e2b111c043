"""What a user sets once for all commands: where settings come from, and what is told of a wrong one."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import Field

from miinb.errors import ConfigError, InvalidValue, UnknownOption, did_you_mean, near
from miinb.frozen import Frozen

PACKAGE = "package"
MAGIC = "%config MiiMagics"
PREFIX = "MIINB_"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Settings(Frozen):
    """Defaults of the commands. An argument of a command holds over them."""

    default_session: Annotated[str, Field(description="deployment for commands without -d; empty: the only one")] = ""
    max_new_tokens: Annotated[
        int, Field(ge=0, description="most new tokens of an answer; 0: the library's default")
    ] = 0
    render_markdown: Annotated[bool, Field(description="show answers as Markdown in cells")] = False
    stream_hz: Annotated[
        float, Field(ge=0.2, le=50, description="updates a second of an answer that grows in a cell")
    ] = 10.0
    short_errors: Annotated[bool, Field(description="one line for an error in a cell; off: the whole traceback")] = True
    price_usd_per_gpu_hour: Annotated[float, Field(ge=0, description="your price, for benchmarks; 0: none")] = 0.0
    run_dir: Annotated[str, Field(description="folder that keeps every benchmark run; empty: none")] = ""
    start_timeout_s: Annotated[
        float, Field(ge=0, description="seconds that a start may take; 0: the library's default")
    ] = 0.0


def load(folder: Path | None = None) -> tuple[Settings, dict[str, str]]:
    """The settings and where each comes from: the nearest pyproject.toml, the user's file, the environment; later wins.

    Args:
        folder: where the search for pyproject.toml begins; the working folder by default.

    Raises:
        ConfigError: a source has an unknown name or a wrong value, or cannot be read; the message names it.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(Settings.model_fields, PACKAGE)
    for source, given in (*_files(folder), *_environment()):
        _checked(source, given)
        values |= _beside(source, given)
        sources |= dict.fromkeys(given, source)
    return Settings.parse(values), sources


def _beside(source: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings with a relative `run_dir` of a file put beside that file."""
    place, kept = Path(source.removesuffix(" [tool.miinb]")).parent, given.get("run_dir")
    return {**given, "run_dir": str(place / kept)} if kept and place.is_absolute() else given


def user_file() -> Path:
    """The user's own file of settings."""
    return Path(platformdirs.user_config_dir("miinb"), "config.toml")


def changed(settings: Settings, name: str, value: Any) -> Settings:
    """The settings with one of them changed."""
    return settings.model_copy(update={name: value})


def _files(folder: Path | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        start = (folder or Path.cwd()).resolve()
    except FileNotFoundError:  # the working folder was removed
        start = Path("/")
    project = next((path for one in (start, *start.parents) if (path := one / "pyproject.toml").is_file()), None)
    if project is not None:
        tools = _read(project, only_with=b"[tool.miinb").get("tool", {})
        if "miinb" in tools:
            yield f"{project} [tool.miinb]", tools["miinb"]
    if user_file().is_file():
        yield str(user_file()), _read(user_file())


def _read(file: Path, *, only_with: bytes = b"") -> dict[str, Any]:
    """The file's values. One that is not TOML counts as empty where it does not have the text `only_with`."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    try:
        return tomllib.loads(text.decode())
    except ValueError as error:
        if only_with not in text:
            return {}
        raise ConfigError(f"{file} is not TOML: {error}.") from None


def _environment() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Settings of the environment; empty ones count as not set.

    Its other names are not for commands, unless they are meant for a setting.
    """
    for variable in sorted(os.environ):
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or not os.environ[variable].strip():
            continue
        if name in Settings.model_fields:
            yield f"environment {variable}", {name: _typed(variable, name, os.environ[variable])}
        elif (meant := near(name, Settings.model_fields)) is not None:
            hint = f"Did you mean {PREFIX}{meant.upper()}?"
            raise UnknownOption(f"environment {variable}: there is no such setting.", hint=hint)


def _typed(variable: str, name: str, text: str) -> Any:
    kind = Settings.model_fields[name].annotation
    if kind is bool:
        if text.strip().lower() in _TRUE + _FALSE:
            return text.strip().lower() in _TRUE
        raise InvalidValue(f"environment {variable}: {text!r} is neither true nor false.")
    try:
        return kind(text) if kind is not None else text
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise InvalidValue(f"environment {variable}: {text!r} is not {what}.") from None


def _checked(source: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise InvalidValue(f"{source}: give a table of settings.")
    for name in given:
        if name not in Settings.model_fields:
            raise UnknownOption(
                f"{source}: there is no setting {name!r}.", hint=did_you_mean(name, Settings.model_fields)
            )
    try:
        Settings.parse(given)
    except InvalidValue as error:
        raise error.of(source) from None
