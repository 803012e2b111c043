"""Falcon (Almazrouei et al., 2023) as its 7B is: one key/value head, both branches behind one norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import llama
from miinb.engine.spec import DecoderSpec, Policy, activation_of, column, row, whole
from miinb.errors import UnsupportedModel


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a Falcon configuration."""
    one_head = config.get("multi_query", True) and not config.get("new_decoder_architecture")
    if config.get("alibi") or not one_head or not config.get("parallel_attn", True):
        raise UnsupportedModel("Falcon with ALiBi, several key/value heads or serial layers has no fused form.")
    hidden = config.get("n_embed") or config["hidden_size"]
    bias = bool(config.get("bias", False))
    return llama.spec(
        {**config, "hidden_size": hidden, "intermediate_size": config.get("ffn_hidden_size") or 4 * hidden},
        kv_heads=1,
        norm="layer",
        eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation_of(config.get("activation", "gelu")),
        gated=False,
        block="parallel",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


WEIGHTS = {
    "embed": whole("word_embeddings"),
    "attn_norm": whole("h.{i}.input_layernorm"),
    "qkv": column("h.{i}.self_attention.query_key_value", sections=3),
    "out": row("h.{i}.self_attention.dense"),
    "up": column("h.{i}.mlp.dense_h_to_4h"),
    "down": row("h.{i}.mlp.dense_4h_to_h"),
    "norm": whole("ln_f"),
    "head": column("lm_head"),
}

IGNORED = ("h.*.self_attention.rotary_emb.inv_freq",)

POLICY = Policy("falcon", spec, "transformer.", WEIGHTS, ignored=IGNORED)
