"""The part of a plan that is about quantized weights: where there are any, and what is in which dtype."""

from __future__ import annotations

from miinb.calibration import is_given
from miinb.config import DeploymentConfig
from miinb.errors import InvalidValue
from miinb.hardware import Gpu
from miinb.messages import Plan
from miinb.models import FP8_CAPABILITY, QUANTIZED_CAPABILITY, ModelInfo

#: Dtypes of weights alone.
QUANTIZED = ("int8", "int4", "fp8")
#: What int4 is where it is not fitted to a text.
TO_THE_NEAREST = "int4 is rounded to the nearest, which loses more"
#: Parameters of the largest model that a CPU fits to the sample: SmolLM2-135M takes it some five minutes.
_MOST_ON_CPU = 300_000_000


def check_options(config: DeploymentConfig) -> None:
    """Raise InvalidValue for an option that acts only with another dtype."""
    if is_given(config.options.calibration) and config.dtype != "int4":
        raise InvalidValue("options.calibration: acts only with dtype='int4'.", hint="Leave it out.")
    if not config.options.quantize_head and config.dtype not in QUANTIZED:
        raise InvalidValue("options.quantize_head: acts only with dtype='int8', 'int4' or 'fp8'.", hint="Leave it out.")


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
    choice = choice.with_line("dtype", dtype, f"asked for: {what}", dtype=dtype)
    return _fitted(choice, config, model, on_gpu=on_gpu) if dtype == "int4" else choice


def _fitted(choice: Plan, config: DeploymentConfig, model: ModelInfo, *, on_gpu: bool) -> Plan:
    """The plan of int4 with a line where it will not be fitted to a text; a warning too where a text was given."""
    given = is_given(config.options.calibration)
    if given and config.tensor_parallel > 1:
        raise InvalidValue(
            "options.calibration: int4 over several ranks is rounded to the nearest, not fitted to a text.",
            hint="Use tensor_parallel=1, dtype='int8', or calibration='off'.",
        )
    why = why_unfitted(config, model, on_gpu=on_gpu)
    if not why:
        return choice
    reason = f"{why}; {TO_THE_NEAREST}"
    return choice.with_line(
        "calibration", "off", reason, warnings=(*choice.warnings, reason) if given else choice.warnings
    )


def why_unfitted(config: DeploymentConfig, model: ModelInfo, *, on_gpu: bool) -> str:
    """Why int4 will not be fitted to a text, as far as that is known before a start, or "".

    The rank may still find that the memory for it is not there.
    """
    calibration = config.options.calibration
    if calibration == "off":
        return "asked for"
    if config.load_format == "dummy":
        return "random weights"
    if config.tensor_parallel > 1:
        return "several ranks: each would need the others' part of every layer"
    if calibration == "auto" and not on_gpu and model.parameters > _MOST_ON_CPU:
        return "it would take a CPU long (give a text to have it)"
    if not (model.folder / "tokenizer.json").exists():
        return "there is no tokenizer.json"
    return ""


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
