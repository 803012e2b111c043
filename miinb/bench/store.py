"""Runs on disk: one folder a run, `env.json` and append-only `requests.jsonl`; CSV and Parquet for other tools.

Small pictures of a run are files in `pictures/` beside them.

Rows are appended, flushed and synced; a last line that a crash cut short is left out at loading, with a warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miinb.bench import thumbnails
from miinb.bench.records import DEFINITIONS, Record, Runs, plain, rows_of
from miinb.errors import InvalidValue, MiinbError
from miinb.writing import writing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_NUMBERS = tuple(field.name for field in dataclasses.fields(Record) if field.type in ("float", "int"))
ENV, REQUESTS = "env.json", "requests.jsonl"


def save(runs: Runs, path: Path) -> Path:
    """Append `runs` under `path`; rows that are there already are not written twice."""
    by_run: dict[str, list[dict[str, Any]]] = {run_id: [] for run_id in runs.env}
    for row in rows_of(runs):
        by_run[row["run_id"]].append(row)
    for run_id, rows in by_run.items():
        if Path(run_id).name != run_id:
            raise InvalidValue(f"The run id {run_id!r} is no name of a folder.", hint="Runs.to_jsonl writes one file.")
        folder = path / run_id
        with writing(path), _whole(folder):
            folder.mkdir(parents=True, exist_ok=True)
            facts, pictures = thumbnails.unpacked(runs.env[run_id])
            for name, data in pictures.items():
                (folder / thumbnails.FOLDER).mkdir(exist_ok=True)
                (folder / thumbnails.FOLDER / name).write_bytes(data)
            write_atomically(folder / ENV, _to_json(facts, indent=1))
            there = {row["seq"] for row in _read_lines(folder / REQUESTS, quiet=True)}
            append_rows(folder / REQUESTS, [row for row in rows if row["seq"] not in there])
    return path


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Remove a folder that was not there before if what is written into it cannot be written whole."""
    new = not folder.exists()
    try:
        yield
    except (OSError, MiinbError):
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON Lines and sync them to disk; a cut last line of an earlier crash is closed first.

    Fields without a value are left out: most requests have few.
    """
    full = (_plain_tree(dict(row)) for row in rows)
    lines = "".join(_to_json({key: value for key, value in row.items() if value is not None}) + "\n" for row in full)
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                lines = "\n" + lines
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> Runs:
    """The runs at `path`: a folder of one run, or a directory that holds such folders."""
    if path.is_file():
        return _load_jsonl(path)
    folders = [path] if (path / REQUESTS).is_file() else sorted(p.parent for p in path.glob(f"*/{REQUESTS}"))
    if not folders:
        raise InvalidValue(f"There are no saved runs in {path}.", hint="Give the directory that Runs.save wrote.")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}  # a copied folder has no request twice
    env: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for row in _requests(folder / REQUESTS):
            key = (row["run_id"], row["seq"]) if row.get("seq") is not None else (len(rows), "unnumbered")
            rows[key] = {**dict.fromkeys(Record.__slots__), **row}
        env[folder.name] = thumbnails.packed(_read_facts(folder / ENV), folder)
    return Runs(rows.values(), {str(facts.get("run_id", name)): facts for name, facts in env.items()})


def _load_jsonl(path: Path) -> Runs:
    """The file that `write_jsonl` wrote; without its `.meta.json` the environment is not known."""
    if path.suffix != ".jsonl":
        raise InvalidValue(f"{path} is no .jsonl file.", hint="Give one of Runs.to_jsonl, or the folder of Runs.save.")
    rows = _requests(path)
    if not rows:
        raise InvalidValue(f"There are no saved runs in {path}.", hint="Give a file that Runs.to_jsonl wrote.")
    facts = _read_facts(_meta(path)).get("env")
    env = {run_id: one for run_id, one in facts.items() if _is_facts(one)} if isinstance(facts, dict) else {}
    return Runs([{**dict.fromkeys(Record.__slots__), **row} for row in rows], env)


def write_jsonl(runs: Runs, path: Path) -> Path:
    """The requests as JSON Lines, fields without a value left out; `<path>.meta.json` as for CSV."""
    rows = ({key: value for key, value in row.items() if value is not None} for row in rows_of(runs))
    write_atomically(path, "".join(_to_json(row) + "\n" for row in rows))
    _write_meta(runs, path)
    return path


def write_csv(runs: Runs, path: Path) -> Path:
    """The requests as CSV; `<path>.meta.json` holds the definitions and the environment."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.requests.to_csv(path, index=False)
    _write_meta(runs, path)
    return path


def _meta(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def _write_meta(runs: Runs, path: Path) -> None:
    write_atomically(_meta(path), _to_json({"definitions": DEFINITIONS, "env": runs.env}, indent=1))


def write_parquet(runs: Runs, path: Path) -> Path:
    """The requests as Parquet.

    Raises:
        MiinbError: pyarrow is not installed.
    """
    try:
        import pyarrow  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        raise MiinbError(
            "to_parquet needs pyarrow, which is not installed.", hint="pip install pyarrow; or use to_csv or save."
        ) from None
    frame = runs.requests.copy()
    frame.attrs = json.loads(_to_json(frame.attrs))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(path, engine="pyarrow", index=False)
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or none: a temporary file beside it, synced, then renamed. Makes the folder.

    Raises:
        InvalidValue: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _to_json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(_plain_tree(value), indent=indent, allow_nan=False, ensure_ascii=False, default=str)


def _plain_tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain_tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_tree(item) for item in value]
    return plain(value)


def _read_facts(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty, with a warning, if the file is damaged: the requests are worth reading without."""
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_bytes())
    except ValueError:
        facts = None
    if not _is_facts(facts):
        warnings.warn(f"{path} is damaged: the runs are read without their environment.", stacklevel=4)
        return {}
    return dict(facts)


def _is_facts(facts: Any) -> bool:
    """Whether this can be a run's environment: an object whose arms are objects of theirs."""
    arms = facts.get("arms", {}) if isinstance(facts, dict) else None
    return isinstance(arms, dict) and all(isinstance(one, dict) for one in arms.values())


def _requests(path: Path) -> list[dict[str, Any]]:
    """The requests of a file; lines that are none are left out, with a warning."""
    rows = _read_lines(path)
    found = [row for row in rows if _is_request(row)]
    if 0 < len(found) < len(rows):
        warnings.warn(f"{path}: {len(rows) - len(found)} line(s) left out that are no requests.", stacklevel=4)
    return found


def _is_request(row: Mapping[str, Any]) -> bool:
    """Whether a line has a run, an arm, and in every field what `Record` has there."""
    if not (isinstance(row.get("run_id"), str) and isinstance(row.get("arm"), str)):
        return False
    with contextlib.suppress(ValueError, TypeError):
        if row.get("t_submit"):
            datetime.datetime.fromisoformat(row["t_submit"])
        numbers = (row.get(name) for name in _NUMBERS)
        return all(value is None or isinstance(value, (int, float)) for value in numbers)
    return False


def _read_lines(path: Path, *, quiet: bool = False) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows, broken = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            broken += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
    if broken and not quiet:
        warnings.warn(f"{path}: {broken} incomplete line(s) left out (a crash while writing).", stacklevel=4)
    return rows
