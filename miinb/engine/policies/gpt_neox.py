"""GPT-NeoX (Black et al., 2022), Pythia too: part of each head rotated, two norms side by side, q, k, v by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.spec import DecoderSpec, Policy, activation_of, column, rotary_of, row, whole


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a GPT-NeoX configuration."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    bias = bool(config.get("attention_bias", True))
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        layers=config["num_hidden_layers"],
        hidden_size=hidden,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        inner_size=config["intermediate_size"],
        max_length=config.get("max_position_embeddings", 2048),
        norm="layer",
        eps=config.get("layer_norm_eps", 1e-5),
        activation=activation_of(config.get("hidden_act", "gelu")),
        scale=(hidden // heads) ** -0.5,
        rotary=rotary_of(
            config, hidden // heads, theta=config.get("rotary_emb_base", 10000.0), part=config.get("rotary_pct", 0.25)
        ),
        block="parallel_norms" if config.get("use_parallel_residual", True) else "serial",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


WEIGHTS = {
    "embed": whole("embed_in"),
    "attn_norm": whole("layers.{i}.input_layernorm"),
    "qkv": column("layers.{i}.attention.query_key_value", by_head=True),
    "out": row("layers.{i}.attention.dense"),
    "mlp_norm": whole("layers.{i}.post_attention_layernorm"),
    "up": column("layers.{i}.mlp.dense_h_to_4h"),
    "down": row("layers.{i}.mlp.dense_4h_to_h"),
    "norm": whole("final_layer_norm"),
    "head": column("embed_out"),
}

IGNORED = ("layers.*.attention.bias", "layers.*.attention.masked_bias", "layers.*.attention.rotary_emb.inv_freq")

POLICY = Policy("gpt_neox", spec, "gpt_neox.", WEIGHTS, ignored=IGNORED)
