"""What the scheduler plans with: a row (one sequence) and the plan of a step. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from miinb.engine.pages import ROOT
from miinb.errors import InvalidRequest, PromptTooLong
from miinb.messages import SequenceRequest


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


class RowState(Enum):
    """Where a row is in its life."""

    WAITING = 0
    RUNNING = 1
    ENDED = 2  # its last event is out; it may still hold memory that a step in flight writes


class Row:
    """One sequence in the scheduler.

    Attributes:
        token_ids: prompt and the new tokens that the host knows.
        length: prompt and new tokens, those of steps in flight included.
        computed: how many of them have their keys and values in the cache, or will when the steps in flight end.
        limit: `length` at which the row ends.
        slot: its row in the executor's per-row tensors, -1 while it has none.
        pages: its pages of the KV cache in order.
        in_flight: steps launched and not completed that hold the row.
    """

    __slots__ = (
        "cached_tokens",
        "computed",
        "entry",
        "eos",
        "in_flight",
        "length",
        "limit",
        "order",
        "pages",
        "poisoned",
        "prompt_tokens",
        "registered",
        "request",
        "row_id",
        "slot",
        "state",
        "t_end",
        "t_first",
        "t_start",
        "token_ids",
    )

    def __init__(self, request: SequenceRequest, order: int, eos: frozenset[int]) -> None:
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
        self.t_start = self.t_first = self.t_end = 0.0

    def __lt__(self, other: Row) -> bool:
        return self.order < other.order


@dataclass(slots=True)
class StepPlan:
    """One step: row i computes tokens `starts[i]` to `starts[i] + counts[i]`; rows with one token come first.

    Attributes:
        samples: whether the row's last token is among them, so that the step yields its next token.
        admitted: rows of this step that came into a slot with it.
    """

    rows: list[Row] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    admitted: list[Row] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in the step."""
        return sum(self.counts)
