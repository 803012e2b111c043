"""MII's call `query`: a request dictionary in, MII's reply fields out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from miinb.client import Client
from miinb.errors import InvalidRequest, did_you_mean
from miinb.image_results import ImageReply
from miinb.messages import PredictedEvent
from miinb.predictions import vectors_of
from miinb.results import ConversationReply, Reply
from miinb.tasks import Task, find_task

#: What `query` gives, by the task.
MiiReply = Reply | ConversationReply | ImageReply


def query(client: Client, request: Mapping[str, Any], parameters: Mapping[str, Any]) -> MiiReply:
    """Ask a deployment in MII's way.

    Args:
        client: of the deployment.
        request: the task's keys, for text generation {"query": text or list of texts}.
        parameters: generation parameters (and `session_id`), those of pictures, or the options of an encoder task.

    Raises:
        RequestError: a key or parameter is wrong (the message names it), or the request failed.
    """
    if not isinstance(request, Mapping):
        raise InvalidRequest(f"request: {type(request).__name__} is no dictionary.", hint='Give {"query": ...}.')
    task = find_task(client.task)
    for name in request:
        if name not in task.inputs:
            raise InvalidRequest(f"{name}: not a key of {task.name}.", hint=did_you_mean(str(name), task.inputs))
    if task.inputs[0] not in request:
        raise InvalidRequest(f"{task.inputs[0]}: the request lacks it.")
    if task.name == "conversational":
        return _converse(client, request, parameters)
    if task.image:
        return _images(client, request, parameters)
    return _generate(client, request, parameters) if task.streams else _predict(client, task, request, parameters)


def _generate(client: Client, request: Mapping[str, Any], parameters: Mapping[str, Any]) -> Reply:
    begin = time.perf_counter()
    result = client.generate(request["query"], **{"return_full_text": True, **parameters})
    return Reply(list(result.texts), time.perf_counter() - begin, result.timing.model_s, result.dropped_messages)


def _images(client: Client, request: Mapping[str, Any], parameters: Mapping[str, Any]) -> ImageReply:
    begin = time.perf_counter()
    result = client.generate_images(request["query"], **parameters)
    taken_s = time.perf_counter() - begin
    return ImageReply(list(result.images), list(result.flagged), taken_s, result.timing.model_s, list(result.seeds))


def _predict(client: Client, task: Task, request: Mapping[str, Any], options: Mapping[str, Any]) -> Reply:
    begin = time.perf_counter()
    single = all(isinstance(value, str) for value in request.values())
    lengths = {len(values) if isinstance(values, (list, tuple)) else -1 for values in request.values()}
    if not single and (len(lengths) > 1 or -1 in lengths):
        raise InvalidRequest(f"{', '.join(request)}: give texts, or lists of the same length.")
    rows = [tuple(request.values())] if single else zip(*request.values(), strict=True)
    inputs = [dict(zip(request, values, strict=True)) for values in rows]
    event = client.predicted(inputs[0] if single else inputs, options)
    outputs = _plain(task, event, options)
    return Reply(outputs[0] if single else outputs, time.perf_counter() - begin, event.model_s)


def _plain(task: Task, event: PredictedEvent, options: Mapping[str, Any]) -> list[Any]:
    """The answer to each input as transformers' pipelines give it, in lists, dictionaries, texts and numbers."""
    if task.name == "feature-extraction":
        vectors = vectors_of(event, pooled=options.get("pooling") != "none")
        return [[{"embedding": vector.tolist()}] for vector in vectors]
    if task.name == "question-answering" and options.get("top_k", 1) == 1:
        return [answers[0] if answers else None for answers in event.outputs]
    return list(event.outputs)


def _converse(client: Client, request: Mapping[str, Any], parameters: Mapping[str, Any]) -> ConversationReply:
    """One turn. The conversation is in the request (MII's way), or in the server if a `session_id` is given."""
    if parameters.get("num_return_sequences") not in (None, 1):
        raise InvalidRequest("num_return_sequences: a conversation goes on with one answer.")
    text, users, answers = _text("text", request["text"]), *(_texts(request, name) for name in _LISTS)
    session_id = parameters.get("session_id")
    if session_id is not None and (users or answers):
        raise InvalidRequest(f"{' and '.join(_LISTS)}: the session has its own history.")
    if len(answers) != len(users):
        raise InvalidRequest(f"{' and '.join(_LISTS)}: their lengths ({len(users)}, {len(answers)}) differ.")
    name = _name(request.get("conversation_id"), session_id)
    roles = ("user", "assistant")
    messages = [
        {"role": role, "content": said}
        for turn in zip(users, answers, strict=True)
        for role, said in zip(roles, turn, strict=True)
    ]
    begin = time.perf_counter()
    result = client.chat([*messages, {"role": "user", "content": text}], **parameters)
    if session_id is not None:
        users, answers = ([said["content"] for said in result.history if said["role"] == role] for role in roles)
    else:
        users, answers = [*users, text], [*answers, result.text]
    taken_s = time.perf_counter() - begin
    return ConversationReply(name, users, answers, taken_s, result.timing.model_s, result.dropped_messages)


_LISTS = ("past_user_inputs", "generated_responses")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name}: {type(value).__name__} is not text.")
    return value


def _texts(request: Mapping[str, Any], name: str) -> list[str]:
    values = request.get(name)
    if values is None:
        return []
    if not isinstance(values, (list, tuple)):
        raise InvalidRequest(f"{name}: {type(values).__name__} is no list of texts.")
    return [_text(name, value) for value in values]


def _name(conversation_id: Any, session_id: Any) -> str:
    """The reply's conversation_id: the request's own, else the session's, else a new one."""
    name = conversation_id if conversation_id is not None else session_id
    if isinstance(name, bool) or not isinstance(name, (str, int, type(None))):
        raise InvalidRequest(f"conversation_id: {type(name).__name__} is neither text nor a whole number.")
    return str(uuid.uuid4()) if name is None else str(name)
