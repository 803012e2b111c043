"""The logs of a deployment, in its folder: supervisor.log, frontend.log, and rank-<replica>-<rank>.log of each rank."""

from __future__ import annotations

import os
import re
from pathlib import Path

from miinb.errors import InvalidValue


def last_lines(folder: Path, lines: int, rank: int | None) -> str:
    """The last lines of every log, or of one rank's (counted over all replicas); "" where there is none.

    Raises:
        InvalidValue: there is no such rank.
    """
    files = sorted(folder.glob("*.log"), key=_in_order)
    if rank is not None:
        ranks = [file for file in files if file.name.startswith("rank-")]
        if ranks and not 0 <= rank < len(ranks):
            raise InvalidValue(f"rank: there is no rank {rank}.", hint=f"Known: 0 to {len(ranks) - 1}.")
        files = ranks[rank : rank + 1]
    return "\n".join(f"==> {file.name} <==\n{_tail(file, lines)}" for file in files)


def _in_order(file: Path) -> tuple[str, list[int]]:
    """Rank 2 comes before rank 10."""
    return file.name.partition("-")[0], [int(number) for number in re.findall(r"\d+", file.name)]


def _tail(file: Path, lines: int) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 500 * lines))
        return "\n".join(stream.read().decode("utf-8", errors="replace").splitlines()[-lines:])
