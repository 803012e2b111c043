"""Where weights come from: safetensors, GGUF, or random numbers; each fills a slice of a fused tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from miinb.engine.spec import checkpoint_name
from miinb.engine.transfer import Room, Transfer, read_into
from miinb.errors import BrokenCheckpoint, MissingHead
from miinb.models import ModelInfo


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a checkpoint tensor, which is [out, in] or [out].

    Attributes:
        shape: of the whole tensor.
        rows, columns: what is wanted of it; columns are None for a vector.
        transposed: the checkpoint has it as [in, out].
        head_size: the rows are q, k and v, so many rows each, of one head after another; the target has all q first.
    """

    shape: tuple[int, ...]
    rows: slice
    columns: slice | None = None
    transposed: bool = False
    head_size: int = 0

    @property
    def height(self) -> int:
        """Rows of what is wanted."""
        return int(self.rows.stop) - int(self.rows.start)

    @property
    def width(self) -> int:
        """Columns of what is wanted of a matrix."""
        return 0 if self.columns is None else self.columns.stop - self.columns.start

    def slices(self, numbers: int) -> Iterator[tuple[int, int, Region]]:
        """(first, last, region) of so many rows of what is wanted as hold about so many numbers; one of all of them
        where the checkpoint has the rows in another order.
        """
        rows = self.height
        step = rows if self.transposed or self.head_size else max(1, numbers // max(1, self.width))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            yield first, last, replace(self, rows=slice(self.rows.start + first, self.rows.start + last))

    def place(self, target: Tensor) -> tuple[Tensor, int]:
        """`target` seen in the checkpoint's order: its first dimension counts so many rows of the checkpoint each."""
        if self.transposed:
            return target.t(), 1
        if not self.head_size:
            return target, 1
        return target.view(3, -1, self.head_size, *target.shape[1:]).transpose(0, 1), 3 * self.head_size


class Reader(Protocol):
    """Where weights come from. Names are the checkpoint's without the family's prefix."""

    def names(self) -> set[str]:
        """All tensors of the checkpoint."""
        ...

    def fill(self, target: Tensor, name: str, region: Region) -> None:
        """Copy a region of a tensor to `target`, converting its dtype; a missing or misshapen tensor is an error."""
        ...


#: safetensors' names of dtypes.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class SafetensorsReader:
    """Reads slices of safetensors files: whole rows with a read, parts of rows through a map of the file."""

    def __init__(self, info: ModelInfo, prefix: str, transfer: Transfer, stack: ExitStack) -> None:
        self._source = info.source
        self._transfer = transfer
        self._files = {file: stack.enter_context(file.open("rb", buffering=0)) for file in info.files}
        self._tensors = {checkpoint_name(entry.name, prefix): entry for entry in info.tensors.values()}

    def names(self) -> set[str]:
        """See `Reader`."""
        return set(self._tensors)

    def fill(self, target: Tensor, name: str, region: Region) -> None:
        """See `Reader`."""
        if name not in self._tensors:
            raise _missing(name, self._source)
        entry = self._tensors[name]
        if entry.shape != (region.shape[::-1] if region.transposed else region.shape):
            raise _misshapen(entry.name, entry.shape, region, self._source)
        rows, columns = (region.columns, region.rows) if region.transposed else (region.rows, region.columns)
        if rows is None:
            raise RuntimeError(f"a vector is not transposed: {name}")
        placed, unit = region.place(target)
        dtype = _DTYPES[entry.dtype]
        if not dtype.is_floating_point:
            raise BrokenCheckpoint(
                f"{entry.name} of {self._source} holds whole numbers ({entry.dtype}), where weights belong.",
                hint="It may be quantized: give the model it was made from, and a dtype.",
            )
        pitch = entry.size_bytes // entry.shape[0]  # bytes from row to row
        size = dtype.itemsize
        part = slice(0, pitch) if columns is None else slice(columns.start * size, columns.stop * size)
        width = part.stop - part.start
        file = self._files[entry.file]

        def read(first: int, last: int, room: Room) -> Tensor:
            start, count = rows.start + first * unit, (last - first) * unit
            memory = room(count * width // size, dtype)
            if width == pitch:
                read_into(file.fileno(), memory, entry.offset + start * pitch)
            else:
                stored = np.memmap(file, np.uint8, "r", entry.offset + start * pitch, (count, pitch))
                np.copyto(memory.view(torch.uint8).numpy().reshape(count, width), stored[:, part])
            return memory

        try:
            self._transfer.fill(placed, unit * width, read)
        except (EOFError, OSError) as error:
            text = f"{entry.file} cannot be read to its end ({error or 'it is too short'})."
            raise BrokenCheckpoint(text, hint="Fetch the model again.") from None


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
    """Unpacks the quantized tensors of a GGUF file, some rows at a time."""

    def __init__(self, info: ModelInfo, transfer: Transfer) -> None:
        (file,) = info.files
        self._info = info
        self._transfer = transfer
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
        kind = GGMLQuantizationType[stored.dtype]
        wanted = self._row_order(name, stored.shape[0])[region.rows]

        def read(first: int, last: int, room: Room) -> Tensor:
            if len(stored.shape) == 1:
                values = dequantize(blocks, kind)[wanted[first:last]]
            else:
                values = dequantize(blocks[wanted[first:last]], kind)[:, region.columns]
            return torch.from_numpy(np.array(values))

        self._transfer.fill(target, blocks.nbytes // stored.shape[0] * 4, read)

    def _row_order(self, name: str, rows: int) -> np.ndarray:
        """The file's row of each row of the checkpoint: LLaMA's writers order rotary pairs as neighbors."""
        order = np.arange(rows)
        heads = {"q_proj": self._info.heads, "k_proj": self._info.kv_heads}.get(name.split(".")[-2])
        if self._info.family != "llama" or not heads:
            return order
        return order.reshape(heads, -1, 2).transpose(0, 2, 1).reshape(-1)


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
