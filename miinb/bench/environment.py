"""What a benchmark ran on: host, GPUs, driver, versions. Nothing here imports torch."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
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
    cores, latest = int(facts.get("cores", 0)), facts.get("flags", [])[-3:]
    return ", ".join([facts["model"], f"{cores} core{'s' * (cores != 1)}", *latest, "no GPU"])


def version_words(hosts: Sequence[Mapping[str, Any]], packages: Iterable[str]) -> list[str]:
    """Versions of these packages, "torch 2.13.0"; "torch 2.12.0/2.13.0" where hosts differ."""
    found = []
    for name in packages:
        there = dict.fromkeys(str(host["versions"][name]) for host in hosts if name in host.get("versions", {}))
        found += [f"{name} {'/'.join(there)}"] if there else []
    return found


def differences(hosts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How the environments of runs that stand together differ, a line each for machines and for versions.

    Args:
        hosts: what each run ran on, by the run's name; of one without facts nothing is said.
    """
    known = {name: host for name, host in hosts.items() if host}
    lines = []
    if machines := _differing({name: _machine(host) for name, host in known.items()}):
        lines.append(f"Measured on different machines: {machines}.")
    installed = {name: _versions(host) for name, host in known.items() if host.get("versions")}
    packages = dict.fromkeys(package for found in installed.values() for package in found)
    texts = [
        _differing({run: f"{package} {found.get(package, 'none')}" for run, found in installed.items()})
        for package in packages
    ]
    if any(texts):
        lines.append(f"Measured with different versions: {'; '.join(filter(None, texts))}.")
    return lines


def _machine(host: Mapping[str, Any]) -> str:
    """The machine in a few words; how many GPUs a run may see does not make another one of it."""
    kinds = list({gpu["name"]: gpu for gpu in host.get("gpus", [])}.values())
    return hardware_words({**host, "gpus": kinds})


def _versions(host: Mapping[str, Any]) -> dict[str, str]:
    python = {"Python": str(host["python"])} if host.get("python") else {}
    return python | {name: str(version) for name, version in host["versions"].items()}


def _differing(texts: Mapping[str, str]) -> str:
    """ "torch 2.12 (calm, busy), torch 2.13 (late)"; "" where all are alike or nothing is known of one."""
    runs: dict[str, list[str]] = {}
    for run, text in texts.items():
        runs.setdefault(text, []).append(run)
    if len(runs) < 2 or "" in runs:
        return ""
    return ", ".join(f"{text} ({', '.join(named)})" for text, named in runs.items())
