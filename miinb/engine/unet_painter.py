"""The optimized painter: this engine's UNet and VAE decoder, between the text encoder and schedulers of diffusers.

The loop of steps is short because all else is elsewhere: what a prompt needs once is in `Unet.prepare`, schedulers keep
their numbers on the host, and a step launches without waiting for the device. The host stays at most `AHEAD` steps in
front of it, so that progress and cancels are of the step that really runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from miinb.engine.image_blocks import fastest_convolutions
from miinb.engine.image_starts import Beginning, begin
from miinb.engine.painting import Decoded, Start, Work
from miinb.engine.pipeline_parts import PipelineParts, generators
from miinb.engine.step_reuse import Predictor, StepReuse
from miinb.engine.unet import Unet
from miinb.engine.unet_graphs import GraphedUnet
from miinb.engine.vae import VaeDecoder
from miinb.pipelines import Pipeline

#: Steps that may wait on the device when the next one is launched.
AHEAD = 2
#: Texts whose embeddings are kept: the negative prompt is mostly the same, and variations of a picture share theirs.
MOST_TEXTS = 64


class UnetPainter(PipelineParts):
    """Computes pictures with the engine's own models; see `Painter`.

    Args:
        pipe: diffusers' pipeline on the device, without a UNet; of its VAE the encoder is used.
        pipeline: what its folder says.
        unet: in eager steps or graphs.
        vae: the decoder.
        step_reuse: one prediction in so many is whole.
    """

    def __init__(
        self, pipe: Any, pipeline: Pipeline, unet: Unet | GraphedUnet, vae: VaeDecoder, *, step_reuse: int = 1
    ) -> None:
        super().__init__(pipe, pipeline)
        self._channels = unet.spec.inputs
        self._vae_scale = float(pipeline.configs["vae"].get("scaling_factor", 0.18215))
        self._unet = unet
        self._vae = vae
        self._step_reuse = step_reuse
        self._texts: dict[str, Tensor] = {}  # embeddings [text_length, D]; those used last stand last

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str], negatives: Sequence[str], guidance: float) -> tuple[Tensor, Tensor | None]:
        """See `Painter`: embeddings [N, text_length, D], of each text computed once."""
        guided, count = guidance > 1 and self._guides, len(prompts)
        texts = [*prompts, *(negatives if guided else ())]
        if missing := [text for text in dict.fromkeys(texts) if text not in self._texts]:
            found, _ = self._pipe.encode_prompt(missing, self._pipe._execution_device, 1, False)
            self._texts |= {text: one.clone() for text, one in zip(missing, found, strict=True)}
        embedded = torch.stack([self._texts[text] for text in texts])
        for text in dict.fromkeys(texts):
            self._texts[text] = self._texts.pop(text)
        for text in list(self._texts)[:-MOST_TEXTS]:
            del self._texts[text]
        return embedded[:count], embedded[count:] if guided else None

    @torch.inference_mode()
    def denoise(
        self,
        conditions: tuple[Tensor, Tensor | None],
        work: Work,
        starts: Sequence[Start],
        between: Callable[[int, Tensor], None],
    ) -> Tensor:
        """See `Painter`."""
        prompts, negatives = conditions
        text = prompts if negatives is None else torch.cat((negatives, prompts))
        scheduler, noise = self.new_scheduler(work, starts), generators(starts)
        scheduler.set_timesteps(work.steps)  # on the host
        if work.kind == "text":
            shape = (len(starts), self._channels, work.height, work.width)
            beginning = Beginning(self._pipe.prepare_latents(*shape, prompts.dtype, prompts.device, noise, None), 0)
        else:
            beginning = begin(self._pipe.vae, scheduler, work, starts, noise)
        latents, first = beginning.latents, beginning.first
        if isinstance(self._unet, GraphedUnet):
            guided = negatives is not None
            self._unet.capture(len(starts), *latents.shape[2:], tokens=text.shape[1], guided=guided)
        options = self._pipe.prepare_extra_step_kwargs(noise, 0.0)
        count = len(scheduler.timesteps) - first

        def after(index: int, latents: Tensor) -> Tensor:
            latents = beginning.after_step(scheduler, index, latents)
            between(max(1, (index + 1 - first) * work.done // count), latents)
            return latents

        unet = StepReuse(self._unet, self._step_reuse) if self._step_reuse > 1 else self._unet
        return denoised(unet, scheduler, latents, text, work.guidance, options, after, first)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Decoded]:
        """See `Painter`."""
        return self.pixels(decoded(self._vae, latents / self._vae_scale))

    def close(self) -> None:
        """See `Painter`."""
        super().close()
        del self._unet, self._vae


def decoded(vae: VaeDecoder, latents: Tensor) -> Tensor:
    """Pictures [N, 3, height, width] of latents divided by the scaling factor, by cuDNN's fastest convolutions."""
    with fastest_convolutions():
        return vae.decode(latents)


@torch.inference_mode()
def denoised(
    unet: Predictor,
    scheduler: Any,
    latents: Tensor,
    text: Tensor,
    guidance: float,
    options: Mapping[str, Any] | None = None,
    after: Callable[[int, Tensor], Tensor] = lambda index, latents: latents,
    first: int = 0,
) -> Tensor:
    """Latents after all steps of a scheduler.

    Args:
        unet: predicts.
        scheduler: diffusers', with its timesteps on the host, where its numbers are.
        latents: [N, C, height, width], noise as the scheduler scales it, or what has been computed up to `first`.
        text: embeddings [N, tokens, width], or [2 * N, tokens, width] for guidance, those of negative prompts first.
        guidance: how far the prediction goes from the negative prompt's to the prompt's; counts with 2 * N texts.
        options: more arguments of the scheduler's step.
        after: told each timestep's index and its latents; gives those that the next one begins with.
        first: index of the first timestep that is computed.
    """
    times = scheduler.timesteps
    conditions = unet.prepare(text, times)
    indexes = torch.arange(len(times), device=latents.device)
    guided, pace = len(text) > len(latents), Pace(latents.device)
    for i in range(first, len(times)):
        prediction = unet.step(scheduler.scale_model_input(latents, times[i]), indexes[i : i + 1], conditions)
        if guided:
            plain, asked = prediction.chunk(2)
            prediction = torch.lerp(plain, asked, guidance)
        else:
            prediction = prediction.clone()  # a graph writes the next one to the same place, and schedulers keep some
        latents = scheduler.step(prediction, times[i], latents, **options or {}, return_dict=False)[0]
        pace.step()
        latents = after(i, latents)
    return latents


class Pace:
    """Keeps the host at most `AHEAD` steps in front of its device.

    Args:
        device: a CPU is never behind.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """A step has been launched: wait until no more than `AHEAD` of them are left."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._running.append(event)
        if len(self._running) > AHEAD:
            self._running.popleft().synchronize()
