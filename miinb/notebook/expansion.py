"""`{name}` in prompts and options: plain look-ups of names that exist become text, every other brace stays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LOOKUP = re.compile(
    r"""(?P<open>\{\{?)
        (?P<name>[^\W\d]\w*)
        (?P<path>(?:\.[^\W\d]\w*|\[(?:-?\d+|"[^"\]]*"|'[^'\]]*'|[^\W\d][\w ]*)\])*)
        (?P<close>\}\}?)""",
    re.VERBOSE,
)
_STEP = re.compile(r"\.(?P<attribute>\w+)|\[(?P<key>[^\]]*)\]")
_MISSING = object()


def expand(text: str, names: Mapping[str, Any]) -> str:
    """Replace `{name}`, `{obj.attr}` and `{d[key]}` where `name` exists; `{{name}}` is a literal `{name}`.

    Nothing is evaluated or called. JSON, LaTeX and code stay as they are: their braces hold no plain look-up of a name
    that exists. A field whose look-up fails stays as well.
    """

    def replaced(match: re.Match[str]) -> str:
        doubled = match["open"] == "{{" and match["close"] == "}}"
        if doubled:
            return match[0][1:-1] if match["name"] in names else match[0]
        value = _look_up(names, match["name"], match["path"])
        if value is _MISSING:
            return match[0]
        return match["open"][1:] + str(value) + match["close"][1:]

    return _LOOKUP.sub(replaced, text)


def looked_up(text: str, names: Mapping[str, Any]) -> Any:
    """The object that a text names, which is nothing but one `{name}`, `{obj.attr}` or `{d[key]}`; else None."""
    match = _LOOKUP.fullmatch(text)
    if match is None or (match["open"], match["close"]) != ("{", "}"):
        return None
    value = _look_up(names, match["name"], match["path"])
    return None if value is _MISSING else value


def _look_up(names: Mapping[str, Any], name: str, path: str) -> Any:
    if name not in names:
        return _MISSING
    value = names[name]
    for step in _STEP.finditer(path):
        try:
            value = getattr(value, step["attribute"]) if step["attribute"] else value[_key(step["key"])]
        except (AttributeError, LookupError, TypeError):
            return _MISSING
    return value


def _key(text: str) -> str | int:
    if text[:1] in "\"'":
        return text[1:-1]
    return int(text) if text.lstrip("-").isdigit() else text
