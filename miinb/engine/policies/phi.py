"""Phi-1 and Phi-2 (Gunasekar et al., 2023): GPT-NeoX's rotation, both branches behind one norm, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import llama
from miinb.engine.spec import DecoderSpec, Policy, activation_of, column, row, whole
from miinb.errors import UnsupportedModel


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a Phi configuration."""
    if config.get("qk_layernorm"):
        raise UnsupportedModel("Phi with layer norms on queries and keys has no fused form.")
    return llama.spec(
        config,
        part=config.get("partial_rotary_factor", 0.5),
        norm="layer",
        eps=config.get("layer_norm_eps", 1e-5),
        activation=activation_of(config.get("hidden_act", "gelu_new")),
        gated=False,
        block="parallel",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
    )


WEIGHTS = {
    "embed": whole("embed_tokens"),
    "attn_norm": whole("layers.{i}.input_layernorm"),
    "qkv": llama.WEIGHTS["qkv"],
    "out": row("layers.{i}.self_attn.dense"),
    "up": column("layers.{i}.mlp.fc1"),
    "down": row("layers.{i}.mlp.fc2"),
    "norm": whole("final_layernorm"),
    "head": column("lm_head"),
}

POLICY = Policy("phi", spec, "model.", WEIGHTS, ignored=llama.POLICY.ignored)
