"""What a model is, from its config.json and its files' headers alone: family, size, tasks, memory. Never imports torch.

`miinb.models()` is the table of families; the module is callable for that (see the end).
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import miinb.engine.parameters as sizes
from miinb.checkpoint import TensorEntry, gguf_config, main_dtype, read_gguf, read_safetensors, safetensors_files
from miinb.config import LoadFormat
from miinb.engine.encoder_spec import EncoderSpec
from miinb.engine.image_parameters import count_pipeline
from miinb.engine.labels import function_of, labels_of
from miinb.engine.parameters import QUANTIZED, Parameters, count_encoder, count_parameters
from miinb.engine.policies import ENCODERS, POLICIES, decoder_spec, encoder_spec
from miinb.engine.spec import NO_LIMIT, DecoderSpec
from miinb.errors import BrokenCheckpoint, InvalidValue, MissingHead, ModelError, UnsupportedModel
from miinb.location import gguf_file, locate, read_config
from miinb.pipelines import Pipeline, is_pipeline, read_pipeline
from miinb.tasks import TASKS, find_task, tasks_of

#: The least compute capability of a GPU that converts fp8 by itself, and of one that multiplies int8 and int4 weights.
FP8_CAPABILITY, QUANTIZED_CAPABILITY = (8, 9), (8, 0)
#: Bytes of one weight by miinb's dtype names; int8 and int4 have scales of about four bytes for each 64 weights.
DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0625, "fp8": 1.0, "int4": 0.5625}

DECODER_TASKS = ("text-generation", "conversational")
ENCODER_TASKS = ("text-classification", "token-classification", "question-answering", "fill-mask", "feature-extraction")
#: config.json's names of one fact, by family; the first that is there counts.
_KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"),
    "kv_heads": ("num_key_value_heads",),
    "context_length": ("max_position_embeddings", "n_positions", "seq_length", "n_ctx", "max_seq_len"),
    "vocab_size": ("vocab_size",),
}
#: More of its numbers, and those that need not be whole.
_WHOLE = ("intermediate_size", "head_dim", "type_vocab_size", "hidden_dim", "n_inner", "ffn_dim", "embedding_size")
_FRACTIONS = ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as its files describe it.

    Attributes:
        source: what the user gave.
        folder: where its files are.
        format: "safetensors", "gguf", or "none" when only a configuration is there (`load_format="dummy"`).
        family: config.json's model_type.
        architecture: the class name that config.json names first, or "".
        tasks: names of the tasks that its head serves.
        config: config.json as it is (for GGUF: the same made from the file's metadata).
        tensors: the checkpoint's tensors, by name.
        parameters: how many (tied ones once) the optimized engine loads, where it has a form for the model, else all.
        dtype: the checkpoint's main dtype, by miinb's names; "bf16" for quantized GGUF.
        context_length: most tokens of one sequence; 0 when the family has no limit.
        head_size: width of one attention head.
        spec: the decoder for the optimized engine; None where it has no form there.
        encoder: the encoder for the optimized engine, with the head of the model's own task (see `serving`), or None.
        unfused: why there is neither: the family has no policy, or this configuration of it no fused form
            (`UnsupportedModel`), or config.json lacks a part (`BrokenCheckpoint`).
        pipeline: of text-to-image: diffusers' pipeline; its tensors' names begin with the part's.
    """

    source: str
    folder: Path
    format: str
    family: str
    architecture: str
    tasks: tuple[str, ...]
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    parameters: int
    dtype: str
    context_length: int
    vocab_size: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    spec: DecoderSpec | None = field(default=None, repr=False)
    encoder: EncoderSpec | None = field(default=None, repr=False)
    unfused: ModelError | None = None
    pipeline: Pipeline | None = None

    @property
    def counted(self) -> Parameters | None:
        """The parameters by kind, where the optimized engine has a form for the model."""
        if self.encoder is not None:
            return count_encoder(self.encoder)
        return None if self.spec is None else count_parameters(self.spec, POLICIES[self.family])

    @property
    def optimized(self) -> bool:
        """Whether the optimized engine has a form for it."""
        return bool(self.spec or self.encoder or (self.pipeline and self.pipeline.diffusion))

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return sorted({entry.file for entry in self.tensors.values()})

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """The checkpoint's bytes by the format's dtype names."""
        sizes: dict[str, int] = {}
        for entry in self.tensors.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
        return sizes

    def weights_bytes(
        self, dtype: str | None = None, ranks: int = 1, *, on_gpu: bool = False, quantize_head: bool = True
    ) -> int:
        """Bytes of the weights in a dtype (default: the checkpoint's); with several ranks, those of each.

        Ranks share the matrices (of an encoder the layers'); all else is whole on each. What cannot be split counts
        whole. The options are of quantized dtypes.
        """
        dtype = dtype or self.dtype
        if self.encoder is not None:
            return sizes.encoder_bytes(self.encoder, dtype, ranks, on_gpu=on_gpu)
        if self.spec is not None and dtype in QUANTIZED:
            form = {"on_gpu": on_gpu, "tables": quantize_head}
            return sizes.quantized_bytes(self.spec, POLICIES[self.family], dtype, ranks, **form)
        numbers = self.parameters
        if self.spec is not None and (counted := self.counted) is not None:
            numbers = counted.others + sizes.rank_matrices(self.spec, counted.matrices, ranks)
        return int(numbers * DTYPE_BYTES[dtype])

    def step_bytes(self, dtype: str, tokens: int, ranks: int = 1, *, on_gpu: bool = False) -> int:
        """About what an encoder's step of so many tokens takes of each rank besides the weights, else 0."""
        if self.encoder is None:
            return 0
        number = sizes.activation_bytes(dtype, on_gpu=on_gpu)
        return sizes.step_bytes(sizes.rank_encoder(self.encoder, ranks), number, tokens)

    def labels(self) -> tuple[tuple[str, ...], str]:
        """The labels of a classifier's outputs, in their order, and what is wrong with config.json's names, or ""."""
        return labels_of(self.config)

    def function(self) -> str:
        """What makes a text classifier's logits scores: softmax, sigmoid or none."""
        return function_of(self.config)

    def kv_bytes_per_token(
        self, dtype: str = "", ranks: int = 1, kv_dtype: str = "auto", *, on_gpu: bool = False
    ) -> int:
        """Bytes of keys and values that one token adds to the cache of each rank.

        Args:
            dtype: of the weights, and so of the cache.
            ranks: that share the model.
            kv_dtype: "fp8" is one byte a number, and a scale of two bytes for each head's key and value.
            on_gpu: with quantized weights the cache has 2 bytes a number on a GPU, 4 on a CPU.
        """
        if self.encoder is not None or (self.tasks and "text-generation" not in self.tasks):
            return 0  # encoders keep nothing
        number = sizes.activation_bytes(dtype or self.dtype, on_gpu=on_gpu)
        layers, heads, size = self.layers, self.kv_heads, self.head_size
        if self.spec is not None:
            layers, heads, size = self.spec.layers, self.spec.kv_heads, self.spec.head_size
        head = size + 2 if kv_dtype == "fp8" else size * number
        return int(2 * layers * -(-heads // ranks) * head)

    def task(self, asked: str | None = None) -> str:
        """The task to serve: the one asked for if the model can, else the only one that it names.

        Raises:
            InvalidValue: there is no such task, or there are several and none was chosen.
            UnsupportedModel: the model's head does not serve the task.
        """
        if asked is None:
            main = [name for name in self.tasks if name != "conversational"]
            if len(main) == 1:
                return main[0]
            raise InvalidValue(
                f"task: {self.source} does not tell its task.", hint=f"Give one of: {', '.join(main or TASKS)}."
            )
        name = find_task(asked).name
        may = name in ENCODER_TASKS and self.family in ENCODERS  # if the head's weights are there, as `serving` sees
        if self.tasks and name not in self.tasks and name != "feature-extraction" and not may:
            raise UnsupportedModel(
                f"{self.architecture} of {self.source} does not serve {name}.", hint=f"It serves {self.tasks[0]}."
            )
        return name

    def serving(self, task: str) -> ModelInfo:
        """The model with the head of a task, which may be another than config.json's first class has.

        Raises:
            MissingHead: the files lack weights of that head.
        """
        if self.family not in ENCODERS or task not in ENCODER_TASKS:
            return self
        policy, tied = ENCODERS[self.family], bool(self.config.get("tie_word_embeddings", True))
        names = self.tensors if self.format == "safetensors" else ()
        missing = policy.missing(policy.head(task), names, tied=tied) if names else []
        if missing:
            more = f" and {len(missing) - 1} more tensors are" if missing[1:] else " is"
            hint = f"It serves {', '.join(self.tasks) or 'feature-extraction'}; use a model trained for {task}."
            if task in self.tasks:
                hint = "Its files may be damaged: fetch or save the model again."
            what = "only a part of the" if task in self.tasks else "no"
            raise MissingHead(f"{self.source} has {what} head for {task}: {missing[0]}{more} missing.", hint=hint)
        spec, unfused = _encoder(self.config, task, self.source)
        counted = self.parameters if spec is None else count_encoder(spec).total
        return dataclasses.replace(self, encoder=spec, unfused=unfused, parameters=counted)


def inspect(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    load_format: LoadFormat = "auto",
) -> ModelInfo:
    """What the model in a folder, in a GGUF file or of a hub name is.

    Raises:
        ModelNotFound: neither a folder nor a name in the local cache (and it could not be fetched).
        UnsupportedModel: no configuration, code from the model's folder that was not allowed, or pickled weights.
        BrokenCheckpoint: damaged or missing files, by name.
    """
    place = locate(model, revision=revision)
    if is_pipeline(place):
        return _describe_pipeline(str(model), place, load_format)
    gguf = gguf_file(place)
    if gguf is not None:
        metadata, entries = read_gguf(gguf)
        config, folder, form = gguf_config(metadata, entries, gguf), gguf.parent, "gguf"
    else:
        config, folder, form = read_config(place), place, "safetensors"
        entries = [entry for file in safetensors_files(folder) for entry in read_safetensors(file)]
    if config.get("auto_map") and not trust_remote_code:
        raise UnsupportedModel(
            f"{model} brings its own Python code.", hint="Read it; trust_remote_code=True then allows it to run."
        )
    if not config.get("model_type"):
        raise UnsupportedModel(f"config.json of {model} has no model_type.", hint="Is it a transformers model?")
    if not entries:
        if load_format != "dummy":
            raise _no_weights(folder)
        form = "none"
    return _describe(str(model), folder, form, config, entries)


def _no_weights(folder: Path) -> UnsupportedModel | BrokenCheckpoint:
    pickles = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt")]
    if pickles:
        return UnsupportedModel(
            f"{folder} holds its weights as a pickle ({pickles[0].name}), which can run code when read.",
            hint="Load it with transformers and save_pretrained() it: that writes safetensors.",
        )
    return BrokenCheckpoint(
        f"{folder} holds no weights.", hint="load_format='dummy' makes random ones for a benchmark."
    )


def _describe(source: str, folder: Path, form: str, config: Mapping[str, Any], entries: list[TensorEntry]) -> ModelInfo:
    parts = config.get("text_config")
    sizes = {**parts, **config} if isinstance(parts, dict) else config  # of a model of several kinds of input
    _check_numbers(sizes, source)
    facts = {name: _first(sizes, keys) for name, keys in _KEYS.items()}
    heads = facts["heads"]
    architecture = (config.get("architectures") or [""])[0]
    tasks = tasks_of(architecture) if architecture else ()
    encodes = tasks[0] in ENCODER_TASKS if tasks else config["model_type"] in ENCODERS
    spec, encoder, counted = None, None, 0
    if encodes:
        encoder, unfused = _encoder(config, tasks[0] if tasks else "feature-extraction", source)
        counted = count_encoder(encoder).total if encoder else 0
    else:
        spec, unfused = _decoder(config, source)
        counted = count_parameters(spec, POLICIES[config["model_type"]]).total if spec else 0
    longest = next((form.max_length for form in (spec, encoder) if form), facts["context_length"])
    return ModelInfo(
        source=source,
        folder=folder,
        format=form,
        family=config["model_type"],
        architecture=architecture,
        tasks=tasks,
        config=config,
        tensors={entry.name: entry for entry in entries},
        parameters=counted or sum(entry.elements for entry in entries) or estimate_parameters(sizes),
        dtype=main_dtype(config, entries),
        context_length=0 if longest == NO_LIMIT else longest,
        vocab_size=facts["vocab_size"],
        layers=facts["layers"],
        hidden_size=facts["hidden_size"],
        heads=heads,
        kv_heads=facts["kv_heads"] or heads,
        head_size=sizes.get("head_dim") or (facts["hidden_size"] // heads if heads else 0),
        spec=spec,
        encoder=encoder,
        unfused=unfused,
    )


def _describe_pipeline(source: str, folder: Path, load_format: LoadFormat) -> ModelInfo:
    pipeline, entries = read_pipeline(folder, source, dummy=load_format == "dummy")
    text = pipeline.configs["text_encoder"]
    return ModelInfo(
        source=source,
        folder=folder,
        format="safetensors" if entries else "none",
        family="stable-diffusion",
        architecture=pipeline.name,
        tasks=tasks_of(pipeline.name),
        config=pipeline.configs["unet"],
        tensors={entry.name: entry for entry in entries},
        parameters=sum(entry.elements for entry in entries) or count_pipeline(pipeline.configs),
        dtype=main_dtype({"dtype": "float16"}, entries),
        context_length=pipeline.text_length,
        vocab_size=_first(text, _KEYS["vocab_size"]),
        layers=0,
        hidden_size=_first(text, _KEYS["hidden_size"]),
        heads=0,
        kv_heads=0,
        head_size=0,
        unfused=pipeline.unfused,
        pipeline=pipeline,
    )


def _decoder(config: Mapping[str, Any], source: str) -> tuple[DecoderSpec | None, ModelError | None]:
    try:
        _check_unquantized(config, source)
        return decoder_spec(config, source), None
    except ModelError as error:
        return None, error


def _encoder(config: Mapping[str, Any], task: str, source: str) -> tuple[EncoderSpec | None, ModelError | None]:
    try:
        _check_unquantized(config, source)
        return encoder_spec(config, task, source), None
    except ModelError as error:
        return None, error


def _check_unquantized(config: Mapping[str, Any], source: str) -> None:
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else "?"
        raise UnsupportedModel(f"The weights of {source} are quantized already ({method}).")


def _check_numbers(config: Mapping[str, Any], source: str) -> None:
    """Raise BrokenCheckpoint where config.json has something else in the place of a number."""
    whole = {key for keys in _KEYS.values() for key in keys} | set(_WHOLE)
    for key in (*sorted(whole), *_FRACTIONS):
        value = config.get(key)
        kinds = (int,) if key in whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, (*kinds, list, NoneType)):  # a list: one a layer
            what = "no whole number" if key in whole else "no number"
            raise BrokenCheckpoint(
                f"config.json of {source} cannot be used: {key} is {value!r:.40}, {what}.",
                hint="Write numbers without quotes, or fetch the model again.",
            )


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int)), 0)


def estimate_parameters(config: Mapping[str, Any]) -> int:
    """Parameters, less biases and norms, where there are no files and no policy: a guess from the usual names."""
    layers, hidden, heads, kv_heads, _, vocab = (_first(config, keys) for keys in _KEYS.values())
    head_size = config.get("head_dim") or (hidden // heads if heads else 0)
    attention = hidden * head_size * (2 * heads + 2 * (kv_heads or heads))
    gated = "silu" in str(config.get("hidden_act"))
    inner = config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_dim") or 4 * hidden
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return layers * (attention + (3 if gated else 2) * hidden * inner) + embeddings


class _CallableModule(types.ModuleType):
    """`miinb.models` is this module for imports and, by the contract, a function for users: both must work."""

    def __call__(self) -> Any:
        from miinb.families import families

        return families()


sys.modules[__name__].__class__ = _CallableModule
