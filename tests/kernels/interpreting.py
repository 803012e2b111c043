"""Runs a file of kernels' tests under Triton's interpreter, which is chosen when Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path


def passes_interpreted(name: str) -> None:
    """Whether the file beside this one passes, in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    tests = str(Path(__file__).with_name(name))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
