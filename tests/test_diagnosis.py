"""`miinb.doctor()` on this machine, and the package's lazy names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import miinb


def test_doctor_finds_this_machine_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    report = miinb.doctor()
    assert report.ready, repr(report)
    assert {check.what for check in report} >= {"system", "GPUs", "memory", "state", "torch", "deepspeed"}
    assert repr(report).count("\n") == len(report) - 1


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    compiler = next(check for check in miinb.doctor() if check.what == "compiler")
    assert compiler.verdict == "note"


def test_names_load_when_they_are_used() -> None:
    assert set(miinb.__all__) <= set(dir(miinb))
    assert miinb.errors.MiinbError
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        _ = miinb.Sesion  # type: ignore[attr-defined]
    probe = "import sys, miinb; print('grpc' in sys.modules, 'psutil' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
