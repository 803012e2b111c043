"""Where Triton kernels run: on CUDA tensors; on CPU tensors under Triton's interpreter (`TRITON_INTERPRET=1`, tests).

Triton may be missing (a machine without a GPU needs none): then `jit` leaves functions alone and no wrapper calls them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` where Triton is installed."""
    return triton.jit(function) if triton is not None else function


def use_triton(x: Tensor) -> bool:
    """Whether the operator on this tensor runs as a Triton kernel."""
    return (x.is_cuda and triton is not None) or INTERPRETED


def power_of_2(n: int) -> int:
    """The least power of two that is not below `n`: Triton's blocks have such sizes."""
    return 1 << (n - 1).bit_length()
