"""Injection policies: one file a model family, data and name maps only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from miinb.engine.encoder_spec import EncoderPolicy, EncoderSpec
from miinb.engine.policies import (
    bert,
    bloom,
    camembert,
    distilbert,
    electra,
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
    roberta,
    stablelm,
    starcoder2,
    xlm_roberta,
)
from miinb.engine.spec import DecoderSpec, Policy
from miinb.errors import BrokenCheckpoint, UnsupportedModel

_FAMILIES = (
    *(gpt2, gpt_bigcode, gpt_neo, gptj, gpt_neox, opt, bloom, falcon),
    *(llama, mistral, qwen2, qwen3, phi, phi3, gemma, gemma2, gemma3_text, stablelm, starcoder2),
)

POLICIES: dict[str, Policy] = {module.POLICY.family: module.POLICY for module in _FAMILIES}

_ENCODER_FAMILIES = (bert, roberta, xlm_roberta, camembert, distilbert, electra)

ENCODERS: dict[str, EncoderPolicy] = {module.POLICY.family: module.POLICY for module in _ENCODER_FAMILIES}


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
    return _read(lambda: _checked(policy.spec(config), _DECODER_SIZES), source)


def encoder_spec(config: Mapping[str, Any], task: str, source: str) -> EncoderSpec:
    """The encoder that a config.json describes, with the head of a task.

    Args:
        config: its content.
        task: one of those that encoders serve.
        source: what the user gave as the model, for messages.

    Raises:
        UnsupportedModel: the family has no policy, or this configuration or head no fused form.
        BrokenCheckpoint: the configuration lacks a part, or holds what cannot be.
    """
    policy = ENCODERS.get(config["model_type"])
    if policy is None:
        raise UnsupportedModel(f"There is no policy for {config['model_type']} yet.")
    if task != "feature-extraction" and task not in policy.heads:
        raise UnsupportedModel(f"{policy.family} has no head for {task}.")
    spec = _read(lambda: _checked(policy.spec(config, task), _ENCODER_SIZES), source)
    if task == "question-answering" and spec.labels != 2:
        raise UnsupportedModel(f"A head of {spec.labels} outputs answers no questions: it takes a start and an end.")
    return spec


_Spec = TypeVar("_Spec", DecoderSpec, EncoderSpec)


def _read(spec: Callable[[], _Spec], source: str) -> _Spec:
    """What a policy makes of config.json. Raises BrokenCheckpoint where it cannot."""
    try:
        return spec()
    except KeyError as missing:
        raise BrokenCheckpoint(f"config.json of {source} lacks {missing}.", hint="Fetch the model again.") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        text = f"config.json of {source} cannot be used ({error})."
        raise BrokenCheckpoint(text, hint="Fetch the model again.") from None


_SIZES = ("vocab_size", "layers", "hidden_size", "heads", "head_size", "inner_size", "max_length")
_DECODER_SIZES = (*_SIZES, "kv_heads")
_ENCODER_SIZES = (*_SIZES, "embed_size", "labels")


def _checked(spec: _Spec, sizes: tuple[str, ...]) -> _Spec:
    """The spec itself. Raises ValueError where its sizes cannot be."""
    for name in sizes:
        size = getattr(spec, name)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}")
    if isinstance(spec, EncoderSpec):
        return spec
    if spec.windows and len(spec.windows) != spec.layers:
        raise ValueError(f"{len(spec.windows)} layers have a kind of attention, there are {spec.layers}")
    if spec.heads % spec.kv_heads:
        raise ValueError(f"{spec.heads} heads do not divide by {spec.kv_heads} key/value heads")
    return spec
