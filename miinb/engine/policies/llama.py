"""LLaMA (Touvron et al., 2023): RMS norm, rotary halves, gated SiLU, grouped key/value heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.spec import DecoderSpec, Policy, activation_of, column, rotary_of, row, whole


def spec(
    config: Mapping[str, Any],
    *,
    max_length: int = 2048,
    head_size: int | None = None,
    kv_heads: int | None = None,
    part: float | None = None,
    **changes: Any,
) -> DecoderSpec:
    """The decoder of a LLaMA configuration.

    Its relatives give their `changes` to it, and what holds where config.json is silent: `max_length`, `head_size`
    (None: the hidden size over the heads), `kv_heads` (None: the heads), and `part` as in `rotary_of`.
    """
    config = {"max_position_embeddings": max_length, **config}
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or head_size or config["hidden_size"] // heads
    bias = bool(config.get("attention_bias", False))
    values: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", kv_heads) or heads,
        "head_size": head_size,
        "inner_size": config["intermediate_size"],
        "max_length": config["max_position_embeddings"],
        "norm": "rms",
        "eps": config.get("rms_norm_eps", 1e-6),
        "activation": activation_of(config.get("hidden_act", "silu")),
        "gated": True,
        "scale": head_size**-0.5,
        "rotary": rotary_of(config, head_size, part=part),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "tied": bool(config.get("tie_word_embeddings", False)),
    }
    return DecoderSpec(**values | changes)


WEIGHTS = {
    "embed": whole("embed_tokens"),
    "attn_norm": whole("layers.{i}.input_layernorm"),
    "qkv": column("layers.{i}.self_attn.q_proj", "layers.{i}.self_attn.k_proj", "layers.{i}.self_attn.v_proj"),
    "out": row("layers.{i}.self_attn.o_proj"),
    "mlp_norm": whole("layers.{i}.post_attention_layernorm"),
    "up": column("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
    "down": row("layers.{i}.mlp.down_proj"),
    "norm": whole("norm"),
    "head": column("lm_head"),
}

POLICY = Policy("llama", spec, "model.", WEIGHTS, ignored=("*.rotary_emb.inv_freq",))
