"""What an encoder and its head are, as data: `EncoderSpec`, `HeadSpec`, and a family's `EncoderPolicy`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from miinb.engine.spec import Source, checkpoint_name
from miinb.errors import UnsupportedModel

#: Activation of a head's layer that is the body's own (config.json's).
BODY = "body"


@dataclass(frozen=True, slots=True)
class HeadLayer:
    """A linear layer of a head, then its activation, then its norm.

    Attributes:
        module: the checkpoint's, without the base model's prefix.
        outputs: its width; "vocab": it is the decoder of tokens, whose weight is the embedding where they are tied.
        activation: a key of `kernels.activation.KINDS`, "tanh", `BODY`, or None.
        norm: the checkpoint's module of a layer norm behind it, or "".
        bias: another name of its bias, which counts before its own where the weights are tied; or "".
    """

    module: str
    outputs: Literal["hidden", "embed", "labels", "vocab"]
    activation: str | None = None
    norm: str = ""
    bias: str = ""


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What is computed from the last hidden states.

    Attributes:
        rows: of which tokens: each sequence's "first", "all", or those that a request names ("wanted").
        layers: one after another; none for the hidden states themselves.
    """

    rows: Literal["first", "all", "wanted"]
    layers: tuple[HeadLayer, ...] = ()


#: The head of embeddings, in every family.
HIDDEN_STATES = HeadSpec("all")


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """The shape of an encoder's computation: embeddings with a norm, layers with their norms behind, a head.

    Every linear layer has a bias, and attention is over all of a sequence's tokens. Sizes are one rank's after `shard`:
    heads and the MLP's columns are shared, all else is whole on each rank.

    Attributes:
        inner_size: width between the two linear layers of the MLP.
        max_length: most tokens of one sequence.
        eps: under the root of the norms.
        activation: of the MLP, a key of `kernels.activation.KINDS`.
        position_offset: rows of the checkpoint's table of positions before the first token's (RoBERTa: 2). The last of
            them is the padding token's, which has no place of its own.
        token_types: rows of the table of token types; 0: the family has none.
        embed_size: width of the embeddings; where it is not `hidden_size`, a projection leads there (ELECTRA).
        labels: outputs of a classifying head.
        tied: the head's decoder of tokens is the embedding.
        head: what follows the last layer.
    """

    vocab_size: int
    layers: int
    hidden_size: int
    heads: int
    head_size: int
    inner_size: int
    max_length: int
    eps: float
    activation: str
    position_offset: int = 0
    token_types: int = 0
    embed_size: int = 0
    labels: int = 2
    tied: bool = True
    head: HeadSpec = field(default=HIDDEN_STATES)

    @property
    def scale(self) -> float:
        """Of the attention scores."""
        return float(self.head_size**-0.5)

    @property
    def padding(self) -> tuple[int, int] | None:
        """The padding token, and the row that it has in the table of positions; None: it has a place as all tokens."""
        return (self.position_offset - 1, self.max_length) if self.position_offset else None

    @property
    def projected(self) -> bool:
        """Whether a projection leads from the embeddings to the layers."""
        return self.embed_size != self.hidden_size

    @property
    def decodes(self) -> bool:
        """Whether the head's outputs are tokens."""
        return any(layer.outputs == "vocab" for layer in self.head.layers)

    def width(self, layer: HeadLayer) -> int:
        """How many outputs a layer of the head has."""
        sizes = {"hidden": self.hidden_size, "embed": self.embed_size, "labels": self.labels, "vocab": self.vocab_size}
        return sizes[layer.outputs]

    def head_shapes(self) -> list[tuple[int, int]]:
        """[outputs, inputs] of the head's layers."""
        widths = [self.hidden_size, *(self.width(layer) for layer in self.head.layers)]
        return list(zip(widths[1:], widths, strict=False))

    def linear_shape(self, part: str) -> tuple[list[int], int, int]:
        """Of a fused linear layer: rows of each matrix in it, columns, and the unit of ranks' shares."""
        attention, hidden = self.heads * self.head_size, self.hidden_size
        return {
            "qkv": ([attention] * 3, hidden, self.head_size),
            "out": ([hidden], attention, self.head_size),
            "up": ([self.inner_size], hidden, 1),
            "down": ([hidden], self.inner_size, 1),
            "project": ([hidden], self.embed_size, 1),
        }[part]

    def shard(self, ranks: int) -> EncoderSpec:
        """The computation of one of so many tensor-parallel ranks: its share of heads and of the MLP's columns.

        Raises:
            UnsupportedModel: a size does not divide.
        """
        if misfit := self.misfit(ranks):
            raise UnsupportedModel(f"{misfit} do not divide by {ranks} ranks.")
        return dataclasses.replace(self, heads=self.heads // ranks, inner_size=self.inner_size // ranks)

    def misfit(self, ranks: int) -> str:
        """What cannot be shared by so many ranks, in words; "" if all can."""
        if self.heads % ranks:
            return f"{self.heads} attention heads"
        return f"{self.inner_size} columns between the MLP's layers" if self.inner_size % ranks else ""


class EncoderBody(Protocol):
    """Reads the body of an encoder from config.json."""

    def __call__(self, config: Mapping[str, Any]) -> EncoderSpec:
        """The encoder without its head.

        Raises:
            UnsupportedModel: this configuration has no fused form.
        """
        ...


@dataclass(frozen=True, slots=True)
class EncoderPolicy:
    """The injection policy of a family of encoders.

    Attributes:
        family: config.json's model_type.
        body: config.json's content to the encoder's shape.
        prefix: of the base model's names; checkpoints of the base model alone lack it.
        weights: part (see `encoder.EncoderWeights` and `encoder.EncoderLayer`) to its source, with the way that
            tensor-parallel ranks share it.
        heads: by task; embeddings need none.
        ignored: patterns of checkpoint names that nothing here reads: buffers, and heads of no task.
    """

    family: str
    body: EncoderBody
    prefix: str
    weights: Mapping[str, Source]
    heads: Mapping[str, HeadSpec]
    ignored: tuple[str, ...] = ()

    def spec(self, config: Mapping[str, Any], task: str) -> EncoderSpec:
        """The encoder of a configuration with the head of a task.

        Raises:
            UnsupportedModel: this configuration has no fused form.
            KeyError: config.json lacks a part, or the family has no such head.
        """
        return dataclasses.replace(self.body(config), head=self.head(task))

    def head(self, task: str) -> HeadSpec:
        """The head of a task. Raises KeyError where the family has none."""
        return HIDDEN_STATES if task == "feature-extraction" else self.heads[task]

    def missing(self, head: HeadSpec, names: Iterable[str], *, tied: bool) -> list[str]:
        """The tensors of a head that a checkpoint with these names lacks; `tied`: its decoder is the embedding."""
        there = {checkpoint_name(name, self.prefix) for name in names}
        lacking = []
        for layer in head.layers:
            wanted = [] if tied and layer.outputs == "vocab" else [f"{layer.module}.weight"]
            if layer.bias not in there:
                wanted.append(f"{layer.module}.bias")
            if layer.norm:
                wanted += [f"{layer.norm}.weight", f"{layer.norm}.bias"]
            lacking += [name for name in wanted if name not in there]
        return lacking
