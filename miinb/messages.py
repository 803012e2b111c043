"""What flows between the processes: plain dataclasses, no behavior beyond construction from JSON.

Kernel and frontend exchange these through gRPC (`rpc/codec.py` alone knows protobuf); frontend and rank 0 through the
frames of `server/frames.py`. Times are seconds; an absolute time is `time.monotonic()`, one clock for all of a host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from miinb.config import GenerationParams

FinishReason = Literal["stop", "length", "cancelled"]

_T = TypeVar("_T")


def from_dict(cls: type[_T], values: Mapping[str, Any]) -> _T:
    """A dataclass of these values; names that it does not have are dropped (an older peer may send more)."""
    known: Mapping[str, object] = cls.__dataclass_fields__  # type: ignore[attr-defined]
    return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, summed over its sequences (the prompt counts once).

    `cached_tokens` of the prompt were not computed, as an earlier request's were the same. Of `draft_tokens` that
    speculation proposed the model confirmed `accepted_tokens`; they are among the output tokens.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went, in seconds.

    `ttft_s` is submit to first non-empty chunk, `tpot_s` = (e2e_s - ttft_s) / (output_tokens - 1), both on the client's
    clock. `queue_s` is waiting for the scheduler, `model_s` from admission to the last token in rank 0.
    """

    queue_s: float = 0.0
    tokenize_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    model_s: float = 0.0
    detokenize_s: float = 0.0
    e2e_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a chosen token and of the `logprobs=` most likely ones (by token id).

    The texts are each token's alone, filled in by the frontend: ranks know none.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""
    top_texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one sequence's new text. `index` is the sequence's place among the request's sequences."""

    text: str
    token_ids: tuple[int, ...] = ()
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """One sequence of a request is complete."""

    index: int
    finish_reason: FinishReason
    output_tokens: int


@dataclass(frozen=True, slots=True)
class RequestBegin:
    """A generate request has been taken: what is known before its first token (and stays true if it is canceled).

    `dropped_messages`: so many of a chat's oldest messages (after the system's) did not fit the context.
    """

    prompt_tokens: int
    dropped_messages: int = 0


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """A generate request is complete: counts and the server's part of the timing (ttft, tpot, e2e are the client's).

    `history`: of a session, with this turn.
    """

    usage: Usage
    timing: Timing
    seed: int
    history: tuple[Mapping[str, str], ...] = ()


StreamEvent = RequestBegin | Chunk | SequenceEnd | RequestEnd


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a client asks: one prompt, or a chat (messages with "role" and "content"), and its parameters."""

    prompt: str | None
    params: GenerationParams
    messages: tuple[Mapping[str, str], ...] | None = None
    request_id: str = ""  # chosen by the client, for logs and records
    session_id: str = ""  # of a conversation that the server remembers: its history goes before the input


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One row for rank 0: a tokenized prompt. A request with n sequences is n of these with seeds seed, seed+1, ..."""

    row_id: int  # unique in the frontend's life
    token_ids: Sequence[int]
    params: GenerationParams  # seed is set; stop strings are the frontend's business
    t_submit: float  # time.monotonic() when the frontend accepted the request
    deadline: float | None = None  # time.monotonic() after which it must not start
    index: int = 0  # its place among the request's sequences


@dataclass(slots=True)  # not frozen: that makes it six times cheaper to create, and there is one a row and step
class TokensEvent:
    """New tokens of a row."""

    row_id: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """A row is complete; its memory is free."""

    row_id: int
    finish_reason: FinishReason
    queue_s: float
    model_s: float
    prefill_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0  # of the prompt, taken from the cache
    draft_tokens: int = 0  # proposed by speculation, and accepted
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """A row failed alone: class name of `miinb.errors` and text for the user (no paths, no tracebacks)."""

    row_id: int
    error: str
    message: str
    hint: str = ""


Event = TokensEvent | FinishedEvent | FailedEvent


@dataclass(frozen=True, slots=True)
class EncodeRequest:
    """Tokenized texts for an encoder, packed one after another.

    Attributes:
        row_id: unique in the frontend's life.
        token_ids: of all sequences, special tokens included.
        lengths: tokens of each sequence; their sum is that of `token_ids`.
        t_submit: time.monotonic() when the frontend sent it.
        type_ids: token types, packed as the tokens are; empty: all are 0.
        wanted: fill-mask: the masks' places in `token_ids`.
        options: how the head's results are reduced; docs/internals.md has each task's.
        deadline: time.monotonic() after which it must not start.
    """

    row_id: int
    token_ids: Sequence[int]
    lengths: Sequence[int]
    t_submit: float
    type_ids: Sequence[int] = ()
    wanted: Sequence[int] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class EncodedEvent:
    """An encoder's results, row after row in the request's order.

    Attributes:
        row_id: of the request.
        columns: numbers in a row.
        values: float32, packed.
        ids: int32, packed: which label or token each value is of; empty: row by row all of them, in their order.
        queue_s: from `t_submit` to its first forward pass.
        model_s: in forward passes that it had a part in, and the reduction of their results.
    """

    row_id: int
    columns: int
    values: bytes
    ids: bytes = b""
    queue_s: float = 0.0
    model_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PredictedEvent:
    """Answers of a predict request, in order, as a client gets them.

    Attributes:
        outputs: one list of JSON-ready dicts an input; of feature-extraction the number of rows that each input has.
        queue_s: from the replica's being asked to its first forward pass.
        preprocess_s: in the frontend before: checks, tokens, windows.
        model_s: in forward passes, and the reduction of their results.
        postprocess_s: in the frontend after: numbers made into answers.
        vectors: of feature-extraction: float32, row after row, of all inputs.
        columns: numbers in a row of `vectors`.
    """

    outputs: Sequence[Any]
    queue_s: float
    preprocess_s: float
    model_s: float
    postprocess_s: float
    vectors: bytes = b""
    columns: int = 0


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One choice and its reason."""

    what: str
    choice: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Which optimizations were chosen for this model, size, batch and hardware, and why."""

    engine: str  # "optimized" or "baseline": what really runs
    device: str
    dtype: str
    tensor_parallel: int = 1
    replicas: int = 1
    max_length: int = 0
    max_batch: int = 0
    kv_cache_bytes: int = 0
    weights_bytes: int = 0
    graphs_bytes: int = 0
    lines: tuple[PlanLine, ...] = ()
    warnings: tuple[str, ...] = ()
    schedulers: tuple[str, ...] = ()  # classes of diffusers that pictures may be asked for with

    def with_line(self, what: str, choice: str, reason: str, **changes: Any) -> Plan:
        """The same plan with one more reason (and changed fields)."""
        return dataclasses.replace(self, lines=(*self.lines, PlanLine(what, choice, reason)), **changes)

    def following(self, before: Plan) -> Plan:
        """This plan after the lines of an earlier one. A line that it tells anew is not kept, nor is its warning."""
        told = {line.what for line in self.lines}
        kept = [line for line in before.lines if line.what not in told]
        gone = {line.reason for line in before.lines if line.what in told}
        warnings = [text for text in before.warnings if text not in gone]
        return dataclasses.replace(self, lines=(*kept, *self.lines), warnings=(*warnings, *self.warnings))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan of `dataclasses.asdict`'s output."""
        plain = dict(values)
        plain["lines"] = tuple(from_dict(PlanLine, line) for line in plain.get("lines", ()))
        plain |= {name: tuple(plain.get(name, ())) for name in ("warnings", "schedulers")}
        return from_dict(cls, plain)

    def __str__(self) -> str:
        width = max((len(line.what) for line in self.lines), default=0)
        rows = [f"{line.what:<{width}}  {line.choice}: {line.reason}" for line in self.lines]
        return "\n".join(rows + [f"warning: {text}" for text in self.warnings])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from miinb.notebook import cards

        return cards.bundle(cards.plan_card(self))


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What rank 0 tells the frontend once the model is ready; `Describe` passes it on to clients."""

    replica: int
    model: str
    task: str
    engine: str
    dtype: str
    device: str
    vocab_size: int
    max_length: int
    max_batch: int
    eos_token_ids: tuple[int, ...]
    tokenizer_folder: str  # tokenizer.json and chat template that rank 0 wrote
    plan: Plan
    labels: tuple[str, ...] = ()  # of a classifier, in the order of its columns
    function: str = ""  # what makes a text classifier's logits scores unless a request says: softmax, sigmoid, none
    load_s: float = 0.0
    phases_s: Mapping[str, float] = field(default_factory=dict)  # seconds of each phase of the rank's start
    load_peak_bytes: int = 0  # most GPU memory in use until the weights were loaded and checked
    versions: Mapping[str, str] = field(default_factory=dict)
    device_name: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineInfo:
        """The information of `dataclasses.asdict`'s output."""
        plain = dict(values)
        plain["plan"] = Plan.from_dict(plain["plan"])
        plain |= {name: tuple(plain.get(name, ())) for name in ("eos_token_ids", "labels")}
        return from_dict(cls, plain)


@dataclass(frozen=True, slots=True)
class Phase:
    """A step of start-up: start, load (i of n), compile (i of n), verify, capture, ready."""

    name: str
    done: int = 0
    total: int = 0
    text: str = ""


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank as the supervisor sees it."""

    replica: int
    rank: int
    pid: int
    state: str
    gpu: int | None = None  # the physical index; None on a CPU
    memory_bytes: int = 0  # reserved on its GPU at the end of its start; on a CPU, resident now
    weights_bytes: int = 0  # like the next two, part of it
    kv_cache_bytes: int = 0
    graphs_bytes: int = 0
    free_bytes: int = 0  # of its GPU, now; 0 on a CPU


@dataclass(frozen=True, slots=True)
class Status:
    """A deployment at this moment."""

    name: str
    state: str  # starting, ready, draining, stopped, failed, lost
    model: str
    task: str
    engine: str
    dtype: str
    device: str
    address: str
    pid: int  # of the supervisor
    persist: bool
    uptime_s: float
    in_flight: int = 0  # requests; also what is canceled and still computed
    queued: int = 0
    requests: int = 0
    kv_dtype: str = "auto"  # of the KV cache: auto is `dtype`
    tcp_address: str = ""  # of the loopback listener, where a port was asked for
    ranks: tuple[RankStatus, ...] = ()
    phase: Phase | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Status:
        """The status of `dataclasses.asdict`'s output."""
        plain = dict(values)
        plain["ranks"] = tuple(from_dict(RankStatus, rank) for rank in plain.get("ranks", ()))
        plain["phase"] = from_dict(Phase, plain["phase"]) if plain.get("phase") else None
        return from_dict(cls, plain)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from miinb.notebook import cards

        return cards.bundle(cards.status_card(self))
