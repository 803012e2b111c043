"""The one fused encoder: every family is an `EncoderSpec`; its forward pass calls the operators of `miinb.kernels`.

A batch is sequences of any lengths packed one after another, without padding. The pass has no host synchronization and
no shape that depends on data, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from miinb.engine.decoder import Norm
from miinb.engine.encoder_spec import BODY, EncoderSpec
from miinb.engine.parallel import Group
from miinb.kernels.cpu_blocks import BlockedLinear
from miinb.kernels.dequantize import embedding_rows
from miinb.kernels.embedding import embedding_norm
from miinb.kernels.linear import PackedLinear, linear
from miinb.kernels.norm import post_norm
from miinb.kernels.packed_attention import packed_attention


@dataclass(slots=True)
class EncoderBatch:
    """Packed sequences, on the device: T tokens of S sequences, of which L rows go through the head.

    Attributes:
        token_ids: [T] int64, the sequences' tokens one after another.
        type_ids: [T] int64, their token types.
        positions: [T] int64, their places in their sequences, from 0; see `EncoderSpec.padding`.
        starts: [S + 1] int32, where each sequence begins, and the end.
        rows: [L] int64, the tokens (indexes into T) whose outputs are wanted.
        max_length: at least the longest sequence's tokens.
    """

    token_ids: Tensor
    type_ids: Tensor
    positions: Tensor
    starts: Tensor
    rows: Tensor
    max_length: int

    @classmethod
    def of_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        *,
        rows: Literal["first", "all"] | Sequence[int] = "all",
        type_ids: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> EncoderBatch:
        """The batch of these sequences' tokens.

        Args:
            sequences: token ids of each, at least one.
            rows: what is wanted: of each sequence's first token, of all tokens, or of these indexes into T.
            type_ids: packed as the tokens are; empty: all are 0.
            device: where it goes.
        """
        lengths = [len(sequence) for sequence in sequences]
        starts = [0, *accumulate(lengths)]
        if isinstance(rows, str):
            rows = starts[:-1] if rows == "first" else range(starts[-1])

        def tensor(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            token_ids=tensor([token for sequence in sequences for token in sequence]),
            type_ids=tensor(type_ids or [0] * starts[-1]),
            positions=tensor([place for length in lengths for place in range(length)]),
            starts=tensor(starts, torch.int32),
            rows=tensor(rows),
            max_length=max(lengths),
        )


#: A linear layer's weights [N, K], as the operator `linear` of the device wants them.
Matrix = PackedLinear | BlockedLinear


@dataclass(slots=True)
class EncoderLayer:
    """One layer; H is hidden_size, heads and inner_size are one rank's.

    Attributes:
        qkv: [3 * heads * head_size, H], all queries' rows, then keys', then values'.
        out: [H, heads * head_size].
        up: [inner_size, H].
        down: [H, inner_size].
        attn_norm: behind the attention's residual addition.
        mlp_norm: behind the MLP's.
    """

    qkv: Matrix
    out: Matrix
    up: Matrix
    down: Matrix
    attn_norm: Norm
    mlp_norm: Norm


@dataclass(slots=True)
class HeadWeights:
    """A layer of the head: [outputs, inputs], and the norm behind it."""

    linear: Matrix
    norm: Norm | None = None


@dataclass(slots=True)
class EncoderWeights:
    """All weights.

    Attributes:
        words: [vocab, embed]; quantized where there is a `words_scale`, as in a `PackedLinear`.
        positions: [max_length, embed], from the first token's on; behind them the padding token's, if it has a row.
        token_types: [types, embed]; None where there are not several: a single one is in `positions`.
        embed_norm: behind the sum of the three.
        head: its layers; the decoder of tokens may be `words` itself.
        project: [hidden, embed] or None.
        rounding: root of the mean square by which quantized weights differ from the checkpoint's, relative to theirs.
        unread: modules of the checkpoint that the task does not need.
    """

    words: Tensor
    positions: Tensor
    token_types: Tensor | None
    embed_norm: Norm
    layers: list[EncoderLayer]
    head: list[HeadWeights] = field(default_factory=list)
    project: Matrix | None = None
    words_scale: Tensor | None = None
    rounding: float = 0.0
    unread: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.embed_norm.weight.dtype


class EncoderOperators(NamedTuple):
    """The operators that the forward pass calls; a CPU has its own, and `parity` puts the references in their place."""

    linear: Callable[..., Tensor] = linear
    post_norm: Callable[..., Tensor] = post_norm
    packed_attention: Callable[..., Tensor] = packed_attention
    embedding_norm: Callable[..., Tensor] = embedding_norm


class Encoder:
    """A loaded model: its spec (one rank's share), its weights, and the forward pass.

    Attributes:
        spec: the rank's shape.
        weights: the rank's, on their device.
        group: the tensor-parallel group, None with one rank.
        ops: the operators.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights: EncoderWeights,
        *,
        group: Group | None = None,
        ops: EncoderOperators | None = None,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.group = group
        self.ops = ops or EncoderOperators()

    @torch.inference_mode()
    def outputs(self, batch: EncoderBatch) -> Tensor:
        """The head's outputs [L, C] of `batch.rows`, in the weights' dtype; without a head their hidden states."""
        x, last = self.embed(batch), self.spec.layers - 1
        for index in range(last):
            x = self.layer(index, x, batch)
        return self._head(self.layer(last, x, batch, batch.rows))

    @torch.inference_mode()
    def body(self, batch: EncoderBatch) -> Tensor:
        """The last hidden states [T, H] of all tokens."""
        x = self.embed(batch)
        for index in range(self.spec.layers):
            x = self.layer(index, x, batch)
        return x

    @torch.inference_mode()
    def head(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The head's outputs [L, C] of these rows of the last hidden states [T, H]."""
        return self._head(hidden[rows])

    def embed(self, batch: EncoderBatch) -> Tensor:
        """[T, H]: the tokens' embeddings with their positions' and types', normalized."""
        w, norm = self.weights, self.weights.embed_norm
        words, token_ids = w.words, batch.token_ids
        if w.words_scale is not None:  # quantized: a table of the batch's own tokens
            words = embedding_rows(token_ids, words, w.words_scale, self.spec.embed_size, w.dtype)
            token_ids = torch.arange(len(token_ids), device=token_ids.device)
        tables = (words, w.positions, w.token_types)
        x = self.ops.embedding_norm(
            token_ids, batch.positions, batch.type_ids, *tables, norm.weight, norm.bias, self.spec.eps
        )
        return x if w.project is None else self.ops.linear(x, w.project)

    def layer(self, index: int, x: Tensor, batch: EncoderBatch, rows: Tensor | None = None) -> Tensor:
        """One layer: [T, H], or [L, H] of these rows alone, as the last layer's others are read by none."""
        spec, w = self.spec, self.weights.layers[index]
        a = self.ops.packed_attention(
            self.ops.linear(x, w.qkv),
            batch.starts,
            heads=spec.heads,
            head_size=spec.head_size,
            scale=spec.scale,
            max_length=batch.max_length,
        )
        if rows is not None:
            a, x = a[rows], x[rows]
        x = self._sum_norm(w.attn_norm, self.ops.linear(a, w.out), x)
        y = self.ops.linear(x, w.up, activation=spec.activation)
        return self._sum_norm(w.mlp_norm, self.ops.linear(y, w.down), x)

    def stand_in(self, tokens: int, rows: int) -> None:
        """Take part with zeros in what is left of a step's reductions, after this rank failed within the step.

        Args:
            tokens: T of the step.
            rows: L of the step.
        """
        if self.group is None:
            return
        last, device = 2 * (self.spec.layers - 1), self.weights.words.device
        for done in range(self.group.reductions, last + 2):
            shape = (tokens if done < last else rows, self.spec.hidden_size)
            self.group.all_reduce(torch.zeros(shape, dtype=self.weights.dtype, device=device))

    def _sum_norm(self, norm: Norm, x: Tensor, residual: Tensor) -> Tensor:
        """`_norm` of a branch's result, of which each rank has a part."""
        if self.group is not None:
            options = {"centered": True, "keep": False}
            both = self.group.reduce_norm(x, residual, norm.weight, norm.bias, self.spec.eps, **options)
            if both is not None:
                return both[0]
            x = self.group.all_reduce(x)
        return self._norm(norm, x, residual)

    def _head(self, x: Tensor) -> Tensor:
        for layer, w in zip(self.spec.head.layers, self.weights.head, strict=True):
            kind = self.spec.activation if layer.activation == BODY else layer.activation
            if kind == "tanh":  # of poolers, which have a row a sequence: no kernel has it
                x = torch.tanh(self.ops.linear(x, w.linear))
            else:
                x = self.ops.linear(x, w.linear, activation=kind)
            x = x if w.norm is None else self._norm(w.norm, x)
        return x

    def _norm(self, norm: Norm, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.ops.post_norm(x, norm.weight, norm.bias, self.spec.eps, residual)
