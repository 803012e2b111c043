"""Turns a llama GGUF file into a Hugging Face folder: safetensors in bf16, tokenizer and configuration.

With numpy alone, one tensor at a time: the notebook's kernel can do it without torch and with little memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Array = npt.NDArray[Any]
CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type


class Reader:
    """The metadata and tensors of one GGUF file, under Hugging Face's names."""

    def __init__(self, path: Path) -> None:
        self._file = gguf.GGUFReader(path)
        kind = (self["general.architecture"], self["tokenizer.ggml.model"])
        if kind != ("llama", "gpt2"):
            raise ValueError(f"{path.name} holds {kind}; only llama with a gpt2 vocabulary is converted here")
        names = hugging_face_names(self["llama.block_count"])
        self._tensors = {names[tensor.name]: tensor for tensor in self._file.tensors if tensor.name in names}
        self._heads = {"q_proj": self["llama.attention.head_count"], "k_proj": self["llama.attention.head_count_kv"]}

    def __getitem__(self, key: str) -> Any:
        return self._file.fields[key].contents()

    def get(self, key: str, default: Any) -> Any:
        """The value of a metadata key, or a default."""
        return self[key] if key in self._file.fields else default

    def shapes(self) -> dict[str, list[int]]:
        """The shape of each tensor (GGUF writes the last dimension first)."""
        return {name: [int(size) for size in reversed(tensor.shape)] for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Array:
        """One tensor in fp32."""
        found = self._tensors[name]
        values = gguf.dequantize(found.data, found.tensor_type).astype(np.float32)
        part = name.split(".")[-2]
        return halves(values, self._heads[part]) if part in self._heads else values


def hugging_face_names(layers: int) -> dict[str, str]:
    """Hugging Face's tensor name of each GGUF name, from the gguf package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{i}.{part}" for i in range(layers) for part in parts]
    names += ["model.embed_tokens", "model.norm", "lm_head"]
    return {f"{table.get_name(name)}.weight": f"{name}.weight" for name in names}


def halves(weight: Array, heads: int) -> Array:
    """Rotary rows of [heads * size, in] from GGUF's interleaved order back to Hugging Face's two halves."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def to_bf16(values: Array) -> bytes:
    """The bits of bf16, rounded to the nearest even (numpy has no bf16)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_safetensors(path: Path, reader: Reader, progress: Callable[[int, int], None]) -> None:
    """The tensors in bf16, written one by one: safetensors is a length, a JSON header and the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    shapes = reader.shapes()
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for done, name in enumerate(shapes, start=1):
            file.write(to_bf16(reader.tensor(name)))
            progress(done, len(shapes))


def config_of(reader: Reader) -> dict[str, Any]:
    """The config.json of the folder."""
    hidden, heads = reader["llama.embedding_length"], reader["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(reader["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": reader["llama.feed_forward_length"],
        "num_hidden_layers": reader["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": reader["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": reader["llama.context_length"],
        "rms_norm_eps": float(f"{reader['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": reader["llama.rope.freq_base"]},
        "tie_word_embeddings": "lm_head.weight" not in reader.shapes(),
        "bos_token_id": reader["tokenizer.ggml.bos_token_id"],
        "eos_token_id": reader["tokenizer.ggml.eos_token_id"],
        "pad_token_id": reader["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_of(reader: Reader) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-level BPE (digits one by one, as SmolLM's) and its tokenizer_config.json."""
    tokens: list[str] = reader["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in reader["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, reader["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    named = {
        f"{name}_token": tokens[reader[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": reader["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": reader.get("tokenizer.chat_template", None),
        **named,
    }
    return tokenizer, settings


def convert(source: Path, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write the folder of a llama GGUF file with a gpt2-style vocabulary.

    Args:
        source: the GGUF file.
        folder: where to write; made if it is not there.
        progress: called with tensors done and in all, after each.

    Raises:
        ValueError: not a GGUF file, or one of another architecture or vocabulary.
    """
    reader = Reader(source)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", reader, progress)
    config = config_of(reader)
    tokenizer, settings = tokenizer_of(reader)
    tokenizer.save(str(folder / "tokenizer.json"))
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (("config", config), ("tokenizer_config", settings), ("generation_config", generation)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
