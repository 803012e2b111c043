"""DistilBERT (Sanh et al., 2019): half of BERT's layers, without token types, its classifier behind a ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.encoder_spec import BODY, EncoderPolicy, EncoderSpec, HeadLayer, HeadSpec
from miinb.engine.policies import bert
from miinb.engine.spec import column, row, whole

#: BERT's words for what DistilBERT's config.json says.
_KEYS = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}


def body(config: Mapping[str, Any]) -> EncoderSpec:
    """The encoder of a DistilBERT configuration."""
    own = {ours: config[theirs] for ours, theirs in _KEYS.items() if theirs in config}
    return bert.body({**config, **own, "type_vocab_size": 0, "layer_norm_eps": 1e-12})


_LAYER = "transformer.layer.{i}."
WEIGHTS = {
    "words": whole("embeddings.word_embeddings"),
    "positions": whole("embeddings.position_embeddings"),
    "embed_norm": whole("embeddings.LayerNorm"),
    "qkv": column(*(f"{_LAYER}attention.{name}" for name in ("q_lin", "k_lin", "v_lin"))),
    "out": row(f"{_LAYER}attention.out_lin"),
    "attn_norm": whole(f"{_LAYER}sa_layer_norm"),
    "up": column(f"{_LAYER}ffn.lin1"),
    "down": row(f"{_LAYER}ffn.lin2"),
    "mlp_norm": whole(f"{_LAYER}output_layer_norm"),
}
HEADS = bert.HEADS | {
    "text-classification": HeadSpec(
        "first", (HeadLayer("pre_classifier", "hidden", "relu"), HeadLayer("classifier", "labels"))
    ),
    "fill-mask": HeadSpec(
        "wanted",
        (
            HeadLayer("vocab_transform", "hidden", BODY, norm="vocab_layer_norm"),
            HeadLayer("vocab_projector", "vocab"),
        ),
    ),
}

POLICY = EncoderPolicy("distilbert", body, "distilbert.", WEIGHTS, HEADS, bert.IGNORED)
