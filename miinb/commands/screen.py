"""Where commands show things: plain text here, for terminals and scripts; notebooks have their own in `notebook`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from miinb.messages import Chunk, TokenLogprob
from miinb.predictions import Embedding, Predictions
from miinb.results import Result
from miinb.wording import printable

#: Tokens in a table of log-probabilities: a notebook is no place for thousands of rows.
LOGPROB_ROWS = 32


class TextStream(Protocol):
    """What `Session.stream` gives."""

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks as they come."""

    def cancel(self) -> None:
        """End it early; what came so far stays in `result`."""

    @property
    def result(self) -> Any:
        """The complete answer, after the last chunk."""


class Place(Protocol):
    """Where one thing is shown after another."""

    def show(self, thing: Any) -> None:
        """Show this instead of what was shown."""


class Screen(Protocol):
    """What a command needs from the place that it runs in."""

    def show(self, thing: Any, *, markdown: bool = False) -> None:
        """Show something besides the command's value; `markdown` is how an answer is to be read."""

    def stream(self, stream: TextStream, *, markdown: bool = False) -> Any:
        """Show an answer while it grows; its `Result`."""

    def place(self) -> Place:
        """A place whose content is replaced."""


class PlainScreen:
    """Prints, and strips what a terminal would act on. Markdown stays as it was written."""

    def show(self, thing: Any, *, markdown: bool = False) -> None:
        """Print it; of an answer also the log-probabilities that were asked for."""
        print(printable(str(thing)))
        for table in logprob_tables(thing):
            print(printable(str(table)))

    def stream(self, stream: TextStream, *, markdown: bool = False) -> Any:
        """Print chunks as they come; closing the pipe that reads us cancels."""
        try:
            for chunk in stream:
                sys.stdout.write(printable(chunk.text))
                sys.stdout.flush()
        except BrokenPipeError:
            stream.cancel()
            raise
        sys.stdout.write("\n")
        for table in logprob_tables(stream.result):
            print(printable(str(table)))
        return stream.result

    def place(self) -> Place:
        """Lines that are written anew; in a pipe one after the other."""
        return PlainPlace()


class PlainPlace:
    """Lines of a terminal that are written anew; in a pipe each thing is written after the last."""

    def __init__(self) -> None:
        self._lines = 0

    def show(self, thing: Any) -> None:
        """Write it over what was written before."""
        text = printable(described(thing))
        if sys.stdout.isatty():
            if self._lines:
                sys.stdout.write(f"\x1b[{self._lines}F\x1b[J")
            width = max(1, shutil.get_terminal_size().columns)
            self._lines = sum(max(1, -(-len(line) // width)) for line in text.split("\n"))
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def described(value: Any) -> str:
    """The plain-text form that the value shows in a notebook, else its text."""
    bundle = getattr(value, "_repr_mimebundle_", None)
    data = bundle() if bundle is not None else {}
    data = data[0] if isinstance(data, tuple) else data
    return str(data.get("text/plain") or value)


@dataclass(frozen=True)
class Table:
    """Rows to show: text in a terminal, a card in a notebook.

    Attributes:
        columns: names of the columns.
        rows: one sequence of plain values a row.
        title: above the rows.
        note: below them (or instead of them when there are none).
        records: the same for `--json`: a list of dictionaries, or one.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    note: str = ""
    records: Sequence[Any] | Mapping[str, Any] = field(default=(), repr=False)

    def __str__(self) -> str:
        cells = [[str(name).upper() for name in self.columns], *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        shown = [self.title, *(line.rstrip() for line in lines if self.rows), self.note]
        return "\n".join(part for part in shown if part)

    def __repr__(self) -> str:
        return str(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from miinb.notebook import cards

        return cards.bundle(cards.table_card(self))

    def __len__(self) -> int:
        return len(self.rows)


def logprob_tables(result: Any) -> list[Table]:
    """The log-probabilities of a `Result`, one table a sequence; none of what has none, or was not asked for them."""
    rows = [entries for entries in getattr(result, "logprobs", ()) if entries]
    return [_logprob_table(entries, f" of answer {i + 1}" * (len(rows) > 1)) for i, entries in enumerate(rows)]


def _logprob_table(entries: Sequence[TokenLogprob], which: str) -> Table:
    rows = [(_named(e.text, e.token_id), f"{e.logprob:.3f}", _alternatives(e)) for e in entries[:LOGPROB_ROWS]]
    more = len(entries) - len(rows)
    note = f"{more} more tokens are in the result's .logprobs." if more else ""
    return Table(("token", "log-probability", "most likely"), rows, title=f"Log-probabilities{which}", note=note)


def _named(text: str, token_id: int) -> str:
    return repr(text) if text else f"token {token_id}"


def _alternatives(entry: TokenLogprob) -> str:
    texts = entry.top_texts or ("",) * len(entry.top)
    named = zip(texts, entry.top, strict=True)
    return "  ".join(f"{_named(text, token_id)} {logprob:.3f}" for text, (token_id, logprob) in named)


#: Of a result: what its table has, and pictures.
_NOT_JSON = ("rows", "images", "files")


def as_json(value: Any) -> str:
    """A command's value as JSON; of a table its records, of predictions a line for each input."""
    if isinstance(value, Predictions):
        return "\n".join(json.dumps({"input": i, "predictions": _plain(one)}) for i, one in enumerate(value))
    return json.dumps(_plain(value), default=str, indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, Table):
        return _plain(value.records)
    if isinstance(value, Result):
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names if name not in _NOT_JSON}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Embedding):
        return {"embedding": value.embedding.tolist()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value) if isinstance(value, Mapping) else value
