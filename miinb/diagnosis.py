"""`miinb.doctor()`: is this machine ready, and if not, what to do. Looks only; starts nothing, never imports torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from miinb import hardware, registry
from miinb.wording import size_words

#: Packages of the server with the ranges that were run together.
_PACKAGES = {
    "torch": ((2, 11), (2, 14)),
    "deepspeed": ((0, 19, 6), (0, 20)),
    "transformers": ((5, 17), (6,)),
    "grpcio": ((1, 66), (2,)),
}
#: DeepSpeed's CPU all-reduce takes 66 MiB a rank of it.
_SHM_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: "ok", "note" (works, but) or "bad" (will not work), and what to do."""

    what: str
    verdict: str
    text: str


class Report(tuple[Check, ...]):
    """The findings of `miinb.doctor()`, shown as lines."""

    __slots__ = ()

    @property
    def ready(self) -> bool:
        """Whether nothing stands in the way."""
        return all(check.verdict != "bad" for check in self)

    def __repr__(self) -> str:
        width = max(len(check.what) for check in self)
        return "\n".join(f"{check.verdict:<4}  {check.what:<{width}}  {check.text}" for check in self)


def doctor() -> Report:
    """Check the machine, the packages and the places that miinb uses."""
    checks: list[Callable[[], Check]] = [_system, _gpus, _memory, _compiler, _state, _shared_memory, _fork]
    return Report([*(check() for check in checks), *(_package(name) for name in _PACKAGES)])


def _system() -> Check:
    text = f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    if sys.platform != "linux":
        return Check("system", "bad", f"{text}: the server runs on Linux only; miinb.attach works elsewhere")
    verdict = "ok" if sys.version_info[:2] in ((3, 11), (3, 12)) else "note"
    return Check("system", verdict, text + ("" if verdict == "ok" else ": tested on Python 3.11 and 3.12"))


def _gpus() -> Check:
    machine = hardware.detect()
    if machine.gpus:
        named = ", ".join(f"{gpu.index} {gpu.name} ({size_words(gpu.free_bytes)} free)" for gpu in machine.gpus)
        return Check("GPUs", "ok", f"{named}, driver {machine.driver}")
    return Check("GPUs", "note", f"none can be seen: models run on the CPU ({machine.cores} cores of {machine.cpu})")


def _memory() -> Check:
    machine = hardware.detect()
    verdict = "ok" if machine.free_bytes > 2e9 else "note"
    return Check("memory", verdict, f"{size_words(machine.free_bytes)} of {size_words(machine.memory_bytes)} free")


def _compiler() -> Check:
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if found:
        return Check("compiler", "ok", f"{shutil.which(found)}")
    return Check("compiler", "note", "no C compiler: slower kernels are used; install gcc")


def _state() -> Check:
    folder = registry.state_folder()
    running = ", ".join(entry.name for entry in registry.entries()) or "no deployment runs"
    free = shutil.disk_usage(folder).free
    verdict = "ok" if free > 100 << 20 else "bad"
    return Check("state", verdict, f"{folder} ({running})" + ("" if verdict == "ok" else ": the disk is full"))


def _shared_memory() -> Check:
    size = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    verdict = "ok" if size >= _SHM_BYTES else "note"
    more = "" if verdict == "ok" else ": too small for several ranks on a CPU (docker run --shm-size=1g)"
    return Check("/dev/shm", verdict, f"{size_words(size)}{more}")


def _fork() -> Check:
    if os.environ.get("GRPC_ENABLE_FORK_SUPPORT") not in (None, "0") or (
        "grpc" in sys.modules and "GRPC_ENABLE_FORK_SUPPORT" not in os.environ
    ):
        return Check("gRPC", "note", "it was loaded before miinb: `!commands` print fork warnings; import miinb first")
    return Check("gRPC", "ok", "quiet when the notebook forks")


def _package(name: str) -> Check:
    low, high = _PACKAGES[name]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "bad", "is not installed: pip install miinb")
    parts = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if low <= parts < high:
        return Check(name, "ok", version)
    wanted = f"{'.'.join(map(str, low))} or newer, below {'.'.join(map(str, high))}"
    return Check(name, "note", f"{version} was not tried; {wanted} was")
