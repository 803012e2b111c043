"""Public model configurations as data: the shapes that benchmarks run with random weights (`load_format="dummy"`).

Only what differs from transformers' defaults for the model type stands here. `write` makes a folder that `Session`
takes as `model`: config.json, and a plain tokenizer with a made-up vocabulary of the right size (of an encoder: of its
family's kind, see `encoder_tokenizers`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miinb.bench import encoder_tokenizers
from miinb.errors import InvalidValue, did_you_mean

#: Name: (class of the model, the config.json of the public checkpoint).
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
    },
    "gpt2-xl": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "activation_function": "gelu_new",
    },
    "bloom-560m": {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": 250880,
        "hidden_size": 1024,
        "n_layer": 24,
        "n_head": 16,
    },
    "bloom-7b1": {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": 250880,
        "hidden_size": 4096,
        "n_layer": 30,
        "n_head": 32,
    },
    "opt-1.3b": {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "activation_function": "relu",
        "do_layer_norm_before": True,
    },
    "gpt-j-6b": {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
    },
    "gpt-neox-20b": {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": 50432,
        "max_position_embeddings": 2048,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "rotary_pct": 0.25,
        "hidden_act": "gelu_fast",
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
    "llama-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
    "bert-base": {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
    },
    "bert-large": {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": 30522,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 512,
    },
    "minilm": {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "max_position_embeddings": 512,
    },
    "distilbert-base": {
        "model_type": "distilbert",
        "architectures": ["DistilBertForMaskedLM"],
        "vocab_size": 30522,
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
        "max_position_embeddings": 512,
    },
    "roberta-base": {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "vocab_size": 50265,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-05,
        "pad_token_id": 1,
        "eos_token_id": 2,
    },
    "roberta-large": {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "vocab_size": 50265,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-05,
        "pad_token_id": 1,
        "eos_token_id": 2,
    },
}
#: Their names by what they are: which suites can run them.
ENCODERS = tuple(sorted(name for name, made in PRESETS.items() if made["model_type"] in encoder_tokenizers.KINDS))
DECODERS = tuple(sorted(PRESETS.keys() - {*ENCODERS}))

_TINY_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
#: What makes a model of a family tiny: enough to run every line, in milliseconds.
_TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "bert": {**_TINY_ENCODER, "vocab_size": 600},
    "roberta": {**_TINY_ENCODER, "vocab_size": 1200},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 600},
}


def tiny(name: str) -> dict[str, Any]:
    """Changes for `write` that make a preset tiny: its family's shape, a few thousand weights.

    Raises:
        InvalidValue: there is no such preset.
    """
    return {"vocab_size": 320, **_TINY[config(name)["model_type"]]}


def config(name: str) -> dict[str, Any]:
    """The config.json of a preset.

    Raises:
        InvalidValue: there is no such preset; the near name is in the hint.
    """
    if name not in PRESETS:
        raise InvalidValue(f"There is no preset {name!r}.", hint=did_you_mean(name, PRESETS))
    return {"torch_dtype": "float16", "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **PRESETS[name]}


def write_into(place: str | Path, name: str, *, small: bool = False) -> Path:
    """`write` into a folder of the preset's name below `place`; a tiny one's is "tiny-NAME", and so it says in records.

    Raises:
        InvalidValue: there is no such preset.
    """
    return write(name, Path(place) / f"tiny-{name}", **tiny(name)) if small else write(name, Path(place) / name)


def write(name: str, folder: str | Path, **changes: Any) -> Path:
    """Make a folder of a preset that `Session(folder, load_format="dummy")` takes.

    Args:
        name: of `PRESETS`.
        folder: made if it is not there; files of the same names are replaced.
        changes: fields of config.json that differ (fewer layers, for a quick run).

    Raises:
        InvalidValue: there is no such preset, or it has no such field.
    """
    values = config(name)
    unknown = sorted(set(changes) - set(values))
    if unknown:
        raise InvalidValue(f"{unknown[0]}: preset {name!r} has no such field.", hint=did_you_mean(unknown[0], values))
    values |= changes
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    if name in ENCODERS:
        encoder_tokenizers.write(values["model_type"], values["vocab_size"], target)
        return target
    tokenizer(values["vocab_size"]).save(str(target / "tokenizer.json"))
    special = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    settings: Mapping[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (target / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    return target


def tokenizer(vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer` of exactly that size: the 256 bytes, then made-up words, so that every id is text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *letters, *(f"Ġw{number}" for number in range(vocab_size - len(letters) - 1))]
    made = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return made
