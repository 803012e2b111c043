"""Injection policies: one file a model family, data and name maps only."""

from __future__ import annotations

from miinb.engine.policies import gpt2, llama, mistral, qwen2, qwen3
from miinb.engine.spec import Policy

POLICIES: dict[str, Policy] = {module.POLICY.family: module.POLICY for module in (gpt2, llama, mistral, qwen2, qwen3)}
