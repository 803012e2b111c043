"""Where and how Triton kernels run: on CUDA tensors; on CPU tensors under Triton's interpreter (`TRITON_INTERPRET=1`).

Triton may be missing (a machine without a GPU needs none): then `jit` leaves functions alone and no wrapper calls them.

Wrappers take meta tensors for tensors of a GPU that is not asked: `engine/compile.py` learns from them which kernels a
model launches. Nothing runs then.

On Hopper and later every kernel is launched with programmatic dependent launch: it starts while the kernel before it
still runs, fetches what no kernel of the step writes (weights), and waits in `wait_for_inputs` or `wait_for_all`. So
every kernel calls one of them before it reads anything that another kernel of the step wrote, and before it writes.
`parallel_block.py` has the one exception. `decode_attention.py` fetches what earlier steps wrote, too: between two
steps there is always something that nothing overtakes (a copy of inputs, a graph's start, a kernel of PyTorch's).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = tl = gdc_launch_dependents = gdc_wait = None

__all__ = [
    "INTERPRETED",
    "arrival_counters",
    "copies_tiles",
    "fail_after",
    "is_plain",
    "jit",
    "launch_options",
    "let_next_start",
    "plain_operators",
    "power_of_2",
    "shared_memory_bytes",
    "tl",
    "use_triton",
    "wait_for_all",
    "wait_for_inputs",
]

#: Shared memory that one program may have, by compute capability; others have what 8.6 has.
_SHARED_MEMORY = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable[..., Any] | None = None, *, plain: tuple[str, ...] = ()) -> Any:
    """`triton.jit` where Triton is installed.

    Args:
        function: the kernel.
        plain: integer parameters whose value makes no better code: a kernel is compiled once for all of them, not again
            for 1 and for multiples of 16.
    """
    if function is None:
        return functools.partial(jit, plain=plain)
    return triton.jit(function, do_not_specialize=plain) if triton is not None else function


@jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait for the kernels before this one, and let the next one start."""
    let_next_start(PDL)
    wait_for_all(PDL)


@jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel start, when every program of this one has come here or ended."""
    if PDL:
        gdc_launch_dependents()


@jit
def wait_for_all(PDL: tl.constexpr):
    """Wait for the end of the kernels before this one; what they wrote can be read then."""
    if PDL:
        gdc_wait()


@jit
def fail_after(looks, MOST_LOOKS: tl.constexpr):
    """Fail when a program has looked so often in vain: its process cannot use the GPU any more, and ends."""
    if looks == MOST_LOOKS:
        tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


_plain = False


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Within it wrappers compute as `reference.py` does, on any device: what their kernels are checked against."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def is_plain() -> bool:
    """Whether it is within `plain_operators`."""
    return _plain


def use_triton(x: Tensor) -> bool:
    """Whether the operator on this tensor runs as a Triton kernel."""
    return (((x.is_cuda or x.is_meta) and triton is not None) or INTERPRETED) and not _plain


def launch_options(x: Tensor) -> dict[str, Any]:
    """Keyword arguments of every launch: programmatic dependent launch where the GPU has it."""
    return {"PDL": True, "launch_pdl": True} if _is_hopper(x) else {"PDL": False}


def copies_tiles(x: Tensor) -> bool:
    """Whether the GPU copies whole tiles of a matrix by itself, which kernels describe to it by `TensorDescriptor`s."""
    return _is_hopper(x) or INTERPRETED


def _is_hopper(x: Tensor) -> bool:
    """Whether the GPU is of compute capability 9.0 or later."""
    return _target_arch() >= 90 if x.is_meta else x.is_cuda and _capability(x.device) >= (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def shared_memory_bytes(x: Tensor) -> int:
    """Shared memory that one program on the tensor's GPU may have."""
    if x.is_cuda:
        major, minor = _capability(x.device)
        return _SHARED_MEMORY.get(10 * major + minor, 99 << 10)
    return _SHARED_MEMORY.get(_target_arch(), 99 << 10) if x.is_meta else 227 << 10


def _target_arch() -> int:
    return int(triton.runtime.driver.active.get_current_target().arch)


@functools.cache
def arrival_counters(device: torch.device) -> Tensor:
    """Zeros by which programs of one launch find the last of them to finish; it sets them back to zero.

    Kernels that use them must not run at the same time: the engine computes on one stream.
    """
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def power_of_2(n: int) -> int:
    """The least power of two that is not below `n`: Triton's blocks have such sizes."""
    return 1 << (n - 1).bit_length()
