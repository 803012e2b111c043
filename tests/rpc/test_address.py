"""Addresses of sockets in folders whose names gRPC would decode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from miinb.rpc.address import socket_path, unix_address


@pytest.mark.parametrize("name", ["plain", "a%2Fb", "with blank", "%41#?&", "é"])
def test_grpc_finds_the_socket(tmp_path: Path, name: str) -> None:
    socket = tmp_path / name / "rpc.sock"
    socket.parent.mkdir()
    address = unix_address(socket)
    assert socket_path(address) == socket
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(address)
    server.start()
    assert socket.exists()
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(10)
    server.stop(0).wait()


def test_tcp_has_no_socket() -> None:
    assert socket_path("127.0.0.1:80") is None
