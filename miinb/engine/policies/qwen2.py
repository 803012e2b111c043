"""Qwen2 (Yang et al., 2024): LLaMA with biases on queries, keys and values, and windows in its upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import llama
from miinb.engine.spec import DecoderSpec, Policy


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's window: by `layer_types`, or from `max_window_layers` on in older configurations."""
    layers = range(config["num_hidden_layers"])
    if not config.get("use_sliding_window") or not (window := config.get("sliding_window", 4096)):
        return tuple(None for _ in layers)
    if types := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = config.get("max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in layers)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a Qwen2 configuration."""
    return llama.spec(config, max_length=1 << 15, kv_heads=32, windows=windows(config), qkv_bias=True, out_bias=False)


POLICY = Policy("qwen2", spec, "model.", llama.WEIGHTS, ignored=llama.POLICY.ignored)
