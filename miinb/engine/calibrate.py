"""Fits the rounding of int4 to a text, layer by layer while a model loads: one layer at a time is there unquantized.

The text's hidden states go through the layers as these are made, twice: as they are, and as the layers make them that
are rounded already. Each matrix of a layer is rounded (`gptq.py`) for the inputs that it gets from the rounded ones
before it, so that its outputs are near those that the model had without rounding: it makes up for what they changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miinb.calibration import calibration_text, is_given
from miinb.config import DeploymentConfig
from miinb.engine.decoder import Decoder, DecoderWeights, LayerWeights, Operators, Stream
from miinb.engine.gptq import round_by_inputs
from miinb.engine.parity import one_layer_cache
from miinb.engine.place import Place, free_bytes
from miinb.engine.quantize import Account
from miinb.engine.spec import DecoderSpec
from miinb.engine.step_batch import StepBatch, StepRow
from miinb.errors import OutOfMemory
from miinb.kernels.activation import gated
from miinb.kernels.linear import PackedLinear, linear
from miinb.messages import Plan
from miinb.models import ModelInfo
from miinb.quantized_planner import TO_THE_NEAREST, why_unfitted
from miinb.wording import size_words

#: Tokens of one sequence, sequences of a step, and most of all by device: they take a CPU minutes, a GPU seconds.
WINDOW, _TOGETHER = 512, 8
_MOST = {"cuda": 96, "cpu": 32}
_PAGE_TOKENS = 16
#: A text of fewer tokens says too little of the inputs that a model gets.
FEW_TOKENS = 128
_MATRICES = ("qkv", "out", "up", "down")


def calibration_of(config: DeploymentConfig, model: ModelInfo, place: Place) -> list[int]:
    """The tokens that a deployment's rounding is fitted to; none where it is not.

    Raises:
        InvalidValue: the text cannot be read.
        OutOfMemory: a text was given, and fitting to it takes more memory than is free.
    """
    if place.dtype != "int4" or _why_not(config, model, place):
        return []
    return calibration_tokens(model, config.options.calibration)


def with_calibration(plan: Plan, config: DeploymentConfig, model: ModelInfo, place: Place, tokens: int) -> Plan:
    """The plan with a line on an int4 model that was fitted to so many tokens; where a given text was of no use or is
    short, a warning too.
    """
    what, choice, reason = calibration_line(config, model, place, tokens)
    warned = is_given(config.options.calibration) and tokens < FEW_TOKENS
    return plan.with_line(what, choice, reason, warnings=(*plan.warnings, reason) if warned else plan.warnings)


def calibration_line(config: DeploymentConfig, model: ModelInfo, place: Place, tokens: int) -> tuple[str, str, str]:
    """The plan's line on an int4 model that was fitted to so many tokens."""
    if not tokens:
        why = _why_not(config, model, place) or "the calibration text has no token of this model"
        return "calibration", "off", f"{why}; {TO_THE_NEAREST}"
    given = is_given(config.options.calibration)
    source = "the text that was given" if given else "a sample of Python's documentation"
    reason = f"of {source}: int4 is rounded for the inputs that they make"
    if tokens < FEW_TOKENS:
        reason = f"the calibration text is too short: with fewer than {FEW_TOKENS} tokens int4 can lose much more"
    return "calibration", f"{tokens:,} tokens", reason


def _why_not(config: DeploymentConfig, model: ModelInfo, place: Place) -> str:
    """Why int4 is not fitted to a text, or "". Raises OutOfMemory where it was asked for and cannot be."""
    if why := why_unfitted(config, model, on_gpu=place.device.type == "cuda"):
        return why
    working, free = working_bytes(model, place), free_bytes(place.device, config)
    form: dict[str, Any] = {"on_gpu": place.device.type == "cuda", "quantize_head": config.options.quantize_head}
    if model.weights_bytes("int4", **form) + working <= free:
        return ""
    needs = f"it would take about {size_words(working)} of memory besides the weights"
    if not is_given(config.options.calibration):
        return f"{needs}, of {size_words(free)} that are free"
    raise OutOfMemory(
        f"options.calibration: {needs}, of {size_words(free)} that are free.",
        hint="Use options.calibration='off', which loses more, or dtype='int8'.",
    )


def working_bytes(model: ModelInfo, place: Place) -> int:
    """About what fitting takes besides the weights: a text on its way through the layers, and one matrix's equations.

    These are, all in fp32 and of the widest input: two sums over the text's tokens, the one that is solved, its factor
    and its inverse.
    """
    spec = model.spec
    if spec is None:
        return 0
    number = 2 if place.device.type == "cuda" else 4
    attended = spec.heads * spec.head_size
    tokens = _MOST[place.device.type] * WINDOW * number
    streams = 4 * tokens * spec.hidden_size  # as the layers are and as rounding makes them, each with its residual
    inputs = tokens * (2 * spec.hidden_size + attended + spec.inner_size)
    layer = number * model.parameters // max(1, model.layers)
    return streams + inputs + layer + 5 * 4 * max(spec.hidden_size, attended, spec.inner_size) ** 2


def calibration_tokens(model: ModelInfo, source: str | Sequence[str]) -> list[int]:
    """The text's tokens; none where the model's folder has no tokenizer that can be read alone."""
    from tokenizers import Tokenizer

    text, file = calibration_text(source), model.folder / "tokenizer.json"
    if not file.exists():
        return []
    ids: list[int] = Tokenizer.from_file(str(file)).encode(text).ids
    return [token for token in ids if token < model.vocab_size]


class _Reached(Exception):
    """The matrix whose inputs are wanted has been reached: the rest of the layer need not be computed."""


class Calibration:
    """The hidden states of a text on their way through the layers, as they are and as rounded layers make them.

    Args:
        tokens: of the text; windows spread over all of it are used.
        spec: of the model, on one rank.
        account: told what rounding has changed.
        device: of the weights.
    """

    def __init__(self, tokens: Sequence[int], spec: DecoderSpec, account: Account, device: torch.device) -> None:
        window = min(WINDOW, spec.max_length, len(tokens))
        count = min(len(tokens) // window, _MOST[device.type]) if window else 0
        starts = [i * len(tokens) // max(1, count) for i in range(count)]
        self._rows = [list(tokens[start : start + window]) for start in starts]
        self._window = window
        self._spec = spec
        self._account = account
        self._decoder: Decoder | None = None
        self._steps: list[StepBatch] = []
        self._exact: list[Stream] = []
        self._rounded: list[Stream] = []
        self._inputs: dict[int, Tensor] = {}  # of matrices that are watched, in the step that is computed
        self._last: PackedLinear | None = None

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
        matrices = {name: getattr(plain, name) for name in _MATRICES}
        exact = []
        for at, batch in enumerate(self._steps):
            self._inputs = {id(packed): torch.empty(0) for packed in matrices.values()}
            self._exact[at] = decoder.layer(index, *self._exact[at], batch, self._cache)
            exact.append(self._inputs)
        for name, packed in matrices.items():
            moments, drift = self._moments(decoder, index, packed, [inputs.pop(id(packed)) for inputs in exact])
            words, scale = round_by_inputs(packed.weight, moments, drift, self._account)
            rounded = PackedLinear(words, packed.bias, scale)
            change: dict[str, Any] = {name: rounded}
            weights.layers[index] = dataclasses.replace(weights.layers[index], **change)
        for at, batch in enumerate(self._steps):
            self._rounded[at] = decoder.layer(index, *self._rounded[at], batch, self._cache)

    def _begin(self, weights: DecoderWeights) -> Decoder:
        # every product is seen, so none may go another way
        operators = Operators(linear=self._linear, gated_linear=self._gated, early_memory=lambda *_, **__: None)
        decoder = self._decoder = Decoder(self._spec, weights, ops=operators)
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
            self._steps.append(batch)
            self._exact.append((decoder.embed(batch), None))
        self._rounded = list(self._exact)
        return decoder

    def _moments(
        self, decoder: Decoder, index: int, packed: PackedLinear, exact: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Sums over all tokens of x x^T, and of (y - x) x^T where y is what x would be without rounding."""
        columns = exact[0].shape[1]
        moments, drift = torch.zeros((2, columns, columns), device=exact[0].device)
        self._last = packed
        for stream, batch, right in zip(self._rounded, self._steps, exact, strict=True):
            self._inputs = {id(packed): torch.empty(0)}
            with contextlib.suppress(_Reached):
                decoder.layer(index, *stream, batch, self._cache)
            x = self._inputs.pop(id(packed)).float()
            moments.addmm_(x.t(), x)
            drift.addmm_((right.float() - x).t(), x)
        self._last = None
        return moments, drift

    def _linear(self, x: Tensor, packed: PackedLinear, **options: Any) -> Tensor:
        if id(packed) in self._inputs:
            self._inputs[id(packed)] = x
        if packed is self._last:
            raise _Reached
        return linear(x, packed, **options)

    def _gated(self, x: Tensor, packed: PackedLinear, kind: str) -> Tensor:
        return gated(self._linear(x, packed), kind)
