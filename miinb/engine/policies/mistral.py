"""Mistral (Jiang et al., 2023): LLaMA with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import llama
from miinb.engine.spec import DecoderSpec, Policy


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a Mistral configuration; one that names no window has that of the first model."""
    window = config.get("sliding_window", 4096)
    windows = (window,) * config["num_hidden_layers"]
    return llama.spec(config, max_length=1 << 17, kv_heads=8, windows=windows, qkv_bias=False, out_bias=False)


POLICY = Policy("mistral", spec, "model.", llama.WEIGHTS, ignored=llama.POLICY.ignored)
