"""What a decoder is, as data: `DecoderSpec` (the shape of the computation) and `Policy` (where its weights come from).

A family of models is one `Policy`: a function from config.json to a `DecoderSpec`, and a map from the fused layers'
parts to the modules of the Hugging Face checkpoint, with the way each is split over tensor-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miinb.errors import UnsupportedModel

#: `DecoderSpec.max_length` of a family whose positions have no end (ALiBi); above what any other has.
NO_LIMIT = 1 << 24


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding (Su et al., 2021).

    Attributes:
        dim: leading elements of each head that are rotated (all of them, or fewer in GPT-J and GPT-NeoX).
        theta: base of the frequencies.
        interleaved: pairs are neighbors (GPT-J) rather than halves (GPT-NeoX, LLaMA).
        scaling: config.json's rope parameters when they are not the default kind; `positions.py` has the kinds.
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """The shape of a decoder's computation. Sizes are one rank's after `shard`.

    Attributes:
        vocab_size: after `shard` the largest rank's share of it.
        inner_size: width between the two projections of the MLP.
        max_length: most tokens of one sequence.
        norm, eps: kind of norm and the number under its root.
        activation: a key of `kernels.activation.KINDS`.
        gated: the MLP is activation(gate) * up.
        scale: of the attention scores.
        rotary: None when positions are learned or come from ALiBi.
        windowed_rotary: of the layers that have a window, where theirs is another one (Gemma 3).
        positions: rows of the table of learned positions, 0 for none; `position_offset` is added first (OPT: 2).
        alibi: scores get the distance times a slope of each head (Press et al., 2022).
        windows: for each layer, how many positions a token sees (itself included), or None for all.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        logit_softcap: the same for the logits (Gemma 2).
        embed_scale: the tokens' embeddings are multiplied by it, rounded to their dtype (Gemma).
        qk_norm: queries and keys of each head are normalized (Qwen3).
        block: "serial" (attention, then MLP), "parallel" (both read one norm, GPT-J), "parallel_norms" (each has its
            own norm, GPT-NeoX), "post" (norms follow the residual additions, OPT-350m).
        residual_from_norm: what is added to a serial branch's result is the branch's normalized input (BLOOM's option).
        qkv_bias, out_bias, mlp_bias, head_bias: which linear layers have one.
        tied: the head is the embedding.
        embed_norm: the embedding is normalized (BLOOM).
        final_norm: there is a norm before the head.
        embed_size: width of the embedding when projections lead to and from `hidden_size` (OPT-350m), else 0.
    """

    vocab_size: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    inner_size: int
    max_length: int
    norm: Literal["rms", "layer"]
    eps: float
    activation: str
    scale: float
    gated: bool = False
    rotary: Rotary | None = None
    windowed_rotary: Rotary | None = None
    positions: int = 0
    position_offset: int = 0
    alibi: bool = False
    windows: tuple[int | None, ...] = ()
    softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    qk_norm: bool = False
    block: Literal["serial", "parallel", "parallel_norms", "post"] = "serial"
    residual_from_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied: bool = False
    embed_norm: bool = False
    final_norm: bool = True
    embed_size: int = 0

    def shard(self, ranks: int) -> DecoderSpec:
        """The computation of one of so many tensor-parallel ranks: its share of heads, inner width and vocabulary.

        Raises:
            UnsupportedModel: a size does not divide.
        """
        if ranks == 1:
            return self
        if misfit := self.misfit(ranks):
            raise UnsupportedModel(f"{misfit} do not divide by {ranks} ranks.")
        return dataclasses.replace(
            self,
            heads=self.heads // ranks,
            kv_heads=max(1, self.kv_heads // ranks),
            inner_size=self.inner_size // ranks,
            vocab_size=self.vocabulary_share(ranks),
        )

    def misfit(self, ranks: int) -> str:
        """What cannot be shared by so many ranks, in words; "" if all can."""
        if self.heads % ranks:
            return f"{self.heads} attention heads"
        if self.kv_heads % ranks and ranks % self.kv_heads:  # fewer of them than ranks are copied
            return f"{self.kv_heads} key/value heads"
        if self.inner_size % ranks:
            return f"{self.inner_size} columns between the MLP's layers"
        if self.vocabulary_share(ranks) * (ranks - 1) >= self.vocab_size:
            return f"{self.vocab_size} tokens of the vocabulary"
        return ""

    def vocabulary_share(self, ranks: int) -> int:
        """Rows of the head that each rank has (the last one perhaps fewer): a multiple of 8, as matrix kernels like."""
        return self.vocab_size if ranks == 1 else -(-self.vocab_size // (8 * ranks)) * 8


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weight (and bias) of one part comes from.

    Attributes:
        modules: the checkpoint's modules, "{i}" standing for the layer; their rows are put one below the other.
        split: how ranks share it: "column" (output rows), "row" (input columns, summed afterwards), None (all of it).
        sections: how many matrices one module holds, one below the other (GPT-2's c_attn: 3).
        transposed: the checkpoint has [in, out] (GPT-2's Conv1D).
        by_head: the one module holds q, k and v of the first head, then of the second, ... (BLOOM, GPT-NeoX).
    """

    modules: tuple[str, ...]
    split: Literal["column", "row"] | None = None
    sections: int = 1
    transposed: bool = False
    by_head: bool = False


def rank_share(total: int, rank: int, ranks: int, unit: int = 1) -> slice:
    """A rank's part of `total` rows or columns that go in whole `unit`s (heads).

    Where there are fewer units than ranks, each is a copy on the ranks that use it: query heads go to ranks in order,
    and so do the key/value heads that they read.
    """
    units = total // unit
    start, count = rank * units // ranks, max(1, units // ranks)
    return slice(start * unit, (start + count) * unit)


def whole(*modules: str) -> Source:
    """Every rank has all of it."""
    return Source(modules)


def column(*modules: str, sections: int = 1, transposed: bool = False, by_head: bool = False) -> Source:
    """Each rank computes its share of the outputs."""
    return Source(modules, "column", sections, transposed, by_head)


def row(*modules: str, transposed: bool = False) -> Source:
    """Each rank reads its share of the inputs; the results are summed over ranks."""
    return Source(modules, "row", 1, transposed)


@dataclass(frozen=True, slots=True)
class Policy:
    """The injection policy of a family.

    Attributes:
        family: config.json's model_type.
        spec: config.json's content to the decoder's shape.
        prefix: of the base model's names; checkpoints of the base model alone lack it.
        weights: part (see `decoder.LayerWeights` and `decoder.Decoder`) to its source. A part without a source, or
            whose bias the spec lacks, does not exist in the family.
        ignored: patterns of checkpoint names that hold no parameters (buffers of old versions).
        norm_offset: added to the norms' weights as they are read (Gemma stores weight - 1).
    """

    family: str
    spec: Callable[[Mapping[str, Any]], DecoderSpec]
    prefix: str
    weights: Mapping[str, Source]
    ignored: tuple[str, ...] = ()
    norm_offset: float = 0.0


def checkpoint_name(name: str, prefix: str) -> str:
    """A tensor's name without the base model's prefix, or the part of it that the checkpoint has, in today's words.

    "decoder." is a part of "model.decoder."; checkpoints that were made for TensorFlow call a norm's numbers gamma and
    beta.
    """
    for part in prefix.split(".")[:-1]:
        name = name.removeprefix(f"{part}.")
    module, _, kind = name.rpartition(".")
    return f"{module}.{_LEGACY[kind]}" if kind in _LEGACY else name


_LEGACY = {"gamma": "weight", "beta": "bias"}
#: Parts of a layer that are norms over the hidden size; the last two follow a branch (Gemma 2).
LAYER_NORMS = ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm")


def linear_shape(spec: DecoderSpec, part: str) -> tuple[list[int], int, bool, int]:
    """Of a fused linear layer: rows of each matrix in it, columns, whether it has a bias, and the unit of shares."""
    q, kv = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    hidden, inner = spec.hidden_size, spec.inner_size
    embed = spec.embed_size or hidden
    return {
        "qkv": ([q, kv, kv], hidden, spec.qkv_bias, spec.head_size),
        "out": ([hidden], q, spec.out_bias, spec.head_size),
        "up": ([inner, inner] if spec.gated else [inner], hidden, spec.mlp_bias, 1),
        "down": ([hidden], inner, spec.mlp_bias, 1),
        "head": ([spec.vocab_size], embed, spec.head_bias, 1),
        "project_in": ([hidden], embed, False, 1),
        "project_out": ([embed], hidden, False, 1),
    }[part]


#: Kinds of rotary scaling whose angles depend on the position alone, and what config.json must say for each.
ROTARY_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("factor", "short_factor"),
}


def rotary_of(
    config: Mapping[str, Any], head_size: int, *, theta: float = 10000.0, part: float | None = None
) -> Rotary:
    """The rotary embedding that config.json tells, in transformers' old (`rope_theta`, `rope_scaling`) or new words.

    Args:
        config: config.json's content.
        head_size: elements of a head.
        theta: the family's base, when config.json has none.
        part: share of each head that is rotated, when `rope_parameters` does not say; None: the family rotates all.

    Raises:
        UnsupportedModel: a kind of scaling that is not known, or whose angles change with a sequence's length.
        ValueError: transformers does not have it either.
        KeyError: config.json lacks a number of the scaling.
    """
    values = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = values.get("rope_type", values.get("type", "default"))
    base = float(values.get("rope_theta", config.get("rope_theta", theta)))
    dim = head_size if part is None else int(head_size * values.get("partial_rotary_factor", part))
    if dim % 2 or not dim:
        raise UnsupportedModel(f"A rotary embedding of {dim} elements has no fused form.")
    longest = config.get("max_position_embeddings", 0)
    trained = config.get("original_max_position_embeddings") or values.get("original_max_position_embeddings", longest)
    if kind in ("default", "dynamic"):  # dynamic is default up to max_position_embeddings, past which nothing is served
        return Rotary(dim, base)
    if kind not in ROTARY_SCALINGS:
        if (known := names_of_transformers("modeling_rope_utils.py", r'"(\w+)": _compute')) and kind not in known:
            raise ValueError(f"there is no rotary scaling of kind {kind!r}")
        raise UnsupportedModel(f"Rotary scaling of kind {kind!r} has no fused form.")
    if kind == "longrope" and longest > trained:
        raise UnsupportedModel(f"Rotary scaling 'longrope' changes past {trained} tokens, which has no fused form.")
    values["factor"] = values.get("factor") or (longest / trained if kind in ("yarn", "longrope") else values["factor"])
    if kind == "longrope" and len(values["short_factor"]) != dim // 2:
        raise ValueError(f"short_factor has {len(values['short_factor'])} numbers, not {dim // 2}")
    numbers = {name: values[name] for name in ROTARY_SCALINGS[kind]}
    numbers |= {"rope_type": kind, "original_max_position_embeddings": trained}
    return Rotary(dim, base, scaling=values | numbers)


#: transformers' names of activations: ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation_of(name: str) -> str:
    """The kernels' name of transformers' activation.

    Raises:
        UnsupportedModel: there is no kernel for it.
        ValueError: transformers does not have it either.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if (known := names_of_transformers("activations.py", r'"(\w+)":')) and name not in known:
        raise ValueError(f"there is no activation {name!r}")
    raise UnsupportedModel(f"Activation {name!r} has no fused form.")


def names_of_transformers(file: str, pattern: str) -> set[str]:
    """The keys of a table of its, read from the source: importing it would import torch. Empty: it is not installed."""
    found = importlib.util.find_spec("transformers")
    source = Path(found.origin).parent / file if found and found.origin else None
    return set(re.findall(pattern, source.read_text(encoding="utf-8"))) if source and source.exists() else set()
