"""GPT-Neo (Black et al., 2021): GPT-2 with scores that are not scaled and windows in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.spec import DecoderSpec, Policy, activation_of, column, row, whole


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's window; `attention_types` is [[kinds, times], ...]."""
    kinds = config.get("attention_layers") or [
        kind for kinds, times in config.get("attention_types") or [(("global", "local"), 12)] for kind in kinds * times
    ]
    window = config.get("window_size", 256)
    return tuple({"local": window, "global": None}[kind] for kind in kinds)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a GPT-Neo configuration."""
    hidden = config["hidden_size"]
    heads = config.get("num_heads") or config["num_attention_heads"]
    length = config.get("max_position_embeddings", 2048)
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        layers=config.get("num_layers") or config["num_hidden_layers"],
        hidden_size=hidden,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        inner_size=config.get("intermediate_size") or 4 * hidden,
        max_length=length,
        norm="layer",
        eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation_of(config.get("activation_function", "gelu_new")),
        scale=1.0,
        positions=length,
        windows=windows(config),
        out_bias=True,
        mlp_bias=True,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


ATTENTION = "h.{i}.attn.attention."

WEIGHTS = {
    "embed": whole("wte"),
    "positions": whole("wpe"),
    "attn_norm": whole("h.{i}.ln_1"),
    "qkv": column(f"{ATTENTION}q_proj", f"{ATTENTION}k_proj", f"{ATTENTION}v_proj"),
    "out": row(f"{ATTENTION}out_proj"),
    "mlp_norm": whole("h.{i}.ln_2"),
    "up": column("h.{i}.mlp.c_fc"),
    "down": row("h.{i}.mlp.c_proj"),
    "norm": whole("ln_f"),
    "head": column("lm_head"),
}

IGNORED = (f"{ATTENTION}bias".format(i="*"), f"{ATTENTION}masked_bias".format(i="*"))

POLICY = Policy("gpt_neo", spec, "transformer.", WEIGHTS, ignored=IGNORED)
