"""What a decoder says of a text's tokens, against plain transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.engine.perplexity import perplexity, token_losses
from tests.engine.conftest import CONFIGS
from tests.engine.test_quantize import decoder

Tiny = Callable[[str], tuple[Any, Path]]
TOKENS = [(7 * i * i + 3 * i) % 101 for i in range(100)]
#: Of several lengths; the last has nothing to predict after two tokens.
WINDOWS = [TOKENS[:48], TOKENS[48:90], TOKENS[90:93], TOKENS[98:]]


def theirs(model: Any, windows: list[list[int]], first: int) -> tuple[Tensor, Tensor]:
    losses, likeliest = [], []
    for window in windows:
        with torch.inference_mode():
            logits = model(torch.tensor([window])).logits[0, first - 1 : -1].float()
        losses.append(F.cross_entropy(logits, torch.tensor(window[first:]), reduction="none"))
        likeliest.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(likeliest)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_losses_are_those_of_transformers(tiny: Tiny, name: str) -> None:
    model, folder = tiny(name)
    ours = decoder(folder, "fp32")
    for first in (1, 2):
        losses, likeliest = token_losses(ours, WINDOWS, first=first)
        wanted, their_likeliest = theirs(model, [window for window in WINDOWS if len(window) > first], first)
        torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
        assert likeliest.tolist() == their_likeliest.tolist()


def test_perplexity_is_their_mean_over_parts_of_the_text(tiny: Tiny) -> None:
    model, folder = tiny("llama")
    parts = [TOKENS[:32], TOKENS[32:64], TOKENS[64:96], TOKENS[96:]]
    wanted, _ = theirs(model, parts, 1)
    ours = decoder(folder, "fp32")
    assert perplexity(ours, TOKENS, window=32) == pytest.approx(math.exp(float(wanted.mean())), rel=1e-4)
    assert perplexity(ours, TOKENS, window=4096) == pytest.approx(
        math.exp(float(theirs(model, [TOKENS], 1)[0].mean())), rel=1e-4
    )
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(ours, TOKENS[:1])
    with pytest.raises(ValueError, match="two tokens"):
        token_losses(ours, WINDOWS[3:], first=2)
