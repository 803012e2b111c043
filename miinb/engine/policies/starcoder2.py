"""StarCoder2 (Lozhkov et al., 2024): LLaMA's attention with layer norms, biases and a plain MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import llama
from miinb.engine.spec import DecoderSpec, Policy, activation_of, column, row


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a StarCoder2 configuration."""
    bias = bool(config.get("use_bias", True))
    return llama.spec(
        config,
        max_length=4096,
        kv_heads=2,
        norm="layer",
        eps=config.get("norm_epsilon", 1e-5),
        activation=activation_of(config.get("hidden_act", "gelu_pytorch_tanh")),
        gated=False,
        windows=(config.get("sliding_window"),) * config["num_hidden_layers"],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


WEIGHTS = llama.WEIGHTS | {"up": column("layers.{i}.mlp.c_fc"), "down": row("layers.{i}.mlp.c_proj")}

POLICY = Policy("starcoder2", spec, "model.", WEIGHTS, ignored=llama.POLICY.ignored)
