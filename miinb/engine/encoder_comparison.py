"""The fused encoder against transformers on the same weights, layer by layer: `comparison` for encoders."""

from __future__ import annotations

from typing import Any

import torch

from miinb.config import DeploymentConfig
from miinb.engine.encoder import Encoder, EncoderBatch
from miinb.engine.encoder_kernels import encoder_kernels
from miinb.engine.encoder_weights import load_encoder_weights
from miinb.engine.place import Place
from miinb.engine.policies import ENCODERS
from miinb.engine.traces import Trace, errors, trace_plain, transformers_model
from miinb.engine.transformers_encoder import TransformersEncoder
from miinb.errors import UnsupportedModel
from miinb.messages import Plan
from miinb.models import ModelInfo

TOKENS = 48


def compare_encoder(config: DeploymentConfig, model: ModelInfo, task: str) -> dict[str, Any]:
    """Both engines on a sequence of tokens: errors of every layer and of the head's outputs, as `comparison.compare`.

    Raises:
        UnsupportedModel: the optimized engine has no form for the model.
        MiinbError: the model cannot be loaded.
    """
    spec = model.encoder
    if spec is None:
        raise model.unfused or UnsupportedModel(f"There is no policy for {task} of {model.family}.")
    padding = model.config.get("pad_token_id", 1)  # has no place of its own in RoBERTa's positions
    tokens = [(7 * i + 3) % spec.vocab_size for i in range(min(TOKENS, spec.max_length))]
    tokens = [token + 1 if token == padding else token for token in tokens]
    types = [int(spec.token_types > 1 and 2 * i >= len(tokens)) for i in range(len(tokens))]
    rows = range(1 if spec.head.rows == "first" else len(tokens))
    batch = EncoderBatch.of_sequences([tokens], rows=rows, type_ids=types, device=config.device)

    def plain(dtype: str) -> Trace:
        with transformers_model(model, config, dtype, task) as loaded:
            found = TransformersEncoder(loaded, task)
            return trace_plain(loaded, spec.layers, lambda: found.outputs(batch))

    truth, base_dtype = plain("fp32"), config.dtype if config.dtype in ("bf16", "fp16") else "fp32"
    base = truth if base_dtype == "fp32" else plain(base_dtype)
    ours = _trace_fused(fused(model, config), batch)
    return {
        **errors(ours, base, truth, exact=config.dtype == "fp32"),
        "baseline_dtype": base_dtype,
        "tokens": [],
        "expected_tokens": [],
        "prompt_tokens": len(tokens),
    }


def fused(model: ModelInfo, config: DeploymentConfig) -> Encoder:
    """The model in the optimized engine. Raises UnsupportedModel, BrokenCheckpoint."""
    if model.encoder is None:
        raise UnsupportedModel(f"{model.family} has no fused form.")
    place = Place(torch.device(config.device), config.dtype)
    kernels, _ = encoder_kernels(Plan("optimized", config.device, config.dtype), place)
    weights = load_encoder_weights(
        model, ENCODERS[model.family], model.encoder,
        dtype=config.dtype, device=place.device, levels=kernels.levels, pack=kernels.pack,
    )  # fmt: skip
    return Encoder(model.encoder, weights, ops=kernels.operators)


@torch.inference_mode()
def _trace_fused(encoder: Encoder, batch: EncoderBatch) -> Trace:
    x, layers = encoder.embed(batch), []
    for index in range(encoder.spec.layers):
        x = encoder.layer(index, x, batch)
        layers.append(x.float().cpu())
    return Trace(layers, encoder.head(x, batch.rows).float().cpu())
