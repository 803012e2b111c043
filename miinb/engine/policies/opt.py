"""OPT (Zhang et al., 2022): layer norm, learned positions from 2 on; 350m has its norms behind and projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.spec import DecoderSpec, Policy, activation_of, column, row, whole
from miinb.errors import UnsupportedModel


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of an OPT configuration."""
    if not config.get("layer_norm_elementwise_affine", True):
        raise UnsupportedModel("OPT whose norms have no weights has no fused form.")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    embed = config.get("word_embed_proj_dim") or hidden
    norm_first, bias = bool(config.get("do_layer_norm_before", True)), bool(config.get("enable_bias", True))
    length = config.get("max_position_embeddings", 2048)
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        layers=config["num_hidden_layers"],
        hidden_size=hidden,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        inner_size=config["ffn_dim"],
        max_length=length,
        norm="layer",
        eps=1e-5,
        activation=activation_of(config.get("activation_function", "relu")),
        scale=(hidden // heads) ** -0.5,
        positions=length + 2,
        position_offset=2,
        block="serial" if norm_first else "post",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied=bool(config.get("tie_word_embeddings", True)),
        final_norm=norm_first and not config.get("_remove_final_layer_norm", False),
        embed_size=embed if embed != hidden else 0,
    )


WEIGHTS = {
    "embed": whole("embed_tokens"),
    "project_in": whole("project_in"),
    "positions": whole("embed_positions"),
    "attn_norm": whole("layers.{i}.self_attn_layer_norm"),
    "qkv": column("layers.{i}.self_attn.q_proj", "layers.{i}.self_attn.k_proj", "layers.{i}.self_attn.v_proj"),
    "out": row("layers.{i}.self_attn.out_proj"),
    "mlp_norm": whole("layers.{i}.final_layer_norm"),
    "up": column("layers.{i}.fc1"),
    "down": row("layers.{i}.fc2"),
    "norm": whole("final_layer_norm"),
    "project_out": whole("project_out"),
    "head": column("lm_head"),
}

POLICY = Policy("opt", spec, "model.decoder.", WEIGHTS)
