"""Weights of the UNet and the VAE decoder: from diffusers' safetensors by name into the layouts of the operators."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from miinb.checkpoint import read_safetensors
from miinb.engine.decoder import Norm
from miinb.engine.image_blocks import Conv, Resnet
from miinb.errors import BrokenCheckpoint, UnsupportedModel
from miinb.kernels.linear import PackedLinear

_NAME = "diffusion_pytorch_model"


class Tensors(Protocol):
    """Where weights come from."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def take(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """The tensor, which must have one of the shapes and gets the first; in the model's dtype, on its device."""
        ...


class RandomTensors:
    """Random weights made on the device, for benchmarks; the same for the same seed and device.

    Norms are 1, biases 0, matrices and convolutions normal with a variance of a third over their inputs, as PyTorch
    initializes them, so that activations stay in fp16's range.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self._dtype = dtype
        self._device = device
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def has(self, name: str) -> bool:
        """See `Tensors`: all but older names."""
        return True

    def take(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """See `Tensors`."""
        target = torch.empty(shapes[0], dtype=self._dtype, device=self._device)
        if self._generator is None:
            return target
        if target.dim() == 1:
            return target.fill_(0.0 if name.endswith(".bias") else 1.0)
        return target.normal_(0.0, (3 * target[0].numel()) ** -0.5, generator=self._generator)


class StoredTensors:
    """Tensors that are there, each taken once.

    Args:
        source: names them in errors.
        stored: reads each.
        dtype: what they become.
        device: where they go.
    """

    def __init__(
        self, source: str, stored: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._source = source
        self._stored = stored
        self._dtype = dtype
        self._device = device
        self._left = set(stored)

    def has(self, name: str) -> bool:
        """See `Tensors`."""
        return name in self._stored

    def take(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """See `Tensors`.

        Raises:
            BrokenCheckpoint: it is missing, has another shape, or is not finite.
        """
        if name not in self._stored:
            raise BrokenCheckpoint(f"{self._source} lacks the tensor {name}.", hint="Fetch the model again.")
        stored = self._stored[name]()
        if stored.shape not in shapes:
            raise BrokenCheckpoint(
                f"{name} of {self._source} has shape {list(stored.shape)}, config.json asks for {list(shapes[0])}.",
                hint="The configuration and the weights do not belong together.",
            )
        self._left.discard(name)
        target: Tensor = stored.reshape(shapes[0]).to(self._device, self._dtype)
        if not torch.isfinite(target.sum(dtype=torch.float32)):
            raise BrokenCheckpoint(
                f"{name} of {self._source} holds NaN or infinity as {self._dtype}.",
                hint="Fetch the model again, or ask for another dtype.",
            )
        return target

    def finish(self, unread: Sequence[str] = ()) -> None:
        """All have been read but those whose names begin like `unread`.

        Raises:
            UnsupportedModel: there are others.
        """
        left = sorted(name for name in self._left if not name.startswith(tuple(unread)))
        if left:
            raise UnsupportedModel(
                f"{self._source} holds {len(left)} tensors that the optimized diffusion engine does not know, "
                f"{left[0]} first.",
                hint='Use engine="baseline", which serves any pipeline.',
            )


@contextlib.contextmanager
def open_tensors(
    folder: Path, dtype: torch.dtype, device: torch.device, *, half: bool = False
) -> Iterator[StoredTensors]:
    """The safetensors of a model's folder, unet/ or vae/ (`half`: see `weight_files`).

    Raises:
        BrokenCheckpoint: a file is missing or damaged.
    """
    with contextlib.ExitStack() as stack:
        stored: dict[str, Callable[[], Tensor]] = {}
        for file in weight_files(folder, half=half):
            names = [entry.name for entry in read_safetensors(file)]
            opened = stack.enter_context(safe_open(file, framework="pt"))
            stored |= {name: functools.partial(opened.get_tensor, name) for name in names}
        yield StoredTensors(str(folder), stored, dtype, device)


def tensors_of(module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> StoredTensors:
    """Those of a model that diffusers has loaded."""
    stored = {name: functools.partial(torch.clone, tensor) for name, tensor in module.state_dict().items()}
    return StoredTensors(type(module).__name__, stored, dtype, device)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises BrokenCheckpoint."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{file} cannot be read ({error}).", hint="Fetch the model again.") from None
    return config


def weight_files(folder: Path, *, half: bool = False) -> list[Path]:
    """The safetensors of a diffusers model; where there are both in full precision, or in half of it if asked.

    Raises:
        BrokenCheckpoint: there are none, or some of several are missing.
    """
    for variant in (".fp16", "") if half else ("", ".fp16"):
        single = folder / f"{_NAME}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = folder / f"{_NAME}.safetensors.index{variant}.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise BrokenCheckpoint(f"{index} is damaged ({error}).", hint="Fetch it again.") from None
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise BrokenCheckpoint(f"{folder} lacks {missing[0]}.", hint="Fetch the model again.")
            return [folder / name for name in names]
    raise BrokenCheckpoint(f"{folder} holds no {_NAME}.safetensors.", hint="Fetch the model's safetensors.")


class ImageBuilder:
    """Takes what the UNet and the VAE decoder have alike."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def norm(self, module: str, width: int) -> Norm:
        """A norm's weights."""
        return Norm(self.tensors.take(f"{module}.weight", (width,)), self.tensors.take(f"{module}.bias", (width,)))

    def matrix(self, module: str, rows: int, columns: int) -> Tensor:
        """[rows, columns]; a convolution of one place is one too."""
        return self.tensors.take(f"{module}.weight", (rows, columns), (rows, columns, 1, 1))

    def linear(self, module: str, rows: int, columns: int, *, bias: bool = True) -> PackedLinear:
        """A linear layer."""
        weight = self.matrix(module, rows, columns)
        return PackedLinear(weight, self.tensors.take(f"{module}.bias", (rows,)) if bias else None)

    def stacked(self, modules: Iterable[str], rows: int, columns: int, *, bias: bool = False) -> PackedLinear:
        """Linear layers of the same input, one below the other."""
        parts = [self.linear(module, rows, columns, bias=bias) for module in modules]
        biases = [part.bias for part in parts if part.bias is not None]
        return PackedLinear(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)

    def kernel(self, module: str, outputs: int, inputs: int, side: int = 3) -> Tensor:
        """A convolution's weight."""
        weight = self.tensors.take(f"{module}.weight", (outputs, inputs, side, side))
        return weight.contiguous(memory_format=torch.channels_last)

    def conv(self, module: str, outputs: int, inputs: int, side: int = 3) -> Conv:
        """A convolution."""
        return Conv(self.kernel(module, outputs, inputs, side), self.tensors.take(f"{module}.bias", (outputs,)))

    def resnet(self, module: str, inputs: int, outputs: int) -> Resnet:
        """A residual block whose shift is its first convolution's bias."""
        return Resnet(
            norm1=self.norm(f"{module}.norm1", inputs),
            conv1=self.kernel(f"{module}.conv1", outputs, inputs),
            norm2=self.norm(f"{module}.norm2", outputs),
            conv2=self.conv(f"{module}.conv2", outputs, outputs),
            shift=self.tensors.take(f"{module}.conv1.bias", (outputs,))[None],
            shortcut=self.linear(f"{module}.conv_shortcut", outputs, inputs) if inputs != outputs else None,
        )
