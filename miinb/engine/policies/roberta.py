"""RoBERTa (Liu et al., 2019): BERT whose positions begin behind the padding token's, with heads of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from miinb.engine.encoder_spec import EncoderPolicy, EncoderSpec, HeadLayer, HeadSpec
from miinb.engine.policies import bert


def body(config: Mapping[str, Any]) -> EncoderSpec:
    """The encoder of a RoBERTa configuration."""
    spec = bert.body(config)
    offset = config.get("pad_token_id", 1) + 1
    return dataclasses.replace(spec, position_offset=offset, max_length=spec.max_length - offset)


HEADS = bert.HEADS | {
    "text-classification": HeadSpec(
        "first", (HeadLayer("classifier.dense", "hidden", "tanh"), HeadLayer("classifier.out_proj", "labels"))
    ),
    "fill-mask": HeadSpec(
        "wanted",
        (
            HeadLayer("lm_head.dense", "hidden", "gelu", norm="lm_head.layer_norm"),
            HeadLayer("lm_head.decoder", "vocab", bias="lm_head.bias"),
        ),
    ),
}

POLICY = EncoderPolicy("roberta", body, "roberta.", bert.WEIGHTS, HEADS, bert.IGNORED)
