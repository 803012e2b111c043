"""The checked-in stubs are what the line in the proto makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINE = "-I. --python_out=. --pyi_out=. --grpc_python_out=. miinb/rpc/inference.proto"


def test_stubs_are_generated_from_the_proto(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is in the dev extra")
    assert LINE in (ROOT / "miinb/rpc/inference.proto").read_text()
    arguments = LINE.replace("_out=.", f"_out={tmp_path}").split()
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], cwd=ROOT, check=True, timeout=60)
    made = sorted((tmp_path / "miinb/rpc").iterdir())
    assert len(made) == 3
    for path in made:
        checked_in = ROOT / "miinb/rpc" / path.name
        assert path.read_text() == checked_in.read_text(), f"python -m grpc_tools.protoc {LINE}"
