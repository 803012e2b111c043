"""Token ids of a request: its checks, the model's chat template, and a history that is cut to fit the context."""

from __future__ import annotations

import asyncio
import bisect
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miinb.config import GenerationParams
from miinb.errors import InvalidRequest, PromptTooLong, did_you_mean
from miinb.messages import GenerateRequest
from miinb.server.text import TextCodec

#: Texts up to so many characters are tokenized in the event loop: a thread would cost more than the work.
INLINE_CHARACTERS = 1000
MAX_MESSAGES = 100_000
ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads.

    Attributes:
        token_ids: of the whole prompt.
        messages: what it says: those of the history that fit, and the new ones.
        dropped: how many of the oldest messages (after the system's) did not fit and were left out.
        shown: the prompt as text, if the answer is to begin with it (`return_full_text`).
    """

    token_ids: list[int]
    messages: tuple[Message, ...]
    dropped: int = 0
    shown: str = ""


async def tokenize(
    request: GenerateRequest, text: TextCodec, max_length: int, history: Sequence[Message] = ()
) -> Prompt:
    """The prompt of a request; a long one in a thread, so that other streams go on.

    Args:
        request: a prompt or messages.
        text: the model's tokenizer and chat template.
        max_length: the model's context, tokens; the answer's `max_new_tokens` have to fit as well.
        history: what was said before, in a session: it goes before a prompt as it is, before messages as messages.

    Raises:
        InvalidRequest: there is no prompt, it is empty, or it holds what cannot be.
        PromptTooLong: it does not fit even without its history.
    """
    messages = [*history, *_given(request)]
    _check(request, messages)
    is_chat = request.messages is not None
    work = functools.partial(_fit, messages, text, max_length - request.params.max_new_tokens, max_length, is_chat)
    small = sum(len(message["content"]) for message in messages) <= INLINE_CHARACTERS
    ids, kept = work() if small else await asyncio.to_thread(work)
    if not ids:
        raise InvalidRequest("prompt: it has no tokens.")
    check_length(len(ids), request.params.max_new_tokens, max_length)
    shown = "".join(message["content"] for message in kept) if request.params.return_full_text else ""
    return Prompt(ids, tuple(kept), len(messages) - len(kept), shown)


def _given(request: GenerateRequest) -> Sequence[Message]:
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("prompt: give a prompt or messages.")
    return request.messages if request.messages is not None else [{"role": "user", "content": request.prompt or ""}]


def _check(request: GenerateRequest, messages: Sequence[Message]) -> None:
    """Refuse a conversation that no template can mean (InvalidRequest)."""
    field = "prompt" if request.messages is None else "messages"
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages: {len(messages)} are more than {MAX_MESSAGES}.")
    for message in messages:
        if message["role"] not in ROLES:
            role = message["role"][:40]
            raise InvalidRequest(f"messages: there is no role {role!r}.", hint=did_you_mean(role, ROLES))
        if "\0" in message["content"] and message["role"] != "assistant":  # a model may say anything
            raise InvalidRequest(f"{field}: it holds a NUL character.")
    if not messages or messages[-1]["role"] != "user":
        raise InvalidRequest("messages: the last one has to be the user's.")
    if not messages[-1]["content"]:
        raise InvalidRequest(f"{field}: it is empty.")
    if request.messages is not None and request.params.return_full_text:
        raise InvalidRequest("return_full_text: not together with messages.")


def _fit(
    messages: Sequence[Message], text: TextCodec, room: int, max_length: int, is_chat: bool
) -> tuple[list[int], Sequence[Message]]:
    """Token ids of the messages, or of the newest that fit into `room` tokens, and the messages that they hold.

    The system's messages at the beginning stay. The cuts lie between turns, some half `room` bytes of text apart: a
    conversation that has outgrown the context begins with the same tokens for several turns, which the prefix cache
    then has (cut at every turn anew, no prompt would begin like the one before).
    """
    head = next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)

    @functools.cache
    def encode(cut: int) -> list[int]:
        kept = [*messages[:head], *messages[cut:]]
        if is_chat:
            return text.encode(text.render_chat(kept), add_special_tokens=False, max_tokens=max_length)
        return text.encode("".join(message["content"] for message in kept), max_tokens=max_length)

    def fits(cut: int) -> bool:
        try:
            return len(encode(cut)) <= room
        except PromptTooLong:  # by far: the tokenizer never reads a history many times the context
            return False

    cuts = [head] if fits(head) else _cuts(messages, head, max(1, room // 2))
    cut = cuts[min(bisect.bisect_left(cuts, True, key=fits), len(cuts) - 1)]
    return encode(cut), [*messages[:head], *messages[cut:]]


def _cuts(messages: Sequence[Message], head: int, apart: int) -> list[int]:
    """Where a conversation may begin: turns about `apart` bytes after each other, and the last turn.

    They depend on what was said before them alone, so that they stay where they are while the conversation grows.
    """
    cuts = []
    size, due = 0, apart
    for i in range(head, len(messages)):
        if messages[i]["role"] == "user" and size >= due:
            cuts.append(i)
            due = size + apart
        size += len(messages[i]["content"].encode("utf-8", "replace"))
    last = len(messages) - 1
    return cuts if cuts and cuts[-1] == last else [*cuts, last]


def check_length(prompt_tokens: int, max_new_tokens: int, max_length: int) -> None:
    """Refuse what does not fit the model's context (PromptTooLong)."""
    room = max_length - prompt_tokens
    if max_new_tokens <= room:
        return
    if room <= 0:
        raise PromptTooLong(
            f"The prompt has {prompt_tokens} tokens, but the model's context is {max_length}.",
            hint="Shorten the prompt.",
        )
    raise PromptTooLong(
        f"The prompt's {prompt_tokens} tokens and max_new_tokens={max_new_tokens} exceed the context of {max_length}.",
        hint=f"At most max_new_tokens={room} fits.",
    )


def check_token_ids(params: GenerationParams, vocab_size: int) -> None:
    """Refuse token ids that the model does not have (InvalidRequest)."""
    for name, ids in (("eos_token_id", params.eos_token_id), ("logit_bias", params.logit_bias)):
        wrong = [token_id for token_id in ids or () if not 0 <= token_id < vocab_size]
        if wrong:
            raise InvalidRequest(f"{name}: {wrong[0]} is no token id of this model (0 to {vocab_size - 1}).")
