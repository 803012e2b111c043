"""Reductions against what numpy says of each sequence alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from miinb.engine.heads import reduce
from miinb.engine.reduction import Reduction

STARTS = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
NO_STARTS = torch.tensor([0], dtype=torch.int32)


def outputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)) * 4).to(dtype)


def reduced(*args: Any) -> Any:
    """Values and ids, as they come to the host."""
    return reduce(*args).parts()


def softmax(logits: torch.Tensor) -> Any:
    shares = np.exp(logits.double().numpy())
    return shares / shares.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_labels(dtype: torch.dtype) -> None:
    logits = outputs(4, 5, dtype)
    plain = logits.double().numpy()
    wanted = {"softmax": softmax(logits), "sigmoid": 1 / (1 + np.exp(-plain)), "none": plain}
    for function, scores in wanted.items():
        values, ids = reduced(logits, Reduction("text-classification", function=function), NO_STARTS)
        assert values.dtype == np.float32
        assert ids is None
        np.testing.assert_allclose(values, scores, rtol=1e-5, atol=1e-7)
        values, ids = reduced(logits, Reduction("text-classification", function=function, top_k=2), NO_STARTS)
        assert ids is not None
        best = np.argsort(-scores, axis=-1)[:, :2]
        np.testing.assert_array_equal(ids, best)
        np.testing.assert_allclose(values, np.take_along_axis(scores, best, -1), rtol=1e-5, atol=1e-7)
    values, ids = reduced(logits, Reduction("text-classification", top_k=9), NO_STARTS)
    assert values.shape == (4, 5)
    values, ids = reduced(logits, Reduction("token-classification"), NO_STARTS)
    np.testing.assert_allclose(values, wanted["softmax"], rtol=1e-5)
    values, ids = reduced(logits, Reduction("question-answering"), NO_STARTS)
    np.testing.assert_allclose(values, plain)


def test_fills_of_masks() -> None:
    logits = outputs(3, 40, torch.bfloat16)
    shares = softmax(logits)
    values, ids = reduced(logits, Reduction("fill-mask", top_k=4), NO_STARTS)
    assert ids is not None
    assert ids.dtype == np.int32
    best = np.argsort(-shares, axis=-1)[:, :4]
    assert set(map(int, ids.flatten())) == set(map(int, best.flatten()))
    np.testing.assert_allclose(values, np.take_along_axis(shares, best, -1), rtol=1e-5)
    targets = (31, 2, 17)
    values, ids = reduced(logits, Reduction("fill-mask", top_k=5, targets=targets), NO_STARTS)
    assert ids is not None
    assert values.shape == (3, 3)
    for row in range(3):
        order = sorted(targets, key=lambda token: -shares[row, token])
        assert ids[row].tolist() == order
        np.testing.assert_allclose(values[row], shares[row, order], rtol=1e-5)
    assert reduced(logits[:0], Reduction("fill-mask", top_k=4), NO_STARTS)[0].shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_vectors(dtype: torch.dtype, normalize: bool) -> None:
    hidden = outputs(9, 6, dtype)
    plain = hidden.double().numpy()
    parts = [plain[0:3], plain[3:4], plain[4:9]]
    wanted = {
        "mean": np.stack([part.mean(0) for part in parts]),
        "first": np.stack([part[0] for part in parts]),
        "none": plain,
    }
    for pooling, vectors in wanted.items():
        if normalize:
            vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        values, ids = reduced(hidden, Reduction("feature-extraction", pooling=pooling, normalize=normalize), STARTS)
        assert ids is None
        np.testing.assert_allclose(values, vectors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "reduction",
    [
        *(
            Reduction("text-classification", function=f, top_k=k)
            for f in ("softmax", "sigmoid", "none")
            for k in (0, 2)
        ),
        Reduction("token-classification"),
        Reduction("question-answering"),
        Reduction("fill-mask", top_k=2),
        Reduction("fill-mask", top_k=1, targets=(3,)),
        *(Reduction("feature-extraction", pooling=p, normalize=n) for p in ("mean", "none") for n in (False, True)),
    ],
)
def test_what_is_not_finite_stays_so_and_leaves_other_rows_alone(reduction: Reduction, bad: float) -> None:
    logits = outputs(9, 5)
    logits[4, 1] = bad
    values, _ = reduced(logits, reduction, STARTS)
    finite = np.isfinite(values).all(-1)
    assert int((~finite).sum()) == 1
