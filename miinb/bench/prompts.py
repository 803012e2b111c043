"""Where the prompts of a benchmark come from: texts, lists, frames, series, files of JSON Lines, CSV or plain text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from miinb.config import BenchConfig
from miinb.errors import InvalidValue

PROMPT_COLUMNS = ("prompt", "text", "query")
PAIR = ("question", "context")
ENDINGS = (".jsonl", ".csv", ".txt")
_FORMS = "Give a prompt, a list, a frame with a column 'prompt', a file (.jsonl, .csv, .txt) or BenchConfig's fields."


def fields_of(workload: Any) -> dict[str, Any]:
    """The fields of `BenchConfig` that a workload stands for, prompts as plain lists in their order.

    Raises:
        InvalidValue: prompts cannot be taken from it; the file, line or column is named.
    """
    if workload is None:
        return {}
    if isinstance(workload, BenchConfig):
        return workload.model_dump(exclude_unset=True)
    if isinstance(workload, Mapping) and not set(PAIR) <= set(workload):  # a pair is an input, no fields
        return dict(workload)
    return {"prompts": prompts_of(workload, "workload")}


def prompts_of(source: Any, name: str = "prompts") -> list[Any] | None:
    """The prompts (of question-answering: dictionaries) of whatever holds them, in their order.

    A path, or a word that ends like one (.jsonl, .csv, .txt), is a file; any other text is a prompt itself.

    Raises:
        InvalidValue: as for `fields_of`.
    """
    if source is None:
        return None
    if isinstance(source, Path) or (isinstance(source, str) and _names_a_file(source)):
        return _read(Path(source).expanduser())
    if isinstance(source, str):
        if Path(source).suffix and len(source) < 256 and Path(source).is_file():
            raise InvalidValue(f"{name}: the file {source} is none of {', '.join(ENDINGS)}.", hint=_FORMS)
        return _texts([source], name)
    if isinstance(source, Mapping):
        return [dict(source)]
    if hasattr(source, "columns"):
        columns = list(map(str, source.columns))
        if twice := [column for column in (*PROMPT_COLUMNS, *PAIR) if columns.count(column) > 1]:
            raise InvalidValue(f"{name}: {columns.count(twice[0])} columns are named {twice[0]!r}.")
        return _of_columns({str(column): list(source[column]) for column in source.columns}, name)
    if isinstance(source, Iterable) and not isinstance(source, bytes):
        prompts = list(source)
        if prompts and all(isinstance(one, Mapping) for one in prompts):
            return [dict(one) for one in prompts]
        if hasattr(source, "dtype") or all(isinstance(one, str) or _is_missing(one) for one in prompts):
            return _texts(prompts, name)  # a series, an array, a list of texts
        other = next(i for i, one in enumerate(prompts) if not isinstance(one, str))
        what = type(prompts[other]).__name__
        raise InvalidValue(f"{name}: prompt {other} (counted from 0) is no text but of type {what}.", hint=_FORMS)
    raise InvalidValue(f"{name}: cannot take prompts from {type(source).__name__}.", hint=_FORMS)


def _names_a_file(text: str) -> bool:
    return text.lower().endswith(ENDINGS) and len(text.split()) == 1


def _read(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidValue(f"prompts: {path} cannot be read: {why}.") from None
    ending = path.suffix.lower()
    if ending == ".jsonl":
        found = _json_lines(text, path)
    elif ending == ".csv":
        table = list(csv.reader(io.StringIO(text, newline="")))
        if short := next((n for n, row in enumerate(table, 1) if row and len(row) != len(table[0])), 0):
            raise InvalidValue(
                f"prompts: row {short} of {path} has {len(table[short - 1])} cells, not {len(table[0])}."
            )
        rows = [row for row in table[1:] if row]
        found = _of_columns(
            {column: [row[i] for row in rows] for i, column in enumerate(table[0])} if table else {}, path
        )
    elif ending == ".txt":
        found = [line for line in text.split("\n") if line.strip()]  # at no other character, as `predict` reads them
    else:
        raise InvalidValue(f"prompts: {path} is none of {', '.join(ENDINGS)}.")
    if not found:
        raise InvalidValue(f"prompts: {path} has no prompt.")
    return found


def _json_lines(text: str, path: Path) -> list[Any]:
    """A prompt of each line: a JSON text, or an object with a prompt or with the inputs of the task."""
    found: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            value = json.loads(line)
        except ValueError:
            raise InvalidValue(f"prompts: {where} is not JSON.") from None
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict):
            raise InvalidValue(f"prompts: {where} is neither a text nor an object.")
        found += _of_columns({str(key): [entry] for key, entry in value.items()}, where)
    return found


def _of_columns(columns: Mapping[str, Sequence[Any]], where: object) -> list[Any]:
    if set(PAIR) <= set(columns):
        parts = [_texts(columns[name], where) for name in PAIR]
        return [dict(zip(PAIR, pair, strict=True)) for pair in zip(*parts, strict=True)]
    found = [name for name in PROMPT_COLUMNS if name in columns] or (list(columns) if len(columns) == 1 else [])
    if not found:
        hint = f"Columns: {', '.join(columns)}." if columns else "It is empty."
        raise InvalidValue(f"{where}: no column is named 'prompt'.", hint=hint)
    return _texts(columns[found[0]], where)


def _texts(values: Sequence[Any], where: object) -> list[str]:
    """Values as texts; a missing one would be the prompt "nan"."""
    for place, value in enumerate(values):
        if _is_missing(value) or (isinstance(value, str) and not value.strip()):
            raise InvalidValue(f"{where}: prompt {place} (counted from 0) is empty.")
        if not isinstance(value, str) and (isinstance(value, bytes) or hasattr(value, "__len__")):
            what = type(value).__name__
            raise InvalidValue(f"{where}: prompt {place} (counted from 0) is no text but of type {what}.")
    return [str(value) for value in values]


def _is_missing(value: Any) -> bool:
    """None, NaN, pandas' NA and NaT."""
    return value is None or (not hasattr(value, "__len__") and bool(pd.isna(value)))
