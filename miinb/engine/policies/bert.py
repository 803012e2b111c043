"""BERT (Devlin et al., 2018): learned positions and token types, norms behind, a pooler before the classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.encoder_spec import BODY, EncoderPolicy, EncoderSpec, HeadLayer, HeadSpec
from miinb.engine.labels import label_count
from miinb.engine.spec import activation_of, column, row, whole
from miinb.errors import UnsupportedModel


def body(config: Mapping[str, Any]) -> EncoderSpec:
    """The encoder of a BERT configuration."""
    for key in ("is_decoder", "add_cross_attention", "pruned_heads"):
        if config.get(key):
            raise UnsupportedModel(f"An encoder with {key} has no fused form.")
    if (kind := config.get("position_embedding_type") or "absolute") != "absolute":
        raise UnsupportedModel(f"Positions of kind {kind!r} have no fused form.")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        raise ValueError(f"hidden_size {hidden} is no multiple of {heads} heads")
    return EncoderSpec(
        vocab_size=config["vocab_size"],
        layers=config["num_hidden_layers"],
        hidden_size=hidden,
        heads=heads,
        head_size=hidden // heads,
        inner_size=config["intermediate_size"],
        max_length=config.get("max_position_embeddings", 512),
        eps=config.get("layer_norm_eps", 1e-12),
        activation=activation_of(config.get("hidden_act", "gelu")),
        token_types=config.get("type_vocab_size", 2),
        embed_size=hidden,
        labels=label_count(config),
        tied=bool(config.get("tie_word_embeddings", True)),
    )


_LAYER = "encoder.layer.{i}."
WEIGHTS = {
    "words": whole("embeddings.word_embeddings"),
    "positions": whole("embeddings.position_embeddings"),
    "token_types": whole("embeddings.token_type_embeddings"),
    "embed_norm": whole("embeddings.LayerNorm"),
    "qkv": column(*(f"{_LAYER}attention.self.{name}" for name in ("query", "key", "value"))),
    "out": row(f"{_LAYER}attention.output.dense"),
    "attn_norm": whole(f"{_LAYER}attention.output.LayerNorm"),
    "up": column(f"{_LAYER}intermediate.dense"),
    "down": row(f"{_LAYER}output.dense"),
    "mlp_norm": whole(f"{_LAYER}output.LayerNorm"),
}
_TRANSFORM = "cls.predictions.transform"
HEADS = {
    "text-classification": HeadSpec(
        "first", (HeadLayer("pooler.dense", "hidden", "tanh"), HeadLayer("classifier", "labels"))
    ),
    "token-classification": HeadSpec("all", (HeadLayer("classifier", "labels"),)),
    "question-answering": HeadSpec("all", (HeadLayer("qa_outputs", "labels"),)),
    "fill-mask": HeadSpec(
        "wanted",
        (
            HeadLayer(f"{_TRANSFORM}.dense", "hidden", BODY, norm=f"{_TRANSFORM}.LayerNorm"),
            HeadLayer("cls.predictions.decoder", "vocab", bias="cls.predictions.bias"),
        ),
    ),
}
IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.*", "cls.seq_relationship.*")

POLICY = EncoderPolicy("bert", body, "bert.", WEIGHTS, HEADS, IGNORED)
