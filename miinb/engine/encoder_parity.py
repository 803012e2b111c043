"""The check of an encoder at start-up: fused layers against plain references, on the weights that were loaded.

First, middle and last layer and the head compute packed sequences of several lengths twice (see `parity`).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from miinb.engine.encoder import Encoder, EncoderBatch, EncoderOperators, Matrix
from miinb.engine.parity import ParityReport, difference, products_of_many
from miinb.kernels import reference
from miinb.kernels.linear import PackedLinear

#: Tokens of the sequences: one alone, some, and more than the small-batch kernels take.
LENGTHS = (1, 7, 40)


def _linear(x: Tensor, packed: Matrix, **options: Any) -> Tensor:
    if isinstance(packed, PackedLinear):
        return reference.linear(x, packed.weight, packed.bias, scale=packed.scale, **options)
    return reference.linear(x, packed.plain(), packed.bias, **options)  # in tiles of a CPU's product


REFERENCE = EncoderOperators(
    linear=_linear,
    post_norm=reference.post_norm,
    packed_attention=reference.packed_attention,
    embedding_norm=reference.embedding_norm,
)


@torch.inference_mode()
def check(encoder: Encoder, tolerance: float) -> ParityReport:
    """Compare the encoder's fused operators with the references on its own weights.

    Args:
        encoder: on its device; the rank's, and all ranks check together.
        tolerance: the largest difference that passes, relative to the reference's largest value.
    """
    started = time.monotonic()
    spec = encoder.spec
    plain = Encoder(spec, encoder.weights, group=encoder.group, ops=REFERENCE)
    lengths = [min(length, spec.max_length) for length in LENGTHS]
    tokens = [[(7 * i + 3 * length) % spec.vocab_size for i in range(length)] for length in lengths]
    batch = EncoderBatch.of_sequences(tokens, device=encoder.weights.words.device)
    rows = batch.starts[:-1].long()
    ours, theirs = encoder.embed(batch), plain.embed(batch)
    worst, where = difference(ours, theirs), "embeddings"
    last = spec.layers - 1
    for index in sorted({0, last // 2, last}):
        error = difference(encoder.layer(index, theirs, batch), plain.layer(index, theirs, batch))
        if error > worst:
            worst, where = error, f"layer {index}"
        for name, *pair in products_of_many(encoder.ops.linear, encoder.weights.layers[index], encoder.weights.dtype):
            if (error := difference(*pair)) > worst:
                worst, where = error, f"layer {index}, {name}"
    error = difference(encoder.head(theirs, rows), plain.head(theirs, rows))
    if error > worst:
        worst, where = error, "head"
    return ParityReport(worst, tolerance, where, time.monotonic() - started)
