"""BLOOM (BigScience, 2022): ALiBi, a norm behind the embedding, q, k and v fused head by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.spec import NO_LIMIT, DecoderSpec, Policy, column, row, whole


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a BLOOM configuration; `seq_length` is what it was trained on, ALiBi itself has no end."""
    hidden = config.get("n_embed") or config["hidden_size"]
    heads = config.get("n_head") or config["num_attention_heads"]
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        layers=config.get("n_layer") or config["num_hidden_layers"],
        hidden_size=hidden,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        inner_size=4 * hidden,
        max_length=config.get("seq_length") or NO_LIMIT,
        norm="layer",
        eps=config.get("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        scale=(hidden // heads) ** -0.5,
        alibi=True,
        residual_from_norm=bool(config.get("apply_residual_connection_post_layernorm", False)),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=bool(config.get("tie_word_embeddings", True)),
        embed_norm=True,
    )


WEIGHTS = {
    "embed": whole("word_embeddings"),
    "embed_norm": whole("word_embeddings_layernorm"),
    "attn_norm": whole("h.{i}.input_layernorm"),
    "qkv": column("h.{i}.self_attention.query_key_value", by_head=True),
    "out": row("h.{i}.self_attention.dense"),
    "mlp_norm": whole("h.{i}.post_attention_layernorm"),
    "up": column("h.{i}.mlp.dense_h_to_4h"),
    "down": row("h.{i}.mlp.dense_4h_to_h"),
    "norm": whole("ln_f"),
    "head": column("lm_head"),
}

POLICY = Policy("bloom", spec, "transformer.", WEIGHTS)
