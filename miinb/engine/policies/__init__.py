"""Injection policies: one file a model family, data and name maps only."""

from __future__ import annotations

from miinb.engine.policies import (
    bloom,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    llama,
    mistral,
    opt,
    phi3,
    qwen2,
    qwen3,
)
from miinb.engine.spec import Policy

_FAMILIES = (gpt2, gpt_neo, gptj, gpt_neox, opt, bloom, llama, mistral, qwen2, qwen3, phi3)

POLICIES: dict[str, Policy] = {module.POLICY.family: module.POLICY for module in _FAMILIES}
