"""Fits the rounding of int4 to a text, layer by layer while a model loads: one layer at a time is there unquantized.

The text's hidden states go through the layers as these are made. A layer first computes them as it is, and the inputs
of its matrices are noted (their second moments); then it is rounded for these inputs (`gptq.py`) and computes them
again, so that the next layer is fitted to what the rounded ones before it make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miinb.engine.decoder import Decoder, DecoderWeights, LayerWeights, Operators, StepBatch, StepRow, Stream
from miinb.engine.gptq import round_by_inputs
from miinb.engine.parity import one_layer_cache
from miinb.engine.quantize import Account
from miinb.engine.spec import DecoderSpec
from miinb.errors import InvalidValue
from miinb.kernels.linear import PackedLinear, linear
from miinb.models import ModelInfo

#: Tokens of one sequence, sequences of a step, and most of all.
WINDOW, _TOGETHER, _MOST = 512, 8, 32
_PAGE_TOKENS = 16
#: Topics of Python's own documentation that make the sample.
_TOPICS = ("specialnames", "compound", "types", "string-methods", "debugger", "execmodel", "strings", "try", "calls")
_MATRICES = ("qkv", "out", "up", "down")


def calibration_text(source: str | Sequence[str]) -> str:
    """The text of the option `calibration`. Raises InvalidValue where a file cannot be read."""
    if not isinstance(source, str):
        return "\n\n".join(source)
    if source == "auto":
        import pydoc_data.topics

        topics = pydoc_data.topics.topics
        return "\n\n".join(topics[name] for name in _TOPICS if name in topics)
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "Give the path of a text file, a list of texts, 'auto' or 'off'."
        raise InvalidValue(f"options.calibration: {source} cannot be read ({error}).", hint=hint) from None


def calibration_tokens(model: ModelInfo, source: str | Sequence[str]) -> list[int]:
    """The text's tokens; none where the model's folder has no tokenizer that can be read alone."""
    from tokenizers import Tokenizer

    text, file = calibration_text(source), model.folder / "tokenizer.json"
    if not file.exists():
        return []
    ids: list[int] = Tokenizer.from_file(str(file)).encode(text).ids
    return [token for token in ids if token < model.vocab_size]


class Calibration:
    """The hidden states of a text on their way through the layers.

    Args:
        tokens: of the text; windows spread over all of it are used.
        spec: of the model, on one rank.
        account: told what rounding has changed.
    """

    def __init__(self, tokens: Sequence[int], spec: DecoderSpec, account: Account) -> None:
        window = min(WINDOW, spec.max_length, len(tokens))
        count = min(len(tokens) // window, _MOST) if window else 0
        stride = len(tokens) / max(1, count)
        starts = [int(i * stride) for i in range(count)]
        self._rows = [list(tokens[start : start + window]) for start in starts]
        self._window = window
        self._spec = spec
        self._account = account
        self._decoder: Decoder | None = None
        self._steps: list[tuple[StepBatch, Stream]] = []
        self._moments: dict[int, Tensor] = {}

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self._window * len(self._rows)

    @torch.inference_mode()
    def add(self, plain: LayerWeights, weights: DecoderWeights) -> None:
        """Round the next layer and add it to the weights, whose embedding is there."""
        index = len(weights.layers)
        weights.layers.append(plain)
        decoder = self._decoder or self._begin(weights)
        self._moments = {id(getattr(plain, name)): torch.empty(0) for name in _MATRICES}
        self._run(decoder, index, keep=False)
        rounded = {name: self._rounded(getattr(plain, name)) for name in _MATRICES}
        weights.layers[index] = dataclasses.replace(plain, **rounded)
        self._run(decoder, index, keep=True)

    def _begin(self, weights: DecoderWeights) -> Decoder:
        decoder = self._decoder = Decoder(self._spec, weights, ops=Operators(linear=self._linear, gated_linear=self._gated))
        device = weights.embed.device
        page_tokens = _PAGE_TOKENS if device.type == "cuda" else self._window
        pages = -(-self._window // page_tokens)
        self._cache = one_layer_cache(decoder, pages * _TOGETHER, page_tokens, weights.dtype)
        for first in range(0, len(self._rows), _TOGETHER):
            rows = [
                StepRow(row, 0, range(i * pages, (i + 1) * pages))
                for i, row in enumerate(self._rows[first : first + _TOGETHER])
            ]
            batch = StepBatch.of_rows(rows, page_tokens, device)
            self._steps.append((batch, (decoder.embed(batch), None)))
        return decoder

    def _run(self, decoder: Decoder, index: int, *, keep: bool) -> None:
        for at, (batch, stream) in enumerate(self._steps):
            after = decoder.layer(index, *stream, batch, self._cache)
            if keep:
                self._steps[at] = (batch, after)

    def _linear(self, x: Tensor, packed: PackedLinear, **options: Any) -> Tensor:
        if id(packed) in self._moments:
            wide = x.float()
            known = self._moments[id(packed)]
            self._moments[id(packed)] = torch.addmm(known, wide.t(), wide) if known.numel() else wide.t() @ wide
        return linear(x, packed, **options)

    def _gated(self, x: Tensor, packed: PackedLinear, kind: str) -> Tensor:
        from miinb.kernels.activation import gated

        return gated(self._linear(x, packed), kind)

    def _rounded(self, plain: PackedLinear) -> PackedLinear:
        words, scale = round_by_inputs(plain.weight, self._moments.pop(id(plain)), self._account)
        return PackedLinear(words, plain.bias, scale)
