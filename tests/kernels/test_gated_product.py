"""Gated pairs of many rows: as `test_kernels.py`."""

import pytest
import torch

import tests.kernels.interpreter  # noqa: F401
from miinb.kernels import gated_product as module
from miinb.kernels import reference
from miinb.kernels.dispatch import copies_tiles
from miinb.kernels.linear import PackedLinear, gated_linear
from tests.kernels.checking import DEVICE, GPU, rand, same, seeded, wide  # noqa: F401

pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.mark.parametrize("rows", [100, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("programs", [2, 1 << 20])
def test_gated_products(rows: int, bias: bool, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles one after another, and small ones each by its program; the last rows fill none."""
    for name, value in {"_PROGRAMS": programs, "_MANY": 1, "_GROUP": 2, "_FEWEST_ROWS": 1}.items():
        monkeypatch.setattr(module, name, value)
    x = rand(rows, 128, dtype=torch.float16)
    if not copies_tiles(x):
        pytest.skip("this GPU copies no tiles")
    weight, b = rand(512, 128, dtype=x.dtype, scale=0.1), rand(512, dtype=x.dtype) if bias else None
    assert module.is_gated_many(x, 256)
    expected = reference.gated(reference.linear(wide(x), wide(weight), wide(b)), "gelu")
    same(gated_linear(x, PackedLinear(weight, b), "gelu"), expected)


def test_which_pairs_are_taken() -> None:
    def taken(rows: int, n: int, k: int, dtype: torch.dtype = torch.float16) -> bool:
        return module.is_gated_many(torch.empty(rows, k, dtype=dtype, device=DEVICE), n)

    assert taken(8192, 1280, 320) is copies_tiles(torch.empty(1, device=DEVICE))
    assert not any((taken(128, 1280, 320), taken(8192, 1280, 300), taken(8192, 1300, 320)))
    assert not taken(8192, 1280, 320, torch.float32)
