"""What the hardware would allow: copy bandwidth and matrix rate as measured, and the least time that follows."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from miinb.bench.floor import token_bytes
from miinb.models import ModelInfo

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a device, as measured here: bytes a second of a large copy, operations a second of a large matrix product."""

    copy_bytes_s: float
    matmul_flop_s: float


def measure(device: str, dtype: str, *, small: bool = False) -> Rates:
    """The rates of a device.

    Args:
        device: "cuda" or "cpu".
        dtype: of the matrix product ("int8" is computed in bf16).
        small: sizes that only show that it runs.
    """
    size = 1 << (20 if small else 32 if device == "cuda" else 28)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    copy_s = _best(functools.partial(target.copy_, source), device)
    del source, target
    width = 64 if small else 8192 if device == "cuda" else 1024
    kind = DTYPES.get(dtype, torch.bfloat16)
    left, right = (torch.randn(width, width, device=device).to(kind) for _ in range(2))
    product_s = _best(functools.partial(torch.matmul, left, right), device)
    del left, right
    if device == "cuda":
        torch.cuda.empty_cache()
    return Rates(2 * size / copy_s, 2 * width**3 / product_s)


def _best(action: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(8):
        _synchronize(device)
        started = time.perf_counter()
        action()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def one_row_s(model: ModelInfo, weights_bytes: float, rates: Rates) -> float:
    """Least seconds a token of one sequence: its weights at the speed of a copy."""
    return token_bytes(model, weights_bytes) / rates.copy_bytes_s


def all_rows_s(
    model: ModelInfo, weights_bytes: float, cache_bytes: int, lengths: Sequence[tuple[int, int]], rates: Rates
) -> float:
    """Least seconds of requests that run all at once.

    Each step reads the weights once and every live row's cache, at the speed of a copy; the prompts' matrix products
    (two operations a weight and token) run at the speed of a large one, and overlap with nothing. `cache_bytes` are a
    token's.
    """
    steps = max(new for _, new in lengths)
    read = sum(new * prompt + new * (new + 1) / 2 for prompt, new in lengths) * cache_bytes
    weights = token_bytes(model, weights_bytes)
    operations = 2 * model.parameters * sum(prompt for prompt, _ in lengths)
    return (steps * weights + read) / rates.copy_bytes_s + operations / rates.matmul_flop_s


def memory_kept() -> int:
    """Bytes of GPU memory that PyTorch holds in this process."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1], "bf16"))))
