"""Injection policies: one file a model family, data and name maps only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.policies import (
    bloom,
    falcon,
    gemma,
    gemma2,
    gemma3_text,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gptj,
    llama,
    mistral,
    opt,
    phi,
    phi3,
    qwen2,
    qwen3,
    stablelm,
    starcoder2,
)
from miinb.engine.spec import DecoderSpec, Policy
from miinb.errors import BrokenCheckpoint, UnsupportedModel

_FAMILIES = (
    *(gpt2, gpt_bigcode, gpt_neo, gptj, gpt_neox, opt, bloom, falcon),
    *(llama, mistral, qwen2, qwen3, phi, phi3, gemma, gemma2, gemma3_text, stablelm, starcoder2),
)

POLICIES: dict[str, Policy] = {module.POLICY.family: module.POLICY for module in _FAMILIES}


def decoder_spec(config: Mapping[str, Any], source: str) -> DecoderSpec:
    """The decoder that a config.json describes.

    Args:
        config: its content.
        source: what the user gave as the model, for messages.

    Raises:
        UnsupportedModel: the family has no policy, or this configuration of it no fused form.
        BrokenCheckpoint: the configuration lacks a part, or holds what cannot be.
    """
    policy = POLICIES.get(config["model_type"])
    if policy is None:
        raise UnsupportedModel(f"There is no policy for {config['model_type']} yet.")
    try:
        spec = policy.spec(config)
        _check_sizes(spec)
        return spec
    except KeyError as missing:
        raise BrokenCheckpoint(f"config.json of {source} lacks {missing}.", hint="Fetch the model again.") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        text = f"config.json of {source} cannot be used ({error})."
        raise BrokenCheckpoint(text, hint="Fetch the model again.") from None


def _check_sizes(spec: DecoderSpec) -> None:
    for name in ("vocab_size", "layers", "hidden_size", "heads", "kv_heads", "head_size", "inner_size", "max_length"):
        size = getattr(spec, name)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}")
    if spec.windows and len(spec.windows) != spec.layers:
        raise ValueError(f"{len(spec.windows)} layers have a kind of attention, there are {spec.layers}")
    if spec.heads % spec.kv_heads:
        raise ValueError(f"{spec.heads} heads do not divide by {spec.kv_heads} key/value heads")
