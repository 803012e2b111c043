"""What a client gets back: `Result` of generate and chat, MII's reply objects. `predictions.py` has encoder tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from miinb.messages import FinishReason, Timing, TokenLogprob, Usage

if TYPE_CHECKING:
    import pandas

#: A row of the requests table, by column name (see the benchmark's records).
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """New text of one prompt or several: prompts in order, and the sequences of a prompt in order.

    Attributes:
        texts: one text a sequence; new text only, unless `return_full_text` was set.
        finish_reasons: "stop" (end token or stop string), "length" or "cancelled", one a sequence.
        usage: token counts, summed over the prompts.
        timing: seconds; of several prompts each field is the largest.
        token_ids: the new tokens, one tuple a sequence.
        logprobs: of the new tokens, one tuple a sequence; empty unless asked for.
        seeds: one a prompt: the given one or the one that was drawn.
        rows: one a prompt, for `frame`.
        dropped_messages: so many of a chat's oldest messages were left out, because they did not fit the context (the
            system's stay).
        history: of a session (`session_id`), with this turn.
    """

    texts: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]
    usage: Usage
    timing: Timing
    token_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    seeds: tuple[int, ...] = ()
    rows: tuple[Row, ...] = field(default=(), repr=False)
    images: tuple[Any, ...] = ()
    dropped_messages: int = 0
    history: tuple[Mapping[str, str], ...] = field(default=(), repr=False)

    @property
    def text(self) -> str:
        """The first text ("" if there is none)."""
        return self.texts[0] if self.texts else ""

    @property
    def frame(self) -> pandas.DataFrame:
        """One row for each prompt, with the columns of `Session.records`."""
        return frame_of(self.rows)

    def __str__(self) -> str:
        return "\n\n".join(self.texts)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from miinb.notebook.cards import bundle, result_card

        return bundle(result_card(self))


def merge(results: Sequence[Result]) -> Result:
    """Results of several prompts as one."""
    timings = [result.timing for result in results]
    usages = [result.usage for result in results]

    def largest(name: str) -> float:
        return max((getattr(timing, name) for timing in timings), default=0.0)

    def total(name: str) -> int:
        return sum(getattr(usage, name) for usage in usages)

    return Result(
        texts=tuple(text for result in results for text in result.texts),
        finish_reasons=tuple(reason for result in results for reason in result.finish_reasons),
        usage=Usage(*(total(name) for name in Usage.__slots__)),
        timing=Timing(*(largest(name) for name in Timing.__slots__)),
        token_ids=tuple(ids for result in results for ids in result.token_ids),
        logprobs=tuple(rows for result in results for rows in result.logprobs),
        seeds=tuple(seed for result in results for seed in result.seeds),
        rows=tuple(row for result in results for row in result.rows),
        dropped_messages=sum(result.dropped_messages for result in results),
        history=results[0].history if len(results) == 1 else (),
    )


def frame_of(rows: Sequence[Row]) -> pandas.DataFrame:
    """Rows as a tidy frame with the columns of the benchmark's records."""
    from miinb.bench.records import requests_frame

    return requests_frame(rows, env={})


# MII's reply objects


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer of `query`, with the fields of MII's replies.

    Attributes:
        response: text tasks: prompt and new text, one a prompt; other tasks: structured data.
        time_taken: seconds on the client's clock.
        model_time_taken: seconds in the model.
        dropped_messages: so many of a session's oldest prompts and answers no longer fit the context.
    """

    response: Any
    time_taken: float
    model_time_taken: float
    dropped_messages: int = 0


@dataclass(frozen=True, slots=True)
class ConversationReply:
    """Answer of `query` for the conversational task: the conversation with one turn more.

    `dropped_messages` of its oldest texts no longer fit the context, so the model did not read them.
    """

    conversation_id: str
    past_user_inputs: list[str]
    generated_responses: list[str]
    time_taken: float
    model_time_taken: float
    dropped_messages: int = 0
