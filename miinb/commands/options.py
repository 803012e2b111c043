"""Options of the commands: read from the configuration classes, so that a new field is an option at once."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from miinb.config import BenchConfig, DeploymentConfig, EngineOptions, GenerationParams
from miinb.errors import InvalidValue, near
from miinb.image_params import ImageParams
from miinb.tasks import TASKS

#: What can stand for a value in completion: names of running deployments, or of commands.
Names = Literal["", "deployments", "commands", "runs"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option or positional argument of a command.

    Attributes:
        name: the Python name; the option is the same with dashes.
        help: one line for `--help`.
        read: makes the value of its text; None for a switch without a value.
        short: one letter, or "".
        choices: the values that it can have; () for any.
        positional: given by place, not by name. `many` then takes all words that are left.
        many: the option may be repeated and its values are a list.
        names: what completion offers as values.
        value: what a switch sets.
        field: the field that it sets when that is not `name` (switches that turn a default off).
        default: what holds without it, for help; None where help says it or nothing does.
        objects: in a notebook `{name}` as the whole value gives the variable's object, not its text.
        also: further flags.
    """

    name: str
    help: str
    read: Callable[[str], Any] | None = str
    short: str = ""
    choices: tuple[str, ...] = ()
    positional: bool = False
    many: bool = False
    names: Names = ""
    value: Any = True
    field: str = ""
    default: Any = None
    objects: bool = False
    also: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """How the option is written, its name last: ("-n", "--max-new-tokens"); () for a positional one."""
        if self.positional:
            return ()
        return (*((f"-{self.short}",) if self.short else ()), *self.also, "--" + self.name.replace("_", "-"))

    @property
    def target(self) -> str:
        """The field that it sets."""
        return self.field or self.name

    @property
    def described(self) -> str:
        """The help text, with the default where there is one."""
        shown = self.default is not None and self.default != "" and self.read is not None and self.default != []
        if not shown or "default" in self.help:
            return self.help
        text = ",".join(map(str, self.default)) if isinstance(self.default, list) else f"{self.default}"
        return f"{self.help} (default: {text.removesuffix('.0')})"


def words(text: str) -> list[str]:
    """The parts of "a,b"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def integers(text: str) -> list[int]:
    """[1, 4] of "1,4"."""
    return [int(part) for part in text.split(",")] if text else []


def floats(text: str) -> list[float]:
    """[0.5, 2.0] of "0.5,2"."""
    return [float(part) for part in text.split(",")] if text else []


def gpu_groups(text: str) -> list[int] | list[list[int]]:
    """[0, 1] of "0,1"; [[0, 1], [2, 3]] of "0,1;2,3"."""
    groups = [integers(group) for group in text.split(";") if group.strip()]
    return groups[0] if len(groups) == 1 else groups


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """90.0 of "90", "90s" and "1.5m"; hours are "2h"."""
    text = text.strip()
    number = float(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else float(text)
    if not 0 <= number < math.inf:
        raise ValueError(text)
    return number


def pixels(text: str) -> tuple[int, int]:
    """(512, 768) of "512x768", width first."""
    width, height = text.lower().split("x")
    return int(width), int(height)


def escapes(text: str) -> str:
    r"""Text with \n, \t and \\ read as in Python: stop strings are mostly line ends."""
    marked = text.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t")
    return marked.replace("\0", "\\")


def biases(text: str) -> dict[int, float]:
    """{50: -1.0, 60: 2.0} of "50=-1,60=2"."""
    return {int(token): float(bias) for token, _, bias in (part.partition("=") for part in words(text))}


_DEPLOYMENT_HELP = {
    "task": "Hugging Face task; inferred when the model leaves one choice",
    "name": "name of the deployment; made from the model's by default",
    "engine": "this project's engine or plain transformers",
    "dtype": "number format of the weights; auto is the checkpoint's",
    "device": "auto takes the GPU when there is one",
    "gpus": 'GPUs to use: "0,1", or one group a replica: "0,1;2,3"',
    "tensor_parallel": "GPUs that share one copy of the model",
    "replicas": "copies of the model",
    "max_length": "longest prompt and answer together, in tokens",
    "max_batch": "most sequences at once",
    "kv_dtype": "number format of the KV cache",
    "load_format": "dummy: random weights, for benchmarks",
    "revision": "branch, tag or commit of the model in the hub's cache",
    "trust_remote_code": "run code that comes with the model",
    "persist": "outlives this notebook or terminal, until idle too long or stopped",
    "idle_timeout_s": "a persistent deployment ends after so long without a request: 1800, 30m, 2h",
    "start_timeout_s": "seconds that the start may take",
    "port": "also listen on this loopback TCP port (0: any free one), guarded by a token",
}
_ENGINE_HELP = {
    "compile": "baseline engine: static cache or torch.compile, whichever is faster",
    "cuda_graphs": "do not capture decode steps in CUDA graphs",
    "page_tokens": "tokens in one page of the KV cache (GPU)",
    "kv_cache_bytes": "memory of the KV cache",
    "prefix_cache": "do not reuse equal beginnings of prompts",
    "max_step_tokens": "most tokens in one step",
    "speculative": "guess several tokens at once from equal text; the answers stay the same",
    "max_queue": "most requests that wait",
    "threads": "CPU threads of one rank",
    "all_reduce": "sums over ranks: on a CPU by shared memory (compiled at first use) or gloo, on GPUs by nccl alone",
    "memory_limit_bytes": "most memory of its device that a rank takes, however much is free",
    "offload": "a model that fits no other way: its weights wait there (ZeRO-Inference, slow)",
    "offload_folder": "of --offload nvme: a folder on a fast disk",
    "step_reuse": "text-to-image: one step in so many is whole, the others reuse its inner layers (lossy; 1: all are)",
    "quantize_head": "int8, int4, fp8: keep the embedding and the head in bf16 (fp32 on a CPU)",
    "calibration": "int4: what its rounding is fitted to: a text file, auto (Python's documentation) or off",
    "parity": "what a failed self-check at the start does",
}
_GENERATION_HELP = {
    "max_new_tokens": "most new tokens of an answer",
    "min_new_tokens": "fewest new tokens before an end token (a stop string ends an answer all the same)",
    "do_sample": "draw tokens at random instead of taking the most likely one",
    "temperature": "above 1 more random, below 1 less (with --do-sample)",
    "top_k": "draw among the k most likely tokens (with --do-sample); 0: all",
    "top_p": "draw among the most likely tokens of this total probability (with --do-sample)",
    "min_p": "drop tokens below this share of the best one's probability (with --do-sample)",
    "repetition_penalty": "above 1 makes tokens that were there less likely",
    "presence_penalty": "subtracted from the logits of tokens that were there",
    "frequency_penalty": "subtracted once for each time that a token was there",
    "stop": r"end before this text (\n is a line end); may be repeated",
    "seed": "same seed, same answer",
    "num_return_sequences": "answers for each prompt (with --do-sample or --num-beams)",
    "num_beams": "beam search over so many (baseline engine)",
    "length_penalty": "above 0 favors long answers, below 0 short ones (with --num-beams)",
    "early_stopping": "end the search with as many answers as beams (with --num-beams)",
    "logprobs": "report the log-probabilities of this many tokens a place",
    "ignore_eos": "go on after the end token",
    "eos_token_id": "end tokens, by id: 2,50256",
    "logit_bias": "added to the logits of tokens, by id: 50=-1,60=2",
    "return_full_text": "put the prompt before the answer",
    "speculative": "do not guess tokens for this request",
}
#: Of text-to-image; `seed` is that of texts.
_IMAGE_HELP = {
    "num_inference_steps": "pictures: steps of the denoising",
    "guidance_scale": "pictures: how closely they follow the prompt; 1: no guidance, half the work",
    "height": "pictures: pixels, a multiple of 8 (default: what the model was trained for)",
    "width": "pictures: the same",
    "negative_prompt": "pictures: what to keep away from",
    "num_images_per_prompt": "pictures of each prompt",
    "scheduler": "pictures: a scheduler's class of diffusers (default: the model's own)",
    "image_format": "pictures: the format of their files",
    "strength": "pictures: with --image: how much of it is painted anew, 0 to 1 (default: 0.8, with --mask 1)",
}
_BENCH_HELP = {
    "prompt_tokens": "length of the synthetic prompts: 256, or a range: 64-512",
    "new_tokens": "tokens of every answer (equal work for all): 128, or a range: 32-256",
    "batch_size": "encoder tasks: inputs of one request",
    "num_images_per_prompt": "pictures: of one request, computed together; several are a point each: 1,8",
    "num_inference_steps": "pictures: steps of the denoising",
    "guidance_scale": "pictures: how closely they follow the prompt",
    "width": "pictures: pixels, a multiple of 8 (default: what the model was trained for)",
    "height": "pictures: the same",
    "negative_prompt": "pictures: what to keep away from",
    "scheduler": "pictures: a scheduler's class of diffusers (default: the model's own)",
    "requests": "requests at each load",
    "duration_s": "instead of --requests: seconds at each load",
    "repeat": "passes over each load; medians and their spread are shown",
    "warmup": "requests before the clock starts",
    "concurrency": "requests in flight: 1,4,16",
    "rate": "arrivals a second instead: 1,2",
    "sweep": "double the concurrency or the rate until all are saturated",
    "sweep_limit": "no load of a sweep is above it",
    "slo": "limits in seconds that make goodput: ttft=0.5,tpot=0.05,e2e=2",
    "seed": "seed of the lengths and the arrivals, and of the synthetic prompts where it is given",
    "prompt_seed": "text generation: seed of the synthetic prompts (default: --seed if given, else new for each run)",
    "price": "US dollars an hour of one GPU (or of the machine without one)",
    "check": "compare the answers of the deployments",
    "run": "name under which the run is kept",
    "do_sample": "draw tokens at random",
    "temperature": "with --do-sample",
    "timeout_s": "seconds that one request may take",
}
_READERS: dict[str, Callable[[str], Any]] = {
    "gpus": gpu_groups,
    "stop": escapes,
    "logit_bias": biases,
    "eos_token_id": integers,
    "concurrency": integers,
    "rate": floats,
    "prompt_tokens": str,  # the configuration reads ranges and objectives
    "new_tokens": str,
    "slo": str,
}
_SHORT = {"max_new_tokens": "n"}


def _read_of(annotation: Any) -> tuple[Callable[[str], Any] | None, tuple[str, ...]]:
    """Reader and choices of a field's type; None reads nothing (a switch)."""
    if get_origin(annotation) is Annotated:
        return _read_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _read_of(next(part for part in get_args(annotation) if part is not type(None)))
    if get_origin(annotation) is list:
        inner, _ = _read_of(get_args(annotation)[0])
        return integers if inner is int else floats if inner is float else annotation, ()
    if get_origin(annotation) is Literal:
        return str, tuple(get_args(annotation))
    return (None if annotation is bool else annotation), ()


def _reader(name: str, read: Callable[[str], Any] | None) -> Callable[[str], Any] | None:
    return _READERS.get(name, seconds if name.endswith("_s") else read)


def options_of(config: type[BaseModel], texts: Mapping[str, str]) -> tuple[Option, ...]:
    """One option for each field that has a help text, in the order of the texts."""
    made = []
    for name, text in texts.items():
        field = config.model_fields[name]
        read, choices = _read_of(field.annotation)
        option = Option(
            name, text, _reader(name, read), _SHORT.get(name, ""), choices, many=name == "stop", default=field.default
        )
        if read is None and field.default is True:
            option = replace(option, name=f"no_{name}", field=name, value=False)
        made.append(option)
    return tuple(made)


DEPLOYMENT = options_of(DeploymentConfig, _DEPLOYMENT_HELP)
ENGINE = options_of(EngineOptions, _ENGINE_HELP)
#: What of a deployment's options the plan depends on.
PLANNED = (
    *(o for o in DEPLOYMENT if o.name not in ("name", "persist", "idle_timeout_s", "start_timeout_s", "port")),
    *ENGINE,
)
#: Options of every command in a notebook.
IN_CELLS = (
    Option("output", "keep the value in this variable", short="o"),
    Option("quiet", "show nothing", read=None, short="q"),
    Option("raw", "leave {name} as it is", read=None),
    Option("show", "print the prompt after {name} was replaced", read=None),
)
GENERATION = options_of(GenerationParams, _GENERATION_HELP)
#: Short names of options of pictures.
_IMAGE_ALSO = {
    "num_inference_steps": ("--steps",),
    "guidance_scale": ("--guidance",),
    "negative_prompt": ("--negative",),
    "num_images_per_prompt": ("-k", "--images"),
}
IMAGES = (
    *(replace(option, also=_IMAGE_ALSO.get(option.name, ())) for option in options_of(ImageParams, _IMAGE_HELP)),
    Option("size", "pictures: width and height: 512x768", pixels),
    Option(
        "image",
        "pictures: begin from this file (a notebook's {name}: a PIL image); may be repeated, one for each prompt",
        many=True,
        objects=True,
    ),
    Option(
        "mask",
        "pictures: of --image paint only what is white here (the rest changes as the VAE does); may be repeated too",
        many=True,
        field="mask_image",
        objects=True,
    ),
    Option("out", "pictures: write them to this folder (a terminal's default: where you are)", also=("--save",)),
)
#: Says a default aloud: with it a parameter that only a draw has is refused.
GREEDY = Option("greedy", "take the most likely token each time (the default)", None, value=False, field="do_sample")
BENCH = options_of(BenchConfig, _BENCH_HELP)
#: What each option of `predict` does, for help and tooltips.
PREDICTION_HELP = {
    "top_k": "the best so many",
    "function_to_apply": "what makes scores of logits",
    "aggregation_strategy": "join tokens to names; how a name gets its label",
    "ignore_labels": "leave out these labels: O,MISC",
    "stride": "read a long text in windows that share so many tokens",
    "doc_stride": "tokens that the windows of a long context share",
    "max_answer_len": "longest answer, in tokens",
    "max_seq_len": "tokens of a window, question and context together",
    "max_question_len": "longest question, in tokens",
    "handle_impossible_answer": "let the answer be that there is none",
    "align_to_words": "answers may begin and end inside a word",
    "targets": "only these tokens: a,b",
    "pooling": "a vector for each text (mean, first) or for each token (none)",
    "normalize": "vectors of length 1",
    "truncation": "cut off what the model cannot take (an error otherwise)",
}


TIMEOUT = Option("timeout_s", "seconds that all of it may take: 90, 90s, 5m (default: 300)", seconds)


def prediction_options() -> tuple[Option, ...]:
    """The options of `predict`, each with the tasks that know it; a task refuses the others'."""
    made = []
    for name, text in PREDICTION_HELP.items():
        tasks = [task for task in TASKS.values() if name in task.options]
        known = tasks[0].options[name]
        read = None if bool in known.kinds else words if list in known.kinds else int if int in known.kinds else str
        shown = f"{text} ({', '.join(task.name for task in tasks)})"
        option = Option(name, shown, read, choices=known.choices)
        if read is None and known.default is True:
            option = replace(option, name=f"no_{name}", field=name, value=False)
        made.append(option)
    return (*made, TIMEOUT)


PREDICTION = prediction_options()


def given(values: Mapping[str, Any], options: Iterable[Option]) -> dict[str, Any]:
    """The values of these options that the user gave."""
    return {option.target: values[option.target] for option in options if values.get(option.target) is not None}


def read_value(option: Option, text: str) -> Any:
    """The value of an option's text.

    Raises:
        InvalidValue: it has another form or is not among the choices.
    """
    shown = option.flags[-1] if option.flags else option.name
    if option.choices and text not in option.choices:
        nearest = near(text, option.choices)
        hint = f"Did you mean {nearest!r}?" if nearest else ""
        raise InvalidValue(f"{shown}: {text!r} is none of {', '.join(option.choices)}.", hint=hint)
    if option.read is None:
        raise InvalidValue(f"{shown} takes no value.")
    try:
        return option.read(text)
    except ValueError:
        kinds: dict[Any, str] = {int: "a whole number", float: "a number", seconds: "a time: 90, 90s, 30m or 2h"}
        kind = kinds.get(option.read, "of the right form")
        raise InvalidValue(f"{shown}: {text!r} is not {kind}.", hint=f"It is: {option.help}.") from None
