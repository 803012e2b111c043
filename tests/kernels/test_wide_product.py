"""Products and convolutions with 320 outputs: as `test_kernels.py`."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tests.kernels.interpreter  # noqa: F401
from miinb.engine.image_blocks import convolve
from miinb.kernels import linear as linear_module
from miinb.kernels import wide_product as module
from miinb.kernels.dispatch import copies_tiles, plain_operators
from miinb.kernels.linear import PackedLinear, linear, linear_norm
from tests.kernels.checking import DOT_DTYPES, GPU, rand, same, seeded, wide  # noqa: F401

pytestmark = [pytest.mark.gpu] if GPU else []

HALVES = [dtype for dtype in DOT_DTYPES if dtype != torch.float32]
OUTPUTS = 320


@pytest.fixture(params=["large tiles", "small tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tiles, for few rows too."""
    monkeypatch.setattr(module, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(module, "_PROGRAMS", 1 if request.param == "large tiles" else 1 << 20)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the kernel is called with from now on."""
    seen: list[tuple[int, ...]] = []
    launch = module._launch

    def noted(x: Tensor, *args: object, **options: object) -> tuple[Tensor, Tensor]:
        seen.append(tuple(x.shape))
        return launch(x, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_launch", noted)
    return seen


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("images", "height", "width", "channels"), [(2, 9, 13, 64), (1, 16, 24, 128), (1, 3, 70, 64), (3, 1, 1, 64)]
)
def test_convolution(dtype: torch.dtype, images: int, height: int, width: int, channels: int) -> None:
    """Lines of one tile, of several, and of a part of one; the edges see zeros."""
    x = rand(images, height, width, channels, dtype=dtype)
    weight = rand(OUTPUTS, 3, 3, channels, dtype=dtype, scale=(9 * channels) ** -0.5).permute(0, 3, 1, 2)
    y = module.wide_convolution(x, weight)
    assert y.is_contiguous()
    same(y, F.conv2d(wide(x).permute(0, 3, 1, 2), wide(weight), padding=1).permute(0, 2, 3, 1))


@pytest.mark.parametrize(("width", "taken"), [(64, True), (48, False)])
def test_convolutions_whose_lines_are_whole_tiles(width: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEWEST_ROWS", 1)
    seen = launches(monkeypatch)
    x = rand(1, 3, width, 64, dtype=torch.float16)
    if not copies_tiles(x):
        pytest.skip("this GPU copies no tiles")
    weight = rand(OUTPUTS, 3, 3, 64, dtype=x.dtype, scale=1 / 24).permute(0, 3, 1, 2)
    same(convolve(x, weight), F.conv2d(wide(x).permute(0, 3, 1, 2), wide(weight), padding=1).permute(0, 2, 3, 1))
    assert bool(seen) is taken


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [64, 200])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.usefixtures("tiles")
def test_linear(dtype: torch.dtype, rows: int, bias: bool, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a layer norm behind it, and without one."""
    seen = launches(monkeypatch)
    x, weight = rand(rows, 128, dtype=dtype), rand(OUTPUTS, 128, dtype=dtype, scale=128**-0.5)
    packed = PackedLinear(weight, rand(OUTPUTS, dtype=dtype) if bias else None)
    other = rand(rows, OUTPUTS, dtype=dtype) if residual else None
    scale, shift = rand(OUTPUTS, dtype=dtype), rand(OUTPUTS, dtype=dtype)
    expected = F.linear(wide(x), wide(weight), wide(packed.bias))
    expected = expected if other is None else expected + wide(other)
    if other is None:
        same(linear(x, packed), expected)
    y, total = linear_norm(x, packed, scale, shift, 1e-5, other)
    assert len(seen) == (1 if residual else 2)
    same(total, expected)
    same(
        y, F.layer_norm(expected, (OUTPUTS,), wide(scale), wide(shift), 1e-5), 3e-2 if dtype == torch.bfloat16 else 4e-3
    )


def test_where_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many rows, whole steps and numbers of 2 bytes; with plain operators never."""
    x = rand(4, 64, 64, 64, dtype=torch.float16)
    assert module.is_wide(x, OUTPUTS)
    assert module.is_wide(x.flatten(0, 2), OUTPUTS)
    assert not module.is_wide(rand(4, 64, 48, 64, dtype=torch.float16), OUTPUTS)
    assert not module.is_wide(rand(8192, 1280, dtype=torch.float16), OUTPUTS)
    assert not module.is_wide(x, 640)
    assert not module.is_wide(x[:1], OUTPUTS)
    assert not module.is_wide(x[..., :40].contiguous(), OUTPUTS)
    assert not module.is_wide(x.float(), OUTPUTS)
    monkeypatch.setattr(linear_module, "wide_linear", None)
    packed = PackedLinear(rand(OUTPUTS, 64, dtype=torch.float16))
    with plain_operators():
        assert linear(x.flatten(0, 2), packed).shape == (16384, OUTPUTS)


def test_without_them_the_norm_follows_the_product() -> None:
    x, residual = rand(9, 128), rand(9, 320)
    packed = PackedLinear(rand(320, 128, scale=0.1), rand(320))
    scale, shift = rand(320), rand(320)
    y, total = linear_norm(x, packed, scale, shift, 1e-5, residual)
    expected = F.linear(wide(x), wide(packed.weight), wide(packed.bias)) + wide(residual)
    same(total, expected)
    same(y, F.layer_norm(expected, (320,), wide(scale), wide(shift), 1e-5), 1e-4)
