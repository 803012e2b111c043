"""What the scheduler plans with: a row (one sequence) and the plan of a step. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from miinb.engine.lookup import PromptLookup
from miinb.engine.pages import ROOT
from miinb.errors import InvalidRequest, PromptTooLong
from miinb.messages import FinishedEvent, FinishReason, SequenceRequest


def check_request(request: SequenceRequest, max_length: int, vocab_size: int) -> None:
    """Refuse a row that can never be computed.

    Raises:
        InvalidRequest: no tokens, or token ids outside the vocabulary.
        PromptTooLong: prompt and new tokens do not fit the context.
    """
    ids, params = request.token_ids, request.params
    if not ids:
        raise InvalidRequest("The prompt has no tokens.")
    for name, given in (
        ("prompt", ids), ("logit_bias", params.logit_bias or ()), ("eos_token_id", params.eos_token_id or ())
    ):  # fmt: skip
        if given and not (min(given) >= 0 and max(given) < vocab_size):
            raise InvalidRequest(f"{name}: a token is outside the vocabulary of {vocab_size}.")
    if len(ids) + params.max_new_tokens > max_length:
        raise PromptTooLong(
            f"{len(ids)} prompt tokens and max_new_tokens={params.max_new_tokens} do not fit the context of "
            f"{max_length} tokens.",
            hint="Shorten the prompt, lower max_new_tokens, or start with a larger max_length.",
        )


#: When a row arrived: plans made before, the negative of its new tokens, rows submitted before.
Order = tuple[int, int, int]


class RowState(Enum):
    """Where a row is in its life."""

    WAITING = 0
    RUNNING = 1
    ENDED = 2  # its last event is out; it may still hold memory that a step in flight writes


class Row:
    """One sequence in the scheduler.

    Attributes:
        order: the least goes first.
        token_ids: prompt and the new tokens that the host knows.
        length: prompt and new tokens, those of steps in flight included.
        computed: how many of them have their keys and values in the cache, or will when the steps in flight end.
        limit: `length` at which the row ends.
        slot: its row in the executor's per-row tensors, -1 while it has none.
        pages: its pages of the KV cache in order.
        in_flight: its places in steps launched and not completed.
        lookup: proposes its next tokens; None: it does not speculate.
        draft: proposed tokens in a step in flight, whose places follow `token_ids`; the row waits for that step.
    """

    __slots__ = (
        "accepted_tokens",
        "cached_tokens",
        "computed",
        "draft",
        "draft_start",
        "draft_tokens",
        "entry",
        "eos",
        "in_flight",
        "length",
        "limit",
        "lookup",
        "order",
        "pages",
        "poisoned",
        "prompt_tokens",
        "registered",
        "request",
        "row_id",
        "slot",
        "state",
        "t_first",
        "t_start",
        "token_ids",
    )

    def __init__(self, request: SequenceRequest, order: Order, eos: frozenset[int]) -> None:
        self.request = request
        self.row_id = request.row_id
        self.order = order
        self.eos = eos
        self.token_ids = list(request.token_ids)
        self.prompt_tokens = self.length = len(self.token_ids)
        self.limit = self.prompt_tokens + request.params.max_new_tokens
        self.computed = 0
        self.state = RowState.WAITING
        self.slot = -1
        self.pages: list[int] = []
        self.in_flight = 0
        self.registered = 0  # pages known to the prefix cache, and the entry of the last of them
        self.entry = ROOT
        self.cached_tokens = 0
        self.poisoned = False  # its pages may hold NaN
        self.lookup: PromptLookup | None = None
        self.draft: Sequence[int] = ()
        self.draft_start = 0  # the place of the draft's first token
        self.draft_tokens = self.accepted_tokens = 0
        self.t_start = self.t_first = 0.0

    def __lt__(self, other: Row) -> bool:
        return self.order < other.order

    def finished(self, reason: FinishReason, now: float) -> FinishedEvent:
        """The row's last event."""
        start = self.t_start or now
        return FinishedEvent(
            row_id=self.row_id,
            finish_reason=reason,
            queue_s=max(0.0, start - self.request.t_submit),
            model_s=now - start,
            prefill_s=(self.t_first or now) - start,
            prompt_tokens=self.prompt_tokens,
            output_tokens=len(self.token_ids) - self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
        )


@dataclass(slots=True)
class StepPlan:
    """One step: row i computes tokens `starts[i]` to `starts[i] + counts[i]`; rows with one token come first.

    A row with a draft has a place for its last token and one for each token of the draft, with one token each: a step
    that verifies drafts is a decode step of more rows, computed by the same kernels and graphs.

    Attributes:
        samples: whether the row's last token is among them, so that the step yields its next token.
        admitted: rows of this step that came into a slot with it.
        copies: (source page, target page, tokens) to be copied in this order before the step.
    """

    rows: list[Row] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    admitted: list[Row] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def ends(self) -> list[int]:
        """Each row's tokens with those of the step."""
        return [start + count for start, count in zip(self.starts, self.counts, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens in the step."""
        return sum(self.counts)

    def add(self, row: Row, count: int) -> None:
        """Let a row compute its next `count` tokens."""
        samples = row.computed + count == row.length
        self.rows.append(row)
        self.starts.append(row.computed)
        self.counts.append(count)
        self.samples.append(samples)
        row.computed += count
        row.length += samples
        row.in_flight += 1

    def longest_first(self) -> None:
        """Order rows of one token by context: a GPU starts with those that take longest, and ends with all at once."""
        order = sorted(range(len(self.rows)), key=self.starts.__getitem__, reverse=True)
        self.rows = [self.rows[i] for i in order]
        self.starts = [self.starts[i] for i in order]
        self.samples = [self.samples[i] for i in order]

    def widen(self, budget: int, page_tokens: int) -> int:
        """Let rows compute more of their prompts, as far as their pages reach. Returns what is left of the budget."""
        for i, row in enumerate(self.rows):
            more = min(budget, row.length - row.computed, len(row.pages) * page_tokens - row.computed)
            if more > 0 and not self.samples[i]:
                budget -= more
                row.computed += more
                self.counts[i] += more
                if row.computed == row.length:
                    self.samples[i] = True
                    row.length += 1
        return budget

    def undo(self) -> None:
        """Take the step back from its rows."""
        for row, count, samples in zip(self.rows, self.counts, self.samples, strict=True):
            row.in_flight -= 1
            row.draft = ()
            if row.state is not RowState.ENDED:
                row.length -= samples
            if row.state is RowState.RUNNING:
                row.computed -= count

    def extend(self, other: StepPlan) -> None:
        """Put the rows of another plan behind."""
        self.rows += other.rows
        self.starts += other.starts
        self.counts += other.counts
        self.samples += other.samples
