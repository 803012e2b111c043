"""What a checkpoint's files hold, read from their headers alone: safetensors (single, sharded) and GGUF."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miinb.errors import BrokenCheckpoint, UnsupportedModel

#: safetensors' names of dtypes: bits of one element.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: its shape (as PyTorch has it), the format's dtype name, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    file: Path
    offset: int = 0

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one; [] when it holds none.

    Raises:
        BrokenCheckpoint: the index is damaged or names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        return [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BrokenCheckpoint(f"{index.name} of {folder} is damaged ({error}).", hint="Fetch it again.") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BrokenCheckpoint(
            f"{len(missing)} of {len(names)} files of {folder} are missing, {missing[0]} first.",
            hint="The download did not finish; fetch the model again.",
        )
    return [folder / name for name in names]


def read_safetensors(file: Path) -> list[TensorEntry]:
    """The tensors that a safetensors file holds.

    Raises:
        BrokenCheckpoint: the file is truncated or its header is damaged; the message names it.
    """
    if not file.is_file():
        raise _broken(file, "it is no file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
            raise _broken(file, "its header is damaged")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = [_safetensors_entry(name, fields, file, 8 + length) for name, fields in header.items()]
        end = max((fields["data_offsets"][1] for fields in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _broken(file, "its header is damaged") from None
    if 8 + length + end != size:
        raise _broken(file, f"it has {size:,} bytes, its header tells of {8 + length + end:,}")
    return entries


def _safetensors_entry(name: str, fields: dict[str, Any], file: Path, data: int) -> TensorEntry:
    start, end = fields["data_offsets"]
    entry = TensorEntry(name, tuple(fields["shape"]), fields["dtype"], end - start, file, data + start)
    if entry.elements * _BITS[entry.dtype] != 8 * entry.size_bytes:
        raise ValueError(name)
    return entry


def _broken(file: Path, why: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{file} is truncated or damaged: {why}.", hint="Fetch the model again.")


# GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: ggml's tensor types: name, elements a block, bytes a block.
_GGML = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ArrayField:
    """A GGUF metadata array of which only the length was read (vocabularies are long)."""

    length: int


def read_gguf(file: Path) -> tuple[dict[str, Any], list[TensorEntry]]:
    """A GGUF file's metadata (arrays as `ArrayField`) and its tensors, shapes turned to PyTorch's order.

    Raises:
        BrokenCheckpoint: the file is truncated or is no GGUF file of version 2 or 3.
    """
    size = file.stat().st_size
    if size < 24:
        raise _broken(file, "it is no GGUF file")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse_gguf(data, size, file)
        except (struct.error, IndexError, UnicodeDecodeError, KeyError, OverflowError):
            raise _broken(file, "its header is damaged") from None


def _parse_gguf(data: mmap.mmap, size: int, file: Path) -> tuple[dict[str, Any], list[TensorEntry]]:
    magic, version, tensors, fields = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise _broken(file, "it is no GGUF file of version 2 or 3")
    cursor = _Cursor(data, 24)
    metadata: dict[str, Any] = {}
    for _ in range(fields):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.scalar("I"))
    entries, end = [], 0
    for _ in range(tensors):
        name = cursor.string()
        shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))
        kind, block, block_bytes = _GGML.get(cursor.scalar("I"), ("", 1, 0))
        offset = cursor.scalar("Q")
        if not kind:
            raise BrokenCheckpoint(f"{file}: tensor {name} has a GGUF type that is not supported.")
        bytes_ = math.prod(shape) // block * block_bytes
        end = max(end, offset + bytes_)
        entries.append(TensorEntry(name, shape[::-1], kind, bytes_, file, offset))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    if start + end > size:
        raise _broken(file, "tensor data is missing at its end")
    return metadata, [dataclasses.replace(entry, offset=start + entry.offset) for entry in entries]


class _Cursor:
    """A place in the mapped file that moves on as values are read."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if self.at + length > len(self.data):
            raise IndexError(length)
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, length = self.scalar("I"), self.scalar("Q")
        self._skip(inner, length)
        return ArrayField(length)

    def _skip(self, kind: int, length: int) -> None:
        """Move over an array's values; an array of arrays is refused (no writer makes one)."""
        if kind != _STRING:
            self.at += struct.calcsize(_SCALARS[kind]) * length
            return
        for _ in range(length):
            size = self.scalar("Q")
            self.at += size
            if self.at > len(self.data):
                raise IndexError(size)


#: GGUF architectures that are read, with their transformers class. llama also holds Mistral's files.
_GGUF_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def gguf_config(metadata: Mapping[str, Any], entries: list[TensorEntry], file: Path) -> dict[str, Any]:
    """config.json's content from a GGUF file's metadata.

    Raises:
        UnsupportedModel: a family or a rotary scaling that is not read from GGUF.
        BrokenCheckpoint: the metadata lacks a part of the configuration.
    """
    family = metadata.get("general.architecture", "")
    if family not in _GGUF_CLASSES:
        raise UnsupportedModel(
            f"{file.name} is a GGUF file of {family or 'an unknown family'}.",
            hint=f"GGUF is read for {', '.join(_GGUF_CLASSES)}; other families as safetensors.",
        )
    scaling = metadata.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none" or any(entry.name == "rope_freqs.weight" for entry in entries):
        raise UnsupportedModel(f"{file.name} scales its rotary embedding.", hint="Use the model's safetensors.")

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"{family}.{name}", default)

    tokens = metadata.get("tokenizer.ggml.tokens")
    try:
        config = {
            "architectures": [_GGUF_CLASSES[family]],
            "model_type": family,
            "num_hidden_layers": get("block_count"),
            "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_attention_heads": get("attention.head_count"),
            "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
            "head_dim": get("attention.key_length", get("embedding_length") // get("attention.head_count")),
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "rope_parameters": {"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)},
            "vocab_size": tokens.length if isinstance(tokens, ArrayField) else get("vocab_size"),
            "tie_word_embeddings": not any(entry.name == "output.weight" for entry in entries),
            "hidden_act": "silu",
        }
    except TypeError:
        raise BrokenCheckpoint(f"{file} lacks parts of its configuration.", hint="Fetch the model again.") from None
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return config


_FILE_DTYPES = {"F32": "fp32", "F64": "fp32", "BF16": "bf16", "F16": "fp16"}


def main_dtype(config: Mapping[str, Any], entries: list[TensorEntry]) -> str:
    """The dtype of most of the checkpoint's bytes; without files, what config.json says."""
    sizes: dict[str, int] = {}
    for entry in entries:
        name = _FILE_DTYPES.get(entry.dtype, "bf16")  # quantized GGUF blocks are unpacked to bf16
        sizes[name] = sizes.get(name, 0) + entry.size_bytes
    if sizes:
        return max(sizes, key=lambda name: sizes[name])
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return {"float16": "fp16", "bfloat16": "bf16"}.get(named, "fp32")
