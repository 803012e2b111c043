"""Where weights come from: safetensors, GGUF, or random numbers; each fills a slice of a fused tensor."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from miinb.errors import BrokenCheckpoint, MissingHead
from miinb.models import ModelInfo


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a checkpoint tensor, which is [out, in] or [out].

    Attributes:
        shape: of the whole tensor.
        rows, columns: what is wanted of it; columns are None for a vector.
        transposed: the checkpoint has it as [in, out].
        head_size: the rows are q, k and v, so many rows each, of one head after another; `sorted` puts all q first.
    """

    shape: tuple[int, ...]
    rows: slice
    columns: slice | None = None
    transposed: bool = False
    head_size: int = 0

    def sorted(self, rows: Tensor) -> Tensor:
        """The rows that were read, in the order in which the fused layer has them."""
        if not self.head_size:
            return rows
        by_head = rows.reshape(-1, 3, self.head_size, *rows.shape[1:])
        return by_head.transpose(0, 1).reshape(rows.shape)


class Reader(Protocol):
    """Where weights come from. Names are the checkpoint's without the family's prefix."""

    def names(self) -> set[str]:
        """All tensors of the checkpoint."""
        ...

    def fill(self, target: Tensor, name: str, region: Region) -> None:
        """Copy a region of a tensor to `target`, converting its dtype; a missing or misshapen tensor is an error."""
        ...


def _without(prefix: str, name: str) -> str:
    """A tensor's name without the prefix or the part of it that the checkpoint has ("decoder." of "model.decoder.")."""
    for part in prefix.split(".")[:-1]:
        name = name.removeprefix(f"{part}.")
    return name


class SafetensorsReader:
    """Reads slices of safetensors files, which are mapped, not loaded."""

    def __init__(self, info: ModelInfo, prefix: str, stack: ExitStack) -> None:
        from safetensors import safe_open

        files = {file: stack.enter_context(safe_open(file, framework="pt")) for file in info.files}
        self._source = info.source
        self._tensors = {
            _without(prefix, entry.name): (entry.name, files[entry.file], entry.shape)
            for entry in info.tensors.values()
        }

    def names(self) -> set[str]:
        """See `Reader`."""
        return set(self._tensors)

    def fill(self, target: Tensor, name: str, region: Region) -> None:
        """See `Reader`."""
        if name not in self._tensors:
            raise _missing(name, self._source)
        stored, file, shape = self._tensors[name]
        if tuple(shape) != (region.shape[::-1] if region.transposed else region.shape):
            raise _misshapen(stored, tuple(shape), region, self._source)
        part = file.get_slice(stored)
        if region.columns is None:
            target.copy_(region.sorted(part[region.rows]))
        elif region.transposed:
            target.copy_(part[region.columns, region.rows].t())
        else:
            target.copy_(region.sorted(part[region.rows, region.columns]))


#: GGUF's names of the modules of a LLaMA-like family.
_GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


class GGUFWeights:
    """Unpacks the quantized tensors of a GGUF file, one at a time."""

    def __init__(self, info: ModelInfo) -> None:
        (file,) = info.files
        self._info = info
        self._bytes = np.memmap(file, mode="r")  # gguf's own reader takes seconds for the vocabulary
        self._tensors = {self._name(entry.name): entry for entry in info.tensors.values()}

    @staticmethod
    def _name(name: str) -> str:
        """The checkpoint's name of a GGUF tensor: blk.3.attn_q.weight is layers.3.self_attn.q_proj.weight."""
        back = {gguf: ours for ours, gguf in _GGUF_NAMES.items()}
        *layer, module, kind = name.split(".")
        ours = back.get(module, module)
        if not layer:
            return f"{ours}.{kind}"
        block = "self_attn." if ours.endswith(("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")) else ""
        block = "mlp." if module.startswith("ffn") and not module.endswith("norm") else block
        return f"layers.{layer[1]}.{block}{ours}.{kind}"

    def names(self) -> set[str]:
        """See `Reader`."""
        return set(self._tensors)

    def fill(self, target: Tensor, name: str, region: Region) -> None:
        """See `Reader`."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        if name not in self._tensors:
            raise _missing(name, self._info.source)
        stored = self._tensors[name]
        if stored.shape != region.shape:
            raise _misshapen(stored.name, stored.shape, region, self._info.source)
        blocks = self._bytes[stored.offset : stored.offset + stored.size_bytes].reshape(*stored.shape[:-1], -1)
        values = torch.from_numpy(np.array(dequantize(blocks, GGMLQuantizationType[stored.dtype])))
        if self._info.family == "llama":  # its writers order rotary pairs as neighbors
            heads = {"q_proj": self._info.heads, "k_proj": self._info.kv_heads}.get(name.split(".")[-2])
            if heads:
                values = values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        target.copy_(values[region.rows] if region.columns is None else values[region.rows, region.columns])


class DummyWeights:
    """Random weights made on the device, for benchmarks; the same for the same seed and device."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def names(self) -> set[str]:
        """See `Reader`: nothing that could be left over."""
        return set()

    def fill(self, target: Tensor, name: str, region: Region) -> None:
        """See `Reader`; norms are 1, biases 0, matrices normal with the usual deviation of 0.02."""
        if self._generator is None:
            return  # a meta tensor has a shape and no numbers
        if target.dim() == 1:
            target.fill_(0.0 if name.endswith(".bias") else 1.0)
        else:
            target.normal_(0.0, 0.02, generator=self._generator)


def _missing(name: str, source: str) -> BrokenCheckpoint | MissingHead:
    if name.startswith(("lm_head.", "embed_out.")):
        return MissingHead(f"{source} has no {name}.", hint="It is a base model; use one with a language-model head.")
    return BrokenCheckpoint(f"{source} lacks the tensor {name}.", hint="Fetch the model again.")


def _misshapen(name: str, shape: tuple[int, ...], region: Region, source: str) -> BrokenCheckpoint:
    wanted = region.shape[::-1] if region.transposed else region.shape
    return BrokenCheckpoint(
        f"{name} of {source} has shape {list(shape)}, config.json asks for {list(wanted)}.",
        hint="The configuration and the weights do not belong together.",
    )
