"""Rotation and attention of one token a row in one kernel, against the references of both one after the other.

On a GPU (`-m gpu`), or by Triton's interpreter: `test_interpreted.py` runs this file in a process of its own.
"""

from typing import Any

import pytest
import torch

import tests.kernels.interpreter  # noqa: F401
from miinb.kernels import online_softmax, reference
from miinb.kernels.decode_attention import decode_attention
from miinb.kernels.dispatch import INTERPRETED, plain_operators
from tests.kernels.checking import DEVICE, DOT_DTYPES, GPU, rand, same, seeded, wide  # noqa: F401

pytestmark = [pytest.mark.gpu] if GPU else []
PAGE = 16


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # a program takes it 30 ms
        monkeypatch.setattr(online_softmax, "_DECODE_PROGRAMS", 20)
    monkeypatch.setattr(online_softmax, "_LEAST_KEYS", 32)  # so that contexts of tests have parts


KINDS: list[tuple[int, int, int, dict[str, Any]]] = [
    # heads, kv_heads, head_size
    (4, 2, 16, {"rotary_dim": 16}),
    (2, 2, 20, {"rotary_dim": 8, "window": 25}),
    (6, 1, 16, {"rotary_dim": 16, "interleaved": True, "window": 9}),
    (4, 4, 8, {"alibi": True}),
    (3, 1, 32, {"rotary_dim": 12, "softcap": 5.0, "window": 70}),
    (4, 2, 24, {"rotary_dim": 24, "norm": True}),
    (2, 1, 80, {}),
    (2, 2, 16, {"rotary_dim": 16, "window": 1}),
    (2, 1, 16, {"rotary_dim": 16, "window": 64, "softcap": 5.0}),
]
LENGTHS = [1, 130, 64, 2, 33, 65, 129]  # 65 and 129: the parts of what came before end where they do


class Inputs:
    """Rows of these lengths, the newest token of each not in the cache yet."""

    def __init__(
        self, heads: int, kv_heads: int, size: int, kind: dict[str, Any], dtype: torch.dtype, lengths: list[int]
    ) -> None:
        kind = dict(kind)
        width = 12
        pages = len(lengths) * width
        self.lengths = lengths
        self.qkv = rand(len(lengths), (heads + 2 * kv_heads) * size, dtype=dtype)
        self.caches = [rand(pages, PAGE, kv_heads, size, dtype=dtype) for _ in range(2)]
        self.scales: torch.Tensor | None = None
        self.table = torch.randperm(pages).view(len(lengths), width).to(torch.int32)
        half = kind.get("rotary_dim", 0) // 2
        angle = torch.arange(200.0)[:, None] / 10 ** torch.linspace(0, 2, max(half, 1))
        self.cos_sin = (angle.cos(), angle.sin()) if half else (None, None)
        self.rope = {"heads": heads, "kv_heads": kv_heads, "head_size": size, "rotary_dim": kind.get("rotary_dim", 0)}
        self.rope["interleaved"] = kind.get("interleaved", False)
        norm = kind.get("norm")
        self.norms = {name: rand(size, dtype=dtype) for name in ("q_norm", "k_norm")} if norm else {}
        self.alibi = torch.tensor([2.0 ** -(i + 1) for i in range(heads)]) if kind.get("alibi") else None
        self.attention = {"scale": 0.3, "window": kind.get("window"), "softcap": kind.get("softcap")}

    def to_fp8(self) -> None:
        """The cache holds fp8, with scales that differ within a page."""
        size = torch.arange(1.0, 1 + PAGE, device=DEVICE)[:, None, None]
        k, v = self.caches
        (k8, k_scale), (v8, v_scale) = reference.to_fp8(k / size), reference.to_fp8(v * 40 * size)
        self.caches = [k8, v8]
        self.scales = torch.stack((k_scale, v_scale), -1).transpose(1, 2).contiguous()

    def run(self) -> torch.Tensor:
        tables = [None if table is None else table.to(DEVICE) for table in self.cos_sin]
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        alibi = None if self.alibi is None else self.alibi.to(DEVICE)
        # pages side by side, as `StepInputs` has them
        table = self.table.t().contiguous().to(DEVICE).t()
        return decode_attention(
            *(self.qkv, *tables, *self.caches, table, lengths),
            rope=self.rope | {"q_norm": None, "k_norm": None, "eps": 1e-6} | self.norms,
            attention=self.attention | {"alibi": alibi},
            kv_scale=self.scales,
        )

    def slots(self) -> torch.Tensor:
        """Where each row's newest token goes."""
        last = torch.tensor(self.lengths) - 1
        return self.table[torch.arange(len(last)), last // PAGE].long() * PAGE + last % PAGE

    def rotated(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Queries, and the caches with the newest keys and values, in fp64."""
        last = torch.tensor(self.lengths) - 1
        caches = [x.double() for x in self.numbers()]
        norms = {name: wide(x) for name, x in self.norms.items()}
        cos_sin = [wide(x) for x in self.cos_sin]
        q = reference.rope_append(wide(self.qkv), last, *cos_sin, *caches, self.slots(), **self.rope, **norms)
        return q, caches

    def numbers(self) -> list[torch.Tensor]:
        """What the caches hold, in fp64."""
        if self.scales is None:
            return [x.double().cpu() for x in self.caches]
        both = self.scales.transpose(1, 2).double()
        return [(x.double() * both[..., i, None]).cpu() for i, x in enumerate(self.caches)]

    def attended(self, q: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
        """The output."""
        starts = torch.arange(len(self.lengths) + 1, dtype=torch.int32)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        alibi = wide(self.alibi)
        return reference.paged_attention(q, *caches, self.table, starts, lengths, alibi=alibi, **self.attention)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size", "kind"), KINDS)
def test_decode_attention(dtype: torch.dtype, heads: int, kv_heads: int, size: int, kind: dict[str, Any]) -> None:
    inputs = Inputs(heads, kv_heads, size, kind, dtype, LENGTHS)
    q, caches = inputs.rotated()
    same(inputs.run(), inputs.attended(q, caches))
    for cache, wanted in zip(inputs.caches, caches, strict=True):
        same(cache, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "kind"), KINDS)
def test_decode_attention_to_fp8(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, kind: dict[str, Any]
) -> None:
    """What is stored is near what another cache would hold, and it is what is attended to."""
    inputs = Inputs(heads, kv_heads, size, kind, dtype, LENGTHS)
    inputs.to_fp8()
    q, exact = inputs.rotated()
    out = inputs.run()
    for held, wanted in zip(inputs.numbers(), exact, strict=True):
        largest = wanted.abs().amax(-1, keepdim=True)
        # of bf16 the norm's and the rotation's numbers are rounded too
        before = 0.0 if dtype == torch.float32 else largest / 64
        assert ((held - wanted).abs() <= 1.01 * (wanted.abs() / 16).clamp(min=largest / 448 / 1024) + before).all()
    same(out, inputs.attended(q, inputs.numbers()))


def test_padding_writes_nothing_and_is_zero_and_all_is_the_same_again() -> None:
    inputs = Inputs(4, 2, 16, {"rotary_dim": 16}, torch.float32, [150, 0, 1])
    before = [cache.clone() for cache in inputs.caches]
    first = inputs.run()
    assert not first[1].any()
    assert first[0].any()
    new = torch.zeros(before[0].shape[0] * PAGE, dtype=torch.bool)
    new[inputs.slots()[[0, 2]]] = True
    for cache, old in zip(inputs.caches, before, strict=True):
        differs = (cache != old).any(-1).any(-1).view(-1).cpu()
        assert torch.equal(differs, new)
    assert torch.equal(inputs.run(), first)  # the counters are back at zero


def test_without_kernels_it_is_the_references() -> None:
    inputs = Inputs(4, 2, 16, {"rotary_dim": 16}, torch.float32, LENGTHS)
    q, caches = inputs.rotated()
    with plain_operators():
        same(inputs.run(), inputs.attended(q, caches))


def test_what_is_not_finite_stays_so() -> None:
    """A row whose newest key is NaN or infinite says so, and no other does; in fp8 too."""
    for fp8 in (False, True):
        inputs = Inputs(2, 2, 16, {}, torch.float32, [130, 70, 5])  # the first has parts
        inputs.qkv[0, 2 * 16 + 3] = float("nan")
        inputs.qkv[2, 4 * 16 + 5] = float("inf")
        if fp8:
            inputs.to_fp8()
        assert inputs.run().isfinite().flatten(1).all(1).tolist() == [False, True, False]
