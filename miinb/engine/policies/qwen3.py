"""Qwen3 (Yang et al., 2025): LLaMA with normalized queries and keys and a head size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import llama
from miinb.engine.policies.qwen2 import windows
from miinb.engine.spec import DecoderSpec, Policy, whole


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a Qwen3 configuration."""
    return llama.spec(config, max_length=1 << 15, head_size=128, kv_heads=32, windows=windows(config), qk_norm=True)


WEIGHTS = llama.WEIGHTS | {
    "q_norm": whole("layers.{i}.self_attn.q_norm"),
    "k_norm": whole("layers.{i}.self_attn.k_norm"),
}

POLICY = Policy("qwen3", spec, "model.", WEIGHTS, ignored=llama.POLICY.ignored)
