"""The one fused decoder: every family is a `DecoderSpec`; its forward pass calls the operators of `miinb.kernels`.

A step computes T packed tokens of R rows: prompts' chunks and single new tokens alike. The pass has no host
synchronization and no shape that depends on data, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.engine.kv_cache import KVCache
from miinb.engine.parallel import Group
from miinb.engine.positions import alibi_slopes, layers_angles
from miinb.engine.spec import DecoderSpec
from miinb.engine.step_batch import StepBatch
from miinb.kernels.attention import paged_attention
from miinb.kernels.decode_attention import decode_attention, is_apt
from miinb.kernels.dequantize import embedding_rows
from miinb.kernels.embedding import token_embedding
from miinb.kernels.head import argmax, greedy_head, largest
from miinb.kernels.linear import PackedLinear, gated_linear, linear
from miinb.kernels.norm import layer_norm, rms_norm
from miinb.kernels.parallel_block import early_memory, early_product, last_products, late_product
from miinb.kernels.rope import rope_append


@dataclass(slots=True)
class Norm:
    """Weights of a norm: [hidden] each; an RMS norm has no bias."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(slots=True)
class LayerWeights:
    """One layer; H is hidden_size, the rest one rank's share.

    Attributes:
        qkv: [(heads + 2 * kv_heads) * head_size, H].
        out: [H, heads * head_size].
        up: [inner_size, H], or [2 * inner_size, H] with the gate in its first half.
        down: [H, inner_size].
        attn_norm: with the block "parallel_norms" [2, H]: attention's and the MLP's.
        mlp_norm: of a block that is not parallel.
        attn_post_norm, mlp_post_norm: of the branches' results in a serial block, or None.
        q_norm, k_norm: [head_size] or None.
    """

    qkv: PackedLinear
    out: PackedLinear
    up: PackedLinear
    down: PackedLinear
    attn_norm: Norm
    mlp_norm: Norm | None = None
    attn_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(slots=True)
class DecoderWeights:
    """All weights; those without a comment are as the spec says.

    Attributes:
        embed: [vocab, embed or hidden size]; quantized (see `kernels.formats`) where there is an `embed_scale`.
        positions: [rows, hidden].
        rounding: root of the mean square by which quantized weights differ from the checkpoint's, relative to theirs.
        fitted_tokens: of a text that the rounding was fitted to; 0: it was to the nearest.
    """

    embed: Tensor
    layers: list[LayerWeights]
    head: PackedLinear
    norm: Norm | None = None
    positions: Tensor | None = None
    embed_norm: Norm | None = None
    project_in: PackedLinear | None = None
    project_out: PackedLinear | None = None
    embed_scale: Tensor | None = None
    rounding: float = 0.0
    fitted_tokens: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations and of the cache."""
        return self.layers[0].attn_norm.weight.dtype


#: The hidden states between layers: `x + residual`, [T, hidden] each, or x alone.
Stream = tuple[Tensor, Tensor | None]


class Operators(NamedTuple):
    """The operators that the forward pass calls; a CPU has its own, and `parity` puts the references in their place."""

    rms_norm: Callable[..., tuple[Tensor, Tensor]] = rms_norm
    layer_norm: Callable[..., tuple[Tensor, Tensor]] = layer_norm
    rope_append: Callable[..., Tensor] = rope_append
    paged_attention: Callable[..., Tensor] = paged_attention
    decode_attention: Callable[..., Tensor] | None = decode_attention  # both, of one token; None: there is none
    linear: Callable[..., Tensor] = linear
    gated_linear: Callable[..., Tensor] = gated_linear
    early_memory: Callable[..., Tensor | None] = early_memory
    greedy_head: Callable[..., tuple[Tensor, Tensor]] = greedy_head
    token_embedding: Callable[..., Tensor] = token_embedding


class Decoder:
    """A loaded model: its spec (one rank's share), its weights, and the forward pass.

    Attributes:
        spec: the rank's shape.
        weights: the rank's weights.
        group: the tensor-parallel group, None with one rank.
        ops: the operators.
    """

    def __init__(
        self, spec: DecoderSpec, weights: DecoderWeights, *, group: Group | None = None, ops: Operators | None = None
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.group = group
        self.ops = ops or Operators()
        device = weights.embed.device
        self.alibi = alibi_slopes(spec, group, device) if spec.alibi else None
        self._windows = spec.windows or (None,) * spec.layers
        self._angles = layers_angles(spec, self._windows, device)
        self._embed_scale = float(torch.tensor(spec.embed_scale, dtype=weights.dtype))
        self._rope = {
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_size": spec.head_size,
            "rotary_dim": spec.rotary.dim if spec.rotary else 0,
            "interleaved": bool(spec.rotary and spec.rotary.interleaved),
            "eps": spec.eps,
        }

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Logits [L, vocab] of `batch.logit_rows`, in the weights' dtype; the cache gets the step's keys and values."""
        return self.logits(self.body(batch, cache), batch.logit_rows)

    @torch.inference_mode()
    def greedy(self, batch: StepBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The most likely next token of each of `batch.logit_rows`, as `kernels.head.greedy_head`: ids and finite."""
        return self.best(self.body(batch, cache), batch.logit_rows)

    @torch.inference_mode()
    def body(self, batch: StepBatch, cache: KVCache) -> Stream:
        """All layers: the stream of hidden states of every token, before the last norm."""
        x, residual = self.embed(batch), None
        for index in range(self.spec.layers):
            x, residual = self.layer(index, x, residual, batch, cache)
        if self.group is not None and self._in_parts(residual):
            x = self.group.all_reduce(x)
        return x, residual

    @torch.inference_mode()
    def logits(self, stream: Stream, rows: Tensor) -> Tensor:
        """Logits [L, vocab] of these tokens of the stream."""
        return self.whole(self.own_logits(stream, rows))

    @torch.inference_mode()
    def best(self, stream: Stream, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `greedy`, of these tokens of the stream."""
        if self.group is None:
            return self.ops.greedy_head(self._head_input(stream, rows), self.weights.head)
        return self.choose(self.own_logits(stream, rows))

    def own_logits(self, stream: Stream, rows: Tensor | None, **options: Tensor) -> Tensor:
        """[L, n]: as `logits`, of this rank's part of the vocabulary, in `out` (see `kernels.linear`) if given.

        `rows` None: of all tokens in their order.
        """
        return self.ops.linear(self._head_input(stream, rows), self.weights.head, **options)

    def whole(self, logits: Tensor) -> Tensor:
        """[L, vocab] of every rank's own logits [L, n]; the last rank's part may be shorter."""
        if cap := self.spec.logit_softcap:  # `choose` does without: the order stays
            logits = torch.tanh(logits / cap) * cap
        if self.group is None:
            return logits
        padded = F.pad(logits, (0, self.spec.vocab_size - logits.shape[-1]))
        return self.group.gather(padded)[:, : self.weights.embed.shape[0]]

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and finite, as `greedy`, of every rank's own logits: only each rank's best one crosses."""
        if self.group is None:
            return argmax(logits)
        value, token_id = largest(logits)
        return self.group.best(value, token_id, self.group.rank * self.spec.vocab_size)

    def stand_in(self, tokens: int, rows: int, *, whole: bool) -> None:
        """Take part with zeros in what is left of a step's collectives, after this rank failed within the step.

        Args:
            tokens: T of the step.
            rows: L of the step.
            whole: its logits are gathered, not candidates.
        """
        if self.group is None:
            return
        device = self.weights.embed.device
        hidden = torch.zeros((tokens, self.spec.hidden_size), dtype=self.weights.dtype, device=device)
        branches = 1 if self.spec.block in ("parallel", "parallel_norms") else 2
        for _ in range(branches * self.spec.layers - self.group.reductions):
            self.group.all_reduce(hidden)
        if self.group.gathers:
            return
        if whole:
            self.group.gather(torch.zeros((rows, self.spec.vocab_size), dtype=self.weights.dtype, device=device))
        else:
            self.group.best(torch.zeros(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device), 0)

    def embed(self, batch: StepBatch) -> Tensor:
        """[T, hidden]: the tokens' embeddings with their positions'."""
        w, positions, offset = self.weights, batch.positions, self.spec.position_offset
        if w.embed_scale is None and w.project_in is None:
            x = self.ops.token_embedding(batch.token_ids, w.embed, self._embed_scale, positions, w.positions, offset)
        else:
            width = self.spec.embed_size or self.spec.hidden_size
            x = embedding_rows(batch.token_ids, w.embed, w.embed_scale, width, w.dtype)
            if self._embed_scale != 1.0:
                x = x * self._embed_scale
            if w.project_in is not None:
                x = self.ops.linear(x, w.project_in)
            if w.positions is not None:
                x = x + F.embedding(positions + offset, w.positions)
        return self._norm(w.embed_norm, x)[0] if w.embed_norm is not None else x

    def layer(
        self, index: int, x: Tensor, residual: Tensor | None, batch: StepBatch, cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        """One layer. The stream of hidden states is `x + residual`, added in the next norm; [T, hidden] each.

        With several ranks the last branch's result is not summed over them yet: `_in_parts` tells.
        """
        w = self.weights.layers[index]
        if self.spec.block == "post":
            y, _ = self._sum_norm(w.attn_norm, self._attention(index, x, batch, cache), x)
            return self._sum_norm(w.mlp_norm, self._mlp(w, y), y)[0], None
        norm = self._sum_norm if self._in_parts(residual) else self._norm
        y, stream = norm(w.attn_norm, x, residual)
        if self.spec.block != "serial":
            first, second = y if self.spec.block == "parallel_norms" else (y, y)
            return self._both(index, first, second, batch, cache), stream
        stream = y if self.spec.residual_from_norm else stream
        norm = self._sum_norm if w.attn_post_norm is None else self._norm
        a = self._attention(index, y, batch, cache)
        y, stream = norm(w.mlp_norm, self._branch(a, w.attn_post_norm), stream)
        stream = y if self.spec.residual_from_norm else stream
        return self._branch(self._mlp(w, y), w.mlp_post_norm), stream

    def _both(self, index: int, x: Tensor, y: Tensor, batch: StepBatch, cache: KVCache) -> Tensor:
        """Attention of `x` and the MLP of `y`, in one sum."""
        w = self.weights.layers[index]
        early = self.ops.early_memory(y, w.qkv, w.up, gated=self.spec.gated)
        if early is None:
            return self._mlp(w, y, residual=self._attention(index, x, batch, cache))
        attended = self._attend(index, batch, cache, late_product(x, w.qkv))
        inner = early_product(y, w.up, self.spec.activation, early, gated=self.spec.gated)
        return last_products(inner, w.down, attended, w.out)

    def _branch(self, x: Tensor, norm: Norm | None) -> Tensor:
        """A serial branch's result; one that has a norm is summed over ranks before it."""
        return x if norm is None else self._sum_norm(norm, x)[0]

    def _in_parts(self, residual: Tensor | None) -> bool:
        """Whether `x` of a stream is a branch's result, of which each rank has a part: then there is a residual."""
        return residual is not None and self.weights.layers[0].mlp_post_norm is None

    def _head_input(self, stream: Stream, rows: Tensor | None) -> Tensor:
        """[L, hidden or embed size]: what the head reads."""
        x, residual = stream
        if rows is not None:
            x, residual = x[rows], None if residual is None else residual[rows]
        w = self.weights
        if w.norm is not None:
            x, _ = self._norm(w.norm, x, residual)
        elif residual is not None:
            x = x + residual
        return x if w.project_out is None else self.ops.linear(x, w.project_out)

    def _attention(self, index: int, x: Tensor, batch: StepBatch, cache: KVCache) -> Tensor:
        w = self.weights.layers[index]
        return self.ops.linear(self._attend(index, batch, cache, self.ops.linear(x, w.qkv)), w.out)

    def _attend(self, index: int, batch: StepBatch, cache: KVCache, qkv: Tensor) -> Tensor:
        """[T, heads * head_size]: attention between its products."""
        w = self.weights.layers[index]
        k, v, cos_sin = cache.k[index], cache.v[index], self._angles[index]
        kv_scale = cache.scale[index]
        rope: dict[str, Any] = {**self._rope, "q_norm": w.q_norm, "k_norm": w.k_norm}
        attention: dict[str, Any] = {
            "scale": self.spec.scale,
            "window": self._windows[index],
            "alibi": self.alibi,
            "softcap": self.spec.softcap,
        }
        both = self.ops.decode_attention
        if both is not None and batch.max_query == 1 and is_apt(len(batch.lengths), self.spec.head_size):
            row = (batch.block_table, batch.lengths)
            return both(qkv, *cos_sin, k, v, *row, rope=rope, attention=attention, kv_scale=kv_scale).flatten(1)
        q = self.ops.rope_append(qkv, batch.positions, *cos_sin, k, v, batch.slots, kv_scale=kv_scale, **rope)
        rows = (batch.block_table, batch.query_start, batch.lengths)
        out = self.ops.paged_attention(q, k, v, *rows, kv_scale=kv_scale, max_query=batch.max_query, **attention)
        return out.flatten(1)

    def _mlp(self, w: LayerWeights, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.spec.gated:
            y = self.ops.gated_linear(x, w.up, self.spec.activation)
        else:
            y = self.ops.linear(x, w.up, activation=self.spec.activation)
        return self.ops.linear(y, w.down, residual=residual)

    def _sum_norm(self, norm: Norm | None, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`_norm` of a branch's result, of which each rank has a part."""
        if self.group is not None and norm is not None:
            centered = self.spec.norm == "layer"
            both = self.group.reduce_norm(x, residual, norm.weight, norm.bias, self.spec.eps, centered=centered)
            if both is not None:
                return both
            x = self.group.all_reduce(x)
        return self._norm(norm, x, residual)

    def _norm(self, norm: Norm | None, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if norm is None:
            raise RuntimeError("the policy gives no weights for a norm that the spec has")
        if self.spec.norm == "rms":
            return self.ops.rms_norm(x, norm.weight, self.spec.eps, residual)
        return self.ops.layer_norm(x, norm.weight, norm.bias, self.spec.eps, residual)
