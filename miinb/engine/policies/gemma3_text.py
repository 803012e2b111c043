"""Gemma 3's language model (Kamath et al., 2025): Gemma 2 with normalized queries and keys, and two rotary bases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import gemma, gemma2
from miinb.engine.spec import DecoderSpec, Policy, activation_of, rotary_of, whole


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a Gemma 3 text configuration."""
    layers, window = range(config["num_hidden_layers"]), config.get("sliding_window", 4096)
    every = config.get("sliding_window_pattern", 6)
    types = config.get("layer_types") or ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
    parts = config.get("rope_parameters") or {}
    wide = {"rope_theta": config.get("rope_theta", 1e6)} | (config.get("rope_scaling") or {})
    wide |= parts.get("full_attention") or {}
    near = {"rope_theta": config.get("rope_local_base_freq", 1e4)} | (parts.get("sliding_attention") or {})
    head_size = config.get("head_dim") or 256
    plain = {name: value for name, value in config.items() if name not in ("rope_parameters", "rope_scaling")}
    return gemma.spec(
        plain,
        max_length=1 << 17,
        kv_heads=4,
        activation=activation_of(config.get("hidden_activation") or "gelu_pytorch_tanh"),
        scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        rotary=rotary_of(plain | {"rope_parameters": wide}, head_size),
        windowed_rotary=rotary_of(plain | {"rope_parameters": near}, head_size),
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
        qk_norm=True,
        logit_softcap=config.get("final_logit_softcapping"),
    )


WEIGHTS = gemma2.WEIGHTS | {
    "q_norm": whole("layers.{i}.self_attn.q_norm"),
    "k_norm": whole("layers.{i}.self_attn.k_norm"),
}

POLICY = Policy("gemma3_text", spec, "model.", WEIGHTS, ignored=gemma2.POLICY.ignored, norm_offset=1.0)
