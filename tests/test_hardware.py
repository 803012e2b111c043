"""What the driver tells of the GPUs, where there is one, and where there is none."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from miinb import hardware


class NVMLError(Exception):
    """As pynvml's."""


def driver(*, broken: bool = False) -> SimpleNamespace:
    """A pynvml of two GPUs; a broken one answers no question."""

    def memory(gpu: int) -> SimpleNamespace:
        if broken:
            raise NVMLError
        return SimpleNamespace(free=100 + gpu)

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: [SimpleNamespace(pid=7), SimpleNamespace(pid=8 + gpu)],
    )


def test_what_the_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    assert hardware.gpu_free_bytes() == {0: 100, 1: 101}
    assert hardware.gpu_processes() == {7, 8, 9}
    monkeypatch.setitem(sys.modules, "pynvml", driver(broken=True))
    assert hardware.gpu_free_bytes() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert hardware.gpu_free_bytes() == {}
    assert hardware.gpu_processes() == set()
