"""A step's plan as bytes, from rank 0 to its followers: only what they cannot know.

Of a row that is new to its slot everything crosses once (JSON and its tokens); after that only which rows compute, how
much, and the pages that they got since. Tokens do not cross, as every rank draws them, but for rows with drafts: which
guess was right, rank 0's host finds. Little-endian: a header of eight u32, then int32: slots, starts, counts, samples
and numbers of new pages of the rows; their tokens (-1: drawn) if some may speculate; the new pages; pages to blank;
source, target and tokens of pages to copy; then for each new row u32 place in the plan, u32 bytes of JSON, u32 tokens,
the JSON, the tokens as int32.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice

from miinb.config import GenerationParams
from miinb.engine.rows import Row, StepPlan
from miinb.messages import SequenceRequest

_HEADER = struct.Struct("<8I")
_ROW = struct.Struct("<3I")


@dataclass(slots=True)
class RemoteStep:
    """A step as a follower sees it.

    Attributes:
        number: rank 0's count of steps.
        needs: `sampling.Needs` of its rows.
        plan: the step; its rows are the follower's own, and `admitted` are all that were told anew.
        blank: pages to be zeroed first.
    """

    number: int
    needs: int
    plan: StepPlan
    blank: list[int] = field(default_factory=list)


class PlanWriter:
    """Rank 0's side: remembers what the followers know."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}  # by slot: pages of its row that have been told

    def write(self, number: int, plan: StepPlan, needs: int, blank: Sequence[int]) -> bytes:
        """The message of a step."""
        admitted = {row.slot for row in plan.admitted}
        slots = [row.slot for row in plan.rows]
        news = []
        fresh: list[int] = []
        new_pages: list[int] = []
        for place, row in enumerate(plan.rows):
            slot = row.slot
            known = self._known.get(slot, -1)
            if known < 0 or slot in admitted:
                admitted.discard(slot)  # a row with a draft has several places
                fresh.append(place)
                known = 0
            new_pages += row.pages[known:]
            news.append(len(row.pages) - known)
            self._known[slot] = len(row.pages)
        tokens = _tokens(plan)
        sizes = (len(slots), len(tokens), len(new_pages), len(blank), len(plan.copies), len(fresh))
        head = _HEADER.pack(number & 0xFFFFFFFF, needs, *sizes)
        numbers = array("i", slots + plan.starts + plan.counts)
        numbers.extend(map(int, plan.samples))
        numbers.extend([*news, *tokens, *new_pages, *blank, *(number for copy in plan.copies for number in copy)])
        return b"".join((head, numbers.tobytes(), *(_row_bytes(place, plan.rows[place]) for place in fresh)))

    def forget(self, rows: Iterable[Row]) -> None:
        """These rows were in a step that raised: the ranks may differ in them, so all of them is told again."""
        for row in rows:
            self._known.pop(row.slot, None)


def _tokens(plan: StepPlan) -> list[int]:
    """The token of each place of a row that may speculate, -1 for other places; nothing if there is no such row."""
    if all(row.lookup is None for row in plan.rows):
        return []
    found = []
    for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
        if row.lookup is None or count > 1:
            found.append(-1)
        elif start < len(row.token_ids):
            found.append(row.token_ids[start])
        else:
            found.append(row.draft[start - row.draft_start])
    return found


def _row_bytes(place: int, row: Row) -> bytes:
    words = {
        "row_id": row.row_id,
        "prompt_tokens": row.prompt_tokens,
        "eos": sorted(row.eos),
        "params": row.request.params.model_dump(mode="json", exclude_defaults=True),
    }
    text = json.dumps(words).encode()
    return _ROW.pack(place, len(text), len(row.token_ids)) + text + array("i", row.token_ids).tobytes()


class PlanReader:
    """A follower's side: its own picture of the rows in the slots."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}

    def read(self, data: bytes) -> RemoteStep:
        """The step of a message."""
        number, needs, count, tokens, pages, blanks, copies, fresh = _HEADER.unpack_from(data)
        sections = (count, count, count, count, count, tokens, pages, blanks, 3 * copies)
        end = _HEADER.size + 4 * sum(sections)
        numbers = iter(array("i", data[_HEADER.size : end]).tolist())
        slots, starts, counts, samples, news, known, told, blank, copied = (
            list(islice(numbers, size)) for size in sections
        )
        plan = StepPlan(starts=starts, counts=counts, samples=[bool(sample) for sample in samples])
        plan.copies = list(zip(copied[::3], copied[1::3], copied[2::3], strict=True))
        for _ in range(fresh):
            place, row, end = _read_row(data, end)
            row.slot = slots[place]
            self._rows[row.slot] = row
            plan.admitted.append(row)
        for slot, new, stop in zip(slots, news, accumulate(news), strict=True):
            row = self._rows[slot]
            row.pages += told[stop - new : stop]
            plan.rows.append(row)
        _set_tokens(plan, known)
        return RemoteStep(number, needs, plan, blank)


def _set_tokens(plan: StepPlan, tokens: Sequence[int]) -> None:
    """Put known tokens where a row's draft is."""
    for row in plan.rows:
        row.draft = ()
    for row, start, token in zip(plan.rows, plan.starts, tokens, strict=False):
        if token >= 0:
            row.draft_start = row.draft_start if row.draft else start
            row.draft = [*row.draft, token]


def _read_row(data: bytes, at: int) -> tuple[int, Row, int]:
    """A row, its place in the plan, and where the next one begins."""
    place, length, tokens = _ROW.unpack_from(data, at)
    at += _ROW.size
    words = json.loads(data[at : at + length])
    at += length
    ids = array("i", data[at : at + 4 * tokens]).tolist()
    params = GenerationParams.from_json(json.dumps(words["params"]))
    row = Row(SequenceRequest(words["row_id"], ids, params, 0.0), (0, 0, 0), frozenset(words["eos"]))
    row.prompt_tokens = words["prompt_tokens"]
    return place, row, at + 4 * tokens
