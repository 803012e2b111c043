"""ZeRO-Inference (Aminabadi et al., 2022): weights wait in the host's memory or on a disk until their layer computes.

DeepSpeed's ZeRO stage 3 takes each parameter away as it is loaded; its hooks bring a layer's to the device before the
layer runs, and let them go afterwards. Every step moves all weights once, so that tokens are slow and batches pay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from miinb.config import DeploymentConfig
from miinb.engine.buffers import exact_buffers, put_back
from miinb.errors import InvalidValue
from miinb.fitting import LIVE_LAYERS, live_parameters
from miinb.messages import EngineInfo
from miinb.models import ModelInfo
from miinb.offloading import no_libaio


def settings_of(config: DeploymentConfig, model: ModelInfo, info: EngineInfo) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's `ds_config`, with what the deployment says in its place.

    Raises:
        InvalidValue: `ds_config` names another dtype, or the disk cannot be read asynchronously here.
    """
    settings = dict(config.options.ds_config or {})
    for name in ("fp16", "bf16"):
        if (settings.get(name) or {}).get("enabled") and info.dtype != name:
            raise InvalidValue(f"options.ds_config: {name} is on, the dtype is {info.dtype}.", hint="Make them equal.")
    live = live_parameters(model)
    zero: dict[str, Any] = {"stage3_max_live_parameters": live, "stage3_prefetch_bucket_size": live // LIVE_LAYERS}
    zero |= settings.get("zero_optimization") or {}
    place: dict[str, Any] = {"pin_memory": info.device == "cuda", **(zero.get("offload_param") or {})}
    place["device"] = config.options.offload
    if config.options.offload == "nvme":
        _check_disk()
        place = {"buffer_size": live, "buffer_count": LIVE_LAYERS + 1} | place
        place["nvme_path"] = config.options.offload_folder
    zero |= {"stage": 3, "offload_param": place}
    own: dict[str, Any] = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    return settings | own | {name: {"enabled": info.dtype == name} for name in ("fp16", "bf16")}


@contextmanager
def partitioning(config: DeploymentConfig, model: ModelInfo, info: EngineInfo) -> Iterator[dict[str, Any]]:
    """transformers takes parameters away as it loads them, inside; gives the settings for `held`.

    Raises:
        InvalidValue: as `settings_of`.
    """
    from transformers.integrations import HfDeepSpeedConfig

    settings = settings_of(config, model, info)
    kept = HfDeepSpeedConfig(settings)  # transformers looks for it as long as it lives
    yield settings
    del kept


def held(model: Any, settings: Mapping[str, Any]) -> Any:
    """The model with DeepSpeed's hooks, which bring its parameters when they are needed."""
    import deepspeed

    buffers = exact_buffers(model)
    module = deepspeed.initialize(model=model, config=dict(settings), dist_init_required=False)[0].module
    put_back(module, buffers)
    return module.eval()


def bytes_of(model: Any) -> int:
    """Bytes of all parameters of a model that `held` has taken, wherever they are."""
    return sum(parameter.ds_numel * parameter.element_size() for parameter in model.parameters())


def _check_disk() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise no_libaio()
