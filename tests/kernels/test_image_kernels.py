"""Kernels of the UNet and the VAE decoder: as `test_kernels.py`."""

import pytest
import torch

import tests.kernels.interpreter  # noqa: F401
from miinb.kernels import group_norm as module
from miinb.kernels import reference
from miinb.kernels.group_norm import group_norm, join
from tests.kernels.checking import DEVICE, DTYPES, GPU, rand, same, seeded, wide  # noqa: F401

pytestmark = [pytest.mark.gpu] if GPU else []

# images, height, width, channels, groups: groups of a size that is no power of two, one group, many, one channel each
SHAPES = [
    *((2, 5, 7, 40, 4), (1, 8, 8, 320, 32), (3, 3, 1, 30, 3)),
    *((1, 9, 8, 24, 1), (2, 1, 1, 640, 8), (1, 4, 4, 7, 7)),
]


@pytest.fixture(params=["each group whole", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels, on small pictures."""
    if request.param == "in parts":
        monkeypatch.setattr(module, "_WHOLE", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "height", "width", "channels", "groups"), SHAPES)
@pytest.mark.usefixtures("parts")
def test_group_norm(dtype: torch.dtype, images: int, height: int, width: int, channels: int, groups: int) -> None:
    """Plain, with a shift of the batch or of each image, with a residual; the sum kept or not."""
    shape = (images, height, width, channels)
    x, residual = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype)
    weight, bias = rand(channels, dtype=dtype), rand(channels, dtype=dtype)
    one, each = rand(1, channels, dtype=dtype), rand(images, channels, dtype=dtype)
    for silu, shift, other, keep in (
        *((False, None, None, True), (True, one, None, False), (True, each, residual, True)),
        *((False, None, residual, True), (True, one, residual, False), (True, one, None, True)),
    ):
        options = {"groups": groups, "eps": 1e-5, "silu": silu, "keep": keep}
        y, total = group_norm(x, weight, bias, shift=shift, residual=other, **options)
        expected = reference.group_norm(
            wide(x), wide(weight), wide(bias), shift=wide(shift), residual=wide(other), **options
        )
        same(y, expected[0], 3e-2 if dtype == torch.bfloat16 else None)  # one rounding more where the sum is kept
        same(total, expected[1])
        if not keep:
            assert total is x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "others", "groups"), [(40, 24, 4), (320, 320, 32), (7, 5, 3)])
@pytest.mark.usefixtures("parts")
def test_norm_of_what_is_joined(dtype: torch.dtype, channels: int, others: int, groups: int) -> None:
    """A group may have channels of both; what is joined is kept or not."""
    x, residual = (rand(2, 5, 7, channels, dtype=dtype) for _ in range(2))
    other, weight, bias = (rand(*shape, channels + others, dtype=dtype) for shape in ((2, 5, 7), (), ()))
    other, shift = other[..., :others].contiguous(), rand(2, channels, dtype=dtype)
    for keep, parts in (
        *((True, {"other": other}), (False, {"other": other, "shift": shift})),
        (True, {"other": other, "shift": shift, "residual": residual}),
    ):
        options = {"groups": groups, "eps": 1e-5, "silu": True, "keep": keep}
        y, total = group_norm(x, weight, bias, **parts, **options)
        exact = {name: wide(part) for name, part in parts.items()}
        expected = reference.group_norm(wide(x), wide(weight), wide(bias), **exact, **options)
        same(y, expected[0], 3e-2 if dtype == torch.bfloat16 else None)
        same(total, expected[1])


@pytest.mark.parametrize("parts", [2, 7])
def test_parts_of_an_image_are_added_up(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some at a time."""
    monkeypatch.setattr(module, "_ROWS", 16)
    monkeypatch.setattr(module, "_WHOLE", 0)
    monkeypatch.setattr(module, "_PARTS", 4)
    monkeypatch.setattr(module, "_PROGRAMS", 2 * parts)
    x, weight, bias = rand(2, 11, 9, 24), rand(24), rand(24)
    y, _ = group_norm(x, weight, bias, groups=3, eps=1e-5)
    same(y, reference.group_norm(wide(x), wide(weight), wide(bias), groups=3, eps=1e-5)[0])
    assert -(-99 // module._span(99, 2)) == parts


@pytest.mark.usefixtures("parts")
def test_a_mean_that_is_large_takes_no_digits_from_the_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rand(1, 20, 20, 32) + 1000
    weight, bias = torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE)
    y, _ = group_norm(x, weight, bias, groups=4, eps=1e-5)
    same(y, reference.group_norm(wide(x), wide(weight), wide(bias), groups=4, eps=1e-5)[0], 1e-4)


@pytest.mark.usefixtures("parts")
def test_a_shift_may_be_a_part_of_a_row() -> None:
    x, weight, bias, shifts = rand(2, 3, 4, 16), rand(16), rand(16), rand(2, 50)
    y, total = group_norm(x, weight, bias, groups=2, eps=1e-5, shift=shifts[:, 9:25], keep=True)
    expected = reference.group_norm(
        wide(x), wide(weight), wide(bias), groups=2, eps=1e-5, shift=wide(shifts)[:, 9:25], keep=True
    )
    same(y, expected[0])
    same(total, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "others"), [(40, 24), (64, 1), (5, 0), (320, 640)])
def test_join(dtype: torch.dtype, channels: int, others: int) -> None:
    x, residual = rand(2, 3, 5, channels, dtype=dtype), rand(2, 3, 5, channels, dtype=dtype)
    other = rand(2, 3, 5, others, dtype=dtype) if others else None
    for shift, more in (
        *((None, None), (rand(1, channels, dtype=dtype), None)),
        *((rand(2, channels, dtype=dtype), residual), (None, residual)),
    ):
        out = join(x, shift=shift, residual=more, other=other)
        assert out.is_contiguous()
        same(out, reference.join(wide(x), shift=wide(shift), residual=wide(more), other=wide(other)))


def test_programs_fill_a_gpu() -> None:
    """Of the largest pictures of Stable Diffusion's UNet and decoder."""
    for size, channels in {64: 320, 512: 128}.items():
        blocks = 2 * -(-channels // module._COLUMNS)
        programs = blocks * -(-size * size // module._span(size * size, blocks))
        assert 1024 <= programs <= 2 * module._PROGRAMS
