"""What an image pipeline's folder holds, as diffusers saves it: parts, sizes, scheduler. Of weights only headers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miinb.checkpoint import TensorEntry, main_dtype, read_safetensors
from miinb.engine.diffusion_spec import DiffusionSpec, diffusion_spec
from miinb.engine.image_parameters import quantized_matrices
from miinb.engine.parameters import QUANTIZED, row_bytes
from miinb.errors import BrokenCheckpoint, UnsupportedModel
from miinb.tasks import TASKS

#: Classes that are served; of others the message names these.
SERVED = TASKS["text-to-image"].architectures
#: What of model_index.json has weights; the safety checker may be missing or null.
_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")
_NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_NEEDED_BY_XL = ("text_encoder_2", "tokenizer_2")
#: Where classes may come from. Another name would be a Python file of the folder itself.
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
#: How files of half the size are told apart ("diffusion_pytorch_model.fp16.safetensors").
_HALF = ".fp16."
_AGAIN = "Fetch the model again."


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline of diffusers.

    Attributes:
        name: its class.
        configs: each part's own configuration, by the part's name.
        scheduler: the class of its scheduler.
        text_length: tokens that its text encoder takes, the two special ones included.
        width, height: of a picture unless a request says, in pixels.
        scale: pixels of a latent's side.
        has_half: it has weights in fp16.
        half_files: these are files of their own, beside or instead of larger ones.
        full_files: there are others than those.
        checks_safety: pictures go through its safety checker.
        diffusion: the UNet and the VAE for the optimized engine; None where it has no form for them.
        unfused: why it has none.
    """

    name: str
    configs: Mapping[str, Mapping[str, Any]] = field(repr=False)
    scheduler: str
    text_length: int
    width: int
    height: int
    scale: int
    has_half: bool
    half_files: bool
    full_files: bool
    checks_safety: bool
    diffusion: DiffusionSpec | None = field(default=None, repr=False)
    unfused: UnsupportedModel | None = None

    def compute_dtype(self, dtype: str, *, on_gpu: bool) -> str:
        """Of activations and of what is not quantized, by miinb's names: `dtype`, unless that is of weights alone."""
        if dtype not in QUANTIZED:
            return dtype
        return "fp32" if not on_gpu else "fp16" if self.has_half else "bf16"

    def quantized_bytes(self, parameters: int, dtype: str, number: float, *, on_gpu: bool) -> int:
        """Bytes of its weights where those of the UNet's transformers are quantized.

        Args:
            parameters: of all its parts.
            dtype: of the transformers' matrices.
            number: bytes of one of the other weights.
            on_gpu: the form of the quantized numbers.
        """
        matrices = quantized_matrices(self.diffusion.unet) if self.diffusion else []
        rest = parameters - sum(rows * columns for rows, columns in matrices)
        return int(rest * number) + sum(rows * row_bytes(columns, dtype, on_gpu=on_gpu) for rows, columns in matrices)

    def variant(self, dtype: str) -> str | None:
        """Which files diffusers is to read for a dtype: "fp16", or None for those without such a word."""
        return "fp16" if self.half_files and (dtype == "fp16" or not self.full_files) else None

    def image_bytes(self, dtype_bytes: float, width: int, height: int) -> int:
        """About what a picture takes of the memory while the UNet computes its two halves, with and without the prompt.

        The skip connections of its levels are about 12 times its first activation, a layer's own intermediates the
        rest.
        """
        latents = (width // self.scale) * (height // self.scale)
        return int(2 * latents * self.configs["unet"]["block_out_channels"][0] * 40 * dtype_bytes)

    def decode_bytes(self, dtype_bytes: float, width: int, height: int) -> int:
        """About what the VAE takes to make pixels of one picture's latents: its last levels have all pixels."""
        channels = self.configs["vae"]["block_out_channels"]
        if is_sdxl(self.name) and self.configs["vae"].get("force_upcast", True):
            dtype_bytes = 4  # diffusers computes it in fp32
        return int(width * height * channels[min(1, len(channels) - 1)] * 5 * dtype_bytes)


def is_sdxl(name: str) -> bool:
    """Whether a class of diffusers is one of SDXL."""
    return name.startswith("StableDiffusionXL")


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is diffusers' kind."""
    return (folder / "model_index.json").is_file()


def read_pipeline(folder: Path, source: str, *, dummy: bool = False) -> tuple[Pipeline, list[TensorEntry]]:
    """The pipeline in a folder, and the tensors that a part's name goes before ("unet/conv_in.weight").

    Args:
        folder: of the pipeline.
        source: names it in errors.
        dummy: its weights will be random ones: files of weights are not looked for, a tokenizer may be missing, and
            there is no safety checker, which could tell nothing.

    Raises:
        UnsupportedModel: another pipeline, its own Python code, or pickled weights.
        BrokenCheckpoint: a part is missing or damaged; the message names it.
    """
    index = _read_json(folder / "model_index.json")
    _check_index(index, source)
    if dummy:
        configs = {name: _read_json(folder / name / "config.json") for name in _WEIGHTS[:3]}
        return _described(folder, index, configs, [], half=False, full=True), []
    configs = {name: _read_json(folder / name / "config.json") for name in _WEIGHTS if _is_there(index, name)}
    for name in ("tokenizer", "scheduler", *(("tokenizer_2",) if is_sdxl(index["_class_name"]) else ())):
        if not (folder / name).is_dir():
            raise BrokenCheckpoint(f"{folder} has no folder {name}.", hint=_AGAIN)
    files = {name: _weight_files(folder / name) for name in configs}
    half = all(any(_HALF in file.name for file in found) for found in files.values())
    full = all(any(_HALF not in file.name for file in found) for found in files.values())
    if not half and not full:
        raise BrokenCheckpoint(f"The parts of {folder} have weights of different kinds.", hint=_AGAIN)
    entries = [
        TensorEntry(f"{name}/{entry.name}", entry.shape, entry.dtype, entry.size_bytes, entry.file, entry.offset)
        for name, found in files.items()
        for file in found
        if (_HALF in file.name) is not full
        for entry in read_safetensors(file)
    ]
    return _described(folder, index, configs, entries, half=half, full=full), entries


def _described(
    folder: Path,
    index: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    entries: list[TensorEntry],
    *,
    half: bool,
    full: bool,
) -> Pipeline:
    try:
        scale = 2 ** (len(_wholes(configs["vae"]["block_out_channels"])) - 1)
        _wholes(configs["unet"]["block_out_channels"])
        sample = configs["unet"]["sample_size"]
        diffusion, unfused = _fused(configs)
        rows, columns = _wholes(sample if isinstance(sample, list) else [sample, sample])
        return Pipeline(
            name=index["_class_name"],
            configs=configs,
            scheduler=index["scheduler"][1],
            text_length=int(_text_length(folder, configs)),
            width=columns * scale,
            height=rows * scale,
            scale=scale,
            has_half=half or main_dtype({}, entries) == "fp16",
            half_files=half,
            full_files=full,
            checks_safety="safety_checker" in configs,
            diffusion=diffusion,
            unfused=unfused,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenCheckpoint(f"The configurations of {folder} cannot be used ({error}).", hint=_AGAIN) from None


def _fused(configs: Mapping[str, Mapping[str, Any]]) -> tuple[DiffusionSpec | None, UnsupportedModel | None]:
    """The optimized engine's form, or why there is none."""
    try:
        return diffusion_spec(configs), None
    except UnsupportedModel as error:
        return None, error


def _wholes(values: Any) -> list[int]:
    """A list of whole numbers above 0. Raises ValueError where it is none."""
    if not isinstance(values, list) or not values or any(type(one) is not int or one < 1 for one in values):
        raise ValueError(f"{values!r:.60} are no whole numbers")
    return values


def _text_length(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> int:
    file = folder / "tokenizer" / "tokenizer_config.json"
    told = _read_json(file).get("model_max_length") if file.is_file() else None
    positions: int = configs["text_encoder"]["max_position_embeddings"]
    return min(int(told), positions) if isinstance(told, (int, float)) else positions


def _check_index(index: Mapping[str, Any], source: str) -> None:
    kind = index.get("_class_name")
    if kind not in SERVED:
        raise UnsupportedModel(f"{source} is a {kind}, which is not served.", hint=f"Served are: {', '.join(SERVED)}.")
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and entry[0] not in _LIBRARIES:
            raise UnsupportedModel(
                f"The part {name} of {source} brings its own Python code ({entry[0]}), which is not run."
            )
    for name in (*_NEEDED, *(_NEEDED_BY_XL if is_sdxl(kind) else ())):
        if not _is_there(index, name):
            raise BrokenCheckpoint(f"model_index.json of {source} names no {name}.", hint=_AGAIN)
    if _is_there(index, "image_encoder"):
        raise UnsupportedModel(f"{source} has an image encoder, which is not served.")


def _is_there(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.ckpt")])
    if pickles:
        raise UnsupportedModel(
            f"{folder} holds its weights as a pickle ({pickles[0].name}), which can run code when read.",
            hint="Load the pipeline with diffusers and save_pretrained() it: that writes safetensors.",
        )
    raise BrokenCheckpoint(f"{folder} holds no weights.", hint=_AGAIN)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise BrokenCheckpoint(f"{file} is missing.", hint=_AGAIN) from None
    except ValueError as error:
        raise BrokenCheckpoint(f"{file} is damaged ({error}).", hint=_AGAIN) from None
    if not isinstance(values, dict):
        raise BrokenCheckpoint(f"{file} is damaged: it holds no object.", hint=_AGAIN)
    return values
