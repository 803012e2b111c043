"""ELECTRA (Clark et al., 2020): BERT with narrow embeddings; its generator predicts tokens from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from miinb.engine.encoder_spec import EncoderPolicy, EncoderSpec, HeadLayer, HeadSpec
from miinb.engine.policies import bert
from miinb.engine.spec import whole


def body(config: Mapping[str, Any]) -> EncoderSpec:
    """The encoder of an ELECTRA configuration."""
    return dataclasses.replace(bert.body(config), embed_size=config.get("embedding_size", 128))


WEIGHTS = bert.WEIGHTS | {"project": whole("embeddings_project")}
HEADS = bert.HEADS | {
    "text-classification": HeadSpec(
        "first", (HeadLayer("classifier.dense", "hidden", "gelu"), HeadLayer("classifier.out_proj", "labels"))
    ),
    "fill-mask": HeadSpec(
        "wanted",
        (
            HeadLayer("generator_predictions.dense", "embed", "gelu", norm="generator_predictions.LayerNorm"),
            HeadLayer("generator_lm_head", "vocab"),
        ),
    ),
}

POLICY = EncoderPolicy("electra", body, "electra.", WEIGHTS, HEADS, (*bert.IGNORED, "discriminator_predictions.*"))
