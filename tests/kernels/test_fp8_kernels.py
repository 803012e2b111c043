"""The kernels of fp8 weights against the reference in fp64: on a GPU, or by Triton's interpreter on a CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tests.kernels.interpreter  # noqa: F401
from miinb.engine.parity import difference, products_of_many
from miinb.kernels import dequantize as dequantize_module
from miinb.kernels import reference
from miinb.kernels.dequantize import dequantized, product_of_many
from miinb.kernels.formats import FP8, FP8_MAX, dequantize, fp8_columns, pack_fp8, unpack_fp8
from miinb.kernels.fp8_gemv import fp8_gemv
from miinb.kernels.fp8_many import fp8_product_of_many, fp8_rows
from miinb.kernels.fp8_product import MOST_ROWS, fp8_product_tile
from miinb.kernels.linear import PackedLinear, gated_linear, linear
from tests.kernels.checking import DEVICE, DOT_DTYPES, DTYPES, GPU, rand, same, seeded, wide  # noqa: F401

pytestmark = [pytest.mark.gpu] if GPU else []


def quantized(n: int, k: int, bias: torch.Tensor | None = None) -> PackedLinear:
    """Numbers of every size with any scales; what fills rows up is not zero, as it must not count."""
    size = 2.0 ** torch.randint(-9, 9, (n, fp8_columns(k)))
    numbers = pack_fp8((torch.randn(n, fp8_columns(k)) * size).clamp(-FP8_MAX, FP8_MAX).to(FP8))
    return PackedLinear(numbers.to(DEVICE), bias, ((torch.rand(n) + 0.1) / FP8_MAX).to(DEVICE))


def exact(x: torch.Tensor, packed: PackedLinear, **options: Any) -> torch.Tensor:
    assert packed.scale is not None
    weight = dequantize(packed.weight.cpu(), packed.scale.cpu())[:, : x.shape[1]]
    return reference.linear(wide(x), weight.double(), wide(packed.bias), **options)


def test_every_number_is_widened_exactly() -> None:
    """All 256 bytes but the two NaNs, by the kernel of one row, by tensor cores, and by the one that stores it."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    numbers = numbers[~numbers.float().isnan()]
    numbers = torch.cat((numbers, numbers[:2])).to(DEVICE)  # 256 rows
    scale = torch.ones(256, device=DEVICE)
    weight = torch.zeros(256, 64, dtype=torch.uint8, device=DEVICE).view(FP8)
    weight.view(torch.uint8)[torch.arange(256), torch.arange(256) % 64] = numbers.view(torch.uint8)
    one = torch.ones(1, 64, device=DEVICE)
    assert torch.equal(fp8_gemv(one, weight, scale, None)[0], numbers.float())
    few = linear(one.to(DOT_DTYPES[1]).expand(3, 64).contiguous(), PackedLinear(weight, scale=scale))
    assert torch.equal(few.float(), numbers.float().expand(3, 256))
    out = torch.empty(256, 64, device=DEVICE)
    assert torch.equal(dequantized(weight, scale, out), unpack_fp8(weight).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(9, 64), (7, 100), (33, 1100), (3, 4200)])
def test_one_row(dtype: torch.dtype, n: int, k: int) -> None:
    x = rand(1, k, dtype=dtype)
    for bias, activation, residual in [
        (None, None, None),
        (rand(n, dtype=dtype), "gelu_tanh", None),
        (rand(n, dtype=dtype), None, rand(1, n, dtype=dtype)),
    ]:
        packed = quantized(n, k, bias)
        out = linear(x, packed, activation=activation, residual=residual)
        same(out, exact(x, packed, activation=activation, residual=wide(residual)))
    assert linear(x, packed, out=out) is out
    same(out, exact(x, packed))


def test_many_outputs_of_one_row() -> None:
    """Programs of eight rows, the last of which has fewer."""
    x, packed = rand(1, 80), quantized(2051, 80)
    same(linear(x, packed), exact(x, packed))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_gated(rows: int, bias: bool) -> None:
    x, b = rand(rows, 136), rand(2 * 33) if bias else None
    packed = quantized(2 * 33, 136, b)
    same(gated_linear(x, packed, "silu"), reference.gated(exact(x, packed), "silu"))


@pytest.mark.parametrize("k", [7, 16, 100])
def test_numbers_come_out_in_the_order_they_went_in(k: int) -> None:
    numbers = torch.randint(0, 127, (3, k), dtype=torch.uint8).view(FP8)
    packed = pack_fp8(numbers)
    assert packed.shape == (3, fp8_columns(k))
    back = unpack_fp8(packed).view(torch.uint8)
    assert torch.equal(back[:, :k], numbers.view(torch.uint8))
    assert not back[:, k:].any()
    if k == 16:
        order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
        assert torch.equal(packed.view(torch.uint8), numbers.view(torch.uint8)[:, order])


@pytest.mark.parametrize(("rows", "n", "k"), [(2, 64, 128), (5, 128, 1024), (33, 100, 176), (MOST_ROWS, 128, 256)])
def test_few_rows(rows: int, n: int, k: int) -> None:
    dtype = DOT_DTYPES[1]
    x, bias, residual = (rand(*shape, dtype=dtype) for shape in ((rows, k), (n,), (rows, n)))
    packed = quantized(n, k, bias)
    tile = fp8_product_tile(x, n, gated=False)
    assert tile is not None
    assert (tile["SPLIT"] > 1) == (k > 128)
    expected = exact(x, packed, activation="silu", residual=wide(residual))
    same(linear(x, packed, activation="silu", residual=residual), expected)
    assert linear(x, packed, out=residual) is residual
    same(residual, exact(x, packed))
    packed = quantized(2 * n, k, rand(2 * n, dtype=dtype))
    assert (fp8_product_tile(x, n, gated=True) is not None) == (n != 100)
    same(gated_linear(x, packed, "relu"), reference.gated(exact(x, packed), "relu"))


def test_what_has_no_product_of_few_rows() -> None:
    dtype = DOT_DTYPES[1]
    assert fp8_product_tile(rand(1, 256, dtype=dtype), 64, gated=False) is None
    assert fp8_product_tile(rand(MOST_ROWS + 1, 256, dtype=dtype), 64, gated=False) is None
    assert fp8_product_tile(rand(3, 100, dtype=dtype), 64, gated=False) is None
    assert fp8_product_tile(rand(3, 256, dtype=dtype), 60, gated=True) is None
    assert fp8_product_tile(rand(3, 256), 64, gated=False) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [16, 112, 1104])
def test_rows_become_fp8(dtype: torch.dtype, k: int) -> None:
    x = rand(5, k, dtype=dtype) * torch.tensor([1.0, 1e-3, 1e4, 0.0, 7.0], dtype=dtype, device=DEVICE)[:, None]
    numbers, scale = fp8_rows(x)
    largest = x.float().abs().amax(1, keepdim=True)
    assert torch.allclose(scale, largest / FP8_MAX, rtol=1e-6, atol=1e-30)
    assert (numbers.float().abs().amax(1) == FP8_MAX).tolist() == [True, True, True, False, True]
    back = unpack_fp8(numbers).float() * scale
    error = (back - x.float()).abs()
    assert (error <= (x.float().abs() / 16 * 1.001).clamp(min=1e-3 / FP8_MAX * largest)).all()  # to the nearest


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, in the interpreter
def test_what_is_not_finite_stays_so_in_its_row() -> None:
    x = rand(3, 64, dtype=torch.bfloat16)
    x[0, 5], x[1, 60] = float("nan"), float("inf")
    numbers, scale = fp8_rows(x)
    finite = (numbers.float() * scale).isfinite().all(1)
    assert finite.tolist() == [False, False, True]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "n", "k"), [(65, 48, 64), (100, 32, 272)])
def test_many_rows_of_fp8(rows: int, n: int, k: int, bias: bool) -> None:
    """The product of what both sides were rounded to, in fp64."""
    dtype = torch.bfloat16
    x, residual = rand(rows, k, dtype=dtype), rand(rows, n, dtype=dtype)
    packed = quantized(n, k, rand(n, dtype=dtype) if bias else None)
    numbers, scale = fp8_rows(x)
    rounded = unpack_fp8(numbers).double().cpu() * scale.double().cpu()
    out = linear(x, packed, activation="gelu", residual=residual)
    same(out, exact(rounded, packed, activation="gelu", residual=wide(residual)))
    assert packed.scale is not None
    out = rand(rows + 1, n, dtype=dtype)[:rows]
    fp8_product_of_many(x, packed.weight, packed.scale, packed.bias, out=out)
    same(out, exact(rounded, packed))
    error = (out.double().cpu() - exact(x, packed)).norm() / exact(x, packed).norm()
    assert 1e-3 < error < 0.05, "rows rounded to fp8, and not worse than that"
    packed = quantized(2 * n, k)
    same(gated_linear(x, packed, "silu"), reference.gated(exact(rounded, packed), "silu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "n", "k"), [(3, 7, 100), (90, 70, 192)])
def test_many_rows_widened(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    monkeypatch.setattr(dequantize_module, "_SCRATCH", 32 * k)  # the matrix goes through it in pieces
    monkeypatch.setattr(dequantize_module, "_ROWS", 16)
    dequantize_module.scratch.cache_clear()
    x, bias, residual = (rand(*shape, dtype=dtype) for shape in ((rows, k), (n,), (rows, n)))
    packed = quantized(n, k, bias)
    out = linear(x, packed, activation="relu", residual=residual)
    same(out, exact(x, packed, activation="relu", residual=wide(residual)))
    packed.bias = None
    out = rand(rows + 1, n, dtype=dtype)[:rows]
    assert packed.scale is not None
    product_of_many(x, packed.weight, packed.scale, None, out=out)
    same(out, exact(x, packed))
    dequantize_module.scratch.cache_clear()


def test_the_check_at_start_up_sees_products_of_many_rows() -> None:
    """The reference rounds its rows as the kernels do, so that what is left is what a mistake would be."""
    layer = SimpleNamespace(**{name: quantized(32, 64) for name in ("qkv", "out", "up")}, down=quantized(16, 48))
    found = products_of_many(linear, layer, torch.bfloat16)
    assert [name.partition(" ")[0] for name, _, _ in found] == ["qkv", "out", "up", "down"]
    assert all(difference(ours, theirs) < 0.01 for _, ours, theirs in found)

    def wrong(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        assert packed.scale is not None
        return linear(x, PackedLinear(packed.weight, scale=packed.scale.roll(1)))

    found = products_of_many(wrong, layer, torch.bfloat16)
    assert all(difference(ours, theirs) > 0.1 for _, ours, theirs in found)
    assert products_of_many(linear, SimpleNamespace(**dict.fromkeys(("qkv", "out", "up", "down"))), torch.float32) == []
