"""diffusers' pipelines of Stable Diffusion as published: the baseline of text-to-image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from miinb.config import DeploymentConfig
from miinb.engine import sdxl
from miinb.engine.diffusion import ImageExecutor, Kind, Reading, Start, Work
from miinb.engine.previews import SDXL, STABLE_DIFFUSION
from miinb.engine.weights import DTYPES
from miinb.errors import BrokenCheckpoint, InvalidRequest, MiinbError, NonFinite, UnsupportedModel
from miinb.messages import EngineInfo, Phase
from miinb.models import ModelInfo
from miinb.pipelines import Pipeline, is_sdxl

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")
#: What a pipeline is called with for conditions, in their order; the last two are SDXL's.
_CONDITIONS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def load_images(
    model: ModelInfo, config: DeploymentConfig, info: EngineInfo, report: Callable[[Phase], None]
) -> ImageExecutor:
    """The executor of an image pipeline.

    Args:
        model: with a pipeline.
        config: `options.max_queue` and `parity` count here.
        info: what the frontend is told; its plan gets a line about how diffusers is run.
        report: told of each phase.

    Raises:
        UnsupportedModel: diffusers cannot make the pipeline.
        BrokenCheckpoint: weights are missing, or hold NaN or infinity.
    """
    if model.pipeline is None:
        raise UnsupportedModel(f"{model.source} is no image pipeline.")
    report(Phase("load", 0, 1, f"{model.architecture} with diffusers"))
    pipe = _load(model, model.pipeline, info)
    report(Phase("load", 1, 1))
    parts = [part for name in _PARTS if (part := getattr(pipe, name, None)) is not None]
    weights = sum(tensor.nbytes for part in parts for tensor in part.parameters())
    if config.options.parity != "off":
        report(Phase("verify"))
        _check(pipe, model)
    checker = "kept" if model.pipeline.checks_safety else "none"
    plan = info.plan.with_line("diffusers", "eager", f"as published; safety checker: {checker}", weights_bytes=weights)
    painter = PipelinePainter(pipe, model.pipeline)
    info = dataclasses.replace(info, plan=plan)
    return ImageExecutor(painter, info, max_queue=config.options.max_queue)


def _load(model: ModelInfo, pipeline: Pipeline, info: EngineInfo) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # it logs what it cuts off of prompts
    diffusers.utils.logging.disable_progress_bar()
    # their parts are those of the classes for other kinds of work
    cls = diffusers.StableDiffusionPipeline
    options: dict[str, Any] = {}
    if is_sdxl(pipeline.name):
        cls, options = diffusers.StableDiffusionXLPipeline, {"add_watermarker": False}
    elif not pipeline.checks_safety:
        options = {"safety_checker": None, "requires_safety_checker": False}
    if not (model.folder / "feature_extractor").is_dir():
        options["feature_extractor"] = None
    try:
        pipe = cls.from_pretrained(
            model.folder,
            dtype=DTYPES[info.dtype],
            variant=pipeline.variant(info.dtype),
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    except (MiinbError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what diffusers makes of an unusual configuration or checkpoint
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise UnsupportedModel(
            f"diffusers cannot make the pipeline of {model.source} ({why}).", hint="Look at its configurations."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(info.device)


def _check(pipe: Any, model: ModelInfo) -> None:
    for name in _PARTS:
        part = getattr(pipe, name, None)
        for tensor, values in part.named_parameters() if part is not None else ():
            if not bool(values.isfinite().all()):
                raise BrokenCheckpoint(
                    f"{name}/{tensor} of {model.source} holds NaN or infinity.", hint="Fetch the model again."
                )


def pipe_of(pipe: Any, kind: Kind) -> Any:
    """The pipeline for a kind of work: diffusers has a class for each, of the same parts."""
    import diffusers

    if kind == "text":
        return pipe
    xl, name = is_sdxl(type(pipe).__name__), "Inpaint" if kind == "inpaint" else "Img2Img"
    own = {"force_zeros_for_empty_prompt", "add_watermarker"} if xl else {"requires_safety_checker"}
    options = {option: pipe.config.get(option, False) for option in own}
    made = getattr(diffusers, f"StableDiffusion{'XL' if xl else ''}{name}Pipeline")(**pipe.components, **options)
    made.set_progress_bar_config(disable=True)
    return made


def inputs_of(work: Work, starts: Sequence[Start]) -> dict[str, Any]:
    """What a pipeline is called with for a kind of work, besides what all take."""
    size = {"width": work.width, "height": work.height}
    if work.kind == "text":
        return size
    from PIL import Image

    images = [Image.frombytes("RGB", (work.width, work.height), start.image) for start in starts]
    if work.kind == "image":
        return {"image": images, "strength": work.strength}
    masks = [Image.frombytes("L", (work.width, work.height), start.mask) for start in starts]
    return {"image": images, "mask_image": masks, "strength": work.strength, **size}


class PipelinePainter:
    """Runs a pipeline of diffusers; see `Painter`.

    Args:
        pipe: a `StableDiffusionPipeline` on its device.
        pipeline: what its folder says.
    """

    def __init__(self, pipe: Any, pipeline: Pipeline) -> None:
        own = type(pipe.scheduler)
        self._classes = {own.__name__: own} | {cls.__name__: cls for cls in pipe.scheduler.compatibles}
        self.scheduler: str = own.__name__
        self.schedulers: Sequence[str] = sorted(self._classes)
        self.width, self.height = pipeline.width, pipeline.height
        self._config = pipe.scheduler.config
        self._length = pipeline.text_length
        self._guides = pipe.unet.config.time_cond_proj_dim is None
        self.kinds: Sequence[Kind] = ("text", "image", "inpaint") if pipe.unet.config.in_channels == 4 else ("inpaint",)
        self._xl = is_sdxl(pipeline.name)
        self.colors = SDXL if self._xl else STABLE_DIFFUSION
        self._pipe: Any = pipe

    def check(self, work: Work) -> None:
        """See `Painter`."""
        scheduler = self._classes[work.scheduler].from_config(self._config)
        try:
            scheduler.set_timesteps(work.steps)
            left = scheduler.timesteps[(work.steps - work.done) * scheduler.order :]
            fits = len(left) > 0 and bool(max(scheduler.timesteps) < scheduler.config.num_train_timesteps)
        except (ValueError, IndexError, RuntimeError, ZeroDivisionError):
            fits = False
        if not fits:
            raise InvalidRequest(
                f"num_inference_steps: {work.scheduler} cannot do {work.steps}.", hint="Ask for fewer, or for 20 to 50."
            )

    def read(self, text: str) -> Reading:
        """See `Painter`."""
        ids = self._pipe.tokenizer(text, truncation=False, verbose=False).input_ids
        rest = ids[self._length - 1 : -1]
        return Reading(min(len(ids), self._length), self._pipe.tokenizer.decode(rest) if rest else "")

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str], negatives: Sequence[str], guidance: float) -> tuple[Tensor | None, ...]:
        """See `Painter`: embeddings [N, text_length, D] of the prompts and, with guidance, of the negative ones."""
        guided = guidance > 1 and self._guides
        if self._xl:
            return sdxl.embed(self._pipe, prompts, negatives, guided)
        device = self._pipe._execution_device
        found: tuple[Tensor, Tensor | None] = self._pipe.encode_prompt(
            list(prompts), device, 1, guided, list(negatives) if guided else None
        )
        return found

    @torch.inference_mode()
    def denoise(
        self,
        conditions: tuple[Tensor | None, ...],
        work: Work,
        starts: Sequence[Start],
        between: Callable[[int, Tensor], None],
    ) -> Tensor:
        """See `Painter`."""
        pipe = pipe_of(self._pipe, work.kind)
        pipe.scheduler = self._classes[work.scheduler].from_config(self._config)

        def after(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            # some schedulers take more timesteps than steps: PNDM's first costs two
            between(max(1, (index + 1) * work.done // pipe.num_timesteps), values["latents"])
            return values

        latents: Tensor = pipe(
            **dict(zip(_CONDITIONS, conditions, strict=False)),
            **inputs_of(work, starts),
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            generator=[torch.Generator("cpu").manual_seed(start.seed) for start in starts],
            output_type="latent",
            return_dict=False,
            callback_on_step_end=after,
        )[0]
        return latents

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> tuple[bytes, bool]:
        """See `Painter`."""
        pipe, flags = self._pipe, None
        if self._xl:
            image = sdxl.decode(pipe, latents)
        else:
            image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        if not bool(torch.isfinite(image).all()):
            raise NonFinite("The model made NaN or infinity of this prompt.", hint="Try dtype='bf16' or 'fp32'.")
        if not self._xl:  # which comes without a checker
            image, flags = pipe.run_safety_checker(image, image.device, latents.dtype)
        flagged = bool(flags and flags[0])
        (picture,) = pipe.image_processor.postprocess(image, output_type="pil", do_denormalize=[not flagged])
        return picture.convert("RGB").tobytes(), flagged

    def close(self) -> None:
        """See `Painter`."""
        self._pipe = None
