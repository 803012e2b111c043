"""Turns a llama GGUF file into a Hugging Face folder (safetensors bf16): `python -m miinb.demo.convert GGUF FOLDER`.

A process of its own, because a notebook's kernel never imports torch. It prints `done total` after each tensor, for the
progress bar of whoever started it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Array = npt.NDArray[Any]
CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type


class Reader:
    """The metadata and tensors of one GGUF file, under Hugging Face's names."""

    def __init__(self, path: Path) -> None:
        self._file = gguf.GGUFReader(path)
        self.count = len(self._file.tensors)

    def __getitem__(self, key: str) -> Any:
        return self._file.fields[key].contents()

    def get(self, key: str, default: Any) -> Any:
        """The value of a metadata key, or a default."""
        return self[key] if key in self._file.fields else default

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Names and fp32 values, one at a time."""
        layers = self["llama.block_count"]
        heads = {"q_proj": self["llama.attention.head_count"], "k_proj": self["llama.attention.head_count_kv"]}
        names = hugging_face_names(layers)
        for tensor in self._file.tensors:
            name = names[tensor.name]
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            part = name.split(".")[-2]
            yield name, halves(values, heads[part]) if part in heads else values


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
        "tie_word_embeddings": True,
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


def convert(source: Path, folder: Path) -> None:
    """Write the folder of a llama GGUF file with a gpt2-style vocabulary.

    Raises:
        ValueError: the file is of another architecture or vocabulary, or its head is not tied.
    """
    reader = Reader(source)
    kind = (reader["general.architecture"], reader["tokenizer.ggml.model"])
    if kind != ("llama", "gpt2"):
        raise ValueError(f"{source.name} holds {kind}; only llama with a gpt2 vocabulary is converted here")
    weights: dict[str, torch.Tensor] = {}
    for done, (name, values) in enumerate(reader.tensors(), start=1):
        weights[name] = torch.from_numpy(values).to(torch.bfloat16)
        print(done, reader.count, flush=True)
    if "lm_head.weight" in weights:
        raise ValueError(f"{source.name} has a head of its own; only tied heads are converted here")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_of(reader)
    tokenizer, settings = tokenizer_of(reader)
    tokenizer.save(str(folder / "tokenizer.json"))
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (("config", config), ("tokenizer_config", settings), ("generation_config", generation)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Convert what the command line names."""
    convert(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
