"""Gemma (Mesnard et al., 2024): LLaMA with norms stored as weight - 1 and a scaled embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import llama
from miinb.engine.spec import DecoderSpec, Policy, activation_of
from miinb.errors import UnsupportedModel


def spec(config: Mapping[str, Any], **changes: Any) -> DecoderSpec:
    """The decoder of a Gemma configuration; Gemma 2 and 3 give their `changes` to it."""
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel("Gemma with attention to later tokens has no fused form.")
    name = config.get("hidden_act") or "gelu"
    values: dict[str, Any] = {
        "max_length": 8192,
        "head_size": 256,
        "kv_heads": 16,
        "activation": activation_of("gelu_pytorch_tanh" if name == "gelu" else name),  # an early slip in its files
        "embed_scale": config["hidden_size"] ** 0.5,
        "mlp_bias": False,
        "tied": bool(config.get("tie_word_embeddings", True)),
    }
    return llama.spec(config, **values | changes)


POLICY = Policy("gemma", spec, "model.", llama.WEIGHTS, ignored=llama.POLICY.ignored, norm_offset=1.0)
