"""What a user gives, made into requests: prompts, chats, sessions, inputs of a task; and what is wrong with it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from miinb.config import GenerationParams, parse_generation
from miinb.errors import InvalidRequest
from miinb.messages import GenerateRequest
from miinb.tasks import find_task

#: A conversation ({"role": ..., "content": ...}), or a text of the user's.
Messages = str | Sequence[Mapping[str, str]]


def text_requests(prompts: str | Sequence[str], parameters: Mapping[str, Any]) -> list[GenerateRequest]:
    """One request for each prompt.

    Args:
        prompts: one prompt or several.
        parameters: `GenerationParams`, and `session_id`.

    Raises:
        InvalidRequest: there is no prompt, or one is no text; or several go to one session.
    """
    if not isinstance(prompts, Iterable) or isinstance(prompts, (Mapping, Set, bytes)):
        hint = "query() takes a dictionary." if isinstance(prompts, Mapping) else "Give a text or a list of texts."
        raise InvalidRequest(f"prompts: {type(prompts).__name__} is not text.", hint=hint)
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    params, session_id = _parameters(parameters)
    if not given:
        raise InvalidRequest("prompts: the list is empty.")
    for place, prompt in enumerate(given):
        if not isinstance(prompt, str):
            raise InvalidRequest(
                f"prompts[{place}]: {type(prompt).__name__} is not text.", hint="Use chat() for messages."
            )
    if session_id and len(given) > 1:
        raise InvalidRequest("session_id: it goes with one prompt.")
    return [GenerateRequest(prompt, params, request_id=uuid.uuid4().hex, session_id=session_id) for prompt in given]


def chat_request(messages: Any, parameters: Mapping[str, Any]) -> GenerateRequest:
    """The request of a chat. Raises InvalidRequest where a message is none."""
    params, session_id = _parameters(parameters)
    return GenerateRequest(None, params, tuple(_messages(messages)), request_id=uuid.uuid4().hex, session_id=session_id)


def task_inputs(task: str, inputs: Any) -> list[Any]:
    """The inputs of an encoder task as dictionaries.

    Args:
        task: its name.
        inputs: a text, a dictionary of the task's inputs, or a list of them.

    Raises:
        InvalidRequest: there are none, or one is of another kind.
    """
    names = find_task(task).inputs
    kind = "a text" if len(names) == 1 else f"a dictionary of {' and '.join(names)}"
    rows = [inputs] if isinstance(inputs, (str, Mapping)) else inputs
    if not isinstance(rows, Iterable):
        raise InvalidRequest(f"inputs: {type(inputs).__name__} is no input of {task}.", hint=f"Give {kind}, or a list.")
    plain: list[Any] = [{names[0]: row} if isinstance(row, str) and len(names) == 1 else row for row in rows]
    if not plain:
        raise InvalidRequest("inputs: there are none.", hint=f"Give {kind}, or a list.")
    if wrong := [row for row in plain if not isinstance(row, Mapping)]:
        raise InvalidRequest(f"inputs: {wrong[0]!r:.60} is no input of {task}.", hint=f"Each is {kind}.")
    return plain


def _parameters(given: Mapping[str, Any]) -> tuple[GenerationParams, str]:
    """The parameters of a generation, and the session that it belongs to ("" if none)."""
    rest = dict(given)
    session_id = rest.pop("session_id", None)
    return parse_generation(rest), "" if session_id is None else session_name(session_id)


def session_name(given: Any) -> str:
    """The name of a session. Raises InvalidRequest unless it is a text or a number."""
    if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
        raise InvalidRequest(f"session_id: {type(given).__name__} {given!r:.40} is no name.", hint="Give a text.")
    return str(given)


def _messages(given: Any) -> Iterator[dict[str, str]]:
    """The messages of a chat; a text is one of the user's. Which roles there are is the server's business.

    Raises:
        InvalidRequest: it is something else; the message says where.
    """
    given = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(given, Sequence) or isinstance(given, bytes) or not given:
        raise InvalidRequest('messages: give a list of {"role": text, "content": text}, or a text.')
    for number, message in enumerate(given):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InvalidRequest(f'messages[{number}]: give {{"role": text, "content": text}}.')
        for name, value in message.items():
            if name not in ("role", "content"):
                raise InvalidRequest(f"messages[{number}]: {name!r:.40} is not served, only role and content are.")
            if not isinstance(value, str):
                what = f"{name} is {type(value).__name__}, not text; images and parts are not served"
                raise InvalidRequest(f"messages[{number}]: {what}.")
        yield {"role": message["role"], "content": message["content"]}
