"""The start-up check finds operators that are wrong, each in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miinb import models
from miinb.engine import parity
from miinb.engine.decoder import Decoder, Operators
from miinb.engine.policies import POLICIES
from miinb.engine.weights import load_weights
from miinb.kernels import decode_attention

Tiny = Callable[[str], tuple[Any, Path]]


def decoder(folder: Path, ops: Operators, dtype: str = "fp32") -> Decoder:
    info = models.inspect(folder)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    return Decoder(spec, load_weights(info, policy, spec, dtype=dtype, device=torch.device("cpu")), ops=ops)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", ["mistral", "qwen3", "gpt2"])
def test_right_operators_pass(tiny: Tiny, name: str, dtype: str) -> None:
    report = parity.check(decoder(tiny(name)[1], Operators(), dtype), 128)
    assert report.passed, str(report)


@pytest.mark.parametrize(
    "name",
    ["rms_norm", "rope_append", "paged_attention", "decode_attention", "linear", "gated_linear", "token_embedding"],
)
@pytest.mark.parametrize("fault", [1.01, float("nan")])
def test_a_wrong_operator_is_found(tiny: Tiny, name: str, fault: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "_LEAST_HEAD", 1)
    right = getattr(Operators(), name)

    def wrong(*given: Any, **options: Any) -> Any:
        out = right(*given, **options)
        return out * fault if isinstance(out, Tensor) else (out[0] * fault, *out[1:])

    report = parity.check(decoder(tiny("llama")[1], Operators(**{name: wrong})), 128)
    assert not report.passed
    assert report.where != "nowhere"


def test_small_pages_are_checked_too(tiny: Tiny) -> None:
    assert parity.check(decoder(tiny("llama")[1], Operators()), 8).passed
