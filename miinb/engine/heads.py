"""From an encoder's outputs to what a task answers: scores, the best of them, vectors. On the device, in fp32.

Requests with equal options are reduced together. What is not finite in the outputs stays so in the results, where the
executor finds it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.engine.reduction import Reduction


class Reduced(NamedTuple):
    """Results on the device.

    Attributes:
        values: [R, K] fp32.
        ids: [R, K] int32: which label or token each value is of; None: all of them, in the model's order.
    """

    values: Tensor
    ids: Tensor | None


def reduce(outputs: Tensor, reduction: Reduction, starts: Tensor) -> Reduced:
    """The results of some sequences' outputs.

    Args:
        outputs: [L, C] of the sequences' rows, which `ROWS` names, one sequence after another.
        reduction: of all of them.
        starts: [S + 1] int32: where each sequence begins in rows of `outputs`, if those are all its tokens.
    """
    task = reduction.task
    if task == "feature-extraction":
        return Reduced(_pool(outputs, reduction, starts), None)
    if task == "question-answering":
        return Reduced(outputs.float(), None)
    if task == "fill-mask":
        return _best_tokens(outputs, reduction)
    scores = _scores(outputs, reduction.function)
    if not reduction.top_k:
        return Reduced(scores, None)
    values, ids = scores.topk(min(reduction.top_k, scores.shape[-1]), dim=-1)
    return Reduced(values, ids.int())


def _scores(logits: Tensor, function: str) -> Tensor:
    if function == "softmax":
        return torch.softmax(logits, -1, dtype=torch.float32)
    logits = logits.float()
    # A sigmoid makes a plain 1 of infinity; times 0 it is NaN.
    return logits.sigmoid() + logits * 0 if function == "sigmoid" else logits


def _best_tokens(logits: Tensor, reduction: Reduction) -> Reduced:
    """The most likely tokens (of the targets), with their shares of the whole vocabulary."""
    scores = torch.softmax(logits, -1, dtype=torch.float32)
    if not reduction.targets:
        values, ids = scores.topk(min(reduction.top_k or scores.shape[-1], scores.shape[-1]), dim=-1)
        return Reduced(values, ids.int())
    targets = torch.tensor(reduction.targets, device=logits.device)
    values, places = scores[:, targets].topk(min(reduction.top_k or len(targets), len(targets)), dim=-1)
    return Reduced(values, targets[places].int())


def _pool(hidden: Tensor, reduction: Reduction, starts: Tensor) -> Tensor:
    vectors = hidden.float()
    if reduction.pooling == "first":
        vectors = vectors[starts[:-1]]
    elif reduction.pooling == "mean":
        # Sums of segments: each row of `vectors` is looked up once, in bags that begin at `starts`.
        tokens = torch.arange(len(vectors), dtype=starts.dtype, device=starts.device)
        vectors = F.embedding_bag(tokens, vectors, starts[:-1], mode="mean")
    return F.normalize(vectors, dim=-1) if reduction.normalize else vectors
