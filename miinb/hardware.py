"""What this machine has, found without torch: cores, instruction sets, memory, GPUs. The planner gets it passed in."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

#: /proc/cpuinfo's names of the instruction sets that decide how fast a dtype is on a CPU.
_INTERESTING_FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve"),
)


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `index` counts within CUDA_VISIBLE_DEVICES, `physical` as NVML does (PCI order)."""

    index: int
    physical: int
    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine as this process may use it: its own cores (affinity), its container's memory, its visible GPUs."""

    cpu: str
    cores: int
    memory_bytes: int
    free_bytes: int
    cpu_flags: frozenset[str] = frozenset()
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""


def detect() -> Hardware:
    """The hardware of this machine at this moment."""
    name, flags = _cpu()
    memory = psutil.virtual_memory()
    limit, used = _container_memory()
    total = min(memory.total, limit) if limit else memory.total
    free = min(memory.available, limit - used) if limit else memory.available
    gpus, driver = _gpus()
    cores = len(os.sched_getaffinity(0))
    return Hardware(name, cores, total, max(0, free), flags, gpus, driver)


def _cpu() -> tuple[str, frozenset[str]]:
    name, flags = "", set[str]()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags.update(value.split())
            break
    return name or os.uname().machine, frozenset(flags.intersection(_INTERESTING_FLAGS))


def _container_memory() -> tuple[int, int]:
    """Limit and use of this process's control group in bytes; (0, 0) without a limit."""
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return int(Path(limit_file).read_text()), int(Path(used_file).read_text())
        except (OSError, ValueError):  # "max" is no number
            continue
    return 0, 0


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    try:
        import pynvml
    except ImportError:
        return (), ""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver
        return (), ""
    try:
        found = []
        for physical in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(physical)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
            facts = (_text(pynvml.nvmlDeviceGetName(handle)), memory.total, memory.free, capability)
            found.append((_text(pynvml.nvmlDeviceGetUUID(handle)), Gpu(0, physical, *facts)))
        return _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES")), _text(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return (), ""
    finally:
        pynvml.nvmlShutdown()


def gpu_free_bytes() -> dict[int, int]:
    """Free memory of this machine's GPUs by their physical index, as far as the driver tells."""
    return dict(enumerate(_asked_gpus(lambda nvml, gpu: int(nvml.nvmlDeviceGetMemoryInfo(gpu).free))))


def gpu_processes() -> set[int]:
    """The processes that hold memory of a GPU of this machine, as far as the driver tells."""
    return {one.pid for found in _asked_gpus(_processes_on) for one in found}


def _processes_on(nvml: Any, gpu: Any) -> Any:
    return nvml.nvmlDeviceGetComputeRunningProcesses(gpu)


def _asked_gpus(ask: Callable[[Any, Any], T]) -> list[T]:
    """What `ask` says of each GPU of this machine, given NVML and its handle; [] where there is nothing to see."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, or its errors for "no driver": either way there is nothing to see
        return []
    try:
        return [ask(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _visible(found: list[tuple[str, Gpu]], wanted: str | None) -> tuple[Gpu, ...]:
    """The GPUs of CUDA_VISIBLE_DEVICES (numbers or UUIDs, whole or their beginnings) in its order, as CUDA reads it."""
    if wanted is None:
        chosen = [gpu for _, gpu in found]
    else:
        chosen = []
        for part in (part.strip() for part in wanted.split(",")):
            match = [g for uuid, g in found if part and (part == str(g.physical) or uuid.startswith(part))]
            if not match:
                break  # CUDA stops at the first that it does not know
            chosen.append(match[0])
    return tuple(
        Gpu(index, gpu.physical, gpu.name, gpu.memory_bytes, gpu.free_bytes, gpu.capability)
        for index, gpu in enumerate(chosen)
    )
