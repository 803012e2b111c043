"""The command `predict`: texts from the line, the cell, files or the standard input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miinb.commands.context import STDIN, Context, stdin
from miinb.commands.generating import parts_of
from miinb.commands.options import PREDICTION, given
from miinb.errors import InvalidValue
from miinb.predictions import Predictions

Values = Mapping[str, Any]


def predict(context: Context, values: Values, body: str | None) -> Predictions:
    """What an encoder task says of texts, or of questions and contexts."""
    inputs = _inputs(context, values, body)
    found: Predictions = context.session(values["deployment"]).predict(inputs, **given(values, PREDICTION))
    return found


def _inputs(context: Context, values: Values, body: str | None) -> Any:
    texts = _texts(context, values, body)
    asked = {name: values[name] for name in ("question", "context") if values[name] is not None}
    if asked.get("context") == STDIN:
        asked["context"] = stdin(context, "predict").read()
    if not asked:
        if not texts:
            hint = f'{context.prog} predict "Paris is the capital of [MASK]."'
            raise InvalidValue("predict: the text is empty.", hint=hint)
        return texts if len(texts) > 1 else texts[0]
    if len(asked) == 2:
        if texts:
            raise InvalidValue("predict: a question, a context and a text.", hint="A text takes the place of either.")
        return asked
    (missing,) = {"question", "context"} - set(asked)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidValue(f"predict: the {missing} is missing.", hint=f"Give it as --{missing}, or as the text.")
    pairs = [{"question": text, "context": text} | asked for text in texts]
    return pairs if len(pairs) > 1 else pairs[0]


def _texts(context: Context, values: Values, body: str | None) -> list[Any]:
    """The inputs that the line, the cell and the files say: texts, or dictionaries of JSON."""
    words = " ".join(values["prompt"] or ())
    files = list(values["file"] or ())
    if words == STDIN:
        files.append(STDIN)
        words = ""
    ways = [name for name, there in (("a line", words), ("a cell", body is not None), ("files", files)) if there]
    if len(ways) > 1:
        raise InvalidValue(
            f"predict: texts on {' and in '.join(ways)}.", hint="Give them in one place; a deployment goes after -d."
        )
    if files:
        return [one for file in files for one in _lines(_read(context, file), file)]
    text = body.removesuffix("\n") if body is not None else words
    if not text.strip():
        return []
    if values["batch"] == "lines":
        return _lines(text, "the cell")
    if values["batch"] == "parts":
        return parts_of(text)
    return _json(text) or [text]


def _json(text: str) -> list[Any]:
    """The inputs of a JSON object or list; [] for a text that only begins like one ("[MASK] is a city")."""
    if text.lstrip()[:1] not in ("{", "["):
        return []
    try:
        value = json.loads(text)
    except ValueError:
        return []
    return value if isinstance(value, list) else [value]


def _lines(text: str, where: str) -> list[Any]:
    """An input of each line that is not empty: a text, or a JSON object of the task's inputs."""
    lines = (line.removesuffix("\r") for line in text.split("\n"))  # and at no other character: a text may hold them
    found = [one for line in lines if line.strip() for one in _object(line) or [line]]
    if not found:
        raise InvalidValue(f"predict: {'the standard input' if where == STDIN else where} has no text.")
    return found


def _object(line: str) -> list[Any]:
    return _json(line) if line.lstrip()[:1] == "{" else []


def _read(context: Context, file: str) -> str:
    try:
        if file == STDIN:
            return stdin(context, "predict").read()
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidValue(f"predict: {file} cannot be read: {why}.") from None
