"""What the tests of kernels share: where they run, random inputs, and how near an output must be to its reference."""

import os

import pytest
import torch

from miinb.kernels.dispatch import INTERPRETED

GPU = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if GPU else "cpu"
# of the largest element: rounding once to the dtype, and fp32 sums in another order
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
DOT_DTYPES = [torch.float32, torch.bfloat16 if GPU else torch.float16]  # the interpreter multiplies bf16 as integers


def rand(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


def wide(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double().cpu()


def same(out: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    limit = TOLERANCE[out.dtype] if tolerance is None else tolerance
    error = (out.double().cpu() - expected.double().cpu()).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert error <= limit, f"relative error {error:.2e}"  # also false for NaN


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Of every file that imports it: there is what its kernels run on, and numbers are the same each time."""
    if GPU and not torch.cuda.is_available():
        pytest.fail("no CUDA device")
    assert GPU or INTERPRETED
    torch.manual_seed(0)
