"""GPT-BigCode (SantaCoder, StarCoder; Li et al., 2023): GPT-2 with one key/value head and plain linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import gpt2
from miinb.engine.spec import DecoderSpec, Policy, column, row
from miinb.errors import UnsupportedModel


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a GPT-BigCode configuration."""
    if not config.get("multi_query", True):
        raise UnsupportedModel("GPT-BigCode with a key/value head for each query head has no fused form.")
    return gpt2.spec({"activation_function": "gelu_pytorch_tanh", **config}, kv_heads=1)


WEIGHTS = gpt2.WEIGHTS | {
    "qkv": column("h.{i}.attn.c_attn", sections=3),
    "out": row("h.{i}.attn.c_proj"),
    "up": column("h.{i}.mlp.c_fc"),
    "down": row("h.{i}.mlp.c_proj"),
}

POLICY = Policy("gpt_bigcode", spec, "transformer.", WEIGHTS, ignored=gpt2.POLICY.ignored)
