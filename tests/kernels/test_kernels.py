"""Every Triton kernel against its plain reference in fp64: on a GPU (`-m gpu`), or by Triton's interpreter on a CPU.

`test_interpreted.py` runs this file in a process of its own, as the interpreter is chosen when Triton is imported.
"""

import math
from typing import Any

import pytest
import torch

import tests.kernels.interpreter  # noqa: F401
from miinb.kernels import norm, online_softmax, reference
from miinb.kernels.activation import KINDS, activate, gated
from miinb.kernels.attention import paged_attention
from miinb.kernels.dispatch import INTERPRETED, plain_operators, power_of_2
from miinb.kernels.embedding import fill_newest, token_embedding
from miinb.kernels.head import argmax, greedy_head
from miinb.kernels.linear import PackedLinear, gated_linear, linear
from miinb.kernels.norm import layer_norm, post_norm, rms_norm
from miinb.kernels.parallel_block import early_memory, early_product, last_products, late_product
from miinb.kernels.rope import rope_append
from miinb.kernels.sample import sample
from miinb.kernels.shares import MOST, best_shares
from tests.kernels.checking import DEVICE, DOT_DTYPES, DTYPES, GPU, rand, same, seeded, wide  # noqa: F401

pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # a program takes it 30 ms
        monkeypatch.setattr(online_softmax, "_DECODE_PROGRAMS", 20)
    monkeypatch.setattr(online_softmax, "_LEAST_KEYS", 32)  # so that contexts of tests have parts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden", "together"), [(1, 576, 1), (3, 48, 1), (2, 1024, 1), (7, 40, 4)])
@pytest.mark.parametrize("residual", [False, True])
def test_norms(
    dtype: torch.dtype, rows: int, hidden: int, together: int, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few rows, and of many, of which a program has several."""
    if together > 1:
        monkeypatch.setattr(norm, "_MANY", rows)
        monkeypatch.setattr(norm, "_TILE", together * power_of_2(hidden))
    x, weight, bias = rand(rows, hidden, dtype=dtype), rand(hidden, dtype=dtype), rand(hidden, dtype=dtype)
    more = rand(rows, hidden, dtype=dtype) if residual else None
    total = x if more is None else x + more
    for out, expected in [
        (rms_norm(x, weight, 1e-5, more), reference.rms_norm(wide(total), wide(weight), 1e-5)),
        (layer_norm(x, weight, bias, 1e-5, more), reference.layer_norm(wide(total), wide(weight), wide(bias), 1e-5)),
        (layer_norm(x, weight, None, 1e-5, more), reference.layer_norm(wide(total), wide(weight), None, 1e-5)),
    ]:
        same(out[0], expected[0])
        same(out[1], total)
    weights, biases = rand(2, hidden, dtype=dtype), rand(2, hidden, dtype=dtype)
    both, stream = layer_norm(x, weights, biases, 1e-5, more)
    same(both, torch.stack([layer_norm(total, *one, 1e-5)[0] for one in zip(weights, biases, strict=True)]))
    same(stream, total)
    same(rms_norm(x, weights, 1e-5, more)[0], torch.stack([rms_norm(total, one, 1e-5)[0] for one in weights]))
    unrounded = wide(x) if more is None else wide(x) + wide(more)
    same(post_norm(x, weight, bias, 1e-5, more), reference.layer_norm(unrounded, wide(weight), wide(bias), 1e-5)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated_pair", [False, True])
def test_a_parallel_block_of_one_token(dtype: torch.dtype, gated_pair: bool) -> None:
    """Both of its last kernels, at sizes that no tile divides."""
    x, attended, inner, bias = (rand(1, n, dtype=dtype) for n in (72, 40, 3001, 72))
    up = PackedLinear(rand(202 if gated_pair else 101, 72, dtype=dtype, scale=0.2))
    down = PackedLinear(rand(72, 3001, dtype=dtype, scale=0.02), bias[0])
    out = PackedLinear(rand(72, 40, dtype=dtype, scale=0.2), rand(72, dtype=dtype))
    early = torch.empty(1, 101, dtype=dtype, device=DEVICE)
    found = early_product(x, up, "gelu", early, gated=gated_pair)
    assert found is early
    same(found, gated_linear(x, up, "gelu") if gated_pair else linear(x, up, activation="gelu"))
    wanted = reference.linear(wide(inner), wide(down.weight), wide(bias[0]))
    wanted += reference.linear(wide(attended), wide(out.weight), wide(out.bias))
    same(last_products(inner, down, attended, out), wanted)
    same(late_product(attended, out), linear(attended, out))


def test_only_one_token_of_plain_weights_goes_early() -> None:
    up = PackedLinear(rand(8, 4))
    assert early_memory(rand(2, 4), up, up, gated=False) is None
    quantized = PackedLinear(up.weight, scale=rand(8))
    assert early_memory(rand(1, 4), up, quantized, gated=False) is None
    assert early_memory(rand(1, 4), quantized, up, gated=False) is None
    with plain_operators():
        assert early_memory(rand(1, 4), up, up, gated=True) is None


@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind: str) -> None:
    x = rand(3, 2 * 1100, scale=3)
    same(activate(x, kind), reference.activate(wide(x), kind))
    same(gated(x, kind), reference.gated(wide(x), kind))


def test_gelu_at_all_sizes() -> None:
    x = torch.cat((torch.linspace(-9, 9, 4001), torch.tensor([-6e4, -40.0, 40.0, 6e4]))).to(DEVICE)
    error = activate(x, "gelu").double().cpu() - torch.nn.functional.gelu(x.double().cpu())
    assert error.abs().max() < 1e-6
    assert activate(torch.tensor([math.nan], device=DEVICE), "gelu").isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(40, 64), (7, 100), (30, 1100)])
@pytest.mark.parametrize("rows", [1, 3])
def test_linear(dtype: torch.dtype, n: int, k: int, rows: int) -> None:
    x, weight = rand(rows, k, dtype=dtype), rand(n, k, dtype=dtype)
    for bias, activation, residual in [
        (None, None, None),
        (rand(n, dtype=dtype), "gelu_tanh", None),
        (rand(n, dtype=dtype), "relu", None),
        (rand(n, dtype=dtype), None, rand(rows, n, dtype=dtype)),
    ]:
        out = linear(x, PackedLinear(weight, bias), activation=activation, residual=residual)
        same(out, reference.linear(wide(x), wide(weight), wide(bias), activation=activation, residual=wide(residual)))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_writes_where_it_is_told(rows: int, bias: bool) -> None:
    x, weight, b = rand(rows, 64), rand(40, 64), rand(40) if bias else None
    out = rand(5, 40)[:rows]
    linear(x, PackedLinear(weight, b), out=out)
    same(out, reference.linear(wide(x), wide(weight), wide(b)))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_linear(rows: int, bias: bool) -> None:
    x, weight = rand(rows, 72), rand(2 * 33, 72)
    b = rand(2 * 33) if bias else None
    expected = reference.gated(reference.linear(wide(x), wide(weight), wide(b)), "silu")
    same(gated_linear(x, PackedLinear(weight, b), "silu"), expected)


ROPE = [
    # heads, kv_heads, head_size, rotary_dim, interleaved, norm
    (4, 2, 16, 16, False, False),
    (3, 1, 20, 12, False, False),
    (2, 2, 16, 8, True, False),
    (3, 3, 10, 4, True, False),
    (4, 2, 24, 24, False, True),
    (3, 3, 12, 0, False, False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "rotary", "interleaved", "norm"), ROPE)
def test_rope_append(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, rotary: int, interleaved: bool, norm: bool
) -> None:
    tokens, pages, page_tokens = 5, 6, 4
    qkv = rand(tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    angle = torch.arange(32.0)[:, None] / 10 ** torch.linspace(0, 2, max(rotary // 2, 1))
    cos, sin = (angle.cos().to(DEVICE), angle.sin().to(DEVICE)) if rotary else (None, None)
    q_norm, k_norm = (rand(size, dtype=dtype), rand(size, dtype=dtype)) if norm else (None, None)
    k_cache = rand(pages, page_tokens, kv_heads, size, dtype=dtype)
    v_cache = rand(pages, page_tokens, kv_heads, size, dtype=dtype)
    positions, slots = torch.tensor([0, 1, 7, 31, 2]), torch.tensor([3, 8, 20, 23, -1])
    options = {"heads": heads, "kv_heads": kv_heads, "head_size": size, "rotary_dim": rotary}
    options |= {"interleaved": interleaved, "eps": 1e-6}
    k_wide, v_wide = wide(k_cache), wide(v_cache)
    expected = reference.rope_append(
        wide(qkv)[:4], positions[:4], wide(cos), wide(sin), k_wide, v_wide, slots[:4],
        q_norm=wide(q_norm), k_norm=wide(k_norm), **options,
    )  # fmt: skip
    q = rope_append(
        qkv, positions.to(DEVICE), cos, sin, k_cache, v_cache, slots.to(DEVICE), q_norm=q_norm, k_norm=k_norm, **options
    )
    same(q[:4], expected)
    same(k_cache, k_wide)
    same(v_cache, v_wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "rotary", "interleaved", "norm"), ROPE[::2])
def test_rope_append_to_fp8(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, rotary: int, interleaved: bool, norm: bool
) -> None:
    """What is stored is the nearest fp8 number to what another cache would hold; its largest uses the whole range."""
    pages, page_tokens = 6, 4
    qkv = rand(6, (heads + 2 * kv_heads) * size, dtype=dtype, scale=100)
    qkv[1] = 0
    angle = torch.arange(32.0)[:, None] / 10 ** torch.linspace(0, 2, max(rotary // 2, 1))
    cos, sin = (angle.cos(), angle.sin()) if rotary else (None, None)
    norms = {"q_norm": rand(size, dtype=dtype), "k_norm": rand(size, dtype=dtype)} if norm else {}
    positions, slots = torch.arange(6) * 5, torch.tensor([3, 8, 20, 23, 0, -1])
    options = {"heads": heads, "kv_heads": kv_heads, "head_size": size, "rotary_dim": rotary}
    options |= {"interleaved": interleaved} | norms
    caches = torch.zeros(2, pages, page_tokens, kv_heads, size, dtype=torch.float8_e4m3fn, device=DEVICE)
    kv_scale = torch.zeros(pages, kv_heads, page_tokens, 2, dtype=torch.bfloat16, device=DEVICE)
    exact = torch.zeros(caches.shape, dtype=dtype, device=DEVICE)
    tables = [None if table is None else table.to(DEVICE) for table in (cos, sin)]
    for k, v, scales in ((*caches, {"kv_scale": kv_scale}), (*exact, {})):
        q = rope_append(qkv, positions.to(DEVICE), *tables, k, v, slots.to(DEVICE), **options, **scales)
    assert q.isfinite().all()
    exact, scale = exact.double(), kv_scale.permute(3, 0, 2, 1)[..., None].double()
    largest = exact.abs().amax(-1, keepdim=True)
    allowed = (exact.abs() / 16).clamp(min=largest / 448 / 1024)  # half a step; fp8's least is 2**-9
    assert ((caches.double() * scale - exact).abs() <= 1.01 * allowed).all()
    assert (caches.double().abs().amax(-1, keepdim=True) == torch.where(largest > 0, 448, 0)).all()


def test_what_is_not_finite_stays_so_in_fp8() -> None:
    qkv = rand(2, 3 * 16, dtype=torch.bfloat16)
    qkv[0, 20], qkv[1, 40] = math.nan, math.inf
    caches = torch.zeros(2, 1, 16, 1, 16, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale = torch.zeros(1, 1, 16, 2, dtype=torch.bfloat16, device=DEVICE)
    slots = torch.arange(2, device=DEVICE)
    rope_append(qkv, slots, None, None, *caches, slots, heads=1, kv_heads=1, head_size=16, kv_scale=scale)
    found = caches[:, 0, :2, 0].double() * scale[0, 0, :2].double().T[..., None]
    assert found.isfinite().all(-1).tolist() == [[False, True], [True, False]]


ATTENTION = [
    # heads, kv_heads, head_size, window, alibi, softcap
    (4, 2, 16, None, False, None),
    (2, 2, 20, 25, False, None),
    (6, 1, 16, 9, False, None),
    (4, 4, 8, None, True, None),
    (3, 1, 32, 70, False, 5.0),
    (2, 1, 80, 40, True, None),
]


def attention_inputs(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, queries: list[int], lengths: list[int]
) -> tuple[torch.Tensor, ...]:
    page_tokens, width = 16, 12
    pages = len(lengths) * width
    table = torch.randperm(pages).view(len(lengths), width).to(torch.int32)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    caches = [rand(pages, page_tokens, kv_heads, size, dtype=dtype) for _ in range(2)]
    q = rand(sum(queries), heads + 1, size, dtype=dtype)[:, :heads]  # not contiguous, as it is a view of a projection
    return q, *caches, table.to(DEVICE), starts.to(DEVICE), torch.tensor(lengths, dtype=torch.int32).to(DEVICE)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size", "window", "alibi", "softcap"), ATTENTION)
@pytest.mark.parametrize(
    ("queries", "lengths"),
    [([1, 1, 1], [1, 130, 64]), ([1, 5, 1, 66], [130, 5, 100, 140]), ([70], [90])],
    ids=["decode", "mixed", "prefill"],
)
def test_paged_attention(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
    alibi: bool,
    softcap: float | None,
    queries: list[int],
    lengths: list[int],
) -> None:
    tensors = attention_inputs(heads, kv_heads, size, dtype, queries, lengths)
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(heads)], device=DEVICE) if alibi else None
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    out = paged_attention(*tensors, alibi=slopes, max_query=max(queries), **options)
    expected = reference.paged_attention(*(wide(t) for t in tensors[:3]), *(t.cpu() for t in tensors[3:]),
                                         alibi=wide(slopes), **options)  # fmt: skip
    same(out, expected)


def attend_to_fp8(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Attention over these keys and values as fp8, and the inputs again with the numbers that those are."""
    size = torch.arange(1.0, 1 + k.shape[1], device=DEVICE)[:, None, None]  # scales differ within a page
    (k8, k_scale), (v8, v_scale) = reference.to_fp8(k / size), reference.to_fp8(v * 40 * size)
    kv_scale = torch.stack((k_scale, v_scale), -1).transpose(1, 2).contiguous()
    out = paged_attention(q, k8, v8, *rest, kv_scale=kv_scale, **options)
    k, v = (x.double() * scale[..., None].double() for x, scale in ((k8, k_scale), (v8, v_scale)))
    return out, (q, k, v, *rest)


@pytest.mark.parametrize(("heads", "kv_heads", "size", "window", "alibi", "softcap"), ATTENTION)
def test_attention_to_fp8(
    heads: int, kv_heads: int, size: int, window: int | None, alibi: bool, softcap: float | None
) -> None:
    queries = [1, 5, 1, 30]
    inputs = attention_inputs(heads, kv_heads, size, torch.bfloat16, queries, [100, 5, 70, 40])
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(heads)], device=DEVICE) if alibi else None
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    out, tensors = attend_to_fp8(*inputs, alibi=slopes, max_query=max(queries), **options)
    expected = reference.paged_attention(*(wide(t) for t in tensors[:3]), *(t.cpu() for t in tensors[3:]),
                                         alibi=wide(slopes), **options)  # fmt: skip
    same(out, expected)


@pytest.mark.parametrize("large", [1.0, 1e6])
def test_queries_of_an_fp8_cache_may_be_beyond_fp16(large: float) -> None:
    q, *rest = attention_inputs(4, 2, 16, torch.float32, [1, 5], [90, 30])
    out, (_, *wider) = attend_to_fp8(q * large, *rest, scale=0.3 / large, max_query=5)
    tensors = (wide(q), *(wide(t) for t in wider[:2]), *(t.cpu() for t in wider[2:]))
    same(out, reference.paged_attention(*tensors, scale=0.3))
    if large > 1:
        out, _ = attend_to_fp8((q * large).bfloat16(), *rest, scale=0.3 / large, max_query=5)
        same(out, reference.paged_attention(*tensors, scale=0.3), 2e-2)


def test_decode_is_the_same_again_and_pads_with_zeros() -> None:
    tensors = attention_inputs(4, 2, 16, torch.float32, [1, 1], [150, 0])
    first = paged_attention(*tensors, scale=0.3, max_query=1)
    again = paged_attention(*tensors, scale=0.3, max_query=1)  # the counters are back at zero
    assert torch.equal(first, again)
    assert not first[1].any()


def test_mixed_steps_are_padded_with_rows_of_no_queries() -> None:
    tensors = attention_inputs(4, 2, 16, torch.float32, [1, 7, 0, 0], [90, 30, 0, 0])
    q = torch.cat((tensors[0], rand(24, 4, 16)))  # tokens of no row
    out = paged_attention(q, *tensors[1:], scale=0.3, max_query=len(q))
    expected = reference.paged_attention(*(wide(t) for t in tensors[:3]), *(t.cpu() for t in tensors[3:]), scale=0.3)
    same(out[:8], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [40, 2500])
@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize("offset", [None, 0, 2])
def test_token_embedding(dtype: torch.dtype, hidden: int, scale: float, offset: int | None) -> None:
    table, places = rand(9, hidden, dtype=dtype), None if offset is None else rand(8, hidden, dtype=dtype)
    token_ids, positions = torch.tensor([8, 0, 3, 3]), torch.tensor([0, 5, 1, 4])
    inputs = (token_ids.to(DEVICE), table, scale, positions.to(DEVICE), places, offset or 0)
    with plain_operators():
        wanted = token_embedding(*inputs)
    found = token_embedding(*inputs)
    cut = INTERPRETED and dtype == torch.bfloat16  # the interpreter cuts off what a GPU rounds
    if cut or (dtype == torch.float32 and scale != 1.0):  # and a GPU adds a product that it has not rounded
        same(found, wanted)
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("count", [1, 5, 300])
def test_what_stands_for_a_rows_newest_token(count: int) -> None:
    token_ids = torch.arange(count) % 7
    token_ids[::3] = -1
    slots, newest = torch.randint(11, (count,)), torch.randint(1000, 2000, (11,))
    wanted = torch.where(token_ids < 0, newest[slots], token_ids)
    found = token_ids.to(DEVICE)
    fill_newest(found, newest.to(DEVICE), slots.to(DEVICE))
    assert torch.equal(found.cpu(), wanted)
    assert (found >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [10, 4096, 9001])
def test_argmax(dtype: torch.dtype, vocab: int) -> None:
    logits = rand(6, vocab, dtype=dtype)
    logits[1, 3] = logits[1, vocab - 1] = 50  # the lower id of two equal ones
    logits[2, vocab // 2] = math.nan
    logits[3, vocab - 1] = math.inf
    logits[4] = -math.inf
    logits[5, : vocab - 1] = -math.inf
    ids, finite = argmax(logits)
    assert finite.tolist() == [True, True, False, False, False, True]
    good = [0, 1, 5]
    assert ids[good].tolist() == logits.cpu()[good].argmax(-1).tolist()
    assert ids[1] == 3
    assert argmax(logits)[1].tolist() == finite.tolist()
    assert (ids >= 0).all()
    assert (ids < vocab).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "k"), [(2, 1), (2, 2), (300, 5), (4096, 16), (9001, 1), (4099, 6), (9001, 17)])
def test_best_shares(dtype: torch.dtype, columns: int, k: int) -> None:
    logits = 4 * rand(8, columns, dtype=dtype)
    logits[1] = 0  # all are equal
    logits[1, 0] = 1
    logits[2, columns // 2] = math.nan
    logits[3, columns - 1] = math.inf
    logits[4] = -math.inf
    logits[5, : columns - 1] = -math.inf
    logits[6, columns - 1] = 60
    found = best_shares(logits, k).cpu()
    shares, ids = found[:, :k], found[:, k:].view(torch.int32)
    wanted = logits.cpu().double().softmax(-1)
    good = [0, 1, 5, 6, 7]
    theirs = wanted.gather(1, ids.clamp(0, columns - 1).long())
    for expected in (wanted.topk(k).values, theirs):
        torch.testing.assert_close(shares[good].double(), expected[good], rtol=1e-5, atol=1e-9)
    assert not shares[[2, 3, 4]].isfinite().any()
    for row in good:
        assert len(set(ids[row].tolist())) == k
        assert 0 <= int(ids[row].min()) <= int(ids[row].max()) < columns
    if k <= MOST:
        assert ids[1].tolist() == list(range(k)), "the lowest ids of equal shares"
    assert best_shares(logits[:0], k).shape == (0, 2 * k)


def test_greedy_head() -> None:
    x, head = rand(1, 64), PackedLinear(rand(500, 64))
    ids, finite = greedy_head(x, head)
    assert ids.tolist() == (wide(x) @ wide(head.weight).T).argmax(-1).tolist()
    assert finite.all()


def test_sample() -> None:
    rows, vocab = 12, 1003
    logits = rand(rows, vocab, scale=2)
    logits[0, 5] = -math.inf
    logits[11, 7] = math.nan
    seed = torch.arange(rows) * 2**40 + 3
    position = torch.arange(rows) + 2**31
    temperature = torch.tensor([0.0, 1, 0.7, 1, 1, 1, 2, 1, 1, 1.5, 0.5, 1])
    top_k = torch.tensor([0, 0, 0, 1, 5, 0, 0, 0, 2000, 30, 50, 0], dtype=torch.int32)
    top_p = torch.tensor([1, 1, 1, 1, 1, 0.3, 0.9, 1, 1, 0.8, 0.95, 1])
    min_p = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0.2, 0, 0.05, 0.01, 0])
    numbers = torch.stack((temperature, top_p, min_p, torch.zeros(rows)), 1)  # columns, as the engine keeps them
    temperature, top_p, min_p, _ = numbers.to(DEVICE).unbind(1)
    arguments = [t.to(DEVICE) for t in (logits, seed, position, temperature, top_k, top_p, min_p)]
    ids, finite = sample(*arguments)
    expected, expected_finite = reference.sample(*(t.cpu() for t in arguments))
    assert finite.tolist() == expected_finite.tolist() == [True] * 11 + [False]
    assert ids[:11].tolist() == expected[:11].tolist()


@pytest.mark.skipif(not GPU, reason="a row takes long; `test_sample` says that it draws as the reference does")
def test_draws_follow_the_probabilities() -> None:
    rows, vocab = 20_000, 23
    logits = rand(vocab, scale=1.5)
    columns = [torch.full((rows,), value, device=DEVICE) for value in (0.8, 5, 0.95, 0.01)]  # top-k 5 of them
    columns[1] = columns[1].int()
    seed = torch.arange(rows, device=DEVICE)
    ids, _ = sample(logits.expand(rows, -1).contiguous(), seed, seed * 0 + 3, *columns)
    scores = logits.float().cpu() / 0.8
    ordered = scores.sort(descending=True).values
    mass = ordered[:5].softmax(0).cumsum(0)
    floor = ordered[int((mass < 0.95).sum())]
    expected = scores.masked_fill(scores < floor, -math.inf).softmax(0).double() * rows
    seen = torch.bincount(ids.cpu(), minlength=vocab).double()
    kept = expected > 0
    assert seen[~kept].sum() == 0
    statistic = ((seen - expected)[kept] ** 2 / expected[kept]).sum()
    half = torch.tensor((float(kept.sum()) - 1) / 2).double()
    assert torch.special.gammaincc(half, statistic / 2) > 1e-3
