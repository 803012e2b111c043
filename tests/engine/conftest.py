"""Tiny random-weight models of every optimized family, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny_pipeline import make_pipeline

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": 101, "n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 128}
GPTJ = {"vocab_size": 101, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 8}
BLOOM = {"vocab_size": 101, "hidden_size": 48, "n_layer": 3, "n_head": 4}
NEO = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "attention_types": [[["global"], 1], [["local"], 2]],
    "window_size": 7,
    "max_position_embeddings": 128,
}
OPT = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 72,
    "max_position_embeddings": 128,
}


def _rope(**values: Any) -> dict[str, Any]:
    return BASE | {"rope_parameters": {"rope_theta": 500.0, "original_max_position_embeddings": 32} | values}


#: Name: transformers' configuration class and what it is given. Odd head sizes, GQA, MQA, tied and untied heads.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "llama-tied-mqa": ("LlamaConfig", BASE | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-odd": ("LlamaConfig", BASE | {"head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (
        "LlamaConfig",
        _rope(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "llama-linear-rope": ("LlamaConfig", _rope(rope_type="linear", factor=4.0)),
    "llama-dynamic-rope": ("LlamaConfig", _rope(rope_type="dynamic", factor=4.0)),
    "qwen2-yarn": ("Qwen2Config", _rope(rope_type="yarn", factor=4.0)),
    "mistral": ("MistralConfig", BASE | {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", BASE | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", BASE | {"head_dim": 20, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-untied": ("GPT2Config", GPT2 | {"tie_word_embeddings": False, "n_inner": 50, "activation_function": "relu"}),
    "gptj": ("GPTJConfig", GPTJ),
    "gptj-odd": ("GPTJConfig", GPTJ | {"n_head": 8, "rotary_dim": 2, "n_inner": 50, "tie_word_embeddings": True}),
    "bloom": ("BloomConfig", BLOOM),
    "bloom-6-heads": (
        "BloomConfig",
        BLOOM | {"n_head": 6, "apply_residual_connection_post_layernorm": True, "tie_word_embeddings": False},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox-serial": (
        "GPTNeoXConfig",
        BASE
        | {
            "num_attention_heads": 3,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
            "hidden_act": "gelu_fast",
        },
    ),
    "gpt_neo": ("GPTNeoConfig", NEO),
    "gpt_neo-untied": (
        "GPTNeoConfig",
        NEO
        | {
            "num_heads": 6,
            "intermediate_size": 50,
            "attention_types": [[["local", "global", "local"], 1]],
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("Phi3Config", BASE | {"sliding_window": 7, "pad_token_id": 0}),
    "phi3-partial": (
        "Phi3Config",
        BASE
        | {
            "pad_token_id": 0,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5, 2.0],
                "long_factor": [2.0, 3.0, 4.0],
            },
        },
    ),
    "phi": ("PhiConfig", BASE | {"partial_rotary_factor": 0.5}),
    "gemma": ("GemmaConfig", BASE | {"head_dim": 20, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        BASE
        | {
            "head_dim": 10,
            "sliding_window": 7,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "hidden_activation": "gelu",
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        BASE
        | {
            "head_dim": 12,
            "sliding_window": 7,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,  # which transformers' Gemma 3 does not use
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "falcon": (
        "FalconConfig",
        {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "bias": True},
    ),
    "stablelm": ("StableLmConfig", BASE | {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2),
    "starcoder2": ("Starcoder2Config", BASE | {"sliding_window": 7}),
    "opt": ("OPTConfig", OPT),
    "opt-350m": ("OPTConfig", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-bare": (
        "OPTConfig",
        OPT
        | {
            "enable_bias": False,
            "activation_function": "gelu",
            "num_attention_heads": 6,
            "tie_word_embeddings": False,
            "_remove_final_layer_norm": True,
        },
    ),
}


def build(name: str, folder: Path, changes: dict[str, Any] | None = None) -> Any:
    """The model of a row of `CONFIGS`, saved to `folder`; its weights are large enough to tell tokens apart."""
    kind, values = CONFIGS[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, kind)(**(values | (changes or {})), bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if values.get("attn_logit_softcapping"):
        model.set_attn_implementation("eager")  # the sdpa of older transformers leaves the cap out
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """name -> (Hugging Face model, its folder), built once."""
    built: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            built[name] = (build(name, folder), folder)
        return built[name]

    return get


def real_text(folder: Path) -> list[int]:
    """Tokens of Python's own documentation, by the tokenizer of a real model."""
    import pydoc_data.topics

    from tokenizers import Tokenizer

    text = "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "exceptions", "import"))
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:4096]


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion of random weights, made once; tests that change it change a copy."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(folder)
    return folder / "model"
