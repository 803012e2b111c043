"""Where a rank computes: its device and dtype, its threads, and how much memory is free there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from miinb.config import DeploymentConfig
from miinb.engine.parameters import QUANTIZED
from miinb.errors import InvalidValue
from miinb.models import FP8_CAPABILITY, ModelInfo
from miinb.quantized_planner import check_device


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank computes and in which dtype, and what is worth saying about that."""

    device: torch.device
    dtype: str
    notes: tuple[tuple[str, str, str], ...] = ()


def find_place(config: DeploymentConfig, model: ModelInfo, gpu: int | None) -> Place:
    """Device and dtype of this rank.

    Raises:
        InvalidValue: the device is not there, or does not have the dtype.
    """
    if config.engine == "baseline":
        refuse_fallback(config, "plain transformers have no such form")
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise InvalidValue("device: PyTorch sees no GPU here.", hint="Use device='auto' or 'cpu'.")
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    if config.device != "cpu" and has_gpu:
        device = torch.device("cuda", gpu or 0)
        torch.cuda.set_device(device)
        if limit := config.options.memory_limit_bytes:
            share = limit / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        capability = torch.cuda.get_device_capability(device)
        if dtype in QUANTIZED:
            check_device(dtype, capability)
        if config.kv_dtype == "fp8" and capability < FP8_CAPABILITY:
            raise InvalidValue("kv_dtype: this GPU has no fp8.", hint="Use kv_dtype='auto'.")
        if dtype == "bf16" and config.dtype == "auto" and capability < (8, 0):
            return Place(device, "fp16", (("dtype", "fp16", "this GPU has no bf16"),))
        return Place(device, dtype)
    if dtype in QUANTIZED:
        check_device(dtype, None)
    if dtype == "fp16":
        return Place(torch.device("cpu"), "bf16", (("dtype", "bf16", "fp16 is slow on a CPU"),))
    return Place(torch.device("cpu"), dtype)


def refuse_fallback(config: DeploymentConfig, reason: str) -> None:
    """Raise InvalidValue where transformers are to serve and what was asked for is the optimized engine's alone."""
    for name, value in (*(("dtype", dtype) for dtype in QUANTIZED), ("kv_dtype", "fp8")):
        if getattr(config, name) == value:
            raise InvalidValue(
                f"{name}: {value} needs the optimized engine: {reason.rstrip('.')}.", hint=f"Use {name}='auto'."
            )
    if config.options.step_reuse > 1:
        raise InvalidValue(
            f"options.step_reuse: only the optimized engine has it: {reason.rstrip('.')}.", hint="Leave it out."
        )


def set_threads(config: DeploymentConfig) -> None:
    """PyTorch's threads: what was asked for, else OMP_NUM_THREADS, else the cores divided by the ranks."""
    if config.options.threads:
        torch.set_num_threads(config.options.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        ranks = config.replicas * config.tensor_parallel
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def free_bytes(device: torch.device, config: DeploymentConfig | None = None) -> int:
    """Free memory of the device; at most what a configuration's `memory_limit_bytes` leaves of it."""
    limit = config.options.memory_limit_bytes if config is not None else None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        return free if limit is None else min(free, limit - torch.cuda.memory_reserved(device))
    free = int(psutil.virtual_memory().available)
    return free if limit is None else min(free, limit)
