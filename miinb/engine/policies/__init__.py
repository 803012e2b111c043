"""Injection policies: one file a model family, data and name maps only."""

from __future__ import annotations

from miinb.engine.policies import bloom, gpt2, gptj, llama, mistral, opt, qwen2, qwen3
from miinb.engine.spec import Policy

_FAMILIES = (gpt2, gptj, opt, bloom, llama, mistral, qwen2, qwen3)

POLICIES: dict[str, Policy] = {module.POLICY.family: module.POLICY for module in _FAMILIES}
