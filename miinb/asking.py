"""What a user gives, made into requests: prompts, chats, sessions, inputs of a task; and what is wrong with it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from miinb.config import GenerationParams, parse_generation
from miinb.errors import InvalidRequest, did_you_mean
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
    request_id = uuid.uuid4().hex  # of the list, whose last ones may come while the server drains
    return [GenerateRequest(prompt, params, request_id=request_id, session_id=session_id) for prompt in given]


def chat_request(messages: Any, parameters: Mapping[str, Any]) -> GenerateRequest:
    """The request of a chat. Raises InvalidRequest where a message is none."""
    params, session_id = _parameters(parameters)
    return GenerateRequest(None, params, tuple(_messages(messages)), request_id=uuid.uuid4().hex, session_id=session_id)


def task_inputs(task: str, inputs: Any) -> list[dict[str, str]]:
    """The inputs of an encoder task as dictionaries of texts.

    Args:
        task: its name.
        inputs: a text, a dictionary of the task's inputs, or any number of them in order (a list, tuple, generator,
            pandas Series, numpy array).

    Raises:
        InvalidRequest: there are none, or one is of another kind; the message says which (`inputs[3]`).
    """
    names = find_task(task).inputs
    if find_task(task).streams:
        raise InvalidRequest(f"This deployment serves {task}.", hint="Use generate() or stream().")
    kind = "a text" if len(names) == 1 else f"a dictionary of {' and '.join(names)}"
    if isinstance(inputs, (str, Mapping)):
        return [_task_input("inputs", inputs, task, names, kind)]
    if getattr(inputs, "ndim", 1) != 1:  # a pandas frame, or a numpy array of another shape
        column = "frame['text']" if len(names) == 1 else f"frame[{list(names)}].to_dict('records')"
        what = f"a {type(inputs).__name__} of {inputs.ndim} dimensions is not taken"
        raise InvalidRequest(f"inputs: {what}.", hint=f"Choose what to send: predict({column}).")
    if not isinstance(inputs, Iterable) or isinstance(inputs, (bytes, Set)):
        why = ": it has no order" if isinstance(inputs, Set) else ""
        raise InvalidRequest(
            f"inputs: {type(inputs).__name__} is no input of {task}{why}.", hint=f"Give {kind}, or a list."
        )
    plain = [_task_input(f"inputs[{place}]", row, task, names, kind) for place, row in enumerate(inputs)]
    if not plain:
        raise InvalidRequest("inputs: there are none.", hint=f"Give {kind}, or a list.")
    return plain


def _task_input(where: str, given: Any, task: str, names: Sequence[str], kind: str) -> dict[str, str]:
    """One input as a dictionary; what its texts say is the server's business."""
    if isinstance(given, str) and len(names) == 1:
        return {names[0]: given}
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where}: {given!r:.60} is no input of {task}.", hint=f"Give {kind}.")
    for name in given:
        if name not in names:
            raise InvalidRequest(f"{where}: {task} has no input {name!r:.40}.", hint=did_you_mean(str(name), names))
    for name in names:
        if name not in given:
            raise InvalidRequest(f"{where}: {name} is missing.", hint=f"Give {kind}.")
        if not isinstance(given[name], str):
            raise InvalidRequest(
                f"{where}: {name} is {type(given[name]).__name__}, not text.", hint=f"Give {kind}, or a list of them."
            )
    return {name: given[name] for name in names}


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
