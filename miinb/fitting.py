"""How much fits where: the free memory of a rank's device, and what would fit when a model does not."""

from __future__ import annotations

import dataclasses

from miinb.config import DeploymentConfig
from miinb.errors import OutOfMemory
from miinb.hardware import Hardware
from miinb.messages import Plan
from miinb.models import DTYPE_BYTES, ModelInfo
from miinb.wording import size_words

#: Share of the free memory that weights and cache may take.
USABLE = 0.9
#: Of what the weights leave, the cache takes at most this share on a CPU (the notebook lives there too).
_CPU_CACHE_SHARE = 0.5
#: Of what the weights leave on a GPU; the rest is for graphs and for what a step computes. The rank has the last word.
_GPU_CACHE_SHARE = 0.85
#: Memory of a rank besides weights and cache: the interpreter, torch, workspaces; measured on a CPU.
RUNTIME_BYTES = 600 << 20
#: The same on a GPU: the CUDA context and its libraries.
GPU_RUNTIME_BYTES = 1 << 30
#: Layers whose weights are on the device at a time where the others wait in the host's memory or on a disk.
LIVE_LAYERS = 4
#: Quantized dtypes that a model that does not fit is offered: fp8 is as large as int8.
_OFFERED = ("int8", "int4")
#: What a GPU reads from the host's memory in a second: PCIe of the fourth generation, as a cautious guess.
_HOST_BYTES_S = 20e9


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a rank's weights and cache go: free bytes of its device, and how many ranks share the model."""

    on_gpu: bool
    free: int
    ranks: int

    @property
    def usable(self) -> int:
        """What weights and cache may take of it."""
        return int(self.free * USABLE) - (GPU_RUNTIME_BYTES if self.on_gpu else RUNTIME_BYTES)

    def cache_bytes(self, room: int) -> int:
        """The cache's part of what the weights leave."""
        return int(room * (_GPU_CACHE_SHARE if self.on_gpu else _CPU_CACHE_SHARE))


def live_parameters(model: ModelInfo) -> int:
    """Parameters that an offloaded model has on its device at a time: some layers', or its largest tensor."""
    largest = max((entry.elements for entry in model.tensors.values()), default=model.vocab_size * model.hidden_size)
    return min(model.parameters, max(LIVE_LAYERS * (model.parameters // max(model.layers, 1)), 2 * largest))


def does_not_fit(
    config: DeploymentConfig, choice: Plan, model: ModelInfo, hardware: Hardware, place: Place, length: int
) -> OutOfMemory:
    """The error with the estimate, and with what would fit."""
    weights = model.weights_bytes(choice.dtype, place.ranks, on_gpu=place.on_gpu)
    token = model.kv_bytes_per_token(choice.dtype, place.ranks, config.kv_dtype, on_gpu=place.on_gpu)
    tokens = config.max_length or min(length, 64)
    need = weights + token * tokens + (GPU_RUNTIME_BYTES if place.on_gpu else RUNTIME_BYTES)
    fits = [*_smaller_cache(place, weights, token), *_smaller_dtypes(choice, model, place)]
    fits += _more_gpus(choice, model, place)
    fits += _offload(config, choice, model, hardware, place)
    if not place.on_gpu and config.replicas > 1:
        fits.append("fewer replicas")
    return OutOfMemory(
        f"{config.model} needs about {size_words(need)} in {choice.dtype} ({size_words(weights)} of weights, "
        f"{tokens:,} tokens of cache); {_bound(config, place)}, {USABLE:.0%} of it usable.",
        hint=f"What would fit: {'; '.join(fits)}." if fits else _room(config, choice, model, place),
    )


def _bound(config: DeploymentConfig, place: Place) -> str:
    """What bounds the memory: the user's limit, or what is free."""
    if place.free == config.options.memory_limit_bytes:
        return f"options.memory_limit_bytes is {size_words(place.free)}"
    return f"{size_words(place.free)} are free on {'each GPU' if place.on_gpu else 'this machine'}"


def _room(config: DeploymentConfig, choice: Plan, model: ModelInfo, place: Place) -> str:
    """The hint where nothing would fit: how large a model may be."""
    if place.usable <= 0:
        runtime = size_words(GPU_RUNTIME_BYTES if place.on_gpu else RUNTIME_BYTES)
        limited = place.free == config.options.memory_limit_bytes
        more = "Raise options.memory_limit_bytes" if limited else "Free some memory"
        return f"{more}: a rank takes {runtime} besides the weights and the cache."
    unit, word = (1e9, "billion") if place.usable >= DTYPE_BYTES[choice.dtype] * 1e8 else (1e6, "million")
    largest, has = place.usable / DTYPE_BYTES[choice.dtype] / unit, model.parameters / unit
    return f"There is room for about {largest:,.1f} {word} parameters; it has {has:,.1f} {word}."


def _smaller_cache(place: Place, weights: int, token: int) -> list[str]:
    tokens = place.cache_bytes(place.usable - weights) // token if token else 0
    return [f"max_length={tokens}"] if tokens >= 8 else []


def _smaller_dtypes(choice: Plan, model: ModelInfo, place: Place) -> list[str]:
    smaller = [
        dtype
        for dtype in ("bf16", *(_OFFERED if model.spec is not None and choice.engine == "optimized" else ()))
        if DTYPE_BYTES[dtype] < DTYPE_BYTES[choice.dtype]
    ]
    needs = {dtype: model.weights_bytes(dtype, place.ranks, on_gpu=place.on_gpu) for dtype in smaller}
    return [f"dtype={dtype!r} ({size_words(need)} of weights)" for dtype, need in needs.items() if need < place.usable]


def _more_gpus(choice: Plan, model: ModelInfo, place: Place) -> list[str]:
    """The fewest GPUs of this size that hold the model, if it can be split."""
    if not place.on_gpu or model.spec is None:
        return []
    for ranks in (2, 4, 8, 16):
        if ranks <= place.ranks or model.spec.misfit(ranks):
            continue
        need = model.weights_bytes(choice.dtype, ranks, on_gpu=True)
        if need < place.usable:
            return [f"tensor_parallel={ranks} on {ranks} such GPUs ({size_words(need)} of weights on each)"]
    return []


def _offload(config: DeploymentConfig, choice: Plan, model: ModelInfo, hardware: Hardware, place: Place) -> list[str]:
    """Weights in the host's memory, if they fit there and their layers on the GPU; each token reads all of them."""
    if not place.on_gpu or config.options.offload != "off":
        return []
    weights = model.weights_bytes(choice.dtype)
    live = live_parameters(model) * DTYPE_BYTES[choice.dtype]
    if config.replicas * weights > hardware.free_bytes * USABLE or live > place.usable:
        return []
    return [f"options={{'offload': 'cpu'}} (ZeRO-Inference: about {_HOST_BYTES_S / weights:.2g} tokens/s a request)"]
