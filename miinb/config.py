"""What a user can set: frozen pydantic models that refuse unknown names and wrong values before anything starts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from miinb.bench_fields import PictureFields, Tokens, number_list, read_slo, read_tokens
from miinb.errors import InvalidRequest, near
from miinb.frozen import Frozen, InvalidValueError
from miinb.offloading import settings_fault

NAME_PATTERN = re.compile(r"[A-Za-z0-9._/][A-Za-z0-9._/-]{0,63}")
MAX_NEW_TOKENS = 1 << 20
MAX_SEED = (1 << 63) - 1
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_LOGIT_BIAS = 1e30
#: Most tokens in a step by default. A CPU computes few as fast as many, and its streams wait less for a prompt.
STEP_TOKENS = {"cuda": 2048, "cpu": 128}
#: The same of encoders. What comes meanwhile waits for a step, so those of a CPU are short.
ENCODER_STEP_TOKENS = {"cuda": 16384, "cpu": 256}

Engine = Literal["optimized", "baseline"]
DType = Literal["auto", "fp32", "bf16", "fp16", "int8", "int4", "fp8"]
Device = Literal["auto", "cuda", "cpu"]
LoadFormat = Literal["auto", "dummy"]


class EngineOptions(Frozen):
    """`options=`: how an engine works inside; the defaults are what the planner would choose.

    Attributes:
        compile: baseline only: the arm "baseline-best" (static cache or `torch.compile`, whichever is faster).
        cuda_graphs: optimized, GPU: capture decode steps in CUDA graphs.
        page_tokens: optimized, GPU: tokens in one page of the KV cache.
        kv_cache_bytes: optimized: memory of the KV cache; None lets the planner choose.
        prefix_cache: optimized: keep the pages of finished prompts and reuse equal prefixes.
        max_step_tokens: optimized: most tokens in one step, of prompts and of running rows, which wait no longer than
            such a step for a prompt. None: 2048 on a GPU, 128 on a CPU; of encoders 16384 and 256.
        speculative: optimized: "prompt_lookup" guesses the next tokens from equal text before and computes several
            in one step; the answers stay the same (in bf16 and fp16 up to near ties, as in any batch).
        max_queue: most requests that wait; more are refused with `QueueFull`.
        threads: CPU threads of one rank; None: the cores divided by the ranks.
        all_reduce: several ranks. CPU: DeepSpeed's through shared memory (compiled at first use, which takes up to a
            minute) or gloo's; "auto" is the former where cores are left beside the ranks. GPU: NCCL's, or with "auto"
            small sums by a kernel of the engine through the memory of linked GPUs.
        memory_limit_bytes: most that a rank plans to take of its device, however much is free; a GPU enforces it.
        offload: for models that do not fit: plain transformers under DeepSpeed's ZeRO-Inference, which fetches the
            weights of each layer from the host's memory ("cpu") or a fast disk ("nvme") when it is their turn.
        offload_folder: "nvme": where.
        ds_config: DeepSpeed's own configuration of the offload (ZeRO stage 3), for what is not said here.
        step_reuse: optimized, text-to-image: one step in so many is whole, the others reuse its inner layers' features:
            lossy (DeepCache). 1: all are.
        quantize_head: of quantized weights: the embedding and the head are int8; else in the activations' dtype.
        calibration: dtype "int4": what its rounding is fitted to: "auto" is a sample of Python's documentation; else a
            text file's path, or a list of texts; "off" rounds to the nearest, which starts sooner and loses more.
        parity: "fallback": a parity failure at start-up falls back to the baseline with a warning; "raise"; "off"
            (weights are then not checked for NaN either).
    """

    compile: bool = False
    cuda_graphs: bool = True
    page_tokens: Annotated[int, Field(ge=8, le=256)] = 16
    kv_cache_bytes: Annotated[int, Field(ge=1 << 16)] | None = None
    prefix_cache: bool = True
    max_step_tokens: Annotated[int, Field(ge=16, le=65536)] | None = None
    speculative: Literal["off", "prompt_lookup"] = "off"
    max_queue: Annotated[int, Field(ge=1, le=100_000)] = 1024
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    all_reduce: Literal["auto", "shared_memory", "gloo", "nccl"] = "auto"
    memory_limit_bytes: Annotated[int, Field(ge=1 << 20)] | None = None
    offload: Literal["off", "cpu", "nvme"] = "off"
    offload_folder: Annotated[str, Field(min_length=1)] | None = None
    ds_config: dict[str, Any] | None = None
    step_reuse: Annotated[int, Field(ge=1, le=10)] = 1
    quantize_head: bool = True
    calibration: str | list[str] = "auto"
    parity: Literal["fallback", "raise", "off"] = "fallback"

    @model_validator(mode="after")
    def _written(self) -> Self:
        self.refuse_unwritable("options.")
        return self

    @model_validator(mode="after")
    def _offload(self) -> Self:
        if self.offload == "off" and (self.offload_folder is not None or self.ds_config is not None):
            raise InvalidValueError("options.offload_folder, options.ds_config: only with options.offload")
        if (self.offload == "nvme") != (self.offload_folder is not None):
            raise InvalidValueError("options.offload_folder: with options.offload='nvme', and only there")
        if fault := settings_fault(self.ds_config or {}):
            raise InvalidValueError(f"options.ds_config: {fault}")
        stage = ((self.ds_config or {}).get("zero_optimization") or {}).get("stage", 3)
        if stage != 3:
            raise InvalidValueError(
                f"options.ds_config: zero_optimization.stage is {stage!r}; offloading needs stage 3"
            )
        return self

    def step_tokens(self, device: str, *, encoder: bool = False) -> int:
        """`max_step_tokens`, or what a "cuda" or "cpu" takes when it is None."""
        return self.max_step_tokens or (ENCODER_STEP_TOKENS if encoder else STEP_TOKENS)[device]


def _gpus(value: object) -> object:
    """[0, 1] is one replica's list; [[0, 1], [2, 3]] has one list a replica; tuples become lists."""
    if isinstance(value, (list, tuple)):
        return [list(part) if isinstance(part, (list, tuple)) else part for part in value]
    return value


class DeploymentConfig(Frozen):
    """Everything that `Session` takes; see the contract for each field's meaning."""

    model: str
    task: str | None = None
    name: str | None = None
    engine: Engine = "optimized"
    dtype: DType = "auto"
    device: Device = "auto"
    gpus: Annotated[list[int] | list[list[int]] | None, BeforeValidator(_gpus)] = None
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    max_length: Annotated[int, Field(ge=8, le=1 << 22)] | None = None
    max_batch: Annotated[int, Field(ge=1, le=4096)] | None = None
    kv_dtype: Literal["auto", "fp8"] = "auto"
    load_format: LoadFormat = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    persist: bool = False
    idle_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    options: EngineOptions = EngineOptions()
    port: Annotated[int, Field(ge=0, le=65535)] | None = None  # loopback TCP besides the socket; 0: any free

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: object) -> object:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, str) and not value.strip():
            raise InvalidValueError("model: give a folder or a hub name")
        return value

    @field_validator("name")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None:
            check_name(value)
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _options(cls, value: object) -> object:
        return {} if value is None else value

    @model_validator(mode="after")
    def _together(self) -> Self:
        self.refuse_unwritable()
        if self.options.compile and self.engine != "baseline":
            raise InvalidValueError("options.compile: only for engine='baseline' (the other does not compile)")
        if self.options.speculative != "off" and self.engine != "optimized":
            raise InvalidValueError("options.speculative: only for engine='optimized'")
        if self.options.step_reuse > 1 and self.engine != "optimized":
            raise InvalidValueError("options.step_reuse: only for engine='optimized'")
        if self.options.offload != "off":
            self._offloaded()
        if self.gpus is not None and self.device == "cpu":
            raise InvalidValueError("gpus: not together with device='cpu'")
        if self.gpus is not None:
            groups = [g if isinstance(g, list) else [g] for g in self.gpus] if self._grouped() else [self.gpus]
            flat = [gpu for group in groups for gpu in group]
            if len(flat) != len(set(flat)):
                raise InvalidValueError(f"gpus: a GPU is named twice in {self.gpus}")
            if len(flat) != self.tensor_parallel * self.replicas:
                need = self.tensor_parallel * self.replicas
                raise InvalidValueError(
                    f"gpus: {len(flat)} named, but tensor_parallel={self.tensor_parallel} x replicas={self.replicas} "
                    f"needs {need}"
                )
        return self

    def _offloaded(self) -> None:
        """Refuse what ZeRO-Inference does not go together with."""
        if self.tensor_parallel > 1:
            raise InvalidValueError(
                "options.offload: not together with tensor_parallel, which keeps the weights in place"
            )
        if self.options.compile or self.options.speculative != "off":
            raise InvalidValueError("options.offload: plain transformers run it, without compile and speculative")

    def _grouped(self) -> bool:
        return bool(self.gpus) and isinstance(self.gpus[0], list)  # type: ignore[index]


def check_name(name: str) -> None:
    """Refuse a deployment name that is not [A-Za-z0-9._/-]{1,64} or that would leave the state folder."""
    if not NAME_PATTERN.fullmatch(name) or any(part in ("", ".", "..") for part in name.split("/")):
        raise InvalidValueError(f"name: {name!r} may hold letters, digits and ._/- (1 to 64, not - first)")


def _stop_list(value: object) -> object:
    if isinstance(value, (str, dict)):
        return [value]
    return list(value) if isinstance(value, tuple) else value


#: What a greedy choice would ignore, and so is refused without `do_sample=True`.
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")
#: What beam search cannot be combined with, by the value that it has otherwise.
_NOT_WITH_BEAMS = {"do_sample": False, "logprobs": None}
#: What only beam search has.
_BEAMS_ONLY = ("length_penalty", "early_stopping")


def _not_tiny(value: float) -> float:
    if value < 1e-30:
        raise InvalidValueError("temperature: logits divided by less than 1e-30 are not finite")
    return value


Temperature = Annotated[float, Field(gt=0, le=100), AfterValidator(_not_tiny)]


class GenerationParams(Frozen):
    """Parameters of one text generation: transformers' names, meanings and (but for `do_sample`) defaults.

    `temperature`, `top_k`, `top_p`, `min_p` need `do_sample=True`; transformers would ignore them without it.
    `min_new_tokens` holds end tokens back, and they alone: a stop string ends an answer at once, as in transformers.
    Without a seed the server draws one, and the record keeps it.
    """

    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 128
    min_new_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)] = 0
    do_sample: bool = False
    temperature: Temperature = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    stop: Annotated[list[str], BeforeValidator(_stop_list)] = []  # noqa: RUF012  # pydantic copies it
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    num_return_sequences: Annotated[int, Field(ge=1, le=64)] = 1
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1  # above 1: beam search, by the baseline engine alone
    length_penalty: Annotated[float, Field(ge=-100, le=100)] = 1.0
    early_stopping: bool | Literal["never"] = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    ignore_eos: bool = False
    eos_token_id: Annotated[list[int] | None, BeforeValidator(number_list)] = None
    logit_bias: dict[int, float] | None = None
    return_full_text: bool = False
    speculative: bool = True  # False: not for this request, where the deployment speculates

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: list[str]) -> list[str]:
        if len(value) > MAX_STOP_STRINGS:
            raise InvalidValueError(f"stop: at most {MAX_STOP_STRINGS} strings")
        if any(not text or len(text.encode("utf-8", "replace")) > MAX_STOP_BYTES for text in value):
            raise InvalidValueError(f"stop: each string has 1 to {MAX_STOP_BYTES} bytes")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _bias(cls, value: dict[int, float] | None) -> dict[int, float] | None:
        if value is not None and (len(value) > 1024 or any(not math.isfinite(bias) for bias in value.values())):
            raise InvalidValueError("logit_bias: at most 1024 finite biases by token id")
        if value is not None and any(abs(bias) > MAX_LOGIT_BIAS for bias in value.values()):
            raise InvalidValueError(f"logit_bias: at most {MAX_LOGIT_BIAS:g}, which decides alone already")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise InvalidValueError(
                f"min_new_tokens: {self.min_new_tokens} is above max_new_tokens ({self.max_new_tokens})"
            )
        self._check_beams()
        if not self.do_sample:
            for name in SAMPLING_ONLY:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise InvalidValueError(f"{name}: acts only with do_sample=True")
        return self

    def _check_beams(self) -> None:
        if self.num_beams == 1:
            for name in _BEAMS_ONLY:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise InvalidValueError(f"{name}: acts only with num_beams above 1")
            if self.num_return_sequences > 1 and not self.do_sample:
                raise InvalidValueError("num_return_sequences: greedy decoding has one answer; set do_sample=True")
            return
        for name, value in _NOT_WITH_BEAMS.items():
            if getattr(self, name) != value:
                raise InvalidValueError(f"{name}: not together with num_beams above 1")
        if self.num_return_sequences > self.num_beams:
            raise InvalidValueError(
                f"num_return_sequences: {self.num_return_sequences} is above num_beams ({self.num_beams})"
            )


#: transformers' generation arguments that have no meaning here, and what to do instead.
REFUSED_GENERATION = {
    "max_length": "Use max_new_tokens (the new tokens alone).",
    "streamer": "Use stream(...), which yields chunks.",
    "pad_token_id": "Batches are packed; nothing is padded.",
    "use_cache": "The cache is always on.",
    **dict.fromkeys(("image", "mask_image", "strength"), "Pictures are taken by deployments of text-to-image."),
}
#: What other libraries call a parameter.
_OTHER_NAMES = {
    "n": "num_return_sequences",
    "max_tokens": "max_new_tokens",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "timeout": "timeout_s",
}


def parse_generation(values: Mapping[str, Any]) -> GenerationParams:
    """The generation parameters of keyword arguments.

    Raises:
        InvalidRequest: an unknown, refused or wrong parameter; the message names it.
    """
    known = GenerationParams.model_fields
    for name in values:
        if name in REFUSED_GENERATION:
            raise InvalidRequest(f"{name} cannot be set.", hint=REFUSED_GENERATION[name])
        if name in _OTHER_NAMES:
            raise InvalidRequest(f"There is no option {name!r}.", hint=f"Use {_OTHER_NAMES[name]}.")
        if name in known:
            continue  # looking for near names takes a millisecond
        if (meant := near(name, (*known, *REFUSED_GENERATION))) in REFUSED_GENERATION:
            raise InvalidRequest(f"There is no option {name!r}.", hint=REFUSED_GENERATION[meant])
    kept = {name: value for name, value in values.items() if value is not None}
    return GenerationParams.parse(kept, error=InvalidRequest)


class BenchConfig(PictureFields):
    """One benchmark: the workload's shape, its load, and the price. Lengths are in tokens, `PictureFields` of images.

    Attributes:
        prompts: the prompts themselves (of encoder tasks the inputs); None makes synthetic ones of `prompt_tokens`.
        prompt_tokens, new_tokens: a number, or a range ("64-512", (64, 512)) that each request draws from, by the seed.
        new_tokens, do_sample, temperature: of tasks that generate text.
        batch_size: of encoder tasks: inputs of one request.
        requests: requests of each point and arm; by default at least two for each one in flight, and every prompt once.
        duration_s: instead of requests: each point and arm sends for so long, and waits for what it has sent.
        repeat: passes over each point, with new prompts and arrivals; the summary has the medians over the passes.
        warmup: requests before each point that do not count; unless 0, at least one for each one in flight.
        concurrency: closed loop: so many requests are always in flight (one point each).
        rate: open loop: requests a second, Poisson arrivals (one point each); excludes concurrency.
        sweep: "concurrency" (or True) or "rate": doubles the load, from 1 or as given, to saturation or `sweep_limit`.
        slo: limits in seconds, "ttft=0.5,tpot=0.05,e2e=2" or a mapping; what meets all of them is goodput.
        prompt_seed: of synthetic prompts to generate from; None: `seed` where it is given, else a new one for each run.
        check: compare both arms' outputs: "exact", "close" (share of equal leading tokens) or "none"; of pictures how
            far they differ, unless it is "none".
        price: US dollars per GPU-hour (or per machine-hour without a GPU), the user's; None leaves cost empty.
    """

    prompts: Annotated[list[str] | list[dict[str, str]] | None, BeforeValidator(_stop_list)] = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt_tokens: Annotated[Tokens, BeforeValidator(partial(read_tokens, name="prompt_tokens"))] = 128
    new_tokens: Annotated[Tokens, BeforeValidator(partial(read_tokens, name="new_tokens"))] = 64
    requests: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    duration_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    repeat: Annotated[int, Field(ge=1, le=100)] = 1
    warmup: Annotated[int, Field(ge=0, le=1000)] = 2
    concurrency: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], BeforeValidator(number_list)] = [1]  # noqa: RUF012
    rate: Annotated[list[Annotated[float, Field(gt=0)]] | None, BeforeValidator(number_list)] = None
    sweep: Literal["concurrency", "rate"] | None = None
    sweep_limit: Annotated[float, Field(gt=0, le=4096)] = 256.0
    slo: Annotated[dict[str, float] | None, BeforeValidator(read_slo)] = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    prompt_seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    price: Annotated[float, Field(ge=0)] | None = None
    check: Literal["exact", "close", "none"] = "exact"
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    do_sample: bool = False
    temperature: Temperature = 1.0
    timeout_s: Annotated[float, Field(gt=0)] = 600.0

    @model_validator(mode="before")
    @classmethod
    def _sweep(cls, values: Any) -> Any:
        """`sweep=True` sweeps the rate where one is given, else the concurrency; False is none."""
        if isinstance(values, dict) and isinstance(values.get("sweep"), bool):
            kind = "rate" if values.get("rate") is not None else "concurrency"
            return {**values, "sweep": kind if values["sweep"] else None}
        return values
