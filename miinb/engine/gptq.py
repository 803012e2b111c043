"""GPTQ (Frantar et al., 2022): a matrix rounded to int4 so that its products change least, not its numbers.

What a column's rounding adds to the error of the products, the columns that are not rounded yet take away again, as far
as their inputs go along with the column's. Columns go from the one with the largest inputs on (GPTQ's "act order"); the
steps and lowest values of the groups are chosen before, by the weights and by how large the columns' inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miinb.engine.quantize import Account, fit_int4, grouped
from miinb.kernels.formats import GROUP, INT4_MAX, pack

#: Added to the diagonal of the inputs' second moments, relative to its mean: few inputs say little about some columns.
_DAMPING = 0.01
#: Share of what inputs have drifted by that is made up for: more of it fits the text at the cost of others.
_MADE_UP = 0.5
#: Columns after which the error goes on to all later ones at once.
_BLOCK = 128


def round_by_inputs(weight: Tensor, moments: Tensor, drift: Tensor, account: Account) -> tuple[Tensor, Tensor]:
    """Round a matrix to int4 for the inputs that it gets.

    Args:
        weight: [N, K], of any dtype.
        moments: [K, K] fp32, the sum of x x^T over many of its inputs x; it is changed.
        drift: [K, K] fp32, the sum of (y - x) x^T, where y is the input that it would get if nothing were rounded.
        account: told what has changed.

    Returns:
        Words and pairs, as `kernels.formats` has them.
    """
    rows, columns = weight.shape
    given = weight.float()
    size = moments.diagonal().clone()
    size[size == 0] = size.mean().clamp(min=1e-30) * 1e-6  # a column without inputs may be rounded as it is
    moments.diagonal().copy_(size + _DAMPING * size.mean())
    exact = given + _MADE_UP * given @ torch.cholesky_solve(drift.t(), _root(moments)).t()
    importance = torch.nn.functional.pad(size / size.mean(), (0, -columns % GROUP)).view(-1, GROUP)
    pair = fit_int4(grouped(exact), importance)
    order = size.argsort(descending=True)
    step, low = (pair.float().repeat_interleave(GROUP, 1)[:, :columns][:, order]).unbind(-1)
    inverse = _root(torch.cholesky_inverse(_root(moments[order][:, order])), upper=True)
    left, numbers = exact[:, order], torch.empty_like(exact)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = torch.empty((rows, last - first), device=weight.device)
        for i in range(first, last):
            whole = ((left[:, i] - low[:, i]) / step[:, i].clamp(min=1e-30)).round_().clamp_(0, INT4_MAX)
            numbers[:, i] = whole
            error = (left[:, i] - whole * step[:, i] - low[:, i]) / inverse[i, i]
            left[:, i:last] -= error[:, None] * inverse[i, i:last]
            errors[:, i - first] = error
        left[:, last:] -= errors @ inverse[first:last, last:]
    account.add(given, numbers * step + low - given[:, order])
    back = torch.empty_like(order)
    back[order] = torch.arange(columns, device=order.device)
    return pack(numbers[:, back], 4), pair


def _root(matrix: Tensor, *, upper: bool = False) -> Tensor:
    """The Cholesky factor of a matrix, to whose diagonal is added until there is one; NaN of what is not finite."""
    more = _DAMPING * matrix.diagonal().mean()
    while bool(more.isfinite()):
        found = torch.linalg.cholesky_ex(matrix, upper=upper)
        if not found.info:
            root: Tensor = found.L
            return root
        matrix.diagonal().add_(more)
        more *= 10
    return torch.full_like(matrix, torch.nan)
