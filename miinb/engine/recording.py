"""Which Triton kernels a computation launches: it runs over meta tensors, and Triton's hook tells of each kernel."""

# mypy: allow-untyped-calls

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel for one kind of arguments.

    Attributes:
        function: Triton's `JITFunction`.
        specialization: Triton's JSON of types, alignments, constants and options, which `JITFunction.preload` takes.
    """

    function: Any
    specialization: str

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.function.__name__)

    def compile(self) -> Any:
        """Compile it for the active driver's target, or find it in the cache: Triton's `CompiledKernel`."""
        return self.function.preload(self.specialization)


class NoDevice:
    """Stands where Triton has the driver of a GPU: tells the target, and has no device."""

    _numbers = itertools.count(1 << 16)

    def __init__(self, capability: tuple[int, int]) -> None:
        self._arch = 10 * capability[0] + capability[1]
        self._number = next(self._numbers)

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        """A new number each time: what Triton has compiled for a device it would launch, not tell of."""
        return self._number

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


@contextlib.contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Within it Triton compiles for such a GPU, and wrappers launch on meta tensors what they launch there."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(NoDevice(capability))
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def recording() -> Iterator[list[Kernel]]:
    """Within it launches do nothing but add their kernel to the list, once for each kind of arguments."""
    from triton import knobs

    found: dict[tuple[str, str], Kernel] = {}
    kernels: list[Kernel] = []

    def take(*, key: str, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        place = (f"{fn.module}.{fn.name}", str(key))
        if place not in found:
            found[place] = Kernel(fn.jit_function, compile["specialization_data"])
            kernels.append(found[place])
        return True  # not to be compiled now, nor launched

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, take
    try:
        yield kernels
    finally:
        knobs.runtime.jit_cache_hook = before
