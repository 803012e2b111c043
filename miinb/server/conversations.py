"""The conversations that the server remembers: MII's sessions. They live in the frontend, so that any client joins in.

A turn counts when its answer has been handed to the client whole. One that fails, is canceled or loses its client
leaves the history as it was: it can be asked again. Turns of one conversation wait for each other.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from miinb.errors import InvalidRequest, QueueFull
from miinb.messages import Chunk, GenerateRequest, RequestEnd, StreamEvent
from miinb.server.prompts import Message, Prompt

MAX_CONVERSATIONS = 1000
IDLE_S = 3600.0  # a conversation without a turn for so long is forgotten
MAX_ID_CHARACTERS = 128
MAX_WAITING = 32  # turns of one conversation


@dataclass(eq=False, slots=True)
class Conversation:
    """What was said, and who may speak."""

    history: tuple[Message, ...] = ()
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    turns: int = 0  # that run or wait
    last_used: float = 0.0


class Turn:
    """One request of a conversation: it sees the answer pass and knows the history that comes of it."""

    def __init__(self, history: tuple[Message, ...]) -> None:
        self.history = history
        self._prompt: Prompt | None = None
        self._pieces: list[str] = []

    def begin(self, prompt: Prompt) -> None:
        """The request has been taken."""
        self._prompt = prompt

    def passing(self, event: StreamEvent) -> StreamEvent:
        """The event as the client is to get it: the end carries the history."""
        if isinstance(event, Chunk):
            self._pieces.append(event.text)
        elif isinstance(event, RequestEnd):
            return dataclasses.replace(event, history=self.after())
        return event

    def after(self) -> tuple[Message, ...]:
        """The history with this turn, without what no longer fits the context."""
        if self._prompt is None:
            return self.history
        text = "".join(self._pieces).removeprefix(self._prompt.shown)
        return (*self._prompt.messages, {"role": "assistant", "content": text})


class Conversations:
    """Conversations by id: a bounded number, forgotten when idle.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[str, Conversation] = {}

    def __len__(self) -> int:
        return len(self._open)

    def create(self, session_id: str) -> None:
        """Begin a conversation.

        Raises:
            InvalidRequest: the id is taken, empty or too long.
            QueueFull: there are too many.
        """
        self._forget_idle()
        if not 1 <= len(session_id) <= MAX_ID_CHARACTERS or not session_id.isprintable():
            raise InvalidRequest(f"session_id: give 1 to {MAX_ID_CHARACTERS} printable characters.")
        if session_id in self._open:
            raise InvalidRequest(f"session_id: {session_id!r} exists already.")
        if len(self._open) >= MAX_CONVERSATIONS:
            raise QueueFull(
                f"{MAX_CONVERSATIONS} sessions are open.",
                hint=f"End one with destroy_session; one that is idle for {IDLE_S / 60:.0f} min goes by itself.",
            )
        self._open[session_id] = Conversation(last_used=self._clock())

    def destroy(self, session_id: str) -> None:
        """Forget a conversation; a turn that runs still gets its answer.

        Raises:
            InvalidRequest: there is none of that id.
        """
        self._find(session_id)
        del self._open[session_id]

    @asynccontextmanager
    async def turn(self, request: GenerateRequest) -> AsyncIterator[Turn]:
        """The turn of a request with a `session_id`. Left without an error, it becomes part of the history.

        Raises:
            InvalidRequest: there is no such conversation, or several answers are asked for.
            QueueFull: too many turns of it wait.
        """
        if request.params.num_return_sequences > 1:
            raise InvalidRequest("num_return_sequences: a session goes on with one answer.")
        conversation = self._find(request.session_id)
        if conversation.turns > MAX_WAITING:
            raise QueueFull(f"{MAX_WAITING} turns of this session wait already.", hint="Wait for their answers.")
        conversation.turns += 1
        try:
            async with conversation.lock:
                if self._find(request.session_id) is not conversation:
                    raise _unknown(request.session_id)
                turn = Turn(conversation.history)
                yield turn
                conversation.history = turn.after()
        finally:
            conversation.turns -= 1
            conversation.last_used = self._clock()

    def _find(self, session_id: str) -> Conversation:
        self._forget_idle()
        conversation = self._open.get(session_id)
        if conversation is None:
            raise _unknown(session_id)
        return conversation

    def _forget_idle(self) -> None:
        limit = self._clock() - IDLE_S
        idle = [name for name, one in self._open.items() if not one.turns and one.last_used <= limit]
        for name in idle:
            del self._open[name]


def _unknown(session_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"session_id: {session_id[:MAX_ID_CHARACTERS]!r} does not exist.",
        hint=f"Call create_session first; a session that is idle for {IDLE_S / 60:.0f} min is forgotten.",
    )
