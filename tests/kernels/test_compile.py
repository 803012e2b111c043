"""Every kernel compiles for the GPUs it is meant for, on a machine without one.

The wrappers run on meta tensors and tell what they would launch, so what is compiled is what they launch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from miinb.engine.recording import compiling_for, recording
from miinb.kernels import (
    all_reduce,
    attention,
    best_of_ranks,
    decode_attention,
    dequantize,
    dispatch,
    embedding,
    formats,
    group_norm,
    head,
    linear,
    norm,
    packed_attention,
    parallel_block,
    rope,
    sample,
    shares,
    wide_product,
)


def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(n: int, k: int, bias: bool) -> linear.PackedLinear:
    return linear.PackedLinear(t(n, k), t(n) if bias else None)


def quantized(n: int, k: int, bits: int, bias: bool = False) -> linear.PackedLinear:
    scale = t(n, formats.groups_of(k), 2) if bits == 4 else t(n, formats.groups_of(k))
    words = ids(n, formats.words_of(k, bits))
    return linear.PackedLinear(words, t(n) if bias else None, scale)


def fp8(n: int, k: int, bias: bool = False) -> linear.PackedLinear:
    weight = t(n, formats.fp8_columns(k), dtype=formats.FP8)
    return linear.PackedLinear(weight, t(n) if bias else None, t(n, dtype=torch.float32))


FP8_CALLS: dict[str, Callable[[], Any]] = {
    "gemv": lambda: linear.linear(t(1, 4096), fp8(4096, 4096), residual=t(1, 4096)),
    "gemv bias": lambda: linear.linear(t(1, 4096), fp8(16384, 4096, True), activation="gelu_tanh"),
    "gemv deep": lambda: linear.linear(t(1, 24576), fp8(6144, 24576, True)),
    "gemv gated": lambda: linear.gated_linear(t(1, 4096), fp8(2 * 14336, 4096), "silu"),
    "gemv odd": lambda: linear.linear(t(1, 100), fp8(7, 100)),
    "product": lambda: linear.linear(t(2, 4096), fp8(4096, 4096), residual=t(2, 4096)),
    "product deep": lambda: linear.linear(t(32, 24576), fp8(6144, 24576, True)),
    "product gated": lambda: linear.gated_linear(t(64, 4096), fp8(2 * 14336, 4096), "silu"),
    "product short": lambda: linear.linear(t(9, 576), fp8(576, 576)),
    "many": lambda: linear.linear(t(512, 28672), fp8(16384, 28672, True), activation="gelu_tanh"),
    "many widened": lambda: linear.linear(t(512, 4096, dtype=torch.float16), fp8(16384, 4096)),
}


def embedding_call(bits: int) -> Callable[[], Any]:
    table, tokens = quantized(50400, 4096, bits), ids(1, dtype=torch.int64)
    return lambda: dequantize.embedding_rows(tokens, table.weight, table.scale, 4096, torch.bfloat16)


def quantized_calls(bits: int) -> dict[str, Callable[[], Any]]:
    """Shapes of llama-8b, gpt-j-6b (biases) and gpt-neox-20b."""
    calls: dict[str, Callable[[], Any]] = {
        "gemv": lambda: linear.linear(t(1, 4096), quantized(4096, 4096, bits), residual=t(1, 4096)),
        "gemv bias": lambda: linear.linear(t(1, 4096), quantized(16384, 4096, bits, True), activation="gelu_tanh"),
        "gemv deep": lambda: linear.linear(t(1, 24576), quantized(6144, 24576, bits, True)),
        "gemv gated": lambda: linear.gated_linear(t(1, 4096), quantized(2 * 14336, 4096, bits), "silu"),
        "gemv odd": lambda: linear.linear(t(1, 100), quantized(7, 100, bits)),
        "product": lambda: linear.linear(t(2, 4096), quantized(4096, 4096, bits), residual=t(2, 4096)),
        "product deep": lambda: linear.linear(t(32, 24576), quantized(6144, 24576, bits, True)),
        "product gated": lambda: linear.gated_linear(t(64, 4096), quantized(2 * 14336, 4096, bits), "silu"),
        "product wide": lambda: linear.linear(t(200, 4096), quantized(50257, 4096, bits)),
        "product odd": lambda: linear.linear(t(9, 576), quantized(1536, 576, bits)),
        "many": lambda: linear.linear(t(512, 4096), quantized(16384, 4096, bits, True), activation="gelu_tanh"),
        "head": lambda: head.greedy_head(t(1, 4096), quantized(128256, 4096, bits)),
        "embedding": embedding_call(bits),
    }
    return {f"int{bits} {name}": call for name, call in calls.items()}


def kv_cache(kv_heads: int, size: int, options: dict[str, Any]) -> torch.Tensor:
    """Keys or values; the option "fp8" is replaced by their scales."""
    if not options.pop("fp8", False):
        return t(4, 16, kv_heads, size)
    options["kv_scale"] = t(4, kv_heads, 16, 2)
    return t(4, 16, kv_heads, size, dtype=torch.float8_e4m3fn)


def rope_call(heads: int, kv_heads: int, size: int, **options: Any) -> Callable[[], Any]:
    cache, table = kv_cache(kv_heads, size, options), t(64, size // 2, dtype=torch.float32)
    tables = (None, None) if options.pop("plain", False) else (table, table)
    options = {"rotary_dim": size} | options | {"heads": heads, "kv_heads": kv_heads, "head_size": size}
    tokens = ids(1, dtype=torch.int64)
    return lambda: rope.rope_append(
        t(1, (heads + 2 * kv_heads) * size), tokens, *tables, cache, cache, tokens, **options
    )


def attention_call(heads: int, kv_heads: int, size: int, max_query: int, **options: Any) -> Callable[[], Any]:
    q, cache = t(max_query, heads, size), kv_cache(kv_heads, size, options)
    return lambda: attention.paged_attention(
        q, cache, cache, ids(1, 4), ids(2), ids(1), scale=0.1, max_query=max_query, **options
    )


def decode_call(heads: int, kv_heads: int, size: int, rows: int = 1, **options: Any) -> Callable[[], Any]:
    cache, table = kv_cache(kv_heads, size, options), t(64, size // 2, dtype=torch.float32)
    tables = (None, None) if options.pop("plain", False) else (table, table)
    rope = {"rotary_dim": size, "interleaved": False, "q_norm": None, "k_norm": None, "eps": 1e-6}
    rope |= {"heads": heads, "kv_heads": kv_heads, "head_size": size}
    attention = {"scale": 0.1, "window": None, "alibi": None, "softcap": None}
    scales = {name: value for name, value in options.items() if name == "kv_scale"}
    rope |= {name: value for name, value in options.items() if name in rope}
    attention |= {name: value for name, value in options.items() if name in attention}
    inputs = (t(rows, (heads + 2 * kv_heads) * size), *tables, cache, cache, ids(4, rows).t(), ids(rows))
    return lambda: decode_attention.decode_attention(*inputs, rope=rope, attention=attention, **scales)


def boards(ranks: int, rank: int = 0) -> all_reduce.Boards:
    return all_reduce.Boards(
        ids(ranks, dtype=torch.int64),
        ids(all_reduce.PROGRAMS, dtype=torch.int64),
        rank,
        1 << 20,
        1 << 16,
        all_reduce.PROGRAMS,
    )


def reduce_norm_call(ranks: int, rows: int, hidden: int, **options: Any) -> Callable[[], Any]:
    x, residual, bias = t(rows, hidden), t(rows, hidden), t(hidden) if options["centered"] else None
    return lambda: all_reduce.reduce_norm(x, boards(ranks), t(hidden), bias, 1e-5, residual, **options)


def encoder_attention_call(tokens: int, heads: int, size: int, max_length: int) -> Callable[[], Any]:
    return lambda: packed_attention.packed_attention(
        t(tokens, 3 * heads * size), ids(9), heads=heads, head_size=size, scale=0.1, max_length=max_length
    )


def group_norm_call(size: int, channels: int, *, each: bool = False, **options: Any) -> Callable[[], Any]:
    x, shift = t(2, size, size, channels), t(2 if each else 1, channels)
    weight, bias = t(channels), t(channels)
    return lambda: group_norm.group_norm(x, weight, bias, groups=32, eps=1e-5, shift=shift, **options)


CALLS: dict[str, Callable[[], Any]] = {
    "rms_norm": lambda: norm.rms_norm(t(1, 4096), t(4096), 1e-5, t(1, 4096)),
    "two norms": lambda: norm.layer_norm(t(1, 6144), t(2, 6144), t(2, 6144), 1e-5, t(1, 6144)),
    "early": lambda: parallel_block.early_product(
        t(1, 6144), packed(12288, 6144, True), "gelu", t(1, 12288), gated=False
    ),
    "last products": lambda: parallel_block.last_products(
        t(1, 12288), packed(6144, 12288, True), t(1, 3072), packed(6144, 3072, False)
    ),
    "layer_norm": lambda: norm.layer_norm(t(1, 768), t(768), t(768), 1e-5, t(1, 768)),
    "reduce norm": reduce_norm_call(2, 1, 4096, centered=False),
    "reduce norm of 8": reduce_norm_call(8, 64, 768, centered=True),
    "reduce post norm": reduce_norm_call(2, 64, 1024, centered=True, keep=False),
    "reduce norm of 3": reduce_norm_call(3, 5, 8192, centered=False),
    "reduce norm of many": reduce_norm_call(2, 64, 4096, centered=False),
    "reduce": lambda: all_reduce.all_reduce(t(16, 4096), boards(2)),
    "reduce pushed": lambda: all_reduce.all_reduce(t(8, 4096), boards(2)),
    "best of ranks": lambda: best_of_ranks.best_of_ranks(*head.largest(t(3, 64128)), boards(2), 64128),
    "gemv": lambda: linear.linear(t(1, 4096), packed(4096, 4096, False), residual=t(1, 4096)),
    "gemv bias": lambda: linear.linear(t(1, 768), packed(3072, 768, True), activation="gelu_tanh"),
    "gemv gated": lambda: linear.gated_linear(t(1, 4096), packed(2 * 14336, 4096, False), "silu"),
    "product gated": lambda: linear.gated_linear(t(100, 4096), packed(2 * 14336, 4096, False), "silu"),
    "product deep": lambda: linear.linear(t(8, 14336), packed(4096, 14336, True), activation="relu"),
    "product short": lambda: linear.linear(t(128, 768), packed(3072, 768, True), activation="gelu"),
    "product short deep": lambda: linear.linear(t(128, 3072), packed(768, 3072, True)),
    "product short few": lambda: linear.linear(t(9, 1024), packed(1024, 1024, True)),
    "product short many": lambda: linear.linear(t(256, 1024), packed(3072, 1024, True)),
    "product middle": lambda: linear.linear(t(384, 768), packed(3072, 768, True), activation="gelu"),
    "product large": lambda: linear.linear(t(16384, 768), packed(3072, 768, True), activation="gelu"),
    "post_norm": lambda: norm.post_norm(t(4, 768), t(768), t(768), 1e-12, t(4, 768)),
    "gated": lambda: linear.gated_linear(t(3, 64), packed(2 * 2048, 64, False), "silu"),
    "rope": rope_call(32, 8, 128),
    "rope norm": rope_call(16, 8, 128, q_norm=t(128), k_norm=t(128)),
    "rope interleaved": rope_call(16, 16, 256, interleaved=True, rotary_dim=64),
    "append": rope_call(12, 12, 64, plain=True),
    "append fp8": rope_call(32, 8, 128, fp8=True),
    "rotate and attend": decode_call(32, 8, 128),
    "rotate and attend, one key head": decode_call(71, 1, 64, interleaved=True, rotary_dim=32),
    "rotate and attend, norms": decode_call(16, 8, 256, 3, q_norm=t(256), k_norm=t(256), window=100, softcap=5.0),
    "rotate and attend, fp8": decode_call(32, 8, 128, fp8=True),
    "append and attend": decode_call(16, 16, 64, plain=True, alibi=t(16, dtype=torch.float32)),
    "late": lambda: parallel_block.late_product(t(1, 4096), packed(9216, 4096, True)),
    "decode": attention_call(32, 8, 128, 1),
    "decode window": attention_call(9, 3, 80, 1, window=100),
    "decode alibi": attention_call(16, 16, 64, 1, alibi=t(16, dtype=torch.float32)),
    "decode one key head": attention_call(71, 1, 64, 1),
    "prefill one key head": attention_call(71, 1, 64, 200),
    "decode wide": attention_call(16, 16, 256, 1),
    "decode fp8": attention_call(32, 8, 128, 1, fp8=True),
    "decode fp8 wide": attention_call(16, 16, 256, 1, fp8=True),
    "prefill fp8": attention_call(8, 4, 256, 200, softcap=50.0, window=4096, fp8=True),
    "prefill": attention_call(32, 8, 128, 200),
    "prefill alibi": attention_call(16, 16, 64, 200, alibi=t(16, dtype=torch.float32)),
    "prefill softcap": attention_call(8, 4, 256, 200, softcap=50.0, window=4096),
    "sample": lambda: sample.sample(
        t(1, 128256),
        *(ids(1, dtype=torch.int64),) * 2,
        t(1, dtype=torch.float32),
        ids(1),
        *(t(1, dtype=torch.float32),) * 2,
    ),
    "argmax": lambda: head.argmax(t(1, 128256)),
    "best_shares": lambda: shares.best_shares(t(8, 30522), 5),
    "best_shares few": lambda: shares.best_shares(t(1024, 2), 1),
    "packed attention alone": encoder_attention_call(128, 12, 64, 128),
    "packed attention": encoder_attention_call(16384, 12, 64, 128),
    "packed attention long": encoder_attention_call(16384, 16, 64, 512),
    "packed attention wide": encoder_attention_call(16384, 8, 128, 512),
    "token embedding": lambda: embedding.token_embedding(
        ids(7, dtype=torch.int64), t(50257, 768), 1.0, ids(7, dtype=torch.int64), t(1024, 768), 2
    ),
    "token embedding scaled": lambda: embedding.token_embedding(
        ids(1, dtype=torch.int64), t(1000, 3584), 59.75, ids(1, dtype=torch.int64), None, 0
    ),
    "newest": lambda: embedding.fill_newest(*(ids(9, dtype=torch.int64) for _ in range(3))),
    "embedding_norm": lambda: embedding.embedding_norm(
        *(ids(4, dtype=torch.int64),) * 3, t(30522, 768), t(512, 768), t(2, 768), t(768), t(768), 1e-12
    ),
    "gated pairs of a picture": lambda: linear.gated_linear(t(8192, 320), packed(2 * 1280, 320, True), "gelu"),
    "group norm": group_norm_call(64, 320, silu=True),
    "group norm kept": group_norm_call(8, 1280, residual=t(2, 8, 8, 1280), keep=True),
    "group norm of a picture": group_norm_call(512, 128, each=True, residual=t(2, 512, 512, 128), silu=True),
    "gated product": lambda: linear.gated_linear(t(65536, 320), packed(2560, 320, True), "gelu"),
    "gated product of few": lambda: linear.gated_linear(t(512, 1280), packed(10240, 1280, True), "gelu"),
    "wide convolution": lambda: wide_product.wide_convolution(t(2, 64, 64, 640), t(320, 3, 3, 640).permute(0, 3, 1, 2)),
    "wide product": lambda: linear.linear(t(65536, 320), packed(320, 320, True)),
    "wide product and norm": lambda: linear.linear_norm(
        t(8192, 320), packed(320, 320, True), t(320), t(320), 1e-5, t(8192, 320)
    ),
    "join": lambda: group_norm.join(
        t(2, 16, 16, 640), shift=t(1, 640), residual=t(2, 16, 16, 640), other=t(2, 16, 16, 320)
    ),
    **quantized_calls(8),
    **quantized_calls(4),
    **{f"fp8 {name}": call for name, call in FP8_CALLS.items()},
}


def compiled(call: Callable[[], Any], capability: tuple[int, int]) -> list[Any]:
    """Every kernel that the call would launch on such a GPU."""
    with compiling_for(capability):
        with recording() as kernels:
            call()
        return [kernel.compile() for kernel in kernels]


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        *((name, (9, 0)) for name in CALLS),
        ("reduce norm", (8, 0)),
        ("gemv gated", (8, 0)),
        ("product gated", (8, 0)),
        ("product short", (8, 0)),
        ("product large", (8, 0)),
        ("decode", (8, 0)),
        ("decode fp8", (8, 9)),
        ("argmax", (8, 0)),
        ("best_shares", (8, 0)),
        *((f"int{bits} {name}", (8, 0)) for bits in (8, 4) for name in ("gemv gated", "product", "many")),
        *((f"fp8 {name}", (8, 9)) for name in ("gemv gated", "product", "product gated", "many", "many widened")),
        ("group norm", (8, 0)),
        ("gated pairs of a picture", (8, 0)),
        ("join", (8, 0)),
        ("packed attention", (8, 0)),
        ("packed attention long", (8, 0)),
    ],
)
def test_compiles(name: str, capability: tuple[int, int]) -> None:
    kernels = compiled(CALLS[name], capability)
    assert kernels
    for kernel in kernels:
        assert kernel.asm["cubin"]
        assert kernel.metadata.target.arch == 10 * capability[0] + capability[1]
        assert kernel.metadata.launch_pdl == (capability >= (9, 0))
        assert kernel.metadata.shared <= (227 if capability >= (9, 0) else 163) * 1024


def test_weights_are_read_16_bytes_at_a_time() -> None:
    (kernel,) = compiled(CALLS["gemv"], (9, 0))
    assert "ld.global.v4.b32" in kernel.asm["ptx"]
    assert dispatch.INTERPRETED is False


def test_ranks_tell_each_other_across_the_system_and_only_then_read_16_bytes_at_a_time() -> None:
    for name, ranks in (("reduce norm of many", 2), ("reduce norm of 3", 3), ("reduce norm of 8", 8)):
        (kernel,) = compiled(CALLS[name], (9, 0))
        ptx = kernel.asm["ptx"]
        told = ptx.index("atom.global.sys.release.exch.b64")
        assert ptx.index("st.global.v4.b32") < ptx.index("bar.sync") < told, name
        assert "atom.global.sys.acquire.add.u64" in ptx, name
        of_a_part = 2 if name == "reduce norm of 3" else 1  # 8,192 columns are 16 numbers for each of 512 threads
        assert ptx.count("ld.global.cg.v4.b32") == ranks * of_a_part, name
        assert "trap;" in ptx, name
        assert "multimem" not in ptx, name


def test_short_messages_are_pushed_packet_by_packet_and_nothing_else_waits() -> None:
    (kernel,) = compiled(CALLS["reduce norm"], (9, 0))
    ptx = kernel.asm["ptx"]
    pushed, awaited = "st.relaxed.sys.global.v2.b64", "ld.relaxed.sys.global.v2.b64"  # two packets at once
    assert ptx.rindex(pushed) < ptx.rindex("ld.global.b64") < ptx.index(awaited)  # the residual is on its way meanwhile
    # Neighbors write side by side: a thread has no two places that follow each other.
    assert "sizePerThread = [1]" in kernel.asm["ttgir"]
    assert "sizePerThread = [2]" not in kernel.asm["ttgir"]
    assert "sizePerThread = [4]" not in kernel.asm["ttgir"]
    assert "membar" not in ptx
    assert "fence" not in ptx
    assert "trap;" in ptx


@pytest.mark.parametrize("name", ["reduce norm", "reduce pushed", "best of ranks"])
def test_the_number_of_a_message_is_counted_when_every_warp_has_read_it(name: str) -> None:
    """A warp that read it later would send its packets as the next message's, and the others would wait for ever."""
    ptx = compiled(CALLS[name], (9, 0))[-1].asm["ptx"]
    pushed = ptx.rindex("st.relaxed.sys.global.v2.b64")
    counted = ptx.index("st.global.", pushed)
    assert "bar.sync" in ptx[pushed:counted]
    assert "st.global." not in ptx[:pushed]


def test_one_kernel_serves_every_rank_and_number_of_rows() -> None:
    found = set()
    with compiling_for((9, 0)):
        for rank, rows in ((0, 10), (1, 11), (1, 16), (3, 17)):
            with recording() as kernels:
                all_reduce.all_reduce(t(rows, 4096), boards(4, rank))
            found |= {kernel.specialization for kernel in kernels}
    assert len(found) == 1


def test_a_short_product_asks_for_its_weights_before_it_waits() -> None:
    (kernel,) = compiled(CALLS["product short"], (9, 0))
    ptx = kernel.asm["ptx"]
    assert 0 < ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait")
    assert "wgmma.mma_async" in ptx


def test_what_begins_early_waits_at_its_end() -> None:
    """And the product before attention lets the next kernel start when what came before it has been written."""
    (ptx,) = [kernel.asm["ptx"] for kernel in compiled(CALLS["early"], (9, 0))]
    wait = ptx.index("griddepcontrol.wait")
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("st.global") < wait
    assert ptx.count("griddepcontrol.wait") == 1
    assert "ld.global" not in ptx[wait:]
    (ptx,) = [kernel.asm["ptx"] for kernel in compiled(CALLS["late"], (9, 0))]
    assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents") < ptx.index("st.global")


@pytest.mark.parametrize(("name", "loads"), [("rotate and attend", 12), ("rotate and attend, fp8", 16)])
def test_attention_of_one_token_asks_for_earlier_keys_before_it_waits_and_writes_after_it(
    name: str, loads: int
) -> None:
    """Of keys and values as many; bf16's angles are read 16 bytes at a time as well."""
    (kernel,) = compiled(CALLS[name], (9, 0))
    ptx = kernel.asm["ptx"]
    before, after = ptx.split("griddepcontrol.wait")
    assert before.count("ld.global.v4.b32") >= loads
    assert "st.global" not in before
    assert "st.global" in after


def test_an_fp8_cache_is_read_16_bytes_at_a_time_and_widened_by_pairs() -> None:
    (kernel,) = compiled(CALLS["decode fp8"], (9, 0))
    ptx = kernel.asm["ptx"]
    assert ptx.count("cp.async.cg.shared.global [") >= 8
    assert "0x10, %r" in ptx  # bytes of a copy
    assert "cvt.rn.f16x2.e4m3x2" in ptx
    assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in ptx
    assert "ld.shared.b8" not in ptx


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_row_is_read_16_bytes_at_a_time_and_converted_by_no_instruction(bits: int) -> None:
    (kernel,) = compiled(CALLS[f"int{bits} gemv"], (9, 0))
    ptx = kernel.asm["ptx"]
    assert ptx.count("ld.global.v4.b32") >= 8
    assert 0 < ptx.index("ld.global.v4.b32") < ptx.index("griddepcontrol.wait")
    assert "cvt.rn.f32.s" not in ptx
    assert ("prmt.b32" if bits == 8 else "lop3.b32") in ptx


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_numbers_reach_tensor_cores_without_a_way_through_shared_memory(bits: int) -> None:
    """Words are read from shared memory as the tensor cores want the weights, and widened there while those work."""
    for name in ("product", "product deep", "product gated", "product wide"):
        (kernel,) = compiled(CALLS[f"int{bits} {name}"], (9, 0))
        graph = kernel.asm["ttgir"]
        loop = graph[graph.index("scf.for") : graph.index("scf.yield")]
        assert loop.count("ttng.warp_group_dot ") == 8  # 16 columns each
        assert loop.count("isAsync = true") == 8
        assert "ttg.local_alloc" not in loop
        assert "ttg.local_store" not in loop
        ptx = kernel.asm["ptx"]
        begin, end = ptx.index("wgmma.mma_async"), ptx.rindex("wgmma.mma_async")
        assert "st.shared" not in ptx[begin:end]
        assert ptx[begin:end].count("wgmma.wait_group.sync.aligned 0") == 0


def test_an_fp8_row_is_read_16_bytes_at_a_time_and_widened_by_pairs() -> None:
    """And each thread loads the inputs that it multiplies: nothing but the sums goes through shared memory."""
    (kernel,) = compiled(CALLS["fp8 gemv"], (9, 0))
    ptx = kernel.asm["ptx"]
    assert ptx.count("ld.global.v4.b32") >= 10
    assert "ld.global.b8" not in ptx
    assert 0 < ptx.index("ld.global.v4.b32") < ptx.index("griddepcontrol.wait")
    assert ptx.count("cvt.rn.f16x2.e4m3x2") >= 64
    assert kernel.metadata.shared <= 128


@pytest.mark.parametrize("name", ["product", "product deep", "product gated", "product short"])
def test_fp8_numbers_reach_tensor_cores_without_a_way_through_shared_memory(name: str) -> None:
    """They are read from shared memory as the tensor cores want the weights, and widened there while those work."""
    (kernel,) = compiled(CALLS[f"fp8 {name}"], (9, 0))
    graph, ptx = kernel.asm["ttgir"], kernel.asm["ptx"]
    loop = graph[graph.index("scf.for") : graph.index("scf.yield")]
    assert loop.count("ttng.warp_group_dot ") == 8  # 16 columns each
    assert loop.count("isAsync = true") == 8
    assert "ttg.local_alloc" not in loop
    assert "ttg.local_store" not in loop
    begin, end = ptx.index("wgmma.mma_async"), ptx.rindex("wgmma.mma_async")
    assert "st.shared" not in ptx[begin:end]
    assert ptx[begin:end].count("wgmma.wait_group.sync.aligned 0") == 0
    assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in ptx
    assert "ld.shared.b8" not in ptx
    assert "cvt.rn.f16x2.e4m3x2" in ptx
    assert "cvt.bf16.f16" not in ptx, "16 of these a cycle, fewer than the bytes that memory brings"


@pytest.mark.parametrize("name", ["wide convolution", "wide product", "wide product and norm", "gated product"])
def test_tiles_that_are_copied_go_straight_to_the_tensor_cores(name: str) -> None:
    """Both operands are read from shared memory, and nothing is moved there meanwhile."""
    (kernel,) = compiled(CALLS[name], (9, 0))
    graph = kernel.asm["ttgir"]
    loop = graph[graph.rindex("scf.for", 0, graph.index("ttng.warp_group_dot ")) :]
    products = [line for line in loop.splitlines() if "ttng.warp_group_dot " in line]
    assert len(products) == 2
    assert all("!ttg.memdesc" in line.split(" : ")[-1].split(" * ")[0] for line in products)
    ptx = kernel.asm["ptx"]
    between = ptx[ptx.index("wgmma.mma_async") : ptx.rindex("wgmma.mma_async")]
    assert "ldmatrix" not in between
    assert "st.shared" not in between
