"""From an encoder's outputs to what a task answers: scores, the best of them, vectors. On the device, in fp32.

Requests with equal options are reduced together. What is not finite in the outputs stays so in the results, where the
executor finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from miinb.engine.reduction import Reduction
from miinb.kernels import reference

BestShares = Callable[[Tensor, int], Tensor]


class Reduced(NamedTuple):
    """Results in one piece of memory, so that they come to the host in one copy.

    Attributes:
        numbers: [R, K] fp32; with ids [R, 2K]: K values, then the bits of their ids, int32.
        has_ids: whether it says which label or token each value is of; else they are all, in the model's order.
    """

    numbers: Tensor
    has_ids: bool = False

    def parts(self) -> tuple[NDArray[np.float32], NDArray[np.int32] | None]:
        """Values [R, K], and ids [R, K] or None; on the host."""
        numbers: NDArray[np.float32] = self.numbers.numpy()
        if not self.has_ids:
            return numbers, None
        count = numbers.shape[1] // 2
        return numbers[:, :count], numbers.view(np.int32)[:, count:]


def reduce(
    outputs: Tensor, reduction: Reduction, starts: Tensor, best_shares: BestShares = reference.best_shares
) -> Reduced:
    """The results of some sequences' outputs.

    Args:
        outputs: [L, C] of the sequences' rows, which `ROWS` names, one sequence after another; contiguous.
        reduction: of all of them.
        starts: [S + 1] int32: where each sequence begins in rows of `outputs`, if those are all its tokens, and the
            end of the last.
        best_shares: the operator; transformers' models do without this project's kernels.
    """
    task = reduction.task
    if task == "feature-extraction":
        return Reduced(_pool(outputs, reduction, starts))
    if task == "question-answering":
        return Reduced(outputs.float())
    if task == "fill-mask" and reduction.targets:
        return _best_targets(outputs, reduction)
    columns = outputs.shape[-1]
    top_k = min(reduction.top_k, columns)
    if task == "fill-mask" or (top_k and reduction.function == "softmax"):
        return Reduced(best_shares(outputs, top_k or columns), has_ids=True)
    scores = _scores(outputs, reduction.function)
    return _joined(*scores.topk(top_k, dim=-1)) if top_k else Reduced(scores)


def _joined(values: Tensor, ids: Tensor) -> Reduced:
    return Reduced(torch.cat((values, ids.int().view(torch.float32)), -1), has_ids=True)


def _scores(logits: Tensor, function: str) -> Tensor:
    if function == "softmax":
        return torch.softmax(logits, -1, dtype=torch.float32)
    logits = logits.float()
    # A sigmoid makes a plain 1 of infinity; times 0 it is NaN.
    return logits.sigmoid() + logits * 0 if function == "sigmoid" else logits


def _best_targets(logits: Tensor, reduction: Reduction) -> Reduced:
    """The most likely of some tokens, with their shares of the whole vocabulary."""
    targets = torch.tensor(reduction.targets, device=logits.device)
    scores = torch.softmax(logits, -1, dtype=torch.float32)[:, targets]
    values, places = scores.topk(min(reduction.top_k or len(targets), len(targets)), dim=-1)
    return _joined(values, targets[places])


def _pool(hidden: Tensor, reduction: Reduction, starts: Tensor) -> Tensor:
    vectors = hidden.float()
    if reduction.pooling == "first":
        vectors = vectors[starts[:-1]]
    elif reduction.pooling == "mean":
        # Sums of segments: each row of `vectors` is looked up once, in bags that begin at `starts`. The last bag has
        # what a graph's step is padded with.
        tokens = torch.arange(len(vectors), dtype=starts.dtype, device=starts.device)
        vectors = F.embedding_bag(tokens, vectors, starts, mode="mean")[:-1]
    return F.normalize(vectors, dim=-1) if reduction.normalize else vectors
