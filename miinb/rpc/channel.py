"""A client's gRPC channel: its options, and an end that does not wait for ever."""

from __future__ import annotations

import threading
from typing import Any

import grpc

CLOSE_S = 3.0  # a channel that has not closed by then is left to itself
SILENCE_MS = 20_000  # a server that does not answer a ping for so long is gone

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # the server is on this machine
    ("grpc.enable_retries", 0),  # `Stream` retries, and only before the first token
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 15_000),  # a frontend that hangs or is stopped is noticed during a call:
    ("grpc.keepalive_timeout_ms", SILENCE_MS),
    ("grpc.http2.ping_timeout_ms", SILENCE_MS),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def open_channel(address: str) -> Any:
    """A channel for bytes in and out: the codec knows the messages (and gRPC's type stubs ask for serializers)."""
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def close_channel(channel: Any) -> None:
    """Close it; gRPC waits for the calls that it knows of, for ever where Stop has hit it as it began one."""
    closing = threading.Thread(target=channel.close, name="miinb-close", daemon=True)
    closing.start()
    closing.join(CLOSE_S)
