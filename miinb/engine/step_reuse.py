"""Steps that reuse what inner layers gave a step before: DeepCache (Ma et al., 2023), lossy and only when asked for.

Features of the inner layers change little from step to step, and cost most. So of N steps in a row the first is whole,
and the others compute the outermost layers alone, on its deep features.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from miinb.engine.unet import Conditions, Unet
from miinb.engine.unet_graphs import GraphedUnet


class Predictor(Protocol):
    """What predicts the steps of a prompt: `Unet`, `GraphedUnet` or `StepReuse`."""

    def prepare(self, text_embeddings: Tensor, timesteps: Tensor) -> Conditions:
        """See `Unet.prepare`."""
        ...

    def step(self, latents: Tensor, step_index: Tensor, conditions: Conditions) -> Tensor:
        """See `Unet.step`."""
        ...


class StepReuse:
    """Predictions of one batch from its first step to its last, of which one in `every` is whole.

    Schedulers with several predictions a step have each of them counted.

    Args:
        unet: in eager steps or graphs.
        every: 2 or more; the first prediction is whole.
    """

    def __init__(self, unet: Unet | GraphedUnet, every: int) -> None:
        self._unet = unet
        self._every = every
        self._count = 0
        self._deep: Tensor | None = None

    def prepare(self, text_embeddings: Tensor, timesteps: Tensor) -> Conditions:
        """See `Unet.prepare`."""
        return self._unet.prepare(text_embeddings, timesteps)

    def step(self, latents: Tensor, step_index: Tensor, conditions: Conditions) -> Tensor:
        """See `Unet.step`; the result of a graph is valid until the next step."""
        whole = self._count % self._every == 0
        self._count += 1
        if whole or self._deep is None:
            prediction, self._deep = self._unet.whole_step(latents, step_index, conditions)
            return prediction
        return self._unet.shallow_step(latents, step_index, conditions, self._deep)
