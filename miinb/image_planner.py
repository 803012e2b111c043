"""What is chosen for an image pipeline, and why: a dtype by the device, how many pictures at once. Pure."""

from __future__ import annotations

from miinb.calibration import is_given
from miinb.config import DeploymentConfig
from miinb.errors import InvalidValue, OutOfMemory, UnsupportedModel
from miinb.fitting import Place
from miinb.messages import Plan
from miinb.models import DTYPE_BYTES, ModelInfo
from miinb.pipelines import Pipeline
from miinb.quantized_planner import QUANTIZED, check_device
from miinb.wording import size_words

#: Pictures at once unless asked for. More of them than 8 make a GPU hardly faster; a CPU gains nothing.
GPU_MAX_BATCH, CPU_MAX_BATCH = 8, 2


def refuse(config: DeploymentConfig, pipeline: Pipeline) -> None:
    """Raise InvalidValue for what an image pipeline does not have; no option is dropped in silence."""
    options = config.options
    wrong: dict[str, bool] = {
        "tensor_parallel": config.tensor_parallel > 1,
        "max_length": config.max_length not in (None, pipeline.text_length),
        "kv_dtype": config.kv_dtype != "auto",
        "dtype": config.dtype in QUANTIZED and config.dtype != "int8",
        "options.compile": options.compile,
        "options.offload": options.offload != "off",
        "options.speculative": options.speculative != "off",
        "options.calibration": is_given(options.calibration),
        "options.quantize_head": not options.quantize_head,
    }
    hints = {
        "tensor_parallel": "replicas=N serves copies of it.",
        "max_length": "Its text encoder takes a fixed number of tokens.",
        "dtype": "Use fp16, bf16 or fp32, or int8.",
    }
    for name, there in wrong.items():
        if there:
            hint = hints.get(name, f"Leave {name} out.")
            what = config.dtype if name == "dtype" else "such choice"
            raise InvalidValue(f"{name}: there is no {what} for text-to-image yet.", hint=hint)


def engine(choice: Plan, config: DeploymentConfig, model: ModelInfo) -> Plan:
    """Which engine runs it: diffusers where that was asked for, or where the optimized one has no form for it."""
    if config.engine == "baseline":
        return choice.with_line("engine", "baseline", "asked for: plain diffusers")
    if pipeline_of(model).diffusion is not None:
        return choice.with_line("engine", "optimized", "fused UNet and VAE decoder; schedulers are diffusers'")
    why = model.unfused.message if model.unfused else f"There is no form of {model.architecture}."
    if config.options.step_reuse > 1:
        raise InvalidValue(
            f"options.step_reuse: only the optimized engine has it, and plain diffusers run this: {why}",
            hint="Leave it out.",
        )
    reason = f"plain diffusers run it: {why}"
    return choice.with_line("engine", "baseline", reason, engine="baseline", warnings=(reason,))


def step_reuse(choice: Plan, config: DeploymentConfig) -> Plan:
    """The plan with a line on steps that are not whole."""
    if (every := config.options.step_reuse) == 1:
        return choice
    why = "lossy: one prediction in so many is whole; the others reuse its inner layers' features, so pictures differ"
    return choice.with_line("step_reuse", str(every), why)


def number_format(choice: Plan, config: DeploymentConfig, model: ModelInfo, capability: tuple[int, int] | None) -> Plan:
    """The plan with a dtype: on a GPU fp16 where the files have it, on a CPU fp32, unless one was asked for.

    Args:
        choice: so far.
        config: of the deployment.
        model: with a pipeline.
        capability: the least compute capability of the GPUs; None on a CPU.
    """
    asked, pipeline = config.dtype, pipeline_of(model)
    if asked in QUANTIZED:
        return _quantized(choice, asked, pipeline, capability)
    if choice.device == "cpu":
        if asked == "fp16":
            return choice.with_line(
                "dtype", "fp32", "fp16 (asked for) is slow on a CPU: fp32 is as exact", dtype="fp32"
            )
        if asked == "auto":
            return choice.with_line("dtype", "fp32", "on a CPU", dtype="fp32")
        return choice.with_line("dtype", asked, "asked for", dtype=asked)
    has_bf16 = capability is not None and capability >= (8, 0)
    if asked == "bf16" and not has_bf16:
        raise InvalidValue("dtype: this GPU has no bf16.", hint="Use dtype='fp16' or 'fp32'.")
    if asked != "auto":
        return choice.with_line("dtype", asked, "asked for", dtype=asked)
    used = "fp16" if pipeline.has_half or (model.dtype == "bf16" and not has_bf16) else model.dtype
    return choice.with_line("dtype", used, "the checkpoint's", dtype=used)


def _quantized(choice: Plan, dtype: str, pipeline: Pipeline, capability: tuple[int, int] | None) -> Plan:
    """The plan with a dtype of weights alone. Raises InvalidValue where there is none."""
    if choice.engine == "baseline":
        raise InvalidValue(
            f"dtype: {dtype} needs the optimized engine, and plain diffusers serve this.", hint="Use dtype='auto'."
        )
    check_device(dtype, capability)
    rest = pipeline.compute_dtype(dtype, on_gpu=capability is not None)
    why = "asked for, lossy: the UNet's transformers have weights in groups of 64 with one scale; activations, "
    why += f"convolutions, the VAE and the text encoder are in {rest}"
    why += "" if capability else "; on a CPU that saves memory, not time"
    return choice.with_line("dtype", dtype, why, dtype=dtype)


def memory(choice: Plan, config: DeploymentConfig, model: ModelInfo, place: Place) -> Plan:
    """The plan with weights, sizes and how many pictures are computed at once.

    Raises:
        OutOfMemory: not even one fits, or not as many as were asked for; the hint has what would.
    """
    pipeline, on_gpu = pipeline_of(model), place.on_gpu
    number = DTYPE_BYTES[pipeline.compute_dtype(choice.dtype, on_gpu=on_gpu)]
    weights = int(model.parameters * number)
    if choice.dtype in QUANTIZED:
        weights = pipeline.quantized_bytes(model.parameters, choice.dtype, number, on_gpu=on_gpu)
    width, height = pipeline.width, pipeline.height
    one = pipeline.image_bytes(number, width, height)
    decode = pipeline.decode_bytes(number, width, height)
    most = (place.usable - weights - decode) // one if place.usable > weights + decode else 0
    asked = config.max_batch or 1
    if most < asked:
        raise _does_not_fit(choice, config, weights, asked * one + decode, place, most)
    why = f"{model.parameters / 1e9:.3g} billion parameters in {choice.dtype}"
    if choice.dtype in QUANTIZED:
        why = f"{model.parameters / 1e9:.3g} billion parameters, those of the UNet's transformers in {choice.dtype}"
    choice = choice.with_line("weights", size_words(weights), why, weights_bytes=weights)
    why = f"a picture unless a request says; prompts are cut after {pipeline.text_length} tokens"
    choice = choice.with_line("size", f"{width} x {height}", why, max_length=pipeline.text_length)
    choice = choice.with_line("scheduler", pipeline.scheduler, "the model's; scheduler= of a request takes another")
    batch = config.max_batch or min(most, GPU_MAX_BATCH if on_gpu else CPU_MAX_BATCH)
    why = "asked for" if config.max_batch else f"pictures at once, about {size_words(one)} each"
    return choice.with_line("max_batch", str(batch), why, max_batch=batch)


def pipeline_of(model: ModelInfo) -> Pipeline:
    """The pipeline of a model. Raises UnsupportedModel where it is none."""
    if model.pipeline is None:
        raise UnsupportedModel(
            f"{model.source} is no image pipeline.", hint="A pipeline's folder has model_index.json."
        )
    return model.pipeline


def _does_not_fit(
    choice: Plan, config: DeploymentConfig, weights: int, pictures: int, place: Place, most: int
) -> OutOfMemory:
    fits = [f"max_batch={most}"] if most else []
    if choice.dtype == "fp32":
        fits.append("dtype='fp16'" if place.on_gpu else "dtype='bf16'")
    if not place.on_gpu and config.replicas > 1:
        fits.append("fewer replicas")
    return OutOfMemory(
        f"{config.model} needs about {size_words(weights + pictures)} in {choice.dtype} ({size_words(weights)} of "
        f"weights, {size_words(pictures)} for {config.max_batch or 1} pictures); {size_words(max(0, place.usable))} "
        "can be used.",
        hint=f"What would fit: {'; '.join(fits)}." if fits else "Take a smaller model.",
    )
