"""The operators on a CPU, through a library in C (cpu*.c); signatures and meanings are those of the wrappers.

PyTorch's own linear layers reach a half of a CPU's memory bandwidth in bf16 and one row, and far less with more rows
where the CPU has no bf16 instructions; and a step of small PyTorch operations costs as much in calls as in work.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.kernels import reference
from miinb.kernels.cpu_blocks import BlockedLinear, blocked
from miinb.kernels.cpu_library import load_library
from miinb.kernels.cpu_trial import NEVER, torch_rows
from miinb.kernels.embedding import token_embedding
from miinb.kernels.formats import FP8, bits_of, part_columns
from miinb.kernels.linear import PackedLinear

_ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "tanh": 5}
_HALF = {torch.float32: 0, torch.bfloat16: 1}
#: Kinds of quantized weights, as cpu_linear.c numbers them after those of `_HALF`.
_INT4 = 3
_KINDS = {torch.int8: 2, torch.int32: _INT4}
#: Kinds of weights in tiles, as cpu_product.c numbers them; what those of bf16 are multiplied by.
_FP32, _INT8 = 0, 1
_AMX = 3
_BF16 = {0: "", 2: "AVX-512", _AMX: "AMX"}
#: Widest head that the library's buffers hold.
MAX_HEAD_SIZE = 1024


class CpuKernels:
    """The operators of one process, for weights of one dtype (`int8`: they are quantized; `dtype` is the activations').

    Attributes:
        dtype: torch.float32 or torch.bfloat16.
        limit: with so many rows and more PyTorch's linear layer is the faster one here (not for quantized weights,
            which it does not have, and weights in tiles); measured once, or given by the environment variable
            MIINB_CPU_TORCH_ROWS (0: never). Never, where nearly all weights are in tiles (`tiles`: they come through
            `pack`): with the library alone a row's answer does not depend on what else is in the step.
        bf16: how the products of weights of bf16 in tiles are computed, 0 where this CPU has no instructions for them.
    """

    def __init__(self, dtype: torch.dtype, *, int8: bool = False, tiles: bool = False) -> None:
        self._library = load_library()
        self.dtype = dtype
        self._half = _HALF[dtype]
        self._linear = self._library.miinb_linear
        self._norm = self._library.miinb_norm
        self._rope = self._library.miinb_rope_append
        self._attention = self._library.miinb_attention
        self._blocked_linear = self._library.miinb_blocked_linear
        self._packed_attention = self._library.miinb_packed_attention
        self.bf16 = self._library.miinb_bf16() if self._half and tiles else 0
        self.limit = NEVER
        if not int8 and not (tiles and self._in_tiles):
            self.limit = torch_rows(self.linear, dtype)

    @property
    def _in_tiles(self) -> bool:
        """Whether `pack` lays weights out in tiles."""
        return not self._half or self.bf16 > 0

    @property
    def description(self) -> str:
        """What runs where, in a few words."""
        threads = torch.get_num_threads()
        if self.limit == NEVER:
            return f"every step, {threads} threads" + (f", {_BF16[self.bf16]}" if self.bf16 else "")
        return (
            f"steps below {self.limit} tokens, {threads} threads; PyTorch's linear layers are faster above, "
            "and the last bits of an answer depend on what else is asked at that moment"
        )

    @property
    def levels(self) -> int:
        """The largest number of int8 weights that `pack` takes: what this CPU's instructions add up without loss."""
        return ctypes.c_int32.in_dll(self._library, "miinb_levels").value

    def pack(self, packed: PackedLinear) -> PackedLinear | BlockedLinear:
        """The layer as the products of many rows are fastest: in tiles, but for bf16 without instructions for it.

        `linear` then multiplies bf16 with bf16 and adds in fp32, by AMX where there is one. It multiplies int8 with
        int8: x is quantized row by row, with a scale for each `reference.GROUP` columns, as the weights are.
        """
        if not self._in_tiles:
            return packed
        tile = ctypes.c_int32.in_dll(self._library, "miinb_tile").value
        return blocked(packed, tile=tile, levels=self.levels)

    def linear(
        self,
        x: Tensor,
        packed: PackedLinear | BlockedLinear,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See `linear.linear`."""
        if isinstance(packed, BlockedLinear):
            return self._run_blocked(x, packed, activation, residual)
        if self._is_references(x, packed):
            return reference.linear(
                x, packed.weight, packed.bias, activation=activation, residual=residual, scale=packed.scale
            )
        return self._run_linear(x, packed, packed.weight.shape[0], activation, residual, 0)

    def gated_linear(self, x: Tensor, packed: PackedLinear, kind: str) -> Tensor:
        """See `linear.gated_linear`."""
        if self._is_references(x, packed):
            return reference.gated(reference.linear(x, packed.weight, packed.bias, scale=packed.scale), kind)
        return self._run_linear(x, packed, packed.weight.shape[0] // 2, kind, None, 1)

    def _is_references(self, x: Tensor, packed: PackedLinear) -> bool:
        """Whether PyTorch multiplies: forms that have no operator here, and what it is clearly faster with."""
        if packed.scale is None:
            return x.shape[0] >= self.limit
        return packed.weight.dtype == FP8 or (packed.weight.dtype == torch.int32 and bits_of(packed.scale) == 8)

    def _run_linear(
        self, x: Tensor, packed: PackedLinear, n: int, activation: str | None, residual: Tensor | None, gated: int
    ) -> Tensor:
        kind = _KINDS.get(packed.weight.dtype, self._half)
        if kind == _INT4:  # a row of words has whole parts: what is past its last column is multiplied by zeros
            x = F.pad(x, (0, -x.shape[1] % part_columns(4)))
        x = x.contiguous()
        m, k = x.shape
        y = torch.empty((m, n), dtype=x.dtype)
        self._linear(
            x.data_ptr(),
            packed.weight.data_ptr(),
            packed.scale.data_ptr() if packed.scale is not None else None,
            packed.bias.data_ptr() if packed.bias is not None else None,
            residual.contiguous().data_ptr() if residual is not None else None,
            y.data_ptr(),
            m,
            n,
            k,
            _ACTIVATIONS[activation],
            gated,
            kind,
        )
        return y

    def _run_blocked(self, x: Tensor, packed: BlockedLinear, activation: str | None, residual: Tensor | None) -> Tensor:
        x = x.contiguous()
        y = torch.empty((x.shape[0], packed.outputs), dtype=x.dtype)
        self._blocked_linear(
            x.data_ptr(),
            packed.blocks.data_ptr(),
            packed.bias.data_ptr() if packed.bias is not None else None,
            residual.contiguous().data_ptr() if residual is not None else None,
            y.data_ptr(),
            x.shape[0],
            packed.outputs,
            packed.columns,
            _ACTIVATIONS[activation],
            self.bf16 or (_INT8 if packed.int8 else _FP32),
        )
        return y

    def packed_attention(
        self, qkv: Tensor, starts: Tensor, *, heads: int, head_size: int, scale: float, max_length: int
    ) -> Tensor:
        """See `packed_attention.packed_attention`."""
        qkv = qkv.contiguous()
        out = torch.empty((qkv.shape[0], heads * head_size), dtype=qkv.dtype)
        self._packed_attention(
            qkv.data_ptr(),
            starts.data_ptr(),
            out.data_ptr(),
            starts.shape[0] - 1,
            max_length,
            heads,
            head_size,
            scale,
            self._half,
            self.bf16 == _AMX,
        )
        return out

    def greedy_head(self, x: Tensor, packed: PackedLinear) -> tuple[Tensor, Tensor]:
        """See `head.greedy_head`."""
        logits = self.linear(x, packed)
        rows, n = logits.shape
        ids = torch.empty(rows, dtype=torch.int64)
        finite = torch.empty(rows, dtype=torch.bool)
        self._library.miinb_argmax(logits.data_ptr(), ids.data_ptr(), finite.data_ptr(), rows, n, self._half)
        return ids, finite

    def early_memory(self, x: Tensor, qkv: PackedLinear, up: PackedLinear, *, gated: bool) -> None:
        """See `parallel_block.early_memory`: here one comes after the other."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `norm.rms_norm`."""
        return self._run_norm(x, weight, None, eps, residual, 0)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `norm.layer_norm`."""
        return self._run_norm(x, weight, bias, eps, residual, 1)

    def post_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """See `norm.post_norm`."""
        return self._run_norm(x, weight, bias, eps, residual, 1, keep=False)[0]

    def _run_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        center: int,
        *,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The norm, and the sum that it is of; without `keep` there is none."""
        if weight.dim() > 1:
            biases = [None] * len(weight) if bias is None else bias.unbind()
            y, total = self._run_norm(x, weight[0], biases[0], eps, residual, center)
            rest = zip(weight[1:], biases[1:], strict=True)
            return torch.stack((y, *(self._run_norm(total, *one, eps, None, center)[0] for one in rest))), total
        x = x.contiguous()
        y = torch.empty_like(x)
        total = x if residual is None or not keep else torch.empty_like(x)
        n = x.shape[-1]
        self._norm(
            x.data_ptr(),
            residual.contiguous().data_ptr() if residual is not None else None,
            weight.data_ptr(),
            bias.data_ptr() if bias is not None else None,
            y.data_ptr(),
            total.data_ptr() if keep else None,
            x.numel() // n,
            n,
            eps,
            center,
            self._half,
        )
        return y, total

    def rope_append(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        *,
        heads: int,
        kv_heads: int,
        head_size: int,
        rotary_dim: int = 0,
        interleaved: bool = False,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        kv_scale: Tensor | None = None,
    ) -> Tensor:
        """See `rope.rope_append`; PyTorch's for an fp8 cache."""
        if kv_scale is not None:
            return reference.rope_append(
                qkv, positions, cos, sin, k_cache, v_cache, slots, heads=heads, kv_heads=kv_heads,
                head_size=head_size, rotary_dim=rotary_dim, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm,
                eps=eps, kv_scale=kv_scale,
            )  # fmt: skip
        tokens = qkv.shape[0]
        q = torch.empty((tokens, heads, head_size), dtype=qkv.dtype)
        self._rope(
            qkv.data_ptr(),
            positions.data_ptr(),
            cos.data_ptr() if cos is not None else None,
            sin.data_ptr() if sin is not None else None,
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slots.data_ptr(),
            q_norm.data_ptr() if q_norm is not None else None,
            k_norm.data_ptr() if k_norm is not None else None,
            q.data_ptr(),
            tokens,
            heads,
            kv_heads,
            head_size,
            rotary_dim,
            eps,
            interleaved,
            self._half,
        )
        return q

    decode_attention = None  # a thread does one after the other anyway
    token_embedding = staticmethod(token_embedding)

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        lengths: Tensor,
        *,
        scale: float,
        window: int | None = None,
        alibi: Tensor | None = None,
        softcap: float | None = None,
        kv_scale: Tensor | None = None,
        max_query: int,
    ) -> Tensor:
        """See `attention.paged_attention`; chunks of prompts and fp8 caches are PyTorch's.

        Rows of one token are this library's in every step, so that a row's answer does not depend on its neighbors.
        """
        if kv_scale is not None:
            return reference.paged_attention(
                q, k_cache, v_cache, block_table, query_start, lengths,
                scale=scale, window=window, alibi=alibi, softcap=softcap, kv_scale=kv_scale,
            )  # fmt: skip
        rows = lengths.shape[0]
        singles = rows if max_query == 1 and q.shape[0] == rows else _leading_singles(query_start)
        if singles == rows:
            out = torch.empty_like(q)
        else:
            out = reference.paged_attention(
                q, k_cache, v_cache, block_table[singles:], query_start[singles:], lengths[singles:],
                scale=scale, window=window, alibi=alibi, softcap=softcap, max_query=max_query,
            )  # fmt: skip
        if singles:
            self._attend(
                q[:singles], k_cache, v_cache, block_table[:singles], lengths[:singles], out,
                scale, window, alibi, softcap,
            )  # fmt: skip
        return out

    def _attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        out: Tensor,
        scale: float,
        window: int | None,
        alibi: Tensor | None,
        softcap: float | None,
    ) -> None:
        rows, heads, head_size = q.shape
        block_table = block_table.contiguous()  # a step's is the transpose of what is in memory
        self._attention(
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            block_table.data_ptr(),
            lengths.data_ptr(),
            out.data_ptr(),
            rows,
            block_table.shape[1],
            k_cache.shape[1],
            heads,
            k_cache.shape[2],
            head_size,
            window or 0,
            scale,
            softcap or 0.0,
            alibi.data_ptr() if alibi is not None else None,
            self._half,
        )


def _leading_singles(query_start: Tensor) -> int:
    """Rows of one token that come before the first longer one."""
    starts = query_start.tolist()
    return next((i for i in range(len(starts) - 1) if starts[i + 1] != i + 1), len(starts) - 1)
