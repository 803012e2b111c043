"""What tests of the demonstration share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture
def _own_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place for deployments that no other program of the user has any in."""
    folder = tempfile.mkdtemp(prefix="mii", dir="/tmp")  # short: unix sockets live in it
    monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
    yield
    shutil.rmtree(folder, ignore_errors=True)
