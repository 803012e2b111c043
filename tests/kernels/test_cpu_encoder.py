"""The compiled operators of encoders against the references, at sizes that do and do not fill a vector."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.engine.quantize import Quantizer
from miinb.kernels import reference
from miinb.kernels.cpu import CpuKernels
from miinb.kernels.cpu_blocks import BlockedLinear
from miinb.kernels.linear import PackedLinear


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    return CpuKernels(torch.float32, int8=True)


@pytest.fixture(scope="module", params=["AVX-512", "AMX"])
def short(request: pytest.FixtureRequest) -> CpuKernels:
    """Of bf16, by each kind of instructions that this CPU has for it."""
    made = CpuKernels(torch.bfloat16, tiles=True)
    wanted = {"AVX-512": 2, "AMX": 3}[request.param]
    if made.bf16 < wanted:
        pytest.skip(f"this CPU has no {request.param} for bf16")
    made.bf16 = wanted
    return made


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max())


def packed(kernels: CpuKernels, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """int8 weights of as many levels as the instructions of this CPU take."""
    quantizer = Quantizer(levels=kernels.levels)
    numbers, scale = quantizer.empty(*weight.shape, weight.device)
    quantizer.quantize(weight, numbers, scale)
    return PackedLinear(numbers, bias, scale)


def rounded(x: Tensor, levels: int) -> Tensor:
    """What the int8 product makes of its inputs: whole numbers with a scale for each group of columns."""
    groups = F.pad(x, (0, -x.shape[-1] % reference.GROUP)).unflatten(-1, (-1, reference.GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    return ((groups * (levels / largest)).round() * (largest / levels)).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 33, 400])
@pytest.mark.parametrize(("n", "k"), [(1, 7), (10, 48), (37, 64), (48, 200), (6, 3000)])
def test_products_in_blocks(kernels: CpuKernels, rows: int, n: int, k: int) -> None:
    x, weight, bias, residual = random(rows, k), random(n, k), random(n), random(rows, n)
    plain = PackedLinear(weight, bias)
    for activation in (None, "gelu"):
        wanted = reference.linear(x, weight, bias, activation=activation, residual=residual)
        assert close(kernels.linear(x, kernels.pack(plain), activation=activation, residual=residual), wanted)
    int8 = packed(kernels, weight, bias)
    assert int8.scale is not None
    block = kernels.pack(int8)
    assert isinstance(block, BlockedLinear)
    assert block.int8
    near = F.linear(rounded(x, kernels.levels), reference.dequantize(int8.weight, int8.scale), bias)
    assert close(
        kernels.linear(x, block, residual=residual), near + residual, 2e-3
    )  # a tie may be rounded the other way
    assert close(kernels.linear(x, block), F.linear(x, weight, bias), 0.05)


@pytest.mark.parametrize("rows", [*range(1, 41), 127, 400])
@pytest.mark.parametrize(("n", "k"), [(1, 7), (37, 64), (48, 200), (6, 3001)])
def test_products_of_bf16_in_blocks(short: CpuKernels, rows: int, n: int, k: int) -> None:
    x, weight, bias, residual = (random(*shape).bfloat16() for shape in ((rows, k), (n, k), (n,), (rows, n)))
    block = short.pack(PackedLinear(weight, bias))
    assert isinstance(block, BlockedLinear)
    assert torch.equal(block.plain(), weight)
    for activation in (None, "gelu", "relu"):
        ours = short.linear(x, block, activation=activation, residual=residual)
        wanted = reference.linear(
            x.float(), weight.float(), bias.float(), activation=activation, residual=residual.float()
        )
        assert ours.dtype == torch.bfloat16
        assert close(ours, wanted, 4e-3)  # rounded once, at the end


def test_no_rows_are_no_work(kernels: CpuKernels, short: CpuKernels) -> None:
    assert kernels.linear(torch.empty(0, 40), kernels.pack(PackedLinear(random(8, 40)))).shape == (0, 8)
    layer = short.pack(PackedLinear(random(8, 40).bfloat16()))
    assert short.linear(torch.empty(0, 40).bfloat16(), layer).shape == (0, 8)


def test_without_instructions_bf16_stays_as_it_is() -> None:
    assert isinstance(CpuKernels(torch.bfloat16).pack(PackedLinear(random(8, 8).bfloat16())), PackedLinear)


def test_the_largest_numbers_do_not_saturate(kernels: CpuKernels) -> None:
    """All products of a group have their largest value and one sign: 16 bits are not enough for any more."""
    for sign in (1, -1):
        x, weight = torch.full((5, 256), 3.0), sign * torch.full((33, 256), 2.0)
        assert close(kernels.linear(x, kernels.pack(packed(kernels, weight))), F.linear(x, weight), 1e-6)


def test_a_row_does_not_depend_on_its_neighbors(kernels: CpuKernels) -> None:
    x, weight, bias, residual = random(205, 208), random(26, 208), random(26), random(205, 26)
    for layer in (kernels.pack(PackedLinear(weight, bias)), kernels.pack(packed(kernels, weight, bias))):
        alone = torch.cat(
            [kernels.linear(x[i : i + 1], layer, activation="gelu", residual=residual[i : i + 1]) for i in range(32)]
        )
        for rows in (2, 3, 4, 5, 6, 13, 31, 205):
            some = kernels.linear(x[:rows], layer, activation="gelu", residual=residual[:rows])
            assert torch.equal(some[:32], alone[:rows]), rows


@pytest.mark.parametrize("k", [208, 768, 50])
def test_a_row_of_bf16_does_not_depend_on_its_neighbors(short: CpuKernels, k: int) -> None:
    x, weight, bias, residual = (random(*shape).bfloat16() for shape in ((205, k), (70, k), (70,), (205, 70)))
    layer = short.pack(PackedLinear(weight, bias))
    alone = torch.cat(
        [short.linear(x[i : i + 1], layer, activation="gelu", residual=residual[i : i + 1]) for i in range(64)]
    )
    for rows in (2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 48, 64, 130, 205):
        some = short.linear(x[:rows], layer, activation="gelu", residual=residual[:rows])
        assert torch.equal(some[:64], alone[:rows]), rows
        last = short.linear(x[-rows:], layer)
        assert torch.equal(last[-1], short.linear(x[-1:], layer)[0]), rows


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_in_bf16_stays_so(short: CpuKernels, broken: float) -> None:
    x, weight = random(40, 100).bfloat16(), random(20, 100).bfloat16()
    x[4, 99] = x[35, 0] = broken
    finite = torch.isfinite(short.linear(x, short.pack(PackedLinear(weight)))).all(-1)
    assert finite.tolist() == [row not in (4, 35) for row in range(40)]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(kernels: CpuKernels, broken: float) -> None:
    x, weight = random(9, 100), random(20, 100)
    x[4, 80] = broken
    for layer in (PackedLinear(weight), packed(kernels, weight)):
        finite = torch.isfinite(kernels.linear(x, kernels.pack(layer))).all(-1)
        assert finite.tolist() == [row != 4 for row in range(9)]


def test_gelu_is_accurate(kernels: CpuKernels) -> None:
    x = torch.linspace(-12, 12, 200_001)
    ours = kernels.linear(x[:, None], kernels.pack(PackedLinear(torch.ones(1, 1))), activation="gelu")[:, 0]
    exact = F.gelu(x.double())
    assert float((ours - exact).abs().max()) < 1e-6
    assert float((ours - exact)[x.abs() < 1].abs().max()) < 2e-7


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", [8, 10, 32, 37, 64])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 16, 33], [130, 2, 47], [512], [3] * 40], ids=str)
def test_packed_attention(dtype: torch.dtype, head_size: int, lengths: list[int], tiles: bool) -> None:
    heads, tokens = 3, sum(lengths)
    qkv = random(tokens, 3 * heads * head_size).to(dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    options = {"heads": heads, "head_size": head_size, "scale": 0.4}
    kernels = CpuKernels(dtype, tiles=tiles)  # in bf16 by AMX, where there is one
    ours = kernels.packed_attention(qkv, starts, max_length=max(lengths) + 3, **options)
    wanted = reference.packed_attention(qkv.float(), starts, max_length=max(lengths), **options)
    assert close(ours, wanted, 1e-5 if dtype == torch.float32 else 1e-2)
    last = kernels.packed_attention(
        qkv[-lengths[-1] :], torch.tensor([0, lengths[-1]]).int(), max_length=lengths[-1], **options
    )
    assert torch.equal(ours[-lengths[-1] :], last)  # alone as in a batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_token_breaks_its_own_sequence_alone(dtype: torch.dtype, broken: float) -> None:
    places = (20, 2 * 2 * 32 + 5, *([2 * 32 + 5] if broken != broken else []))
    for place in places:  # in its query, where it breaks one row, in its value, and in its key
        qkv = random(12, 3 * 2 * 32).to(dtype)
        qkv[7, place] = broken
        starts = torch.tensor([0, 5, 5, 9, 12], dtype=torch.int32)  # one sequence is empty
        kernels = CpuKernels(dtype, tiles=True)
        out = kernels.packed_attention(qkv, starts, heads=2, head_size=32, scale=1.0, max_length=5)
        rows = [7] if place == 20 else range(5, 9)
        assert torch.isfinite(out).all(-1).tolist() == [row not in rows for row in range(12)]
