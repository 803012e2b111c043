"""The kernels on a CPU: their tests under Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "name",
    [
        *("test_kernels.py", "test_encoder_kernels.py", "test_image_kernels.py"),
        *("test_wide_product.py", "test_gated_product.py", "test_quantized_kernels.py", "test_fp8_kernels.py"),
    ],
)
def test_kernels_under_the_interpreter(name: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    tests = str(Path(__file__).with_name(name))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
