"""The kernels of models of text on a CPU: their tests under Triton's interpreter."""

import pytest

pytest.importorskip("triton")
from tests.kernels.interpreting import passes_interpreted


@pytest.mark.parametrize(
    "name",
    [
        "test_kernels.py",
        "test_decode_attention.py",
        "test_encoder_kernels.py",
        "test_quantized_kernels.py",
        "test_fp8_kernels.py",
    ],
)
def test_kernels_under_the_interpreter(name: str) -> None:
    passes_interpreted(name)
