"""GPT-J (Wang and Komatsuzaki, 2021): part of each head rotated in neighboring pairs, both branches behind one norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.spec import DecoderSpec, Policy, Rotary, activation_of, column, row, whole


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a GPT-J configuration."""
    hidden, heads = config["n_embd"], config["n_head"]
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        layers=config["n_layer"],
        hidden_size=hidden,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        inner_size=config.get("n_inner") or 4 * hidden,
        max_length=config.get("n_positions", 2048),
        norm="layer",
        eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation_of(config.get("activation_function", "gelu_new")),
        scale=(hidden // heads) ** -0.5,
        rotary=Rotary(config.get("rotary_dim", 64) or hidden // heads, interleaved=True),
        block="parallel",
        mlp_bias=True,
        head_bias=True,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


WEIGHTS = {
    "embed": whole("wte"),
    "attn_norm": whole("h.{i}.ln_1"),
    "qkv": column("h.{i}.attn.q_proj", "h.{i}.attn.k_proj", "h.{i}.attn.v_proj"),
    "out": row("h.{i}.attn.out_proj"),
    "up": column("h.{i}.mlp.fc_in"),
    "down": row("h.{i}.mlp.fc_out"),
    "norm": whole("ln_f"),
    "head": column("lm_head"),
}

IGNORED = ("h.*.attn.bias", "h.*.attn.masked_bias", "h.*.attn.embed_positions")

POLICY = Policy("gptj", spec, "transformer.", WEIGHTS, ignored=IGNORED)
