"""The kernels of pictures on a CPU: their tests under Triton's interpreter. A file of its own: both take minutes."""

import pytest

pytest.importorskip("triton")
from tests.kernels.interpreting import passes_interpreted


@pytest.mark.parametrize("name", ["test_image_kernels.py", "test_wide_product.py", "test_gated_product.py"])
def test_kernels_under_the_interpreter(name: str) -> None:
    passes_interpreted(name)
