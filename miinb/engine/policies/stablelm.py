"""StableLM (Bellagente et al., 2024): LLaMA with layer norms and part of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import llama
from miinb.engine.spec import DecoderSpec, Policy
from miinb.errors import UnsupportedModel


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a StableLM configuration."""
    if config.get("qk_layernorm") or config.get("use_parallel_residual"):
        raise UnsupportedModel("StableLM with norms of queries and keys or parallel branches has no fused form.")
    return llama.spec(
        config,
        max_length=4096,
        kv_heads=32,
        part=config.get("partial_rotary_factor", 0.25),
        norm="layer",
        eps=config.get("layer_norm_eps", 1e-5),
        qkv_bias=bool(config.get("use_qkv_bias", False)),
        out_bias=False,
        mlp_bias=False,
    )


POLICY = Policy("stablelm", spec, "model.", llama.WEIGHTS, ignored=("*.rotary_emb.inv_freq",))
