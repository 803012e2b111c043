"""CUDA graphs of a UNet's step, one for each number of texts and of latents, and size of these.

A graph reads latents, the text's keys and values, and the step's shifts from memory of its own. What a prompt has is
copied there when its first step comes, the shifts of a step before each: so prompts of any number of steps share it.
Where steps are reused a shallow step is a second graph; the deep features lie in memory that no other graph writes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from miinb.engine.graphs import Recorder, Replay
from miinb.engine.image_blocks import fastest_convolutions
from miinb.engine.unet import Conditions, Unet
from miinb.wording import size_words

#: That all graphs may take, with what the convolutions need beside their outputs.
MOST_BYTES = 4 << 30


def batches(most: int) -> list[int]:
    """How many pictures the graphs that are made at the start are for, the largest first: others fit in its memory."""
    return sorted({n for n in (1, 2, 4, 8) if n < most} | {min(most, 8)}, reverse=True)


@dataclass(slots=True)
class _Graph:
    replay: Replay
    prediction: Tensor  # [N, outputs, height, width]


@dataclass(slots=True)
class _Captured:
    latents: Tensor  # [N, inputs, height, width]
    index: Tensor  # [1] int64: 0, of the one step that `conditions` has
    conditions: Conditions
    step: _Graph  # where steps are reused it writes `deep` too
    shallow: _Graph | None = None
    deep: Tensor | None = None  # [N, height, width, C]
    prompt: Conditions | None = None  # whose text is in `conditions`


class GraphedUnet:
    """A `Unet` that runs a step as a CUDA graph where `capture` has made one, and any other eagerly.

    Args:
        unet: the model.
        recorder: None: `Recorder`.
        reuse: whether there will be shallow steps, which are graphs too.
    """

    def __init__(self, unet: Unet, recorder: Recorder | None = None, *, reuse: bool = False) -> None:
        self.spec = unet.spec
        self._unet = unet
        self._reuse = reuse
        self._recorder = recorder or Recorder(most_bytes=MOST_BYTES)
        self._captured: dict[tuple[int, ...], _Captured] = {}

    def __str__(self) -> str:
        sizes = ", ".join(f"{texts} x {h} x {w}" for _, texts, h, w, _ in sorted(self._captured))
        took = f"captured in {self._recorder.seconds:.1f} s, {size_words(self._recorder.bytes)}"
        return f"predictions of {sizes}, {took}" if sizes else "none"

    @property
    def bytes(self) -> int:
        """Memory of the graphs."""
        return self._recorder.bytes

    def prepare(self, text_embeddings: Tensor, timesteps: Tensor) -> Conditions:
        """See `Unet.prepare`."""
        return self._unet.prepare(text_embeddings, timesteps)

    @torch.inference_mode()
    def capture(self, images: int, height: int, width: int, *, tokens: int = 77, guided: bool = False) -> bool:
        """Make the graph of a step, if there is none yet.

        The convolutions are the fastest that cuDNN finds by trying, before the capture.

        Args:
            images: latents of a step.
            height, width: of the latents.
            tokens: of each text.
            guided: whether there are two texts for each of the latents.

        Returns:
            Whether there is one; not where all of them would take more time or memory than they may.
        """
        texts = 2 * images if guided else images
        key = (images, texts, height, width, tokens)
        if key not in self._captured and not self._recorder.full():
            spec, w = self._unet.spec, self._unet.weights
            zeros = functools.partial(torch.zeros, dtype=w.dtype, device=w.device)
            latents = zeros((images, spec.inputs, height, width))
            text = zeros((texts, tokens, w.keys_values.weight.shape[0]))
            conditions = Conditions(text, zeros((1, w.shifts.weight.shape[0])))
            with fastest_convolutions():
                self._captured[key] = self._record(latents, conditions)
            self._recorder.settle()
        return key in self._captured

    def _record(self, latents: Tensor, conditions: Conditions) -> _Captured:
        unet, index = self._unet, torch.zeros(1, dtype=torch.int64, device=latents.device)
        if not self._reuse:
            replay, (prediction,) = self._recorder.record(lambda: (unet.step(latents, index, conditions),))
            return _Captured(latents, index, conditions, _Graph(replay, prediction))
        height, width = latents.shape[2:]
        deep = latents.new_zeros((len(conditions.text), height, width, unet.deep_channels))

        def whole() -> tuple[Tensor, Tensor]:
            prediction, found = unet.whole_step(latents, index, conditions)
            return prediction, deep.copy_(found)

        replay, (prediction, _) = self._recorder.record(whole)
        step = _Graph(replay, prediction)
        replay, (prediction,) = self._recorder.record(lambda: (unet.shallow_step(latents, index, conditions, deep),))
        return _Captured(latents, index, conditions, step, _Graph(replay, prediction), deep)

    @torch.inference_mode()
    def step(self, latents: Tensor, step_index: Tensor, conditions: Conditions) -> Tensor:
        """See `Unet.step`; the result of a graph is valid until the next step."""
        captured = self._filled(latents, step_index, conditions)
        if captured is None:
            return self._unet.step(latents, step_index, conditions)
        captured.step.replay()
        return captured.step.prediction

    @torch.inference_mode()
    def whole_step(self, latents: Tensor, step_index: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """See `Unet.whole_step`; of a graph the prediction is valid until the next step, the rest until the next whole
        one.
        """
        captured = self._filled(latents, step_index, conditions)
        if captured is None or captured.deep is None:
            return self._unet.whole_step(latents, step_index, conditions)
        captured.step.replay()
        return captured.step.prediction, captured.deep

    @torch.inference_mode()
    def shallow_step(self, latents: Tensor, step_index: Tensor, conditions: Conditions, deep: Tensor) -> Tensor:
        """See `Unet.shallow_step`; the result of a graph is valid until the next step."""
        captured = self._filled(latents, step_index, conditions)
        if captured is None or captured.shallow is None or captured.deep is None:
            return self._unet.shallow_step(latents, step_index, conditions, deep)
        if captured.deep is not deep:
            captured.deep.copy_(deep)
        captured.shallow.replay()
        return captured.shallow.prediction

    def _filled(self, latents: Tensor, step_index: Tensor, conditions: Conditions) -> _Captured | None:
        """What was captured for these sizes, with these inputs in its memory."""
        images, _, height, width = latents.shape
        texts, tokens, _ = conditions.text.shape
        captured = self._captured.get((images, texts, height, width, tokens))
        if captured is None:
            return None
        if captured.prompt is not conditions:
            captured.conditions.text.copy_(conditions.text)
            captured.prompt = conditions
        captured.latents.copy_(latents)
        torch.index_select(conditions.shifts, 0, step_index, out=captured.conditions.shifts)
        return captured
