"""What a pipeline of diffusers has around its UNet and VAE, for all painters: text encoder, schedulers, safety."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from miinb.engine import sdxl
from miinb.engine.painting import Decoded, Kind, Reading, Start, Work
from miinb.engine.polling import poll_in
from miinb.engine.previews import SDXL, STABLE_DIFFUSION
from miinb.engine.weights import DTYPES
from miinb.errors import BrokenCheckpoint, InvalidRequest, MiinbError, NonFinite, UnsupportedModel
from miinb.messages import EngineInfo
from miinb.models import ModelInfo
from miinb.pipelines import Pipeline, is_sdxl

_REMEMBERED = 256  # texts and kinds of work
_USUAL_STEPS = 50  # a hint names the least number of steps that works up to here
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")


def load_pipe(model: ModelInfo, pipeline: Pipeline, info: EngineInfo, *, without: Sequence[str] = ()) -> Any:
    """diffusers' pipeline on its device; with random weights where the model has no files of any.

    Args:
        model: with the pipeline.
        pipeline: what its folder says.
        info: its dtype and device count here.
        without: parts that are not loaded.

    Raises:
        UnsupportedModel: diffusers cannot make it.
    """
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # it logs what it cuts off of prompts
    diffusers.utils.logging.disable_progress_bar()
    # its parts are those of the classes for other kinds of work
    cls, options = diffusers.StableDiffusionPipeline, dict.fromkeys(without)
    dtype = pipeline.compute_dtype(info.dtype, on_gpu=info.device == "cuda")
    if is_sdxl(pipeline.name):
        cls, options = diffusers.StableDiffusionXLPipeline, options | {"add_watermarker": False}
    elif not pipeline.checks_safety:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if not (model.folder / "feature_extractor").is_dir() or not pipeline.checks_safety:
        options["feature_extractor"] = None
    try:
        if model.format == "none":
            options |= _random_parts(model, pipeline, info.device, DTYPES[dtype], without)
        pipe = cls.from_pretrained(
            model.folder,
            dtype=DTYPES[dtype],
            variant=pipeline.variant(dtype),
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


def _random_parts(
    model: ModelInfo, pipeline: Pipeline, device: str, dtype: torch.dtype, without: Sequence[str]
) -> dict[str, Any]:
    """Parts with random weights, the same at every start, and a tokenizer of letters where the folder has none."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from miinb.engine.clip_tokenizer import clip_tokenizer

    configs = pipeline.configs
    makers = {
        "unet": lambda: diffusers.UNet2DConditionModel.from_config(configs["unet"]),
        "vae": lambda: diffusers.AutoencoderKL.from_config(configs["vae"]),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig.from_dict(dict(configs["text_encoder"]))),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(
            CLIPTextConfig.from_dict(dict(configs["text_encoder_2"]))
        ),
    }
    parts = {}
    with torch.device(device):
        for name in makers:
            if name not in configs or name in without:
                continue
            torch.manual_seed(0)  # of each part, so that its weights do not depend on which others are made
            parts[name] = makers[name]().to(dtype).eval()
    for name in ("tokenizer", "tokenizer_2") if is_sdxl(pipeline.name) else ("tokenizer",):
        if not (model.folder / name).is_dir():
            parts[name] = clip_tokenizer(length=pipeline.text_length)
    return parts


def check_parts(pipe: Any, model: ModelInfo) -> None:
    """Raise BrokenCheckpoint where a loaded part has weights that are NaN or infinite, by the tensor's name."""
    for name, part in parts_of(pipe).items():
        for tensor, values in part.named_parameters():
            if not bool(values.isfinite().all()):
                raise BrokenCheckpoint(
                    f"{name}/{tensor} of {model.source} holds NaN or infinity.", hint="Fetch the model again."
                )


def parts_of(pipe: Any) -> dict[str, Any]:
    """The loaded parts that have weights."""
    return {name: part for name in _PARTS if (part := getattr(pipe, name, None)) is not None}


class PipelineParts:
    """What `Painter`s of one pipeline have in common: all but the computation of latents and pictures.

    Args:
        pipe: a `StableDiffusionPipeline`, or SDXL's, on its device; its UNet may be missing.
        pipeline: what its folder says.
    """

    def __init__(self, pipe: Any, pipeline: Pipeline) -> None:
        own = type(pipe.scheduler)
        # Classes with `_backends` stand for those that need a library which is not installed.
        others = [cls for cls in pipe.scheduler.compatibles if not hasattr(cls, "_backends")]
        self._classes = {cls.__name__: cls for cls in (own, *others)}
        self.scheduler: str = own.__name__
        self.schedulers: Sequence[str] = sorted(self._classes)
        self.width, self.height = pipeline.width, pipeline.height
        self._config = pipe.scheduler.config
        self._length = pipeline.text_length
        unet = pipeline.configs["unet"]
        self._guides = unet.get("time_cond_proj_dim") is None
        own_size = unet.get("in_channels", 4) == pipeline.configs["vae"].get("latent_channels", 4)
        self.kinds: Sequence[Kind] = ("text", "image", "inpaint") if own_size else ("inpaint",)
        self._xl = is_sdxl(pipeline.name)
        self.colors = SDXL if self._xl else STABLE_DIFFUSION
        self._pipe: Any = pipe
        for part in parts_of(pipe).values():
            if part.device.type == "cpu":
                poll_in(part)
        # Requests are alike: to make a scheduler and to read a text take a millisecond or two each time.
        self.check = functools.lru_cache(_REMEMBERED)(self._check)
        self.read = functools.lru_cache(_REMEMBERED)(self._read)

    def _check(self, work: Work) -> None:
        """See `Painter.check`."""
        if self._fits(work):
            return
        more = (steps for steps in range(work.steps + 1, _USUAL_STEPS + 1) if self._fits(replace(work, steps=steps)))
        least = next(more, None)
        raise InvalidRequest(
            f"num_inference_steps: {work.scheduler} cannot do {work.steps}.",
            hint=f"Ask for {least} or more." if least else "Ask for 20 to 50.",
        )

    def noise_schedule(self, scheduler: str) -> str:
        """See `Painter.noise_schedule`."""
        own = inspect.signature(self._classes[scheduler].__init__).parameters
        words = ("karras", "exponential", "beta")
        names = {f"use_{word}_sigmas": word.capitalize() for word in words}
        return next((word for name, word in names.items() if name in own and self._config.get(name)), "")

    def _fits(self, work: Work) -> bool:
        """Whether the work's scheduler can do so many steps."""
        scheduler = self._classes[work.scheduler].from_config(self._config)  # the pipeline's may be at work
        try:
            scheduler.set_timesteps(work.steps)
            left = scheduler.timesteps[(work.steps - work.done) * scheduler.order :]
            return len(left) > 0 and bool(max(scheduler.timesteps) < scheduler.config.num_train_timesteps)
        except (ValueError, IndexError, RuntimeError, ZeroDivisionError):
            return False

    def _read(self, text: str) -> Reading:
        """See `Painter.read`."""
        ids = self._pipe.tokenizer(text, truncation=False, verbose=False).input_ids
        rest = ids[self._length - 1 : -1]
        cut = self._pipe.tokenizer.decode(rest) if rest else ""
        return Reading(min(len(ids), self._length), cut.lstrip("\ufffd") or cut)  # cut in the middle of a letter

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

    def new_scheduler(self, work: Work, starts: Sequence[Start]) -> Any:
        """A scheduler of the work's class with the model's settings, without timesteps; the pipeline's from now on."""
        scheduler = self._classes[work.scheduler].from_config(self._config)
        if hasattr(scheduler, "noise_sampler_seed"):  # DPMSolverSDE draws from Brownian trees, not from generators
            scheduler.noise_sampler_seed = [start.seed for start in starts]  # a tree for each picture
        self._pipe.scheduler = scheduler
        return scheduler

    def pixels(self, images: Tensor) -> list[Decoded]:
        """RGB of pictures [N, 3, height, width], about -1 to 1, as diffusers' image processor rounds them."""
        finite = images.isfinite().flatten(1).all(1).tolist()
        images, flags = images.nan_to_num(), None
        if not self._xl:  # which comes without a checker
            images, flags = self._pipe.run_safety_checker(images, images.device, images.dtype)
        flagged = [bool(flag) for flag in flags or [False] * len(images)]
        values = (images * 0.5 + 0.5).clamp(0, 1)
        for place, flag in enumerate(flagged):
            if flag:  # the checker made it black
                values[place] = images[place]
        rounded = (values.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [
            (picture.tobytes(), flag) if whole else _not_finite()
            for picture, flag, whole in zip(rounded, flagged, finite, strict=True)
        ]

    def close(self) -> None:
        """See `Painter`."""
        self._pipe = None


def _not_finite() -> NonFinite:
    return NonFinite("The model made NaN or infinity of this prompt.", hint="Try dtype='bf16' or 'fp32'.")


def generators(starts: Sequence[Start]) -> list[torch.Generator]:
    """What each picture's noise comes from: on the CPU, so that devices agree."""
    return [torch.Generator("cpu").manual_seed(start.seed) for start in starts]
