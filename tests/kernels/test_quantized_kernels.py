"""The kernels of quantized weights against the reference in fp64: on a GPU, or by Triton's interpreter on a CPU."""

from typing import Any

import pytest
import torch

import tests.kernels.interpreter  # noqa: F401
from miinb.kernels import dequantize as dequantize_module
from miinb.kernels import reference
from miinb.kernels.dequantize import embedding_rows, product_of_many
from miinb.kernels.formats import INT8_OFFSET, bits_of, dequantize, groups_of, pack, unpack
from miinb.kernels.head import greedy_head
from miinb.kernels.linear import PackedLinear, gated_linear, linear
from miinb.kernels.quantized_product import MOST_ROWS, quantized_product_tile
from tests.kernels.checking import DEVICE, DOT_DTYPES, DTYPES, GPU, rand, same, seeded, wide  # noqa: F401

pytestmark = [pytest.mark.gpu] if GPU else []
#: A weight is put into the bits of a float, and what that adds is taken away again: see `quantized_gemv`.
FP32_TOLERANCE = 1e-3


def quantized(n: int, k: int, bits: int, bias: torch.Tensor | None = None) -> PackedLinear:
    """Any numbers with any scales: what they stand for is the reference's to say."""
    numbers = torch.randint(0, 1 << bits, (n, k))
    numbers[:, -1] = torch.randint(0, 2, (n,)) * ((1 << bits) - 1)
    step = (torch.rand(n, groups_of(k)) + 0.1) / (1 << bits)
    scale = torch.stack((step, -8 * step + 0.1 * torch.randn_like(step)), -1) if bits == 4 else step
    return PackedLinear(pack(numbers, bits).to(DEVICE), bias, scale.bfloat16().to(DEVICE))


def exact(x: torch.Tensor, packed: PackedLinear, **options: Any) -> torch.Tensor:
    assert packed.scale is not None
    weight = dequantize(packed.weight.cpu(), packed.scale.cpu())[:, : x.shape[1]]
    return reference.linear(wide(x), weight.double(), wide(packed.bias), **options)


def near(out: torch.Tensor, expected: torch.Tensor) -> None:
    same(out, expected, FP32_TOLERANCE if out.dtype == torch.float32 else None)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k", [7, 64, 100])
def test_numbers_come_out_of_words_as_they_went_in(bits: int, k: int) -> None:
    numbers = torch.randint(0, 1 << bits, (3, k))
    words = pack(numbers, bits)
    assert torch.equal(unpack(words, bits)[:, :k], numbers.int())
    assert words.shape[1] * 4 >= k * bits / 8
    scale = torch.ones(3, groups_of(k), 2) if bits == 4 else torch.ones(3, groups_of(k))
    assert bits_of(scale) == bits
    assert torch.equal(dequantize(words, scale)[:, :k], numbers + (1.0 if bits == 4 else -INT8_OFFSET))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(9, 64), (7, 100), (33, 1100), (3, 4200)])
def test_one_row(bits: int, dtype: torch.dtype, n: int, k: int) -> None:
    x = rand(1, k, dtype=dtype)
    for bias, activation, residual in [
        (None, None, None),
        (rand(n, dtype=dtype), "gelu_tanh", None),
        (rand(n, dtype=dtype), None, rand(1, n, dtype=dtype)),
    ]:
        packed = quantized(n, k, bits, bias)
        out = linear(x, packed, activation=activation, residual=residual)
        near(out, exact(x, packed, activation=activation, residual=wide(residual)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_gated(bits: int, rows: int, bias: bool) -> None:
    x, b = rand(rows, 136), rand(2 * 33) if bias else None
    packed = quantized(2 * 33, 136, bits, b)
    near(gated_linear(x, packed, "silu"), reference.gated(exact(x, packed), "silu"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(2, 64, 128), (5, 128, 1024), (33, 100, 192), (70, 130, 320), (MOST_ROWS, 128, 256)]
)
def test_few_rows(bits: int, rows: int, n: int, k: int) -> None:
    dtype = DOT_DTYPES[1]
    x, bias, residual = (rand(*shape, dtype=dtype) for shape in ((rows, k), (n,), (rows, n)))
    packed = quantized(n, k, bits, bias)
    tile = quantized_product_tile(x, n, bits, gated=False)
    assert tile is not None
    assert tile["SPLIT"] == min(-(-k // 128), 8)
    expected = exact(x, packed, activation="silu", residual=wide(residual))
    same(linear(x, packed, activation="silu", residual=residual), expected)
    n += -n % 64
    packed = quantized(2 * n, k, bits, rand(2 * n, dtype=dtype))
    same(gated_linear(x, packed, "relu"), reference.gated(exact(x, packed), "relu"))


def test_what_has_no_product_of_few_rows() -> None:
    dtype = DOT_DTYPES[1]
    assert quantized_product_tile(rand(1, 256, dtype=dtype), 64, 4, gated=False) is None
    assert quantized_product_tile(rand(MOST_ROWS + 1, 256, dtype=dtype), 64, 4, gated=False) is None
    assert quantized_product_tile(rand(3, 100, dtype=dtype), 64, 4, gated=False) is None
    assert quantized_product_tile(rand(3, 256, dtype=dtype), 60, 4, gated=True) is None
    assert quantized_product_tile(rand(3, 256), 64, 4, gated=False) is None


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "n", "k"), [(3, 7, 100), (90, 70, 192)])
def test_many_rows(monkeypatch: pytest.MonkeyPatch, bits: int, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    monkeypatch.setattr(dequantize_module, "_SCRATCH", 32 * k)  # the matrix goes through it in pieces
    monkeypatch.setattr(dequantize_module, "_ROWS", 16)
    dequantize_module.scratch.cache_clear()
    x, bias, residual = (rand(*shape, dtype=dtype) for shape in ((rows, k), (n,), (rows, n)))
    packed = quantized(n, k, bits, bias)
    out = linear(x, packed, activation="relu", residual=residual)
    near(out, exact(x, packed, activation="relu", residual=wide(residual)))
    packed.bias = None
    out = rand(rows + 1, n, dtype=dtype)[:rows]
    assert packed.scale is not None
    product_of_many(x, packed.weight, packed.scale, None, out=out)
    near(out, exact(x, packed))
    dequantize_module.scratch.cache_clear()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_rows(bits: int, dtype: torch.dtype) -> None:
    packed = quantized(20, 100, bits)
    assert packed.scale is not None
    ids = torch.tensor([3, 19, 0, 3], device=DEVICE)
    table = dequantize(packed.weight.cpu(), packed.scale.cpu())[:, :100]
    out = embedding_rows(ids, packed.weight, packed.scale, 100, dtype)
    assert out.dtype == dtype
    same(out, table[ids.cpu()])
    plain = rand(5, 8, dtype=dtype)
    assert torch.equal(embedding_rows(ids[2:3], plain, None, 8, dtype), plain[:1])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_greedy_head(bits: int, rows: int) -> None:
    x = rand(rows, 128, dtype=DOT_DTYPES[1])
    packed = quantized(5000, 128, bits)
    ids, finite = greedy_head(x, packed)
    logits = exact(x, packed)
    best = logits.amax(-1)
    assert finite.all()
    assert ((best - logits.gather(1, ids.cpu()[:, None])[:, 0]) <= 2e-3 * best).all()
