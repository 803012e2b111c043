"""Between miinb's errors and what a failed call carries: gRPC's codes with metadata, or bytes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from miinb import errors
from miinb.errors import InvalidRequest, MiinbError
from miinb.rpc.codec import MAX_REQUEST_BYTES

#: Names in the trailing metadata of a failed call. Values are ASCII or, with "-bin", UTF-8.
ERROR_KEY = "miinb-error"
HINT_KEY = "miinb-hint-bin"
MAX_TEXT = 2000  # characters of a message or hint on the wire: metadata is bounded

Code = grpc.StatusCode

#: The code of each error. A class that is not here has its parent's.
STATUS: dict[type[MiinbError], grpc.StatusCode] = {
    errors.MiinbError: Code.UNKNOWN,
    errors.ConfigError: Code.INVALID_ARGUMENT,
    errors.ModelError: Code.FAILED_PRECONDITION,
    errors.ModelNotFound: Code.NOT_FOUND,
    errors.UnsupportedModel: Code.UNIMPLEMENTED,
    errors.StartError: Code.FAILED_PRECONDITION,
    errors.OutOfMemory: Code.RESOURCE_EXHAUSTED,
    errors.DeploymentNotFound: Code.NOT_FOUND,
    errors.DeploymentExists: Code.ALREADY_EXISTS,
    errors.VersionMismatch: Code.FAILED_PRECONDITION,
    errors.RequestError: Code.INTERNAL,
    errors.InvalidRequest: Code.INVALID_ARGUMENT,
    errors.PromptTooLong: Code.INVALID_ARGUMENT,
    errors.QueueFull: Code.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: Code.DEADLINE_EXCEEDED,
    errors.Cancelled: Code.CANCELLED,
    errors.Unavailable: Code.UNAVAILABLE,
    errors.NonFinite: Code.DATA_LOSS,
    errors.TargetError: Code.INTERNAL,
}

#: The error of a code that came without a name: from gRPC itself or from a server that is not miinb's.
ERRORS: dict[grpc.StatusCode, type[MiinbError]] = {
    Code.INVALID_ARGUMENT: errors.InvalidRequest,
    Code.RESOURCE_EXHAUSTED: errors.QueueFull,
    Code.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    Code.CANCELLED: errors.Cancelled,
    Code.UNAVAILABLE: errors.Unavailable,
    Code.DATA_LOSS: errors.NonFinite,
    Code.NOT_FOUND: errors.DeploymentNotFound,
    Code.ALREADY_EXISTS: errors.DeploymentExists,
    Code.UNIMPLEMENTED: errors.VersionMismatch,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a call's status: code, text and trailing metadata."""

    code: grpc.StatusCode
    text: str
    metadata: tuple[tuple[str, str | bytes], ...]


def failure_of(error: BaseException, log: Callable[[str, BaseException], None] | None = None) -> Failure:
    """The status of an error.

    The text of an exception that is not miinb's stays here (it may hold paths or prompts): the client gets a number
    under which `log(number, error)` has noted it.
    """
    if not isinstance(error, MiinbError):
        number = uuid.uuid4().hex[:12]
        if log is not None:
            log(number, error)
        error = errors.RequestError(f"The server failed at this request (number {number} in frontend.log).")
    code = next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)
    metadata: list[tuple[str, str | bytes]] = [(ERROR_KEY, type(error).__name__)]
    if error.hint:
        metadata.append((HINT_KEY, error.hint[:MAX_TEXT].encode("utf-8", "replace")))
    return Failure(code, error.message[:MAX_TEXT].encode("utf-8", "replace").decode(), tuple(metadata))


def error_of(call: Any, *, cancelled: bool = True) -> MiinbError:
    """The error of a failed call (a `grpc.RpcError` that is a `grpc.Call`); nothing of gRPC in it.

    `cancelled`: whether its caller may have canceled it. Else a call that is canceled without a word was by the end of
    the server, or of the way to it.
    """
    code, text = call.code(), call.details() or ""
    metadata = dict(call.trailing_metadata() or ())
    hint = metadata.get(HINT_KEY, b"")
    hint = hint.decode("utf-8", "replace") if isinstance(hint, bytes) else str(hint)
    if name := metadata.get(ERROR_KEY):
        named = errors.from_name(str(name), text)
        named.hint = hint
        return named
    if code is Code.CANCELLED and not cancelled:
        return stopped()
    return _error_of_code(code, text)


def _error_of_code(code: grpc.StatusCode, text: str) -> MiinbError:
    if code is Code.RESOURCE_EXHAUSTED and "larger than max" in text:
        return too_large()
    if code is Code.DEADLINE_EXCEEDED:
        return timed_out()
    if code is Code.UNAVAILABLE:
        return unavailable()
    if code is Code.UNIMPLEMENTED:
        return unknown_call()
    if code is Code.CANCELLED:
        return errors.Cancelled("The request was cancelled.")
    return ERRORS.get(code, errors.RequestError)(text or f"The request failed ({code.name}).")


def too_large() -> InvalidRequest:
    """Of a request with more bytes than the server takes."""
    limit = f"{MAX_REQUEST_BYTES >> 20} MiB"
    return InvalidRequest(f"The request is larger than the {limit} that the server takes.", hint="Send less text.")


def unknown_call() -> errors.VersionMismatch:
    """Of a call that the server has not."""
    return errors.VersionMismatch("The server does not know this call.", hint="Start it again with this version.")


def timed_out() -> errors.DeadlineExceeded:
    """Of a request that its time limit ended."""
    return errors.DeadlineExceeded("The request's time limit passed.", hint="Give a larger timeout_s.")


def unavailable() -> errors.Unavailable:
    """Of a frontend that is not there."""
    return errors.Unavailable("The deployment does not answer.", hint="See status() and logs(), or start it again.")


DRAINING = "The deployment is being stopped; it takes no new requests."
STOPPED = "The deployment was stopped while this request ran."


def draining() -> errors.Unavailable:
    """Of a new request to a frontend that lets its running ones end."""
    return errors.Unavailable(DRAINING, hint="Start it again.")


def stopped() -> errors.Unavailable:
    """Of a request that ended with its deployment."""
    return errors.Unavailable(STOPPED, hint="Start it, then ask again.")


def final(error: MiinbError) -> bool:
    """Whether the server has said that it ends: to ask it again is no use."""
    return error.message in (DRAINING, STOPPED)


def encode_failure(error: BaseException, log: Callable[[str, BaseException], None] | None = None) -> bytes:
    """`failure_of` as bytes."""
    failure = failure_of(error, log)
    metadata = dict(failure.metadata)
    hint = metadata.get(HINT_KEY, b"")
    return json.dumps([metadata[ERROR_KEY], failure.text, hint.decode() if isinstance(hint, bytes) else hint]).encode()


def decode_failure(data: bytes) -> MiinbError:
    """The error that these bytes say."""
    try:
        name, text, hint = json.loads(data)
    except ValueError:
        return unavailable()
    return errors.from_name(name, text, hint=hint)
