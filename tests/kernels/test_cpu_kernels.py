"""The compiled CPU operators against the references, at sizes that do and do not fill a vector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miinb.engine.quantize import Quantizer
from miinb.kernels import cpu, cpu_build, cpu_library, reference
from miinb.kernels.cpu import CpuKernels
from miinb.kernels.linear import PackedLinear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=DTYPES)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    made = CpuKernels(DTYPES[request.param])
    made.limit = 1 << 30  # every size through the library
    return made


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for rounding: `theirs` is computed in fp32."""
    tolerance = 1e-5 if ours.dtype == torch.float32 else 1e-2
    return bool((ours.float() - theirs).abs().max() <= tolerance * theirs.abs().max())


def random(kernels: CpuKernels, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(kernels.dtype)


@pytest.mark.parametrize("rows", [*range(1, 10), 33])
@pytest.mark.parametrize(("n", "k"), [(1, 7), (10, 48), (13, 100), (64, 33), (6, 5000)])
def test_linear(kernels: CpuKernels, rows: int, n: int, k: int) -> None:
    x, w, bias, residual = (random(kernels, *shape) for shape in ((rows, k), (n, k), (n,), (rows, n)))
    packed = PackedLinear(w, bias)
    wanted = reference.linear(x.float(), w.float(), bias.float(), activation="gelu_tanh", residual=residual.float())
    assert close(kernels.linear(x, packed, activation="gelu_tanh", residual=residual), wanted)
    assert close(kernels.linear(x, PackedLinear(w)), x.float() @ w.float().t())


@pytest.mark.parametrize("kind", ["relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "inner"), [(1, 5), (3, 8), (4, 7), (6, 21), (8, 3)])
def test_gated_linear(kernels: CpuKernels, kind: str, rows: int, inner: int) -> None:
    x, w, bias = random(kernels, rows, 40), random(kernels, 2 * inner, 40), random(kernels, 2 * inner)
    wanted = reference.gated(reference.linear(x.float(), w.float(), bias.float()), kind)
    assert close(kernels.gated_linear(x, PackedLinear(w, bias), kind), wanted)


def quantized(weight: Tensor, bias: Tensor | None = None, kind: Any = "int8") -> PackedLinear:
    quantizer = Quantizer(kind)
    numbers, scale = quantizer.empty(*weight.shape, weight.device)
    quantizer.quantize(weight, numbers, scale)
    return PackedLinear(numbers, bias, scale)


@pytest.fixture(scope="module")
def plain() -> CpuKernels:
    made = CpuKernels(torch.float32)
    made.limit = 4  # where PyTorch's linear layers are the faster ones: they have none for int8
    return made


@pytest.mark.parametrize("rows", [*range(1, 10), 33])
@pytest.mark.parametrize(("n", "k"), [(1, 7), (10, 48), (13, 100), (9, 192), (64, 65), (6, 5000)])
def test_linear_of_int8(plain: CpuKernels, rows: int, n: int, k: int) -> None:
    x, w, bias, residual = (random(plain, *shape) for shape in ((rows, k), (n, k), (n,), (rows, n)))
    packed = quantized(w, bias)
    assert packed.scale is not None
    wanted = x @ reference.dequantize(packed.weight, packed.scale).t() + bias
    assert close(plain.linear(x, packed, activation="relu", residual=residual), wanted.relu() + residual)
    assert close(reference.linear(x, packed.weight, bias, scale=packed.scale), wanted)
    doubled = quantized(torch.cat((w, random(plain, n, k + 1)[:, :-1])))
    assert close(
        plain.gated_linear(x, doubled, "silu"),
        reference.gated(reference.linear(x, doubled.weight, scale=doubled.scale), "silu"),
    )


@pytest.fixture(scope="module", params=["this CPU", "x86-64-v3", "x86-64"])
def leveled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    """For this CPU's instructions, for AVX2 alone, and for less (as on a CPU of another kind)."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "this CPU":
            if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
                pytest.skip("this CPU does not have AVX2")
            flags = tuple(flag.replace("native", request.param) for flag in cpu_build.FLAGS)
            patch.setattr(cpu_build, "FLAGS", flags)
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
            patch.setattr(cpu, "load_library", cpu_library.load_library.__wrapped__)
        return CpuKernels(torch.float32, int8=True)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize(("n", "k"), [(1, 7), (10, 48), (13, 100), (9, 192), (37, 97), (64, 65), (6, 5000)])
@pytest.mark.usefixtures("threads")
def test_quantized_products_at_every_level_of_instructions(leveled: CpuKernels, kind: str, n: int, k: int) -> None:
    """Against fp64, and each row to the bit as it is alone."""
    for rows in (*range(1, 10), 15, 16, 100):
        x, w, bias, residual = (random(leveled, *shape) for shape in ((rows, k), (2 * n, k), (2 * n,), (rows, 2 * n)))
        packed = quantized(w, bias, kind)
        assert packed.scale is not None
        exact = x.double() @ reference.dequantize(packed.weight, packed.scale)[:, :k].double().t() + bias
        found = leveled.linear(x, packed, activation="relu", residual=residual)
        assert close(found, exact.relu() + residual), rows
        assert close(leveled.gated_linear(x, packed, "silu"), reference.gated(exact, "silu")), rows
        for i in range(0, rows, 7):
            alone = leveled.linear(x[i : i + 1], packed, activation="relu", residual=residual[i : i + 1])
            assert torch.equal(alone, found[i : i + 1]), (rows, i)


def test_int4_of_the_largest_numbers_and_of_what_is_not_finite(leveled: CpuKernels) -> None:
    w = random(leveled, 6, 130)
    w[:4, 0], w[:4, 129] = 1e38, -1e38
    packed = quantized(w, kind="int4")
    assert packed.scale is not None
    x = random(leveled, 5, 130) * 1e-3
    wanted = x.double() @ reference.dequantize(packed.weight, packed.scale)[:, :130].double().t()
    assert close(leveled.linear(x, packed), wanted)
    w[2, 129] = float("nan")
    assert leveled.linear(x, quantized(w, kind="int4")).isfinite().all(0).tolist() == [True] * 2 + [False] + [True] * 3
    x[1, 129] = float("inf")
    assert leveled.linear(x, packed).isfinite().all(1).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("weights", ["same", "int8", "int4"])
@pytest.mark.parametrize("k", [40, 208])  # from 16 rows on, 208 columns are multiplied in blocks
def test_a_row_does_not_depend_on_its_neighbors(kernels: CpuKernels, weights: str, k: int) -> None:
    """Bit for bit: else an answer would change with what else is asked at that moment."""
    x, w, bias, residual = (random(kernels, *shape) for shape in ((205, k), (26, k), (26,), (205, 26)))
    if weights != "same" and kernels.dtype != torch.float32:
        pytest.skip("activations are fp32 where weights are quantized")
    packed = PackedLinear(w, bias) if weights == "same" else quantized(w, bias, weights)
    for activation in (None, "relu", "silu", "gelu", "gelu_tanh"):
        alone = torch.cat(
            [
                kernels.linear(x[i : i + 1], packed, activation=activation, residual=residual[i : i + 1])
                for i in range(32)
            ]
        )
        for rows in (*range(2, 10), 13, 16, 18, 31, 205):
            some = kernels.linear(x[:rows], packed, activation=activation, residual=residual[:rows])
            assert torch.equal(some[:32], alone[:rows]), (activation, rows)
    gated = torch.cat([kernels.gated_linear(row[None], packed, "silu") for row in x[:32]])
    for rows in (2, 5, 8, 13, 16, 31, 205):
        assert torch.equal(kernels.gated_linear(x[:rows], packed, "silu")[:32], gated[:rows]), rows


def test_many_rows_by_pytorch_give_the_same(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIINB_CPU_TORCH_ROWS", "4")
    other = CpuKernels(kernels.dtype)
    assert other.limit == 4
    assert "depend" in other.description
    x, packed = random(kernels, 6, 40), PackedLinear(random(kernels, 24, 40), random(kernels, 24))
    for rows in (1, 3, 4, 6):
        ours, theirs = (
            other.linear(x[:rows], packed, activation="silu"),
            kernels.linear(x[:rows], packed, activation="silu"),
        )
        assert close(ours, theirs.float())
        assert torch.equal(ours, theirs) or rows >= 4
        assert close(
            other.gated_linear(x[:rows], packed, "gelu"), kernels.gated_linear(x[:rows], packed, "gelu").float()
        )


@pytest.mark.parametrize("hidden", [5, 48, 100])
@pytest.mark.parametrize("rows", [1, 20])
def test_norms(kernels: CpuKernels, hidden: int, rows: int) -> None:
    x, residual, weight, bias = (random(kernels, *s) for s in ((rows, hidden), (rows, hidden), (hidden,), (hidden,)))
    y, total = kernels.rms_norm(x, weight, 1e-5, residual)
    wanted, stream = reference.rms_norm((x + residual).float(), weight.float(), 1e-5)
    assert close(y, wanted)
    assert torch.equal(total.float(), stream)
    y, total = kernels.layer_norm(x, weight, bias, 1e-5)
    assert close(y, reference.layer_norm(x.float(), weight.float(), bias.float(), 1e-5)[0])
    assert total is x
    weights, biases = random(kernels, 2, hidden), random(kernels, 2, hidden)
    y, total = kernels.layer_norm(x, weights, biases, 1e-5, residual)
    wanted, stream = reference.layer_norm((x + residual).float(), weights.float(), biases.float(), 1e-5)
    assert close(y, wanted)
    assert torch.equal(total.float(), stream)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(64, 64), (20, 8), (10, 0)])
def test_rope_append(kernels: CpuKernels, interleaved: bool, head_size: int, rotary_dim: int) -> None:
    heads, kv_heads, tokens = 4, 2, 18
    qkv = random(kernels, tokens, (heads + 2 * kv_heads) * head_size)
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:tokens]
    positions = torch.arange(tokens) * 3
    angles = torch.arange(64.0)[:, None] * torch.rand(max(rotary_dim // 2, 1))
    cos, sin = (angles.cos(), angles.sin()) if rotary_dim else (None, None)
    norms = (random(kernels, head_size), random(kernels, head_size)) if head_size == 20 else (None, None)
    fixed: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_size": head_size, "rotary_dim": rotary_dim}

    def run(operator: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (torch.zeros(3, 8, kv_heads, head_size, dtype=dtype) for _ in range(2))
        q_norm, k_norm = (n.to(dtype) if n is not None else None for n in norms)
        given = (qkv.to(dtype), positions, cos, sin, k, v, slots)
        q = operator(*given, q_norm=q_norm, k_norm=k_norm, interleaved=interleaved, **fixed)
        return q, k, v

    for ours, theirs in zip(
        run(kernels.rope_append, kernels.dtype), run(reference.rope_append, torch.float32), strict=True
    ):
        assert close(ours, theirs)


@pytest.mark.parametrize("head_size", [10, 64, 80])
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 2.0}, {"alibi": True}], ids=str)
@pytest.mark.parametrize("page_tokens", [4, 40])
def test_attention_of_single_queries(
    kernels: CpuKernels, head_size: int, options: dict[str, Any], page_tokens: int
) -> None:
    heads, kv_heads, lengths = 6, 2, [1, 23, 38]
    width = 40 // page_tokens
    q = random(kernels, len(lengths), heads, head_size)
    k, v = (random(kernels, 3 * width, page_tokens, kv_heads, head_size) + n for n in (0, 1))
    table = torch.randperm(3 * width, generator=torch.Generator().manual_seed(2)).view(width, 3).int().t()
    if options.get("alibi"):
        options = {"alibi": torch.rand(heads, generator=torch.Generator().manual_seed(3))}
    tail = (table, torch.arange(4, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32))
    ours = kernels.paged_attention(q, k, v, *tail, scale=0.3, max_query=1, **options)
    wanted = reference.paged_attention(q.float(), k.float(), v.float(), *tail, scale=0.3, max_query=1, **options)
    assert close(ours, wanted)


def test_greedy_head_finds_the_first_largest_and_what_is_not_finite(kernels: CpuKernels) -> None:
    head = PackedLinear(random(kernels, 200, 33))
    x = random(kernels, 4, 33)
    ids, finite = kernels.greedy_head(x, head)
    assert torch.equal(ids, kernels.linear(x, head).argmax(-1))
    assert finite.all()
    head.weight[7] = head.weight[3] = 50 * torch.sign(x[0])
    head.weight[9, 0] = float("nan")
    ids, finite = kernels.greedy_head(x, head)
    assert not finite.any()
    head.weight[9, 0] = 0.0
    ids, finite = kernels.greedy_head(x, head)
    assert (ids[0].item(), finite[0].item()) == (3, True)
    x[1, 2] = float("inf")
    assert kernels.greedy_head(x, head)[1].tolist() == [True, False, True, True]


def test_build_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "not-a-compiler"
    wrong.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    wrong.chmod(0o755)
    monkeypatch.setenv("CC", str(wrong))
    with pytest.raises(cpu_build.Unavailable, match="no such flag"):
        cpu_build.build(tmp_path / "cache")
    monkeypatch.setenv("CC", "no-such-program")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cpu_build.Unavailable, match="no C compiler"):
        cpu_build.build(tmp_path / "cache")


def test_build_is_made_once(tmp_path: Path) -> None:
    first = cpu_build.build(tmp_path)
    made = first.stat().st_mtime_ns
    assert cpu_build.build(tmp_path) == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".so"] == ["lock"]


def test_a_decoding_row_does_not_depend_on_prompts_in_its_step(kernels: CpuKernels) -> None:
    k, v = random(kernels, 3, 40, 2, 16), random(kernels, 40, 3, 2, 16).transpose(0, 1).contiguous()
    q = random(kernels, 2 + 9, 4, 16)
    table, lengths = torch.tensor([[0], [1], [2]], dtype=torch.int32), torch.tensor([30, 7, 20], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 11], dtype=torch.int32)
    for window in (None, 5):
        mixed = kernels.paged_attention(q, k, v, table, starts, lengths, scale=0.25, window=window, max_query=9)
        alone = kernels.paged_attention(
            q[:2], k, v, table[:2], starts[:3], lengths[:2], scale=0.25, window=window, max_query=1
        )
        chunk = reference.paged_attention(
            q[2:], k, v, table[2:], torch.tensor([0, 9]), lengths[2:], scale=0.25, window=window
        )
        assert torch.equal(mixed[:2], alone)
        assert torch.equal(mixed[2:], chunk)
