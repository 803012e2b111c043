"""What a benchmark ran on: host, GPUs, driver, versions. Nothing here imports torch."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("miinb", "torch", "deepspeed", "transformers", "diffusers", "triton", "grpcio", "numpy")
#: Flags of /proc/cpuinfo that decide a CPU's speed here, and how they are written.
CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX-BF16",
}


def environment() -> dict[str, Any]:
    """Host, GPUs and package versions, JSON-ready."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu(),
        "memory_bytes": int(psutil.virtual_memory().total),
        **gpus(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that matter to speed, by their metadata."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu() -> dict[str, Any]:
    """Model name, cores that this process may use, and vector instruction sets."""
    model, flags = _cpu_identity()
    return {"model": model, "cores": len(os.sched_getaffinity(0)), "flags": list(flags)}


@functools.cache
def _cpu_identity() -> tuple[str, tuple[str, ...]]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:
        return platform.processor() or platform.machine(), ()
    present = set(fields.get("flags", fields.get("Features", "")).split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return " ".join(model.split()), tuple(text for flag, text in CPU_FLAGS.items() if flag in present)


def gpus() -> dict[str, Any]:
    """{"gpus": [name, uuid, memory_bytes, mig], "driver", "cuda"}; an empty list without NVIDIA's driver."""
    nothing: dict[str, Any] = {"gpus": [], "driver": None, "cuda": None}
    try:
        import pynvml
    except ImportError:  # a client without the server's requirements
        return nothing
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return nothing
    try:
        found = [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        return {
            "gpus": found,
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        }
    except pynvml.NVMLError as failure:
        return {**nothing, "nvml_error": str(failure)}
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        mig = bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:
        mig = False
    return {
        "index": index,
        "name": nvml.nvmlDeviceGetName(handle),
        "uuid": nvml.nvmlDeviceGetUUID(handle),
        "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        "mig": mig,
    }


def hardware_words(host: dict[str, Any]) -> str:
    """The machine in a few words: "NVIDIA H100 80GB HBM3, driver 570.1" or "AMD EPYC, 2 cores, AVX2, no GPU"."""
    names = [gpu["name"] for gpu in host.get("gpus", [])]
    if names:
        counted = [f"{names.count(n)} x {n}" if names.count(n) > 1 else n for n in dict.fromkeys(names)]
        return ", ".join([*counted, f"driver {host.get('driver')}"])
    facts = host.get("cpu", {})
    if not facts:
        return ""
    cores = int(facts.get("cores", 0))
    return ", ".join([facts["model"], f"{cores} core{'s' * (cores != 1)}", *facts.get("flags", [])[:3], "no GPU"])
