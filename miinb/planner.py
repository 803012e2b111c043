"""What is chosen for a model on this hardware, and why; what cannot work is refused before anything starts.

Pure: the model's and the machine's facts are passed in. The rank may still change a choice for a reason that only it
can see (a parity failure, a missing compiler); its lines then follow these.
"""

from __future__ import annotations

import dataclasses

from miinb import encoder_planner, image_planner, splitting
from miinb.config import DeploymentConfig
from miinb.errors import BrokenCheckpoint, InvalidValue, OutOfMemory
from miinb.fitting import USABLE, Place, does_not_fit, live_parameters
from miinb.hardware import Gpu, Hardware
from miinb.messages import Plan
from miinb.models import DTYPE_BYTES, FP8_CAPABILITY, ModelInfo
from miinb.quantized_planner import QUANTIZED, check_options, quantized
from miinb.tasks import TASKS
from miinb.wording import size_words

#: Most tokens of one sequence and most rows on a CPU unless asked for: a page is a whole slot there.
CPU_MAX_LENGTH = 4096
CPU_MAX_BATCH = 16
GPU_MAX_BATCH = 256


def plan(config: DeploymentConfig, model: ModelInfo, hardware: Hardware) -> Plan:
    """The plan for a deployment.

    Raises:
        InvalidValue: the device cannot do what was asked, or that is not built yet.
        OutOfMemory: the model cannot fit; the message has the estimate, the hint what would.
        ModelError: the model does not serve the task.
    """
    task = model.task(config.task)
    model = model.serving(task)
    groups = _device_groups(config, hardware)
    device = "cuda" if groups else "cpu"
    choice = Plan(config.engine, device, "", config.tensor_parallel, config.replicas)
    if TASKS[task].image:
        return _images(choice, config, model, hardware, groups)
    if config.options.step_reuse > 1:
        raise InvalidValue(f"options.step_reuse: {task} has no steps of denoising.", hint="Leave it out.")
    choice = _engine(choice, config, model, task)
    choice = _split(choice, config, model)
    choice = _device(choice, config, hardware, groups)
    choice = _dtype(choice, config, model, hardware, groups)
    choice = encoder_planner.labels(encoder_planner.head(choice, model, task), model, task)
    if config.kv_dtype == "fp8":
        _check_fp8_cache(choice, groups, encodes=not TASKS[task].streams)
    return _memory(choice, config, model, hardware, groups)


def _images(
    choice: Plan, config: DeploymentConfig, model: ModelInfo, hardware: Hardware, groups: list[list[Gpu]]
) -> Plan:
    image_planner.refuse(config, image_planner.pipeline_of(model))
    choice = _device(image_planner.engine(choice, config, model), config, hardware, groups)
    capability = min((gpu.capability for group in groups for gpu in group), default=None)
    choice = image_planner.number_format(choice, config, model, capability)
    choice = image_planner.memory(choice, config, model, _place(config, hardware, groups))
    return image_planner.step_reuse(choice, config)


def resolve(config: DeploymentConfig, choice: Plan, hardware: Hardware) -> DeploymentConfig:
    """The configuration with the plan's choices in place of "auto": what the ranks get."""
    groups = _device_groups(config, hardware)
    options = config.options
    if choice.device == "cpu" and choice.kv_cache_bytes:  # a GPU's is sized by the rank, when its weights are there
        options = options.model_copy(update={"kv_cache_bytes": max(1 << 16, choice.kv_cache_bytes)})
    changes = {
        "options": options,
        "device": choice.device,
        "dtype": choice.dtype,
        "max_length": choice.max_length,
        "max_batch": choice.max_batch,
        "gpus": [[gpu.index for gpu in group] for group in groups] or None,
    }
    return config.model_copy(update=changes)


def _device_groups(config: DeploymentConfig, hardware: Hardware) -> list[list[Gpu]]:
    """The GPUs of each replica; [] for a CPU."""
    if config.device == "cpu" or (config.device == "auto" and not hardware.gpus and config.gpus is None):
        return []
    if not hardware.gpus:
        raise InvalidValue("device: no GPU can be seen on this machine.", hint="Use device='auto' or device='cpu'.")
    need = config.replicas * config.tensor_parallel
    if config.gpus is None:
        numbers = list(range(need))
    else:
        numbers = [n for part in config.gpus for n in (part if isinstance(part, list) else [part])]
    known = {gpu.index: gpu for gpu in hardware.gpus}
    missing = [number for number in numbers if number not in known]
    if missing:
        what = f"gpus: there is no GPU {missing[0]}" if config.gpus else f"replicas: {need} need {need} GPUs"
        raise InvalidValue(
            f"{what}; {len(known)} can be seen.", hint=f"They are numbered 0 to {len(known) - 1}; use fewer replicas."
        )
    size = config.tensor_parallel
    return [[known[n] for n in numbers[i : i + size]] for i in range(0, need, size)]


def _engine(choice: Plan, config: DeploymentConfig, model: ModelInfo, task: str) -> Plan:
    if config.engine == "baseline":
        arm = "static cache or compiled, whichever is faster" if config.options.compile else "plain transformers"
        return choice.with_line("engine", "baseline", f"asked for: {arm}")
    if config.options.offload != "off":
        reason = "plain transformers run offloaded weights, under DeepSpeed's ZeRO-Inference"
        return choice.with_line("engine", "baseline", reason, engine="baseline")
    generates = TASKS[task].streams
    if isinstance(model.unfused, BrokenCheckpoint):
        raise model.unfused
    why = ""
    if (model.spec if generates else model.encoder) is None:
        why = model.unfused.message if model.unfused else f"There is no policy for {task} of {model.family}."
    if why:
        reason = f"plain transformers run it: {why}"
        return choice.with_line("engine", "baseline", reason, engine="baseline", warnings=(reason,))
    return choice.with_line(
        "engine", "optimized", f"fused {'decoder' if generates else 'encoder'} with the policy of {model.family}"
    )


def _split(choice: Plan, config: DeploymentConfig, model: ModelInfo) -> Plan:
    """How the model is split over ranks.

    Raises:
        InvalidValue: it cannot be; the hint has the numbers of ranks that work.
    """
    ranks = config.tensor_parallel
    if ranks == 1:
        return choice
    _check_all_reduce(config.options.all_reduce, choice.device)
    spec = model.spec or model.encoder
    if choice.engine != "optimized" or spec is None:
        return _split_by_autotp(choice, model, ranks)
    if misfit := spec.misfit(ranks):
        fits = [str(n) for n in range(1, 65) if not spec.misfit(n)]
        raise InvalidValue(
            f"tensor_parallel: the {misfit} of {model.source} do not divide by {ranks}.",
            hint=f"Numbers of ranks that work: {', '.join(fits)}.",
        )
    reason = f"{spec.heads // ranks} of {spec.heads} attention heads each"
    if model.spec is None:
        reason += "; the embeddings and the task's head are whole on each"
    elif model.spec.kv_heads < ranks:
        reason += f"; each key/value head is on {ranks // model.spec.kv_heads} of them"
    return choice.with_line("tensor_parallel", f"{ranks} ranks", reason)


def _check_all_reduce(asked: str, device: str) -> None:
    """Raise InvalidValue for sums over ranks that the device does not have."""
    known = ("auto", "nccl") if device == "cuda" else ("auto", "shared_memory", "gloo")
    if asked not in known:
        where = "GPUs" if device == "cuda" else "a CPU"
        hint = f"Use {' or '.join(map(repr, known))}."
        raise InvalidValue(f"options.all_reduce: ranks on {where} do not sum by {asked!r}.", hint=hint)


def _split_by_autotp(choice: Plan, model: ModelInfo, ranks: int) -> Plan:
    """The same where transformers run the model. Raises InvalidValue."""
    if why := splitting.misfit(model, ranks):
        fits = splitting.fitting(model)
        raise InvalidValue(
            f"tensor_parallel: {why}.",
            hint=f"Numbers of ranks that work: {', '.join(map(str, fits))}."
            if len(fits) > 1
            else "Use tensor_parallel=1; replicas=N serves copies of it.",
        )
    reason = f"{model.heads // ranks} of {model.heads} attention heads each; the embedding is whole on each"
    return choice.with_line("tensor_parallel", f"{ranks} ranks, DeepSpeed AutoTP", reason)


def _device(choice: Plan, config: DeploymentConfig, hardware: Hardware, groups: list[list[Gpu]]) -> Plan:
    if groups:
        named = ", ".join(f"{gpu.index} ({gpu.name})" for group in groups for gpu in group)
        size = config.tensor_parallel
        return choice.with_line("device", f"cuda {named}", "a GPU a replica" if size == 1 else f"{size} a replica")
    reason = "asked for" if config.device == "cpu" else "no GPU can be seen"
    ranks = config.replicas * config.tensor_parallel
    threads = config.options.threads or max(1, hardware.cores // ranks)
    choice = choice.with_line("device", "cpu", f"{hardware.cpu}, {reason}")
    if config.options.threads:
        return choice.with_line("threads", str(threads), "asked for")
    return choice.with_line("threads", str(threads), f"{hardware.cores} cores for {ranks} rank{'s' * (ranks > 1)}")


def _dtype(
    choice: Plan, config: DeploymentConfig, model: ModelInfo, hardware: Hardware, groups: list[list[Gpu]]
) -> Plan:
    check_options(config)
    asked = config.dtype if config.dtype != "auto" else model.dtype
    origin = "the checkpoint's" if config.dtype == "auto" else "asked for"
    if asked in QUANTIZED:
        return quantized(choice, config, model, groups)
    if choice.device == "cpu" and model.encoder is not None:
        used, reason = encoder_planner.dtype_on_cpu(asked, origin, hardware)
        return choice.with_line("dtype", used, reason, dtype=used)
    if choice.device == "cpu" and asked == "fp16":
        fast = hardware.cpu_flags & {"avx2", "avx512_bf16", "amx_bf16", "bf16"}
        used = "bf16" if fast else "fp32"
        reason = f"fp16 ({origin}) is slow on a CPU: {used} " + ("has its size" if fast else "is as exact")
        return choice.with_line("dtype", used, reason, dtype=used)
    if choice.device == "cuda" and asked == "bf16" and any(gpu.capability < (8, 0) for gpu in hardware.gpus):
        if config.dtype == "auto":
            return choice.with_line("dtype", "fp16", "this GPU has no bf16", dtype="fp16")
        raise InvalidValue("dtype: this GPU has no bf16.", hint="Use dtype='fp16' or 'fp32'.")
    return choice.with_line("dtype", asked, origin, dtype=asked)


def _check_fp8_cache(choice: Plan, groups: list[list[Gpu]], *, encodes: bool) -> None:
    """Raise InvalidValue where there is no fp8 cache."""
    if encodes:
        raise InvalidValue("kv_dtype: an encoder has no cache.", hint="Use kv_dtype='auto'.")
    if choice.engine == "baseline":
        raise InvalidValue(
            "kv_dtype: fp8 needs the optimized engine, and plain transformers serve this.", hint="Use kv_dtype='auto'."
        )
    if any(gpu.capability < FP8_CAPABILITY for group in groups for gpu in group):
        raise InvalidValue("kv_dtype: this GPU has no fp8; Ada, Hopper and later have.", hint="Use kv_dtype='auto'.")


def _memory(
    choice: Plan, config: DeploymentConfig, model: ModelInfo, hardware: Hardware, groups: list[list[Gpu]]
) -> Plan:
    """Length, rows and cache: what the free memory of a rank's device holds after the weights."""
    ranks = config.tensor_parallel
    place = _place(config, hardware, groups)
    form = {"on_gpu": place.on_gpu, "quantize_head": config.options.quantize_head}
    weights = model.weights_bytes(choice.dtype, ranks, **form)
    if config.options.offload != "off":
        choice = _offload(choice, config, model, hardware)
        weights = int(live_parameters(model) * DTYPE_BYTES[choice.dtype])
    token = model.kv_bytes_per_token(choice.dtype, ranks, config.kv_dtype, on_gpu=place.on_gpu)
    length = _length(config, model, on_gpu=place.on_gpu)
    if choice.engine == "optimized" and model.encoder is not None:
        return encoder_planner.memory(choice, config, model, length, place.usable)
    room = place.usable - weights
    if ranks > 1 and choice.engine != "optimized":
        choice = _loaded_whole(choice, config, model, hardware)
        weights = splitting.rank_bytes(model, choice.dtype, ranks)
        room = place.usable - (weights if place.on_gpu else model.weights_bytes(choice.dtype))
    if room < token * (config.max_length or min(length, 64)):
        raise does_not_fit(config, choice, model, hardware, place, length)
    share = f", the share of each of {ranks} ranks" if ranks > 1 else ""
    share = f", some layers of {model.layers} at a time" if config.options.offload != "off" else share
    why = f"{model.parameters / 1e9:.3g} billion parameters in {choice.dtype}{share}"
    choice = choice.with_line("weights", size_words(weights), why, weights_bytes=weights)
    if not token:  # no cache to size: encoders
        return dataclasses.replace(choice, max_length=length, max_batch=config.max_batch or 32)
    choice = _cache(choice, config, length, token, room, place)
    if choice.engine == "optimized":
        return _steps(choice, config)
    if config.options.speculative != "off":
        return choice.with_line("speculation", "off", "plain transformers serve this model")
    return choice


def _place(config: DeploymentConfig, hardware: Hardware, groups: list[list[Gpu]]) -> Place:
    """What a rank may take: of its GPU, or its share of the host's memory."""
    ranks = config.tensor_parallel
    free = min((gpu.free_bytes for group in groups for gpu in group), default=hardware.free_bytes)
    free //= 1 if groups else config.replicas * ranks
    return Place(bool(groups), min(free, config.options.memory_limit_bytes or free), ranks)


def _offload(choice: Plan, config: DeploymentConfig, model: ModelInfo, hardware: Hardware) -> Plan:
    """The plan with where the weights wait. Raises OutOfMemory."""
    whole = model.weights_bytes(choice.dtype)
    if config.options.offload == "nvme":
        return choice.with_line("offload", "nvme", f"{size_words(whole)} in {config.options.offload_folder}")
    if config.replicas * whole > hardware.free_bytes * USABLE:
        raise OutOfMemory(
            f"{config.model} has {size_words(whole)} of weights in {choice.dtype}, for each of {config.replicas} "
            f"replicas; {size_words(hardware.free_bytes)} of the host's memory are free.",
            hint="Use options.offload='nvme' with options.offload_folder on a fast disk.",
        )
    what = "of the host's memory: DeepSpeed brings a layer's weights when it computes"
    return choice.with_line("offload", size_words(whole), what)


def _loaded_whole(choice: Plan, config: DeploymentConfig, model: ModelInfo, hardware: Hardware) -> Plan:
    """The plan with what AutoTP takes of the host's memory at the start. Raises OutOfMemory."""
    ranks = config.tensor_parallel * config.replicas
    whole = model.weights_bytes(choice.dtype)
    if ranks * whole > hardware.free_bytes * USABLE:
        raise OutOfMemory(
            f"Each of {ranks} ranks reads all {size_words(whole)} of {config.model} before it keeps its part; "
            f"{size_words(hardware.free_bytes)} of the host's memory are free.",
            hint="Use fewer ranks.",
        )
    return choice.with_line(
        "load", f"{ranks} x {size_words(whole)}", "of host memory: each rank reads the whole model first"
    )


def _steps(choice: Plan, config: DeploymentConfig) -> Plan:
    """How the optimized engine's steps are bounded and launched."""
    tokens = config.options.step_tokens(choice.device)
    why = "longer prompts are split, so that running answers wait for one such step at most"
    choice = choice.with_line("step_budget", f"{tokens} tokens", why)
    if config.options.speculative != "off":
        why = "text that repeats is guessed and checked, several tokens a step; the answers stay the same"
        choice = choice.with_line("speculation", "prompt lookup", why)
    if choice.device != "cuda":
        return choice
    if not config.options.cuda_graphs:
        return choice.with_line("graphs", "off", "asked for")
    rows = min(choice.max_batch, tokens)
    return choice.with_line("graphs", "on", f"decode steps of up to {rows} rows are one launch each")


def _length(config: DeploymentConfig, model: ModelInfo, *, on_gpu: bool) -> int:
    limit = model.context_length or 1 << 22
    if config.max_length is not None:
        if config.max_length > limit:
            raise InvalidValue(
                f"max_length: {config.max_length} is above the model's context of {limit} tokens.",
                hint=f"Use at most {limit}.",
            )
        return config.max_length
    return limit if on_gpu and model.context_length else min(limit, CPU_MAX_LENGTH)


def _cache(choice: Plan, config: DeploymentConfig, length: int, token: int, room: int, place: Place) -> Plan:
    on_gpu = place.on_gpu
    asked = config.options.kv_cache_bytes
    budget = asked or place.cache_bytes(room)
    fits = budget // token
    if config.max_length is None and fits < length:
        length = max(8, fits)
    if fits < length:
        raise OutOfMemory(
            f"The cache has room for {fits:,} tokens, max_length is {length:,}.",
            hint=f"Use max_length={max(8, fits)}, or more options.kv_cache_bytes.",
        )
    rows = config.max_batch or (GPU_MAX_BATCH if on_gpu else max(1, min(CPU_MAX_BATCH, fits // length)))
    size = rows * length * token
    if not on_gpu and size > budget:
        raise OutOfMemory(
            f"{rows} rows of {length:,} tokens need {size_words(size)} of cache, {size_words(budget)} are there.",
            hint=f"Use max_batch={max(1, fits // length)} or a smaller max_length.",
        )
    why = "asked for" if config.max_length else ("the model's context" if on_gpu else "what a CPU serves in good time")
    choice = choice.with_line("max_length", f"{length} tokens", why, max_length=length)
    why = "asked for" if config.max_batch else "rows at once"
    choice = choice.with_line("max_batch", str(rows), why, max_batch=rows)
    size = min(size, budget)
    kind = f"slots of {length} tokens, touched when used"
    if on_gpu:
        kind = f"pages for {size // token:,} tokens" + (
            " of all rows together" if size == budget else ", all rows full"
        )
    if config.kv_dtype == "fp8":
        kind += ", in fp8: answers can differ from those of other caches"
        kind += "" if on_gpu else ", and steps are slower, as each widens what it reads"
    return choice.with_line("kv_cache", size_words(size), kind, kv_cache_bytes=size)
