"""The part of `codec.py` for text-to-image: its messages as protobuf bytes. Nothing else knows protobuf."""

from __future__ import annotations

from typing import Any

from miinb.errors import InvalidRequest, VersionMismatch
from miinb.image_messages import ImagesEnd, ImagesEvent, ImagesProgress, ImagesRequest, ImageTimes, Picture, Source
from miinb.image_params import MAX_PROMPT, parse_images
from miinb.rpc import inference_pb2 as pb
from miinb.rpc.codec import SERVICE, json_object, parse

GENERATE_IMAGES = f"/{SERVICE}/GenerateImages"

_TIMES = tuple(ImageTimes.__slots__)
_FACTS = ("prompt_tokens", "cut", "negative_cut", "batch")
_BESIDE_FILE = tuple(name for name in Picture.__slots__ if name != "data")
_SOURCES = ("image", "mask")
#: Characters of a source's name.
MAX_NAME = 255


def encode_images(request: ImagesRequest) -> bytes:
    """A request for pictures as bytes.

    Raises:
        InvalidRequest: the prompt is too long, or holds a lone surrogate, which no UTF-8 can say.
    """
    _check_length(request.prompt)
    try:
        parameters = request.params.model_dump_json(exclude_unset=True)
        message = pb.ImagesRequest(prompt=request.prompt, parameters_json=parameters, request_id=request.request_id)
        for name in _SOURCES:
            if (source := getattr(request, name)) is not None:
                getattr(message, name).CopyFrom(pb.Source(name=source.name, data=source.data))
    except (UnicodeEncodeError, ValueError) as error:
        raise InvalidRequest("prompt: it holds a lone surrogate, which is not text.") from error
    data: bytes = message.SerializeToString()
    return data


def decode_images(data: bytes) -> ImagesRequest:
    """The request for pictures of these bytes.

    Raises:
        InvalidRequest: it cannot be read, or a parameter is unknown or wrong; the message names it.
    """
    message = parse(pb.ImagesRequest, data)
    _check_length(message.prompt)
    params = parse_images(json_object(message.parameters_json))
    sources = {name: _source(getattr(message, name)) for name in _SOURCES if message.HasField(name)}
    return ImagesRequest(message.prompt, params, message.request_id[:64], **sources)


def _source(message: Any) -> Source:
    """Of the name what is no folder, and not endless: it is written into files."""
    return Source(message.name.replace("\\", "/").rpartition("/")[2][:MAX_NAME], message.data)


def _check_length(prompt: str) -> None:
    if len(prompt) > MAX_PROMPT:
        raise InvalidRequest(f"prompt: {len(prompt)} characters; at most {MAX_PROMPT} are taken.")


def encode_images_event(event: ImagesEvent) -> tuple[bytes, bytes]:
    """A message of the answer's stream as bytes, and a picture's file, which is not in it and so not copied."""
    file = b""
    if isinstance(event, ImagesProgress):
        progress = pb.Progress(step=event.step, total=event.total, preview=event.preview)
        message = pb.ImagesEvent(progress=progress)
    elif isinstance(event, Picture):
        message = pb.ImagesEvent(picture=pb.Picture(**{name: getattr(event, name) for name in _BESIDE_FILE}))
        file = event.data
    else:
        facts = {name: getattr(event, name) for name in _FACTS}
        times = {name: getattr(event.times, name) for name in _TIMES}
        message = pb.ImagesEvent(end=pb.ImagesEnd(**facts, **times))
    return message.SerializeToString(), file


def joined(data: bytes, file: bytes) -> bytes:
    """The same as one message: gRPC's has the file inside."""
    if not file:
        return data
    message = pb.ImagesEvent.FromString(data)
    message.picture.data = file
    whole: bytes = message.SerializeToString()
    return whole


def decode_images_event(data: bytes, file: bytes = b"") -> ImagesEvent:
    """The message of the answer's stream that these bytes say; `file` is a picture's that is not in it."""
    message = parse(pb.ImagesEvent, data)
    kind = message.WhichOneof("event")
    if kind == "progress":
        return ImagesProgress(message.progress.step, message.progress.total, message.progress.preview)
    if kind == "picture":
        facts = {name: getattr(message.picture, name) for name in _BESIDE_FILE}
        return Picture(**facts, data=file or message.picture.data)
    if kind == "end":
        end = message.end
        times = ImageTimes(**{name: getattr(end, name) for name in _TIMES})
        return ImagesEnd(times, **{name: getattr(end, name) for name in _FACTS})
    raise VersionMismatch("The server sent a message that this version does not know.")
