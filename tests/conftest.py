"""What several test modules stand on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest

from miinb.client import Client
from tests.frontend_process import FrontendProcess, make


def pytest_configure() -> None:
    """Take Ctrl-C: a shell's background job begins without it, and hands that on to the programs under test."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """PyTorch computes in one thread, whatever an earlier test has left: several wait for each other on busy cores."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontendProcess]:
    """A frontend with one stand-in rank, for all tests of a module."""
    process = make(tmp_path_factory.mktemp("frontend"))
    try:
        process.rank()
        yield process
    finally:
        process.close()


@pytest.fixture
def client(frontend: FrontendProcess) -> Iterator[Client]:
    """A client of that frontend."""
    with frontend.client() as client:
        yield client
