"""What a benchmark ran on: host, GPUs, driver, versions. Nothing here imports torch."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import miinb
from miinb import hardware

PACKAGES = ("torch", "deepspeed", "transformers", "diffusers", "triton", "grpcio", "numpy")
#: Instruction sets that decide a CPU's speed here: the kernel's name and how it is written.
CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "sve": "SVE",
}


def environment() -> dict[str, Any]:
    """Host, visible GPUs, driver and package versions, JSON-ready."""
    machine = hardware.detect()
    flags = [text for flag, text in CPU_FLAGS.items() if flag in machine.cpu_flags]
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": {"model": " ".join(machine.cpu.split()), "cores": machine.cores, "flags": flags},
        "memory_bytes": machine.memory_bytes,
        "gpus": [
            {"index": gpu.physical, "name": gpu.name, "memory_bytes": gpu.memory_bytes, "capability": gpu.capability}
            for gpu in machine.gpus
        ],
        "driver": machine.driver or None,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that matter to speed, by their metadata."""
    found = {"miinb": miinb.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware_words(host: Mapping[str, Any]) -> str:
    """The machine in a few words: "NVIDIA H100 80GB HBM3, driver 570.1" or "AMD EPYC, 2 cores, AVX2, no GPU"."""
    names = [gpu["name"] for gpu in host.get("gpus", [])]
    if names:
        counted = [f"{names.count(n)} x {n}" if names.count(n) > 1 else n for n in dict.fromkeys(names)]
        return ", ".join([*counted, f"driver {host.get('driver')}"])
    facts = host.get("cpu", {})
    if not facts:
        return ""
    cores = int(facts.get("cores", 0))
    return ", ".join(
        [facts["model"], f"{cores} core{'s' * (cores != 1)}", *facts.get("flags", [])[-3:], "no GPU"]
    )  # the latest
