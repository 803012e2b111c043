"""From a deployment's configuration to a running executor: device, dtype, weights, cache, parity, fallbacks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from miinb import models, splitting
from miinb.config import DeploymentConfig
from miinb.engine import encoder_parity, parity
from miinb.engine.calibrate import calibration_of, with_calibration
from miinb.engine.compile_job import CompileJob, use_cache
from miinb.engine.decoder import Decoder, DecoderWeights, Operators
from miinb.engine.encoder import Encoder, EncoderWeights
from miinb.engine.encoder_executor import fused_executor
from miinb.engine.encoder_kernels import encoder_kernels
from miinb.engine.encoder_weights import load_encoder_weights
from miinb.engine.executor import Executor, StepExecutor
from miinb.engine.finite import check_finite
from miinb.engine.followers import Follower, Followers, Following
from miinb.engine.graphs import GraphRunner
from miinb.engine.kv_cache import KVCache, cache_dtype, size_cache
from miinb.engine.parameters import QUANTIZED
from miinb.engine.place import Place, device_name, find_place, free_bytes, refuse_fallback, set_threads
from miinb.engine.policies import ENCODERS, POLICIES
from miinb.engine.ranks import Ranks, join
from miinb.engine.spec import DecoderSpec
from miinb.engine.start_up import Aside, Report, compiled, verified, with_rounding
from miinb.engine.tokenizer_files import eos_token_ids, export_tokenizer, with_chat_template
from miinb.engine.weights import DTYPES, load_weights, tensors, weights_bytes
from miinb.errors import InvalidValue, OutOfMemory, UnsupportedModel
from miinb.messages import EngineInfo, Phase, Plan
from miinb.models import ModelInfo
from miinb.tasks import TASKS
from miinb.wording import size_words

#: Whose versions are told.
LIBRARIES = ("torch", "transformers", "diffusers", "deepspeed")


def load_executor(
    config: DeploymentConfig,
    *,
    replica: int,
    rank: int,
    gpus: Sequence[int] | None,
    folder: Path,
    report: Report,
    kernels: CompileJob | None = None,
) -> Executor:
    """`load_rank` for rank 0."""
    loaded = load_rank(config, replica=replica, rank=rank, gpus=gpus, folder=folder, report=report, kernels=kernels)
    if isinstance(loaded, Following):
        raise RuntimeError(f"rank {rank} has no executor")
    return loaded


def load_rank(
    config: DeploymentConfig,
    *,
    replica: int,
    rank: int,
    gpus: Sequence[int] | None,
    folder: Path,
    report: Report,
    kernels: CompileJob | None = None,
) -> Executor | Following:
    """Load the model of one rank and return what computes with it: a follower above rank 0.

    Args:
        config: the deployment's; "auto" and None are resolved here where the planner has not done so.
        replica: which copy of the model this is.
        rank: which of the replica's tensor-parallel ranks this is.
        gpus: the replica's GPUs as CUDA numbers them, one a rank; None on a CPU.
        folder: the deployment's; the tokenizer is written to its `tokenizer` by rank 0 of replica 0.
        report: told each phase of start-up.
        kernels: compiles the GPU's kernels meanwhile; None: they are compiled where they are first used.

    Raises:
        MiinbError: the model, the device or an option does not work; its class tells.
    """
    use_cache()
    started = time.monotonic()
    model = models.inspect(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        load_format=config.load_format,
    )
    task = model.task(config.task)
    model = model.serving(task)
    place = find_place(config, model, gpus[rank] if gpus else None)
    set_threads(config)
    info = _engine_info(config, replica, model, task, place, folder)
    with ThreadPoolExecutor(1, "start") as thread:  # imports take seconds; weights are read meanwhile
        kind = place.device.type
        ranks = thread.submit(join, config, replica=replica, rank=rank, folder=folder, device=kind)
        tokenizer = thread.submit(_export_tokenizer, config, model, task, rank, folder)
        executor: Executor | Following | None = None
        if info.engine == "optimized":
            try:
                executor = _optimized(config, model, info, place, Aside(ranks, kernels), rank, report)
            except UnsupportedModel as reason:
                info = _fall_back(info, config, reason.message)
        tokenizer.result()
        ranks.result()
    if executor is None:
        executor = _batch_executor(config, model, info, place, ranks.result(), report)
    if rank == 0 and task == "conversational":
        executor.info = with_chat_template(executor.info, folder / "tokenizer")
    executor.info = dataclasses.replace(executor.info, load_s=time.monotonic() - started)
    return executor


def _export_tokenizer(config: DeploymentConfig, model: ModelInfo, task: str, rank: int, folder: Path) -> None:
    if rank == 0 and not TASKS[task].image:
        dummy = config.load_format == "dummy"
        export_tokenizer(model, folder / "tokenizer", trust_remote_code=config.trust_remote_code, dummy=dummy)


def _engine_info(
    config: DeploymentConfig, replica: int, model: ModelInfo, task: str, place: Place, folder: Path
) -> EngineInfo:
    engine = config.engine if config.options.offload == "off" else "baseline"
    plan = Plan(engine, place.device.type, place.dtype, config.tensor_parallel, config.replicas)
    for note in place.notes:
        plan = plan.with_line(*note)
    limit = model.context_length or config.max_length or 4096
    if config.max_length is not None and config.max_length > limit:
        raise InvalidValue(f"max_length: {config.max_length} is above the model's {limit} positions.")
    length = config.max_length or limit
    batch = config.max_batch or 16
    return EngineInfo(
        replica=replica,
        model=config.model,
        task=task,
        engine=engine,
        dtype=place.dtype,
        device=place.device.type,
        vocab_size=model.vocab_size,
        max_length=length,
        max_batch=batch,
        eos_token_ids=eos_token_ids(model),
        tokenizer_folder=str(folder / "tokenizer"),
        plan=dataclasses.replace(plan, max_length=length, max_batch=batch),
        labels=model.labels()[0] if task in ("text-classification", "token-classification") else (),
        function=model.function() if task == "text-classification" else "",
        versions={name: importlib.metadata.version(name) for name in LIBRARIES},
        device_name=device_name(place.device),
    )


def _optimized(
    config: DeploymentConfig, model: ModelInfo, info: EngineInfo, place: Place, aside: Aside, rank: int, report: Report
) -> Executor | Following:
    """The engine's own executor of the task. Raises UnsupportedModel where it has none: the baseline serves then."""
    if TASKS[info.task].image:
        from miinb.engine.image_loading import load_painter  # it imports diffusers, which texts do without

        return load_painter(config, model, info, place, aside, report)
    make = _step_executor if TASKS[info.task].streams else _encode_executor
    return make(config, model, info, place, aside, rank, report)


def _step_executor(
    config: DeploymentConfig,
    model: ModelInfo,
    info: EngineInfo,
    place: Place,
    aside: Aside,
    rank: int,
    report: Report,
) -> Executor | Follower:
    """The fused decoder under continuous batching; on a follower what computes rank 0's steps.

    Raises:
        UnsupportedModel: the family has no policy, its configuration no fused form, or the parity check failed.
    """
    if model.spec is None:
        raise model.unfused or UnsupportedModel(f"{model.family} is no decoder.")
    policy, spec = POLICIES[model.family], model.spec
    local = spec.shard(config.tensor_parallel)
    report(Phase("load", 0, spec.layers))
    started = time.monotonic()
    weights = load_weights(
        model,
        policy,
        spec,
        dtype=place.dtype,
        device=place.device,
        rank=rank,
        ranks=config.tensor_parallel,
        dummy=config.load_format == "dummy",
        quantize_head=config.options.quantize_head,
        calibration=calibration_of(config, model, place),
        report=report,
    )
    plan = _load_lines(info.plan, weights, place, time.monotonic() - started)
    if place.dtype == "int4":
        plan = with_calibration(plan, config, model, place, weights.fitted_tokens)
    ops, plan = operators_of(plan, local, place)
    ranks = aside.ranks.result()
    decoder = Decoder(local, weights, group=ranks.group, ops=ops)
    if aside.kernels is not None:
        plan = plan.with_line("kernels", *compiled(aside.kernels, report))
    ranks.connect(config, place.device)
    free = ranks.share_of(free_bytes(place.device, config), place.device)
    kv_dtype = cache_dtype(config.kv_dtype, weights.dtype)
    size = size_cache(local, config, place.device.type, kv_dtype, free)
    plan = dataclasses.replace(ranks.describe(plan), max_length=size.max_length, max_batch=size.max_batch)
    plan = dataclasses.replace(plan, kv_cache_bytes=size.size_bytes, weights_bytes=weights_bytes(weights))
    report(Phase("verify"))
    if config.options.parity != "off" and config.load_format != "dummy":
        check_finite(tensors(weights), model, weights.dtype)
    plan = verified(plan, lambda: parity.check(decoder, size.page_tokens, kv_dtype), config, ranks)
    peak = torch.cuda.max_memory_allocated() if place.device.type == "cuda" else 0
    cache = KVCache(local, size, kv_dtype, place.device)
    info = dataclasses.replace(info, plan=plan, max_length=size.max_length, max_batch=size.max_batch)
    info = dataclasses.replace(info, load_peak_bytes=peak)
    if ranks.link is not None:
        return _capture(Follower(info, decoder, cache, config.options, ranks.link), config, report)
    followers = Followers.of(ranks.leader)
    executor = StepExecutor(info=info, decoder=decoder, cache=cache, options=config.options, followers=followers)
    return _capture(executor, config, report)


def _encode_executor(
    config: DeploymentConfig, model: ModelInfo, info: EngineInfo, place: Place, aside: Aside, rank: int, report: Report
) -> Executor | Following:
    """The fused encoder with the head of its task; on a follower what computes rank 0's steps.

    Raises:
        UnsupportedModel: the family has no policy, its configuration no fused form, or the parity check failed.
    """
    spec = model.encoder
    if spec is None:
        raise model.unfused or UnsupportedModel(f"There is no policy for {info.task} of {model.family}.")
    local = spec.shard(config.tensor_parallel)
    report(Phase("load", 0, spec.layers))
    started = time.monotonic()
    kernels, plan = encoder_kernels(info.plan, place, model.dtype)
    weights = load_encoder_weights(
        model,
        ENCODERS[model.family],
        spec,
        dtype=place.dtype,
        device=place.device,
        rank=rank,
        ranks=config.tensor_parallel,
        dummy=config.load_format == "dummy",
        levels=kernels.levels,
        pack=kernels.pack,
        report=report,
    )
    plan = _load_lines(plan, weights, place, time.monotonic() - started)
    if weights.unread:
        plan = plan.with_line(
            "unread", ", ".join(weights.unread), f"heads of the checkpoint that {info.task} has no use for"
        )
    ranks = aside.ranks.result()
    encoder = Encoder(local, weights, group=ranks.group, ops=kernels.operators)
    if aside.kernels is not None:
        plan = plan.with_line("kernels", *compiled(aside.kernels, report))
    ranks.connect(config, place.device)
    plan = ranks.describe(plan)
    report(Phase("verify"))
    if config.options.parity != "off" and config.load_format != "dummy":
        check_finite(tensors(weights), model, weights.dtype)
    plan = verified(plan, lambda: encoder_parity.check(encoder, kernels.tolerance), config, ranks)
    peak = torch.cuda.max_memory_allocated() if place.device.type == "cuda" else 0
    plan = dataclasses.replace(plan, weights_bytes=weights_bytes(weights))
    return fused_executor(encoder, config, dataclasses.replace(info, plan=plan, load_peak_bytes=peak), report, ranks)


def _load_lines(plan: Plan, weights: DecoderWeights | EncoderWeights, place: Place, seconds: float) -> Plan:
    """The plan with what was read, and what rounding has changed of it."""
    size = weights_bytes(weights)
    rate = f", {size_words(size / seconds)}/s" if size >= 1e8 else ""
    plan = plan.with_line("load", size_words(size), f"in {seconds:.1f} s{rate}")
    return with_rounding(plan, place.dtype, weights.rounding, weights.dtype, place.device)


def _capture(loaded: StepExecutor | Follower, config: DeploymentConfig, report: Report) -> StepExecutor | Follower:
    """CUDA graphs for its steps, and the plan's line on them."""
    compute, info = loaded.compute, loaded.info
    if compute.device.type != "cuda":
        return loaded
    if not config.options.cuda_graphs:
        loaded.info = dataclasses.replace(info, plan=info.plan.with_line("graphs", "off", "asked for"))
        return loaded
    report(Phase("capture"))
    tokens = config.options.step_tokens("cuda")
    rows = min(info.max_batch, tokens)
    compute.runner = runner = GraphRunner(compute.decoder, compute.cache, compute.inputs, rows, tokens)
    plan = info.plan.with_line("graphs", "on", str(runner), graphs_bytes=runner.bytes)
    loaded.info = dataclasses.replace(info, plan=plan)
    return loaded


def operators_of(plan: Plan, spec: DecoderSpec, place: Place) -> tuple[Operators, Plan]:
    """The operators of the device, and the plan with a line on them where there is a choice."""
    if place.device.type == "cuda":
        return Operators(), plan
    from miinb.kernels.cpu import MAX_HEAD_SIZE, CpuKernels
    from miinb.kernels.cpu_build import Unavailable

    try:
        if spec.head_size > MAX_HEAD_SIZE:
            raise Unavailable(f"heads of {spec.head_size} are wider than {MAX_HEAD_SIZE}")
        kernels = CpuKernels(DTYPES.get(place.dtype, torch.float32), int8=place.dtype in QUANTIZED)
    except Unavailable as reason:
        plan = plan.with_line("kernels", "PyTorch's", str(reason))
        if place.dtype in QUANTIZED:
            slow = f"{place.dtype} without compiled operators widens weights in every step, which is slow: {reason}."
            plan = dataclasses.replace(plan, warnings=(*plan.warnings, slow))
        return Operators(), plan
    ops = Operators(**{name: getattr(kernels, name) for name in Operators._fields})
    return ops, plan.with_line("kernels", "compiled for this CPU", kernels.description)


def _fall_back(info: EngineInfo, config: DeploymentConfig, reason: str) -> EngineInfo:
    refuse_fallback(config, reason)
    reason = f"plain {'diffusers' if TASKS[info.task].image else 'transformers'} run it: {reason}"
    plan = info.plan.with_line("engine", "baseline", reason, engine="baseline")
    plan = dataclasses.replace(plan, warnings=(*plan.warnings, reason))
    return dataclasses.replace(info, engine="baseline", plan=plan)


def _batch_executor(
    config: DeploymentConfig, model: ModelInfo, info: EngineInfo, place: Place, ranks: Ranks, report: Report
) -> Executor | Following:
    """transformers' own model, one batch at a time; on several ranks split by DeepSpeed's AutoTP."""
    count = config.tensor_parallel
    if count > 1 and (why := splitting.misfit(model, count)):
        raise UnsupportedModel(
            f"{model.family} cannot be split over {count} ranks: {why}.", hint="Use tensor_parallel=1."
        )
    # Each rank reads the whole model into the host's memory before it keeps its part.
    need = count * model.weights_bytes(place.dtype)
    on_host = count > 1 or config.options.offload != "off"
    free = free_bytes(torch.device("cpu")) if on_host else free_bytes(place.device, config)
    if config.options.offload == "nvme":
        need = 0
    if need > free:
        raise OutOfMemory(f"The weights need {size_words(need)}, {size_words(free)} are free.")
    if TASKS[info.task].image:
        from miinb.engine.pipeline_painter import load_images

        return load_images(model, config, info, report)
    from miinb.engine.baseline import load_baseline  # it imports transformers, which the fused path does without

    return load_baseline(model, config, info, report, ranks)
