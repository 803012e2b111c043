"""What several test modules stand on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

from miinb.client import Client
from tests.frontend_process import FrontendProcess, make


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Take Ctrl-C, and keep deployments and files in a folder of this process, whose path is short: it holds sockets.

    A shell's background job begins without Ctrl-C, and hands that on to the programs under test. Tests that run beside
    these, and a user's own deployments, have the same names.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.mkdtemp(prefix="tests-", dir="/tmp")
    os.environ["XDG_RUNTIME_DIR"] = folder
    if hasattr(config, "workerinput"):  # one of several processes: pytest's own folder for it is a level deeper
        config.option.basetemp = f"{folder}/t"
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


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
