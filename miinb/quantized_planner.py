"""The part of a plan that is about quantized weights: where there are any, and what is in which dtype."""

from __future__ import annotations

from miinb.config import DeploymentConfig
from miinb.errors import InvalidValue
from miinb.hardware import Gpu
from miinb.messages import Plan
from miinb.models import FP8_CAPABILITY, QUANTIZED_CAPABILITY, ModelInfo

#: Dtypes of weights alone.
QUANTIZED = ("int8", "int4", "fp8")


def quantized(choice: Plan, config: DeploymentConfig, model: ModelInfo, groups: list[list[Gpu]]) -> Plan:
    """The plan with a quantized dtype, the configuration's, and a line on what is in it.

    Args:
        choice: so far.
        config: of the deployment.
        model: to be served.
        groups: the GPUs of each replica; [] for a CPU.

    Raises:
        InvalidValue: the engine, the model or the device has none.
    """
    dtype = config.dtype
    if choice.engine == "baseline":
        raise InvalidValue(
            f"dtype: {dtype} needs the optimized engine, and plain transformers serve this.",
            hint="Use dtype='bf16' or 'auto'.",
        )
    if dtype == "int4" and model.encoder is not None:
        raise InvalidValue("dtype: int4 is for models that generate text.", hint="Use dtype='int8' or 'bf16'.")
    check_device(dtype, min((gpu.capability for group in groups for gpu in group), default=None))
    on_gpu = bool(groups)
    rest = "fp32" if not on_gpu else "fp16" if model.dtype == "fp16" and dtype != "fp8" else "bf16"
    tables = "int8" if config.options.quantize_head else rest
    what = {
        "int8": "weights in groups of 64 with one scale",
        "int4": "weights in groups of 64 with a step and a lowest value",
        "fp8": "weights with a scale for each row",
    }[dtype]
    if model.encoder is None and tables != dtype:
        what += f"; embedding and head in {tables}"
    elif model.encoder is not None and model.encoder.decodes and dtype == "fp8":
        what += "; the head over the vocabulary in int8"
    what += f"; activations, norms and cache in {rest}"
    if dtype == "fp8":
        what += ", and activations in fp8 where more than 64 rows are multiplied"
    return choice.with_line("dtype", dtype, f"asked for: {what}", dtype=dtype)


def check_device(dtype: str, capability: tuple[int, int] | None) -> None:
    """Raise InvalidValue where there is no such quantized dtype.

    Args:
        dtype: one of `QUANTIZED`.
        capability: the least compute capability of the GPUs; None on a CPU.
    """
    if dtype == "fp8":
        if capability is None:
            raise InvalidValue("dtype: a CPU has no fp8.", hint="Use dtype='int8' or 'auto'.")
        if capability < FP8_CAPABILITY:
            raise InvalidValue(
                "dtype: this GPU has no fp8; Ada, Hopper and later have.", hint="Use dtype='int8' or 'auto'."
            )
    elif capability is not None and capability < QUANTIZED_CAPABILITY:
        raise InvalidValue(f"dtype: {dtype} needs an Ampere GPU or a later one.", hint="Use dtype='fp16' or 'auto'.")
