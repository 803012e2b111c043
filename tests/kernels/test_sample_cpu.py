"""The CPU's draw against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from miinb.kernels import reference, sample_cpu

VOCAB = 3001


@pytest.mark.parametrize(("spread", "dtype"), [(1.0, torch.float32), (4.0, torch.float32), (3.0, torch.bfloat16)])
def test_it_draws_what_the_reference_draws(spread, dtype):
    torch.manual_seed(0)
    grid = list(itertools.product([0.0, 0.3, 1.0, 2.5], [0, 1, 40, VOCAB + 5], [1.0, 0.9, 0.2], [0.0, 0.1, 1.0]))
    logits = (torch.randn(len(grid), VOCAB) * spread).to(dtype)
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*grid, strict=True))
    seed = torch.randint(0, 2**63 - 1, (len(grid),))
    position = torch.randint(0, 2**33, (len(grid),))
    arguments = (logits, seed, position, temperature, top_k.int(), top_p, min_p)
    ids, finite = sample_cpu.sample(*arguments)
    wanted, _ = reference.sample(*arguments)
    assert finite.all()
    assert ids.tolist() == wanted.tolist()


def test_rows_that_are_not_finite_are_flagged_and_banned_tokens_never_drawn():
    logits = torch.zeros(4, 50)
    logits[0, 3] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf
    ones = torch.ones(4)
    ids, finite = sample_cpu.sample(logits, ones.long(), ones.long(), ones, ones.int() * 0, ones, ones * 0)
    assert finite.tolist() == [False, False, False, True]
    assert int(ids[3]) == 0
