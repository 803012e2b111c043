"""The part of a plan that is about quantized weights: where there are any, and what is in which dtype."""

from __future__ import annotations

from miinb.config import DeploymentConfig
from miinb.errors import InvalidValue
from miinb.hardware import Hardware
from miinb.messages import Plan
from miinb.models import QUANTIZED_CAPABILITY, ModelInfo

#: Dtypes of weights alone.
QUANTIZED = ("int8", "int4")


def quantized(choice: Plan, config: DeploymentConfig, model: ModelInfo, hardware: Hardware) -> Plan:
    """The plan with a quantized dtype, the configuration's, and a line on what is in it.

    Raises:
        InvalidValue: the engine, the model or the GPU has none.
    """
    dtype = config.dtype
    if choice.engine == "baseline":
        raise InvalidValue(
            f"dtype: {dtype} needs the optimized engine, and plain transformers serve this.",
            hint="Use dtype='bf16' or 'auto'.",
        )
    if dtype == "int4" and model.encoder is not None:
        raise InvalidValue("dtype: int4 is for models that generate text.", hint="Use dtype='int8' or 'bf16'.")
    on_gpu = choice.device == "cuda"
    if on_gpu and any(gpu.capability < QUANTIZED_CAPABILITY for gpu in hardware.gpus):
        raise InvalidValue(f"dtype: {dtype} needs an Ampere GPU or a later one.", hint="Use dtype='fp16' or 'auto'.")
    rest = "fp32" if not on_gpu else "fp16" if model.dtype == "fp16" else "bf16"
    what = "weights in groups of 64 with one scale"
    if dtype == "int4":
        tables = "int8" if config.options.quantize_head else rest
        what = f"weights in groups of 64 with a step and a lowest value; embedding and head in {tables}"
    elif not config.options.quantize_head:
        what += f"; embedding and head in {rest}"
    choice = choice.with_line("dtype", dtype, f"asked for: {what}; activations, norms and cache in {rest}", dtype=dtype)
    if dtype == "int4" and not on_gpu:
        slow = "int4 on a CPU saves memory, not time: every step widens the weights; int8 is faster."
        return choice.with_line("speed", "slow", slow)
    return choice
