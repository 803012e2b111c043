"""Kernels of encoders and matrix products of few and of many rows: as `test_kernels.py`."""

from typing import Any

import pytest
import torch

import miinb.kernels.large_product as large_product_module
import tests.kernels.interpreter  # noqa: F401
from miinb.kernels import product, reference
from miinb.kernels.dispatch import copies_tiles
from miinb.kernels.embedding import embedding_norm
from miinb.kernels.large_product import is_large, large_product
from miinb.kernels.linear import PackedLinear, gated_linear, linear
from miinb.kernels.packed_attention import attention_tile, packed_attention
from miinb.kernels.product import product_tile
from tests.kernels.checking import DEVICE, DOT_DTYPES, DTYPES, GPU, rand, same, seeded, wide  # noqa: F401

pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.mark.parametrize("dtype", DOT_DTYPES[1:])
@pytest.mark.parametrize("rows", [2, 40, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_gated_pairs(dtype: torch.dtype, rows: int, bias: bool) -> None:
    x, weight = rand(rows, 256, dtype=dtype), rand(2 * 128, 256, dtype=dtype)
    b = rand(2 * 128, dtype=dtype) if bias else None
    assert product_tile(x, 128, gated=True)
    expected = reference.gated(reference.linear(wide(x), wide(weight), wide(b)), "silu")
    same(gated_linear(x, PackedLinear(weight, b), "silu"), expected)


@pytest.mark.parametrize(("rows", "k"), [(130, 64), (300, 320), (513, 128)])
def test_gated_pairs_of_many_rows(rows: int, k: int) -> None:
    """A UNet's: with an exact gelu and short sums."""
    x, weight, b = (rand(*shape, dtype=DOT_DTYPES[1]) for shape in ((rows, k), (2 * 256, k), (2 * 256,)))
    assert product_tile(x, 256, gated=True, epilogue=True)
    assert product_tile(x, 256, gated=True) is None
    assert product_tile(torch.empty(rows, 2048, dtype=x.dtype), 256, gated=True, epilogue=True) is None
    expected = reference.gated(reference.linear(wide(x), wide(weight), wide(b)), "gelu")
    same(gated_linear(x, PackedLinear(weight, b), "gelu"), expected)


@pytest.mark.parametrize(("rows", "short"), [(2, False), (20, False), (70, False), (2, True), (20, True)])
def test_products_with_long_sums(rows: int, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_SHORT_WEIGHT", 1 << 22 if short else 0)
    shapes = ((rows, 2048), (128, 2048), (128,), (rows, 128))
    x, weight, bias, residual = (rand(*shape, dtype=DOT_DTYPES[1]) for shape in shapes)
    tile = product_tile(x, 128, gated=False)
    assert tile
    assert tile["SPLIT"] > 1
    assert bool(tile["AHEAD"]) is short
    expected = reference.linear(wide(x), wide(weight), wide(bias), activation="relu", residual=wide(residual))
    out = linear(x, PackedLinear(weight, bias), activation="relu", residual=residual)
    same(out, expected)
    again = torch.empty(rows + 1, 128, dtype=x.dtype, device=x.device)
    linear(x, PackedLinear(weight, bias), out=again[:rows])
    same(again[:rows], reference.linear(wide(x), wide(weight), wide(bias)))


@pytest.mark.parametrize(
    ("rows", "n", "activation"), [(7, 256, "gelu"), (130, 128, None), (150, 256, "gelu"), (100, 128, "silu")]
)
def test_short_products(rows: int, n: int, activation: str | None) -> None:
    """Those of an encoder at batch 1: the whole sum in one program."""
    x, weight, bias = (rand(*shape, dtype=DOT_DTYPES[1]) for shape in ((rows, 384), (n, 384), (n,)))
    residual = None if activation else rand(rows, n, dtype=x.dtype)
    out = linear(x, PackedLinear(weight, bias), activation=activation, residual=residual)
    same(out, reference.linear(wide(x), wide(weight), wide(bias), activation=activation, residual=wide(residual)))


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_a_residual_is_added_by_the_product(dtype: torch.dtype) -> None:
    x, weight, residual = (rand(*shape, dtype=dtype) for shape in ((300, 200), (96, 200), (300, 96)))
    out = linear(x, PackedLinear(weight), residual=residual)
    same(out, reference.linear(wide(x), wide(weight), residual=wide(residual)))


@pytest.mark.parametrize("rows", [64, 300, 330])
def test_products_of_many_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups of tiles of rows, of which the last may be smaller."""
    monkeypatch.setattr(product, "_GROUP", 2)
    x, weight, bias = (rand(*shape, dtype=DOT_DTYPES[1]) for shape in ((rows, 128), (256, 128), (256,)))
    tile = product._fitted(x, product.Tile(64, 128, 64, 4, 3), 1, gated=False)
    assert tile
    out = product.product(x, weight, bias, tile, activation="gelu")
    same(out, reference.linear(wide(x), wide(weight), wide(bias), activation="gelu"))


@pytest.mark.parametrize(("rows", "activation"), [(20, "gelu"), (128, None), (300, "gelu")])
@pytest.mark.parametrize("bias", [False, True])
def test_large_products(rows: int, activation: str | None, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of one program, in groups of tiles of rows, the last of them smaller; and rows that fill none."""
    monkeypatch.setattr(large_product_module, "_PROGRAMS", 2)
    monkeypatch.setattr(large_product_module, "_GROUP", 2)
    if not copies_tiles(x := rand(rows, 128, dtype=torch.float16)):
        pytest.skip("this GPU copies no tiles")
    weight, b = rand(512, 128, dtype=x.dtype), rand(512, dtype=x.dtype) if bias else None
    assert is_large(x, 512)
    expected = reference.linear(wide(x), wide(weight), wide(b), activation=activation)
    same(large_product(x, weight, b, activation), expected)
    if activation:
        residual = rand(rows, 512, dtype=x.dtype)
        out = linear(x, PackedLinear(weight, b), activation=activation, residual=residual)
        same(out, expected + wide(residual))


def test_which_products_are_large() -> None:
    """Those that fill the GPU."""

    def large(rows: int, n: int, k: int, dtype: torch.dtype = torch.float16) -> bool:
        return is_large(torch.empty(rows, k, dtype=dtype, device=DEVICE), n)

    assert large(16384, 3072, 768) is copies_tiles(torch.empty(1, device=DEVICE))
    assert not any((large(512, 3072, 768), large(16384, 3200, 768), large(16384, 3072, 40)))
    assert not large(16384, 3072, 768, torch.float32)


def test_which_products_run_here() -> None:
    """Short ones up to 256 rows; of more rows those alone whose activation cuBLAS lacks."""

    def tile(rows: int, n: int, k: int, epilogue: bool = False) -> dict[str, Any] | None:
        return product_tile(torch.empty(rows, k, dtype=torch.float16), n, gated=False, epilogue=epilogue)

    assert all(tile(rows, 3072, 768) for rows in (2, 128, 256))
    assert tile(257, 3072, 768) is None
    assert tile(64, 12288, 4096) is None
    assert tile(16384, 3072, 768, epilogue=True)
    rows = [chosen["BLOCK_M"] for rows in (10, 30, 128, 256) if (chosen := tile(rows, 2304, 768))]
    assert rows == sorted(rows)
    assert rows[0] == 16
    few = tile(8, 768, 3072)
    assert few
    assert few["SPLIT"] > 1


@pytest.mark.parametrize(
    ("rows", "k", "n", "dtype"),
    [(1, 256, 128, torch.bfloat16), (129, 256, 128, torch.bfloat16), (2, 200, 128, torch.bfloat16),
     (2, 256, 100, torch.bfloat16), (2, 256, 128, torch.float32)],
)  # fmt: skip
def test_other_products_are_cublas(rows: int, k: int, n: int, dtype: torch.dtype) -> None:
    assert product_tile(torch.empty(rows, k, dtype=dtype), n, gated=True) is None


PACKED = [
    # heads, head_size, lengths, max_length
    (2, 32, [5, 1, 0, 16], 16),
    (3, 64, [40, 64, 3], 64),
    (1, 26, [33, 7], 128),
    (1, 80, [140, 1], 300),
    (1, 128, [20, 150], 150),
]


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("heads", "size", "lengths", "most"), PACKED)
def test_packed_attention(dtype: torch.dtype, heads: int, size: int, lengths: list[int], most: int) -> None:
    starts = torch.tensor([0, *torch.tensor([*lengths, 0, 0]).cumsum(0).tolist()], dtype=torch.int32)
    tokens = sum(lengths)
    qkv = rand(tokens + 3, 3 * heads * size, dtype=dtype, scale=2)  # a graph's batch has tokens of no sequence
    options = {"heads": heads, "head_size": size, "scale": 0.3, "max_length": most}
    out = packed_attention(qkv, starts.to(DEVICE), **options)
    assert out.shape == (tokens + 3, heads * size)
    same(out[:tokens], reference.packed_attention(wide(qkv), starts, **options)[:tokens])


@pytest.mark.parametrize(
    "starts",
    [[0, 5, 5, 40], [0, 1, 2, 3, 4, 16, 17, 33, 33, 33], [3, 20], [0, *range(1, 150)], [*[0] * 17000, 9, 70, 151]],
    ids=len,
)
def test_sequences_share_tiles(starts: list[int]) -> None:
    """Wherever they begin and end; more of them than are looked at in one step; tokens before and behind all."""
    qkv, where = rand(151, 3 * 16, dtype=torch.float16), torch.tensor(starts, dtype=torch.int32)
    options = {"heads": 1, "head_size": 16, "scale": 0.3, "max_length": 40}
    out = packed_attention(qkv, where.to(DEVICE), **options)
    mine = slice(starts[0], starts[-1])
    same(out[mine], reference.packed_attention(wide(qkv), where, **options)[mine])
    assert out.isfinite().all()


def test_tiles_of_packed_attention() -> None:
    """No longer than sequences."""
    long, short = (attention_tile(torch.empty(1, 1, dtype=torch.float16), 64, most) for most in (500, 20))
    assert [tile["BLOCK_M"] for tile in (long, short)] == [64, 32]
    assert [tile["BLOCK_N"] for tile in (long, short)] == [64, 32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "types"), [(48, 2), (100, 0), (768, 1)])
def test_embedding_norm(dtype: torch.dtype, hidden: int, types: int) -> None:
    token_ids, positions = torch.tensor([3, 0, 29, 7]), torch.tensor([0, 1, 0, 9])
    type_ids = torch.tensor([0, 1, 1, 0]) % max(types, 1)
    tables = [rand(30, hidden, dtype=dtype), rand(10, hidden, dtype=dtype)]
    tables.append(rand(types, hidden, dtype=dtype) if types else None)
    weight, bias = rand(hidden, dtype=dtype), rand(hidden, dtype=dtype) if types else None
    ids = (token_ids, positions, type_ids)
    out = embedding_norm(*(x.to(DEVICE) for x in ids), *tables, weight, bias, 1e-5)
    wanted = reference.embedding_norm(*ids, *map(wide, tables), wide(weight), wide(bias), 1e-5)
    same(out, wanted)
