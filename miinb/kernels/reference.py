"""Each operator in plain PyTorch: what the kernels are checked against, and what runs where there is no GPU.

Statistics, rotations and softmax are computed in fp32 and rounded once to the input's dtype, as the kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.kernels.formats import FP8, FP8_MAX, GROUP, dequantize

__all__ = ["FP8", "GROUP", "dequantize"]  # of weights; the operators are used by the module's name

#: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF
_WIDENED = 1 << 22  # numbers of a quantized weight at a time
#: What each byte stands for.
_FP8_NUMBERS = torch.arange(256, dtype=torch.uint8).view(FP8).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `norm.rms_norm`."""
    if residual is not None:
        x = x + residual
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    scaled = scaled.to(x.dtype)
    return weight * scaled if weight.dim() == 1 else torch.stack([one * scaled for one in weight]), x


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `norm.layer_norm`."""
    if residual is not None:
        x = x + residual
    if weight.dim() > 1:
        biases = [None] * len(weight) if bias is None else bias
        return torch.stack([layer_norm(x, *one, eps)[0] for one in zip(weight, biases, strict=True)]), x
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps), x


def post_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """See `norm.post_norm`."""
    return layer_norm(x, weight, bias, eps, residual)[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, *, interleaved: bool) -> Tensor:
    """Rotary embedding of the first `rotary_dim` elements of each head.

    Args:
        x: [T, heads, head_size].
        cos: [T, rotary_dim / 2] fp32, one row a token.
        sin: as `cos`.
        rotary_dim: how many leading elements are rotated.
        interleaved: pairs are neighbors (GPT-J) rather than halves (GPT-NeoX, LLaMA).
    """
    turned, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        mixed = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        mixed = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    mixed = mixed.to(x.dtype)
    return torch.cat((mixed, rest), -1) if rest.shape[-1] else mixed


def rope_append(
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
    """See `rope.rope_append`."""
    packed = qkv.view(-1, heads + 2 * kv_heads, head_size)
    q, k, v = packed[:, :heads], packed[:, heads : heads + kv_heads], packed[:, heads + kv_heads :]
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps)[0], rms_norm(k, k_norm, eps)[0]
    if cos is not None and sin is not None:
        cos, sin = cos[positions], sin[positions]
        q = rotate(q, cos, sin, rotary_dim, interleaved=interleaved)
        k = rotate(k, cos, sin, rotary_dim, interleaved=interleaved)
    for which, new, cache in ((0, k, k_cache), (1, v, v_cache)):
        if kv_scale is not None:
            page_tokens = cache.shape[1]
            new, kv_scale[slots // page_tokens, :, slots % page_tokens, which] = to_fp8(new)
        cache.view(-1, kv_heads, head_size)[slots] = new
    return q


def to_fp8(x: Tensor, scales: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Numbers [..., D] as fp8 (e4m3fn), the largest of each row as its largest, and the rows' scales [...].

    NaN and infinity become NaN, or a scale that is not finite.
    """
    wide = x.float()
    scale = (wide.abs().amax(-1) / FP8_MAX).clamp(min=1e-30).to(scales)
    return (wide / scale.float()[..., None]).to(FP8), scale


def paged_attention(
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
    max_query: int | None = None,
) -> Tensor:
    """See `attention.paged_attention`. Reads the tables on the host: free on a CPU, a synchronization elsewhere."""
    out = torch.empty_like(q)
    starts, tables = query_start.tolist(), block_table.tolist()
    page_tokens = k_cache.shape[1]
    for row, length in enumerate(lengths.tolist()):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        pages = tables[row][: -(-length // page_tokens)]
        k = _of_pages(k_cache, None if kv_scale is None else kv_scale[..., 0], pages, length, q.dtype)
        v = _of_pages(v_cache, None if kv_scale is None else kv_scale[..., 1], pages, length, q.dtype)
        out[start:end] = _attend(q[start:end], k, v, scale, window, alibi, softcap)
    return out


def _of_pages(cache: Tensor, scale: Tensor | None, pages: list[int], length: int, dtype: torch.dtype) -> Tensor:
    """Keys or values [length, kv_heads, head_size] of a row; those of one page are a view unless they are fp8."""
    found = (cache[pages[0]] if len(pages) == 1 else cache[pages].flatten(0, 1))[:length]
    if scale is None:
        return found
    scales = scale[pages].transpose(1, 2).flatten(0, 1)[:length]
    return (_widen(found) * scales.float()[..., None]).to(dtype)


def _widen(x: Tensor) -> Tensor:
    """fp8 as fp32. On a CPU a table is three times as fast as PyTorch's conversion."""
    if x.device.type != "cpu":
        return x.float()
    return _FP8_NUMBERS.index_select(0, x.view(torch.uint8).int().flatten()).view(x.shape)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, alibi: Tensor | None, softcap: float | None
) -> Tensor:
    """One row: `q` [n, heads, head_size] are the last n of the `k`, `v` [length, kv_heads, head_size] positions."""
    n, heads, _ = q.shape
    length, kv_heads, _ = k.shape
    bias = _attention_bias(q, length, window, alibi)
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if not softcap:
        causal = bias is None and n > 1 and n == length
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=heads != kv_heads
        )[0]
        return out.transpose(0, 1)
    k, v = k.repeat_interleave(heads // kv_heads, 0), v.repeat_interleave(heads // kv_heads, 0)
    if bias is None:
        bias = q.new_zeros(n, length).masked_fill_(_hidden(n, length, None, q.device), -math.inf)
    scores = torch.tanh((q @ k.transpose(1, 2)).float() * (scale / softcap)) * softcap + bias
    return (scores.softmax(-1).to(q.dtype) @ v).transpose(0, 1)


def _hidden(n: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """[n, length] bool: key positions that the last n queries do not see."""
    distance = torch.arange(length - n, length, device=device)[:, None] - torch.arange(length, device=device)
    hidden = distance < 0
    return hidden | (distance >= window) if window else hidden


def _attention_bias(q: Tensor, length: int, window: int | None, alibi: Tensor | None) -> Tensor | None:
    """The additive bias of one row, [n, length] or [heads, n, length]; None where plain causal attention is right."""
    n = q.shape[0]
    windowed = bool(window) and length > (window or 0)
    if alibi is None and not windowed and n in (1, length):
        return None
    hidden = _hidden(n, length, window, q.device)
    bias = torch.zeros(n, length, device=q.device, dtype=q.dtype).masked_fill_(hidden, -math.inf)
    if alibi is None:
        return bias
    distance = torch.arange(length, device=q.device) - torch.arange(length - n, length, device=q.device)[:, None]
    return (alibi.float()[:, None, None] * distance).to(q.dtype) + bias


def packed_attention(
    qkv: Tensor, starts: Tensor, *, heads: int, head_size: int, scale: float, max_length: int
) -> Tensor:
    """See `packed_attention.packed_attention`. Reads the starts on the host, as `paged_attention` does."""
    out = qkv.new_empty(qkv.shape[0], heads * head_size)
    for start, stop in pairwise(starts.tolist()):
        if start < stop:
            q, k, v = qkv[start:stop].view(1, stop - start, 3, heads, head_size).permute(2, 0, 3, 1, 4)
            rows = F.scaled_dot_product_attention(q, k, v, scale=scale)
            out[start:stop] = rows[0].transpose(0, 1).flatten(1)
    return out


def embedding_norm(
    token_ids: Tensor,
    positions: Tensor,
    type_ids: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    type_table: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """See `embedding.embedding_norm`."""
    x = F.embedding(token_ids, token_table)
    if type_table is not None:
        x = x + F.embedding(type_ids, type_table)
    x = x + F.embedding(positions, position_table)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def activate(x: Tensor, kind: str) -> Tensor:
    """See `activation.activate`."""
    return ACTIVATIONS[kind](x)


def gated(x: Tensor, kind: str) -> Tensor:
    """See `activation.gated`."""
    gate, up = x.chunk(2, -1)
    return ACTIVATIONS[kind](gate) * up


#: gelu is exact (erf), gelu_tanh its approximation.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """See `linear.linear`. With a `scale` the weight is quantized, and widened by and by: it may be a whole head."""
    if scale is None:
        y = F.linear(x, weight, bias)
    else:
        count = max(1, _WIDENED // x.shape[-1])
        rows = zip(torch.split(weight, count), torch.split(scale, count), strict=True)
        y = torch.cat([F.linear(x, dequantize(w, s)[:, : x.shape[-1]].to(x.dtype)) for w, s in rows], -1)
        y = y if bias is None else y + bias
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def best_shares(logits: Tensor, k: int) -> Tensor:
    """See `shares.best_shares`; equal shares may come in another order."""
    shares, ids = torch.softmax(logits, -1, dtype=torch.float32).topk(k, dim=-1)
    return torch.cat((shares, ids.int().view(torch.float32)), -1)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `head.argmax`."""
    return logits.argmax(-1), torch.isfinite(logits.amax(-1))


def philox(seed: Tensor, position: Tensor, count: int) -> Tensor:
    """Philox4x32-10 words for tokens 0..count-1 of each row.

    Token i of a row takes word i % 4 of the block with key (seed low, seed high) and counter
    (i // 4, position low, position high, 0).

    Args:
        seed: [L] int64, not negative.
        position: [L] int64: the place of the token to be drawn in its sequence.
        count: words a row, the size of the vocabulary.

    Returns:
        [L, count] int64, each 0 to 2**32 - 1.
    """
    blocks = -(-count // 4)
    c0 = torch.arange(blocks, device=seed.device).expand(seed.shape[0], blocks)
    c1 = (position & _U32)[:, None].expand_as(c0)
    c2 = (position >> 32)[:, None].expand_as(c0)
    c3 = torch.zeros_like(c0)
    k0, k1 = (seed & _U32)[:, None], (seed >> 32)[:, None]
    for _ in range(10):
        high0, low0 = _multiply(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _U32, (k1 + _PHILOX_WEYL[1]) & _U32
    return torch.stack((c0, c1, c2, c3), -1).flatten(1)[:, :count]


def _multiply(multiplier: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 by 32 bit product; split, as int64 would overflow its sign."""
    low = multiplier * (value & 0xFFFF)
    high = multiplier * (value >> 16) + (low >> 16)
    return (high >> 16) & _U32, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def gumbel(seed: Tensor, position: Tensor, count: int) -> Tensor:
    """Gumbel noise [L, count] fp32 of (seed, position) alone: -log(-log(u)), u from the words' upper 23 bits."""
    words = philox(seed, position, count)
    uniform = (words >> 9).float() * 2.0**-23 + 2.0**-24  # 0 < u < 1, both exact in fp32
    return -torch.log(-torch.log(uniform))


def sample(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `sample.sample`."""
    finite = torch.isfinite(logits.amax(-1))
    greedy = temperature == 0
    scores = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    ordered = scores.sort(-1, descending=True).values
    last = torch.where(top_k > 0, top_k, logits.shape[-1]).clamp(max=logits.shape[-1]) - 1
    floor = ordered.gather(1, last[:, None].long())
    mass = ordered.masked_fill(ordered < floor, -math.inf).softmax(-1)
    above = mass.cumsum(-1) - mass
    kept = (above < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1) - 1
    floor = torch.maximum(floor, ordered.gather(1, kept))
    floor = torch.maximum(floor, ordered[:, :1] + torch.log(min_p)[:, None])
    noise = gumbel(seed, position, logits.shape[-1])
    noisy = torch.where(greedy[:, None], scores, scores + noise)
    return noisy.masked_fill(scores < floor, -math.inf).argmax(-1), finite


#: PyTorch's group norm of [N, H, W, C] in memory is slow on a CPU for fewer pixels: copies to and fro take less time.
_LARGE_PICTURE = 1024


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `group_norm.group_norm`."""
    total = join(x, shift=shift, residual=residual, other=other)
    planes = total.permute(0, 3, 1, 2)
    if x.shape[1] * x.shape[2] < _LARGE_PICTURE:
        planes = planes.contiguous()
    y = F.group_norm(planes, groups, weight, bias, eps).permute(0, 2, 3, 1).contiguous()
    return F.silu(y) if silu else y, total if keep else x


def join(
    x: Tensor, *, shift: Tensor | None = None, residual: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """See `group_norm.join`."""
    if shift is not None:
        x = x + shift[:, None, None]
    if residual is not None:
        x = x + residual
    return x if other is None else torch.cat((x, other), -1)
