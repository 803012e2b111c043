"""Which sequences of which requests an encoder computes next. Numbers alone: no torch.

A step takes requests in their order, as many sequences as fit its tokens. One that does not fit whole takes half of
what is left while others wait behind it, so that a thousand texts do not hold up the single one of somebody else; what
those do not need it gets as well. A packed batch computes no padding, so the sequences of a request keep their order;
for a padded one (transformers' model) they are taken by length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from miinb.engine.reduction import ROWS, Reduction
from miinb.errors import InvalidRequest, PromptTooLong
from miinb.messages import EncodeRequest

Numbers = NDArray[np.int64]
#: As they come in a frame: not copied.
Ids = NDArray[np.int32]
#: What numpy takes for an index: a slice where it can be, which costs a small request little.
Place = slice | Numbers
_Number = TypeVar("_Number", np.int64, np.int32)
MANY = 1 << 31


@dataclass(eq=False, slots=True)
class Job:
    """A request and how far it is.

    Attributes:
        order: [S] places of its sequences in the order in which they are computed; None: as they come.
        token_starts: [S + 1] where each sequence begins in `token_ids`.
        row_starts: [S + 1] where each sequence begins in its results.
        wanted: fill-mask: places in `token_ids`, ascending.
        planned: how many sequences (of `order`) are in steps or done.
        done: how many are done.
        alone: it shares no step, as a step that it was in has raised.
        t_first: when its first step began; 0: none has.
        values: [rows, columns] float32, once there are some.
        ids: [rows, columns] int32, where results are of some labels or tokens.
    """

    request: EncodeRequest
    reduction: Reduction
    token_ids: Ids
    type_ids: Ids | None
    lengths: Numbers
    longest: int
    order: Numbers | None
    token_starts: Numbers
    row_starts: Numbers
    wanted: Ids
    planned: int = 0
    done: int = 0
    alone: bool = False
    ended: bool = False
    t_first: float = 0.0
    model_s: float = 0.0
    values: NDArray[np.float32] | None = None
    ids: NDArray[np.int32] | None = None

    @property
    def sequences(self) -> int:
        """How many it has."""
        return len(self.lengths)

    def store(self, piece: Piece, values: NDArray[np.float32], ids: NDArray[np.int32] | None) -> None:
        """Take over the results of some sequences, [rows of theirs, columns]."""
        if piece.whole:
            self.values, self.ids, self.done = values, ids, piece.count
            return
        if self.values is None:
            shape = (int(self.row_starts[-1]), values.shape[1])
            self.values = np.empty(shape, np.float32)
            self.ids = None if ids is None else np.empty(shape, np.int32)
        rows = piece.within(self.row_starts)
        self.values[rows] = values
        if ids is not None and self.ids is not None:
            self.ids[rows] = ids
        self.done += piece.count


@dataclass(frozen=True, slots=True)
class Piece:
    """Sequences of a job in a step.

    Attributes:
        first: place of the first in the job's order.
        count: how many.
    """

    job: Job
    first: int
    count: int

    @property
    def whole(self) -> bool:
        """Whether they are the job's, all and in their order."""
        return self.count == self.job.sequences and self.job.order is None

    @property
    def sequences(self) -> Place:
        """Their places in the job."""
        place = slice(self.first, self.first + self.count)
        return place if self.job.order is None else self.job.order[place]

    def within(self, starts: Numbers) -> Place:
        """Where their part is of what is packed in sequences that begin at `starts` [S + 1]."""
        if self.job.order is None:
            return slice(starts[self.first], starts[self.first + self.count])
        return spans(starts, self.job.order[self.first : self.first + self.count])


def spans(starts: Numbers, places: Numbers) -> Numbers:
    """Indexes of all that lies in some segments, segment after segment; `starts` [S + 1] has where each begins."""
    lengths = starts[places + 1] - starts[places]
    ends = lengths.cumsum()
    found: Numbers = np.arange(int(lengths.sum())) + np.repeat(starts[places] - ends + lengths, lengths)
    return found


@dataclass(frozen=True, slots=True)
class EncodeStep:
    """What is computed together; pieces with equal reductions follow each other.

    Attributes:
        token_ids: [T], sequence after sequence.
        type_ids: [T]; None: all are 0.
        lengths: [S] tokens of each sequence.
        starts: [S + 1] where each sequence begins, and the end.
        longest: of `lengths`.
        rows: [L] indexes into T whose outputs are wanted.
        row_counts: rows of each piece.
    """

    pieces: list[Piece]
    token_ids: Ids
    type_ids: Ids | None
    lengths: Numbers
    starts: Numbers
    longest: int
    rows: Numbers
    row_counts: list[int]

    @classmethod
    def of_whole(cls, piece: Piece) -> EncodeStep:
        """A job is packed as it is."""
        job = piece.job
        kind = ROWS[job.reduction.task]
        if kind == "first":
            rows = job.token_starts[:-1]
        else:
            rows = job.wanted.astype(np.int64) if kind == "wanted" else np.arange(len(job.token_ids))
        starts, counts = job.token_starts, [len(rows)]
        return cls([piece], job.token_ids, job.type_ids, job.lengths, starts, job.longest, rows, counts)

    @classmethod
    def of_pieces(cls, pieces: list[Piece]) -> EncodeStep:
        """Pack them."""
        if len(pieces) == 1 and pieces[0].whole:
            return cls.of_whole(pieces[0])
        tokens = [piece.within(piece.job.token_starts) for piece in pieces]
        lengths = _joined([piece.job.lengths[piece.sequences] for piece in pieces])
        starts = starts_of(lengths)
        parts = [piece.job.token_ids[place] for piece, place in zip(pieces, tokens, strict=True)]
        token_ids, type_ids = _joined(parts), None
        if any(piece.job.type_ids is not None for piece in pieces):
            type_ids = _joined([
                np.zeros(len(part), np.int32) if (types := piece.job.type_ids) is None else types[place]
                for piece, place, part in zip(pieces, tokens, parts, strict=True)
            ])  # fmt: skip
        kind = ROWS[pieces[0].job.reduction.task]
        if kind == "first":
            rows, counts = starts[:-1], [piece.count for piece in pieces]
        elif kind == "all":
            rows, counts = np.arange(len(token_ids)), [len(part) for part in parts]
        else:
            rows, counts = _wanted_rows(pieces, starts)
        return cls(pieces, token_ids, type_ids, lengths, starts, int(lengths.max()), rows, counts)

    def groups(self) -> Iterator[tuple[list[int], Reduction]]:
        """Pieces that are reduced together: their numbers, and how."""
        first = 0
        for i, piece in enumerate(self.pieces):
            reduction = piece.job.reduction
            if i + 1 == len(self.pieces) or self.pieces[i + 1].job.reduction != reduction:
                yield list(range(first, i + 1)), reduction
                first = i + 1


def _joined(parts: list[NDArray[_Number]]) -> NDArray[_Number]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def starts_of(lengths: Numbers) -> Numbers:
    """Where each sequence begins, and the end."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=starts[1:])
    return starts


def _wanted_rows(pieces: list[Piece], starts: Numbers) -> tuple[Numbers, list[int]]:
    found, at = [], 0
    for piece in pieces:
        job, sequences = piece.job, piece.sequences
        moved = starts[at : at + piece.count] - job.token_starts[:-1][sequences]  # from there to here
        masks = np.diff(job.row_starts)[sequences]
        found.append(job.wanted.astype(np.int64)[piece.within(job.row_starts)] + np.repeat(moved, masks))
        at += piece.count
    return _joined(found), [len(rows) for rows in found]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request may hold, and what a step takes.

    Attributes:
        max_length: most tokens of a sequence.
        vocab_size: token ids are below it.
        token_types: type ids are below it; 0: the model has none, and those given are not read.
        max_tokens: most tokens of a step; a single sequence may have more.
        max_sequences: most sequences of a step; 0: any number.
        shared: several requests may be in a step.
        by_length: a request's sequences are computed in the order of their lengths.
    """

    max_length: int
    vocab_size: int
    token_types: int
    max_tokens: int
    max_sequences: int = 0
    shared: bool = True
    by_length: bool = False


def make_job(request: EncodeRequest, reduction: Reduction, bounds: Bounds) -> Job:
    """Check a request and make a job of it.

    Raises:
        InvalidRequest: its numbers do not fit each other or the model.
        PromptTooLong: a sequence is longer than the model takes.
    """
    lengths, token_ids = np.asarray(request.lengths, np.int64), np.asarray(request.token_ids, np.int32)
    longest = max(request.lengths, default=0)
    told = len(request.type_ids) and bounds.token_types  # transformers' models without types do not read them either
    type_ids = np.asarray(request.type_ids, np.int32) if told else None
    starts = starts_of(lengths)
    if min(request.lengths, default=1) < 1:
        raise InvalidRequest("lengths: a sequence has no tokens.")
    if starts[-1] != len(token_ids):
        raise InvalidRequest(f"lengths: {starts[-1]} tokens in all, but {len(token_ids)} are given.")
    if longest > bounds.max_length:
        raise PromptTooLong(f"A sequence has {longest} tokens, but the model takes {bounds.max_length}.")
    _check_below("token_ids", token_ids, bounds.vocab_size)
    if type_ids is not None:
        if len(type_ids) != len(token_ids):
            raise InvalidRequest(f"type_ids: {len(type_ids)} for {len(token_ids)} tokens.")
        _check_below("type_ids", type_ids, bounds.token_types)
    wanted, row_starts = np.asarray(request.wanted, np.int32), starts
    kind = ROWS[reduction.task]
    if kind == "wanted":
        _check_below("wanted", wanted, len(token_ids))
        if (np.diff(wanted) <= 0).any():
            raise InvalidRequest("wanted: places have to ascend.")
        row_starts = np.searchsorted(wanted, starts)
    elif len(wanted):
        raise InvalidRequest(f"wanted: not for {reduction.task}.")
    if reduction.one_a_sequence:
        row_starts = np.arange(len(lengths) + 1)
    order = np.argsort(lengths, kind="stable") if bounds.by_length else None
    return Job(request, reduction, token_ids, type_ids, lengths, longest, order, starts, row_starts, wanted)


def _check_below(name: str, values: Ids, limit: int) -> None:
    unsigned = values.view(np.uint32)  # a negative number is large: one look at each is enough
    if len(values) and int(unsigned.max()) >= limit:
        raise InvalidRequest(f"{name}: {values[unsigned.argmax()]} is not one of 0 to {limit - 1}.")


@dataclass(slots=True)
class EncodeQueue:
    """The jobs with sequences that are in no step yet, in their order.

    Attributes:
        bounds: of steps.
        max_tokens: those of `bounds`, or fewer since the memory did not suffice.
    """

    bounds: Bounds
    jobs: list[Job] = field(default_factory=list)
    max_tokens: int = 0

    def __post_init__(self) -> None:
        self.max_tokens = self.bounds.max_tokens

    def next_step(self) -> EncodeStep | None:
        """Plan what comes next; None: nothing waits."""
        if not self.jobs:
            return None
        head = self.jobs[0]
        if len(self.jobs) == 1 and head.order is None and self._fits_whole(head):  # most often; and what costs least
            self.jobs.clear()
            return EncodeStep.of_pieces([self._piece(head, head.sequences)])
        apart = head.alone or not self.bounds.shared
        jobs = [head] if apart else [job for job in self.jobs if not job.alone]
        room = _Room(self.max_tokens, self.bounds.max_sequences or MANY)
        taken: dict[Job, int] = {}
        for i, job in enumerate(jobs):
            if room.full:
                break
            taken[job] = room.take(job, halve=i + 1 < len(jobs))
        for job in taken:  # what those behind have left
            if room.full:
                break
            if job.planned + taken[job] < job.sequences:
                taken[job] += room.take(job, skip=taken[job])
        pieces = [self._piece(job, count) for job, count in taken.items() if count]
        self.jobs = [job for job in self.jobs if job.planned < job.sequences]
        pieces.sort(key=lambda piece: piece.job.reduction)
        return EncodeStep.of_pieces(pieces)

    def _fits_whole(self, job: Job) -> bool:
        most = self.bounds.max_sequences or MANY
        return not job.planned and len(job.token_ids) <= self.max_tokens and job.sequences <= most

    def _piece(self, job: Job, count: int) -> Piece:
        piece = Piece(job, job.planned, count)
        job.planned += count
        return piece

    def put_back(self, step: EncodeStep) -> None:
        """It was not computed: its sequences come first again."""
        for piece in step.pieces:
            if not piece.job.ended:
                piece.job.planned = piece.first
                self.remove(piece.job)
                self.jobs.append(piece.job)
        self.jobs.sort(key=lambda job: job.request.row_id)

    def remove(self, job: Job) -> None:
        """Forget a job."""
        if job in self.jobs:
            self.jobs.remove(job)


@dataclass(slots=True)
class _Room:
    """What is left of a step. A first sequence always fits."""

    tokens: int
    sequences: int
    empty: bool = True
    full: bool = False

    def take(self, job: Job, *, halve: bool = False, skip: int = 0) -> int:
        """How many of the job's next sequences, after `skip` of them, go in."""
        first = job.planned + skip
        left = job.sequences - first
        # Few lengths are looked at where a job is huge: each sequence has at least one token.
        near = slice(first, first + min(left, self.sequences, self.tokens + 1))
        ends = job.lengths[near if job.order is None else job.order[near]].cumsum()
        count = int(ends.searchsorted(self.tokens, "right"))
        if halve and count < left:
            count = min(int(ends.searchsorted(self.tokens / 2, "right")), -(-self.sequences // 2))
        if self.empty and len(ends):
            count = max(count, 1)
        if count:
            self.tokens -= int(ends[count - 1])
            self.sequences -= count
            self.empty = False
        self.full = self.tokens < 1 or self.sequences < 1
        return count
