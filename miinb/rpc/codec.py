"""Between the dataclasses of `messages.py` and protobuf bytes.

With `image_codec.py` the only module that knows protobuf. Servers and clients hand it bytes and get dataclasses or a
`MiinbError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from miinb import errors
from miinb.config import GenerationParams, parse_generation
from miinb.errors import InvalidRequest
from miinb.frozen import plain
from miinb.messages import (
    Chunk,
    GenerateRequest,
    PredictedEvent,
    RequestBegin,
    RequestEnd,
    SequenceEnd,
    StreamEvent,
    Timing,
    TokenLogprob,
    Usage,
)
from miinb.rpc import inference_pb2 as pb

SERVICE = "miinb.v1.Inference"
GENERATE = f"/{SERVICE}/Generate"
PREDICT = f"/{SERVICE}/Predict"
CREATE_SESSION = f"/{SERVICE}/CreateSession"
DESTROY_SESSION = f"/{SERVICE}/DestroySession"
DESCRIBE = f"/{SERVICE}/Describe"

#: What a call may be: bytes of a request, and inputs of a predict request. A client cuts a longer list.
MAX_REQUEST_BYTES = 16 << 20
MAX_INPUTS = 1024

#: The times that the server measures; the others are the client's.
_SERVER_TIMES = tuple(name for name in Timing.__slots__ if name in pb.RequestEnd.DESCRIPTOR.fields_by_name)


# Generate


def encode_generate(request: GenerateRequest) -> bytes:
    """A generate request as bytes.

    Raises:
        InvalidRequest: the prompt or a message holds a lone surrogate, which no UTF-8 can say.
    """
    parameters = request.params.model_dump_json(exclude_unset=True)
    try:
        message = pb.GenerateRequest(
            parameters_json=parameters, request_id=request.request_id, session_id=request.session_id
        )
        if request.messages is not None:
            message.chat.CopyFrom(pb.Chat(messages=_messages(request.messages)))
        else:
            message.prompt = request.prompt or ""
    except (UnicodeEncodeError, ValueError) as error:
        raise InvalidRequest("prompt: it holds a lone surrogate, which is not text.") from error
    data: bytes = message.SerializeToString()
    return data


def decode_generate(data: bytes) -> GenerateRequest:
    """The generate request of these bytes.

    Raises:
        InvalidRequest: it cannot be read, or a parameter is unknown or wrong; the message names it.
    """
    message = parse(pb.GenerateRequest, data)
    kind = message.WhichOneof("input")
    messages = _plain_messages(message.chat.messages) if kind == "chat" else None
    return GenerateRequest(
        prompt=message.prompt if kind == "prompt" else None,
        params=_parameters(message.parameters_json),
        messages=messages,
        request_id=message.request_id[:64],
        session_id=message.session_id,
    )


def _messages(rows: Iterable[Mapping[str, str]]) -> list[Any]:
    return [pb.Message(role=row["role"], content=row["content"]) for row in rows]


def _plain_messages(rows: Iterable[Any]) -> tuple[dict[str, str], ...]:
    return tuple({"role": row.role, "content": row.content} for row in rows)


def parse(cls: Callable[[], Any], data: bytes) -> Any:
    """The message of these bytes. Raises InvalidRequest where they are none."""
    message = cls()
    try:
        message.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("The request cannot be read.") from error
    return message


def json_object(text: str) -> dict[str, Any]:
    """The object that the field parameters_json holds; none is an empty one. Raises InvalidRequest."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("parameters_json: it is not JSON.") from error
    if not isinstance(values, dict):
        raise InvalidRequest("parameters_json: it is not an object.")
    return values


def _parameters(text: str) -> GenerationParams:
    values = json_object(text)
    bias = values.get("logit_bias")
    if isinstance(bias, dict):  # JSON has text keys only; what is no number is refused as a wrong key
        values["logit_bias"] = {int(key) if key.lstrip("-").isdecimal() else key: value for key, value in bias.items()}
    return parse_generation(values)


def encode_event(event: StreamEvent) -> bytes:
    """A message of the answer's stream as bytes."""
    if isinstance(event, Chunk):
        text = pb.TextChunk(text=event.text, token_ids=event.token_ids, index=event.index)
        for entry in event.logprobs:
            text.logprobs.add(
                token_id=entry.token_id,
                logprob=entry.logprob,
                top_ids=[token_id for token_id, _ in entry.top],
                top_logprobs=[logprob for _, logprob in entry.top],
                text=entry.text,
                top_texts=entry.top_texts,
            )
        message = pb.GenerateChunk(text=text)
    elif isinstance(event, RequestBegin):
        begin = pb.RequestBegin(prompt_tokens=event.prompt_tokens, dropped_messages=event.dropped_messages)
        message = pb.GenerateChunk(begin=begin)
    elif isinstance(event, SequenceEnd):
        message = pb.GenerateChunk(
            sequence_end=pb.SequenceEnd(
                index=event.index, finish_reason=event.finish_reason, output_tokens=event.output_tokens
            )
        )
    else:
        message = pb.GenerateChunk(
            end=pb.RequestEnd(
                **{name: getattr(event.usage, name) for name in Usage.__slots__},
                **{name: getattr(event.timing, name) for name in _SERVER_TIMES},
                seed=event.seed,
                history=_messages(event.history),
            )
        )
    data: bytes = message.SerializeToString()
    return data


def decode_event(data: bytes) -> StreamEvent:
    """The message of the answer's stream that these bytes say."""
    message = parse(pb.GenerateChunk, data)
    kind = message.WhichOneof("event")
    if kind == "text":
        text = message.text
        logprobs = tuple(
            TokenLogprob(
                row.token_id,
                row.logprob,
                tuple(zip(row.top_ids, row.top_logprobs, strict=True)),
                row.text,
                tuple(row.top_texts),
            )
            for row in text.logprobs
        )
        return Chunk(text.text, tuple(text.token_ids), text.index, logprobs)
    if kind == "sequence_end":
        end = message.sequence_end
        return SequenceEnd(end.index, end.finish_reason, end.output_tokens)
    if kind == "end":
        end = message.end
        return RequestEnd(
            Usage(**{name: getattr(end, name) for name in Usage.__slots__}),
            Timing(**{name: getattr(end, name) for name in _SERVER_TIMES}),
            end.seed,
            _plain_messages(end.history),
        )
    if kind == "begin":
        return RequestBegin(message.begin.prompt_tokens, message.begin.dropped_messages)
    raise errors.VersionMismatch("The server sent a message that this version does not know.")


# Sessions


def encode_session(session_id: str) -> bytes:
    """The request to create or destroy a session."""
    try:
        data: bytes = pb.SessionRequest(session_id=session_id).SerializeToString()
    except (UnicodeEncodeError, ValueError) as error:
        raise InvalidRequest("session_id: it holds a lone surrogate, which is not text.") from error
    return data


def decode_session(data: bytes) -> str:
    """The session id of such a request."""
    session_id: str = parse(pb.SessionRequest, data).session_id
    return session_id


# Predict and Describe


def encode_predict(inputs: Iterable[Mapping[str, Any]], options: Mapping[str, Any], request_id: str = "") -> bytes:
    """A predict request as bytes.

    Raises:
        InvalidRequest: a value is not JSON (text, number, bool, None, list, dict), nor numpy's word for it.
    """
    message = pb.PredictRequest(request_id=request_id)
    what = "options"
    try:
        message.options.update({name: plain(value) for name, value in options.items()})
        for place, values in enumerate(inputs):
            what = f"inputs[{place}]"
            message.inputs.add().update(values)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what}: it holds a lone surrogate, which is not text.") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        text = f"{what}: it holds what is not text, a number, a list or a dictionary: {error}."
        raise InvalidRequest(text) from error
    data: bytes = message.SerializeToString()
    return data


def decode_predict(data: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Inputs and options of a predict request; whole numbers are int again (a Struct knows only doubles)."""
    message = parse(pb.PredictRequest, data)
    if message.blobs:
        raise InvalidRequest("blobs: this deployment takes none.")
    return [_plain(values) for values in message.inputs], _plain(message.options)


def request_id(data: bytes) -> str:
    """Of a predict request: the same for all calls of a list. Raises InvalidRequest."""
    return str(parse(pb.PredictRequest, data).request_id)


def _plain(value: Any) -> Any:
    if isinstance(value, str):  # most often
        return value
    if hasattr(value, "fields"):  # Struct
        return {key: _plain(entry) for key, entry in value.items()}
    if hasattr(value, "values") and not callable(value.values):  # ListValue
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


_OUTPUTS = json.JSONEncoder(ensure_ascii=False, allow_nan=False)  # json.dumps makes one a call


def encode_predicted(event: PredictedEvent) -> bytes:
    """The answer of a predict request as bytes.

    Raises:
        NonFinite: an output is NaN or infinite, which JSON cannot say.
    """
    try:
        outputs = _OUTPUTS.encode(event.outputs)
    except ValueError as error:
        raise errors.NonFinite("The model produced NaN or infinity for this input.") from error
    predictions = pb.Predictions(
        outputs_json=outputs,
        queue_s=event.queue_s,
        preprocess_s=event.preprocess_s,
        model_s=event.model_s,
        postprocess_s=event.postprocess_s,
        blobs=[event.vectors] if event.columns else [],
        columns=event.columns,
    )
    data: bytes = pb.PredictEvent(predictions=predictions).SerializeToString()
    return data


def decode_predicted(data: bytes) -> PredictedEvent:
    """The answer of a predict request."""
    got = parse(pb.PredictEvent, data).predictions
    outputs: Sequence[Any] = json.loads(got.outputs_json)
    vectors = got.blobs[0] if got.blobs else b""
    times = (got.queue_s, got.preprocess_s, got.model_s, got.postprocess_s)
    return PredictedEvent(outputs, *times, vectors, got.columns)


def encode_description(values: Mapping[str, Any]) -> bytes:
    """The reply of Describe as bytes."""
    data: bytes = pb.DescribeReply(json=json.dumps(values, ensure_ascii=False)).SerializeToString()
    return data


def decode_description(data: bytes) -> dict[str, Any]:
    """The values of Describe's reply."""
    values: dict[str, Any] = json.loads(parse(pb.DescribeReply, data).json)
    return values
