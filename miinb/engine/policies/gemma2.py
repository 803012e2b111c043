"""Gemma 2 (Riviere et al., 2024): norms on both sides of each branch, softcaps, windows in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import gemma, llama
from miinb.engine.spec import DecoderSpec, Policy, activation_of, whole


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a Gemma 2 configuration."""
    layers, window = range(config["num_hidden_layers"]), config.get("sliding_window", 4096)
    types = config.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in layers]
    return gemma.spec(
        config,
        kv_heads=4,
        activation=activation_of(config.get("hidden_activation") or "gelu_pytorch_tanh"),
        scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
        softcap=config.get("attn_logit_softcapping", 50.0),
        logit_softcap=config.get("final_logit_softcapping", 30.0),
    )


WEIGHTS = llama.WEIGHTS | {
    "attn_post_norm": whole("layers.{i}.post_attention_layernorm"),
    "mlp_norm": whole("layers.{i}.pre_feedforward_layernorm"),
    "mlp_post_norm": whole("layers.{i}.post_feedforward_layernorm"),
}

POLICY = Policy("gemma2", spec, "model.", WEIGHTS, ignored=llama.POLICY.ignored, norm_offset=1.0)
