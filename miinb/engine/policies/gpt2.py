"""GPT-2 (Radford et al., 2019): layer norm, learned positions, [in, out] weights (Conv1D), a tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.spec import DecoderSpec, Policy, activation_of, column, row, whole
from miinb.errors import UnsupportedModel


def spec(config: Mapping[str, Any], *, kv_heads: int | None = None) -> DecoderSpec:
    """The decoder of a GPT-2 configuration; `kv_heads`: of a relative that has fewer than query heads."""
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("add_cross_attention"):
        raise UnsupportedModel("GPT-2 with scores scaled by layer or with cross-attention has no fused form.")
    hidden, heads = config["n_embd"], config["n_head"]
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        layers=config["n_layer"],
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_size=hidden // heads,
        inner_size=config.get("n_inner") or 4 * hidden,
        max_length=config.get("n_positions", 1024),
        norm="layer",
        eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation_of(config.get("activation_function", "gelu_new")),
        scale=(hidden // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0,
        positions=config.get("n_positions", 1024),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


WEIGHTS = {
    "embed": whole("wte"),
    "positions": whole("wpe"),
    "attn_norm": whole("h.{i}.ln_1"),
    "qkv": column("h.{i}.attn.c_attn", sections=3, transposed=True),
    "out": row("h.{i}.attn.c_proj", transposed=True),
    "mlp_norm": whole("h.{i}.ln_2"),
    "up": column("h.{i}.mlp.c_fc", transposed=True),
    "down": row("h.{i}.mlp.c_proj", transposed=True),
    "norm": whole("ln_f"),
    "head": column("lm_head"),
}

POLICY = Policy("gpt2", spec, "transformer.", WEIGHTS, ignored=("h.*.attn.bias", "h.*.attn.masked_bias"))
