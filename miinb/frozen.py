"""The base of all configurations: pydantic models that cannot change, and errors in words for what they refuse."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from miinb.errors import ConfigError, InvalidValue, MiinbError, UnknownOption, did_you_mean, near

_WORDS = {"list_type": "give a list", "string_type": "give a text"}  # for pydantic's
#: What other libraries call a choice.
_OTHER_WORDS = {"gpu": "cuda", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32"}


class InvalidValueError(ValueError):
    """Raised inside validators only; `Frozen.parse` turns it into `InvalidValue`."""


class Frozen(BaseModel):
    """Base of every configuration: immutable, no unknown fields, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, error: type[MiinbError] = InvalidValue) -> Self:
        """The configuration of these values.

        Raises:
            UnknownOption: a name is not a field; the hint has the near name (`error` instead for requests).
            InvalidValue: a value is wrong; the message names the field (`error` is raised).
        """
        try:
            return cls.model_validate(plain(dict(values)))
        except ValidationError as failure:
            raise _explain(failure, cls, error) from None

    def to_json(self) -> str:
        """JSON that `from_json` reads back."""
        return self.model_dump_json()

    def refuse_unwritable(self, prefix: str = "") -> None:
        """For validators: raise InvalidValueError where a field holds what JSON cannot say, as processes are told it.

        Args:
            prefix: before the field's name in the message.
        """
        for name in self.model_fields_set:
            try:
                self.model_dump_json(include={name})
            except ValueError as error:
                lone = "surrogate" in str(error)
                what = "a lone surrogate, which is not text" if lone else "something that is not of JSON"
                raise InvalidValueError(f"{prefix}{name}: it holds {what}") from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The configuration that `to_json` wrote."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as failure:
            raise _explain(failure, cls, InvalidValue) from None


def _explain(failure: ValidationError, cls: type[BaseModel], error: type[MiinbError]) -> MiinbError:
    first = failure.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        unknown = UnknownOption if issubclass(error, ConfigError) else error
        owner: Any = cls
        for part in first["loc"][:-1]:
            owner = owner.model_fields[part].annotation if part in getattr(owner, "model_fields", {}) else owner
        known = list(getattr(owner, "model_fields", cls.model_fields))
        return unknown(f"There is no option {field!r}.", hint=did_you_mean(str(first["loc"][-1]), known))
    if first["loc"][-1:] == ("[key]",):
        field = ".".join(str(part) for part in first["loc"][:-2])
        return error(f"{field}: the key {_short(first['input'])} is no whole number.")
    if isinstance(cause := first.get("ctx", {}).get("error"), MiinbError):
        return error(cause.message, hint=cause.hint)
    text = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] == "value_error":  # our own validators name their field
        return error(f"{text}.")
    given = "" if first["type"] == "missing" else f", not {_short(first.get('input'))}"
    return error(f"{field or cls.__name__}: {text}{given}.", hint=_near_choice(first))


def _near_choice(failure: Any) -> str:
    """The choice that a wrong one is most like, as a hint, or ""."""
    if failure["type"] != "literal_error" or not isinstance(failure["input"], str):
        return ""
    choices = re.findall("'([^']*)'", failure["ctx"]["expected"])
    given = _OTHER_WORDS.get(failure["input"].lower(), failure["input"].lower())
    meant = given if given in choices else near(given, choices)
    return f"Did you mean {meant!r}?" if meant else ""


def _short(value: object) -> str:
    return text if len(text := repr(value)) <= 60 else text[:57] + "..."


def plain(value: object) -> Any:
    """Numbers, texts and arrays of numpy and its friends as Python's own, in lists and dictionaries too."""
    if hasattr(value, "tolist") and callable(value.tolist):
        return value.tolist()
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value
