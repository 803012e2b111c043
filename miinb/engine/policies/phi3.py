"""Phi-3 (Abdin et al., 2024): LLaMA with its projections fused in the checkpoint, one below the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import llama
from miinb.engine.spec import DecoderSpec, Policy, column
from miinb.errors import UnsupportedModel


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a Phi-3 or Phi-4 configuration."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type")) in ("su", "yarn"):  # early names of what longrope became
        raise UnsupportedModel("Phi-3's rotary scaling of old checkpoints has no fused form.")
    return llama.spec(
        config,
        eps=config.get("rms_norm_eps", 1e-5),
        max_length=4096,
        part=config.get("partial_rotary_factor", 1.0),
        windows=(config.get("sliding_window"),) * config["num_hidden_layers"],
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )


WEIGHTS = llama.WEIGHTS | {
    "qkv": column("layers.{i}.self_attn.qkv_proj", sections=3),
    "up": column("layers.{i}.mlp.gate_up_proj", sections=2),
}

POLICY = Policy("phi3", spec, "model.", WEIGHTS, ignored=llama.POLICY.ignored)
