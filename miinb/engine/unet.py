"""The UNet of Stable Diffusion: every version is a `UnetSpec`; its step calls the operators of `miinb.kernels`.

Activations are [N, H, W, C] throughout. What is the same in every step of a prompt is computed once, by `prepare`: the
keys and values of the text, and each residual block's shift for each timestep. A step has no host synchronization and
no shape that depends on data, so that it can be captured in a CUDA graph. A shallow step takes what inner layers
gave in a step before (`step_reuse.py` says when).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from miinb.engine.decoder import Norm
from miinb.engine.diffusion_spec import BlockSpec, UnetSpec
from miinb.engine.image_blocks import Conv, Resnet, Sum, Upsampler, attention, convolve, resnet, upsample
from miinb.engine.polling import poll_point
from miinb.kernels.linear import PackedLinear, gated_linear, linear, linear_norm

#: Of the transformers, whatever config.json says of the others.
_TRANSFORMER_EPS = 1e-6
_LAYER_EPS = 1e-5
_LONGEST_PERIOD = 10000
#: First layers of the first block and last layers of the last that a shallow step computes (DeepCache's branch 0): the
#: latter join what the first convolution and the former gave. These blocks have as many at least.
_FIRST, _LAST = 1, 2


@dataclass(slots=True)
class TransformerLayer:
    """Self-attention, attention to the text, MLP; C is the block's channels.

    Attributes:
        norm1, norm2, norm3: layer norms before the three.
        qkv: [3 * C, C], all queries' rows, then keys', then values'.
        out: [C, C].
        query: [C, C], of the attention to the text.
        text_out: [C, C].
        up: [8 * C, C], the gate's rows first.
        down: [C, 4 * C]; the last layer's has no bias, which is in the transformer's way out.
        first_text: column of the layer's first key among the text's; its values follow its keys.
    """

    norm1: Norm
    qkv: PackedLinear
    out: PackedLinear
    norm2: Norm
    query: PackedLinear
    text_out: PackedLinear
    norm3: Norm
    up: PackedLinear
    down: PackedLinear
    first_text: int


@dataclass(slots=True)
class Transformer:
    """A group norm, a projection, layers, and a projection back: [C, C] each."""

    norm: Norm
    enter: PackedLinear
    layers: list[TransformerLayer]
    leave: PackedLinear


@dataclass(slots=True)
class Block:
    """Weights of a `BlockSpec`: the mid block has one transformer, others as many as residual blocks or none.

    At most one of `halve` (a convolution with a stride of 2) and `double` is there.
    """

    resnets: list[Resnet]
    transformers: list[Transformer] = field(default_factory=list)
    halve: Conv | None = None
    double: Upsampler | None = None


@dataclass(slots=True)
class UnetWeights:
    """All weights.

    Attributes:
        time1, time2: [4 * C, C] and [4 * C, 4 * C], the MLP of the sinusoids.
        shifts: [sum of the residual blocks' channels, 4 * C], their projections of the time embedding one below the
            other; each bias holds that of the block's first convolution too.
        keys_values: [sum of 2 * channels, text_width], of all the transformers' layers.
        down, mid, up: the blocks.
        rounding: root of the mean square by which quantized weights differ from the checkpoint's, relative to theirs.
    """

    conv_in: Conv
    time1: PackedLinear
    time2: PackedLinear
    shifts: PackedLinear
    keys_values: PackedLinear
    down: list[Block]
    mid: Block
    up: list[Block]
    norm_out: Norm
    conv_out: Conv
    rounding: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.conv_in.weight.device


@dataclass(slots=True)
class Conditions:
    """What all steps of a prompt share.

    Attributes:
        text: [N, tokens, sum of 2 * channels], keys and values of every layer.
        shifts: [steps, sum of channels], of every residual block.
    """

    text: Tensor
    shifts: Tensor


class Unet:
    """A loaded UNet: its spec, its weights, and the step.

    Attributes:
        spec: the model's shape.
        weights: on their device.
    """

    def __init__(self, spec: UnetSpec, weights: UnetWeights) -> None:
        self.spec = spec
        self.weights = weights

    @torch.inference_mode()
    def prepare(self, text_embeddings: Tensor, timesteps: Tensor) -> Conditions:
        """What all steps share.

        Args:
            text_embeddings: [N, tokens, text_width] of the text encoder; with guidance those of the negative prompts
                come first.
            timesteps: [steps], the scheduler's, whole or fractions.
        """
        w = self.weights
        text = text_embeddings.to(w.device, w.dtype)
        keys_values = linear(text.flatten(0, 1).contiguous(), w.keys_values).view(*text.shape[:2], -1)
        waves = sinusoids(timesteps.to(w.device), self.spec).to(w.dtype)
        embedding = linear(linear(waves, w.time1, activation="silu"), w.time2, activation="silu")
        return Conditions(keys_values, linear(embedding, w.shifts))

    @torch.inference_mode()
    def step(self, latents: Tensor, step_index: Tensor, conditions: Conditions) -> Tensor:
        """The prediction for one step.

        Args:
            latents: [N, inputs, height, width], as the scheduler scales them; any sizes. With guidance N / 2 are
                enough: both predictions are of the same latents, and what comes before the text is computed once.
            step_index: [1] int64 on the device: which of `prepare`'s timesteps.
            conditions: of N rows.

        Returns:
            [N, outputs, height, width] in the weights' dtype.
        """
        stream, skips, shift = self._inner(latents, step_index, conditions)
        return self._outer(stream, skips, shift, conditions)

    @torch.inference_mode()
    def whole_step(self, latents: Tensor, step_index: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """See `step`: the prediction, and the deep features that `shallow_step` takes: [N, height, width, C]."""
        stream, skips, shift = self._inner(latents, step_index, conditions)
        deep = stream.value()
        return self._outer(Sum(deep), skips, shift, conditions), deep

    @torch.inference_mode()
    def shallow_step(self, latents: Tensor, step_index: Tensor, conditions: Conditions, deep: Tensor) -> Tensor:
        """See `step`: by the outermost layers alone, on the deep features of a step before; not the same prediction."""
        shift = conditions.shifts.index_select(0, step_index)
        skips = [self._first(latents)]
        self._down(0, _FIRST, skips, shift, conditions)
        return self._outer(Sum(deep), skips, shift, conditions)

    @property
    def deep_channels(self) -> int:
        """Of the deep features."""
        return self.spec.up[-1].resnets[-_LAST][0] - self.spec.channels  # the skip that is joined has those

    def _inner(self, latents: Tensor, step_index: Tensor, conditions: Conditions) -> tuple[Sum, list[Sum], Tensor]:
        """All up to the deep features: these, the skips that are left, and the step's shifts."""
        spec, w = self.spec, self.weights
        shift = conditions.shifts.index_select(0, step_index)
        skips = [self._first(latents)]
        for place, weights in enumerate(w.down):
            self._down(place, len(weights.resnets), skips, shift, conditions)
            if weights.halve is not None:
                halved = convolve(skips[-1].value(), weights.halve.weight, stride=2)
                skips.append(Sum(halved, weights.halve.bias[None]))
        stream = self.layer(spec.mid, w.mid, 0, skips[-1], shift, conditions.text)
        stream = self._resnet(w.mid.resnets[1], stream, shift)
        for place, weights in enumerate(w.up[:-1]):
            stream = self._up(place, range(len(weights.resnets)), stream, skips, shift, conditions)
            if weights.double is not None:
                _, height, width, _ = skips[-1].value().shape  # odd sizes were rounded up on the way down
                stream = upsample(stream, weights.double, (height, width))
        first = range(len(w.up[-1].resnets) - _LAST)
        return self._up(len(w.up) - 1, first, stream, skips, shift, conditions), skips, shift

    def _outer(self, stream: Sum, skips: list[Sum], shift: Tensor, conditions: Conditions) -> Tensor:
        """The prediction of the deep features and what skipped these."""
        spec, w = self.spec, self.weights
        count = len(w.up[-1].resnets)
        last = range(count - _LAST, count)
        stream = self._up(len(w.up) - 1, last, stream, skips, shift, conditions)
        y = stream.norm(w.norm_out, spec.groups, spec.eps, silu=True, keep=False)
        return convolve(y, w.conv_out.weight, w.conv_out.bias).permute(0, 3, 1, 2).contiguous()

    def _first(self, latents: Tensor) -> Sum:
        w = self.weights
        x = latents.to(w.dtype).permute(0, 2, 3, 1).contiguous()
        return Sum(convolve(x, w.conv_in.weight), w.conv_in.bias[None])

    def _down(self, place: int, count: int, skips: list[Sum], shift: Tensor, conditions: Conditions) -> None:
        """Add what the first layers of a block on the way down give to the skips."""
        block, weights = self.spec.down[place], self.weights.down[place]
        for i in range(count):
            skips.append(self.layer(block, weights, i, skips[-1], shift, conditions.text))

    def _up(
        self, place: int, layers: range, stream: Sum, skips: list[Sum], shift: Tensor, conditions: Conditions
    ) -> Sum:
        """The stream behind some layers of a block on the way up, each of which takes the last skip."""
        block, weights = self.spec.up[place], self.weights.up[place]
        for i in layers:
            stream = stream.joined(_repeated(skips.pop().value(), len(conditions.text)))
            stream = self.layer(block, weights, i, stream, shift, conditions.text)
        return stream

    def _resnet(self, w: Resnet, stream: Sum, shift: Tensor) -> Sum:
        own = shift[:, w.first_shift : w.first_shift + len(w.conv1)]
        return resnet(w, stream, own, self.spec.groups, self.spec.eps)

    def layer(self, block: BlockSpec, w: Block, i: int, stream: Sum, shift: Tensor, text: Tensor) -> Sum:
        """A block's residual block `i`, and the transformer behind it.

        Args:
            block: the block's shape.
            w: its weights.
            i: which of its residual blocks.
            stream: [N, H, W, in].
            shift: [1, sum of channels], of the step.
            text: `Conditions.text`.
        """
        stream = self._resnet(w.resnets[i], stream, shift)
        return self._transformer(block.heads, w.transformers[i], stream, text) if w.transformers else stream

    def _transformer(self, heads: int, w: Transformer, stream: Sum, text: Tensor) -> Sum:
        y = stream.norm(w.norm, self.spec.groups, _TRANSFORMER_EPS, silu=False)
        shape = y.shape
        inner, way, x = y.flatten(0, 2), w.enter, None
        for layer in w.layers:
            y, x = _into(layer.norm1, inner, way, x)
            inner, x = _transformer_layer(layer, heads, y, x, shape[1] * shape[2], text)
            way = layer.down
            poll_point()
        x = linear(linear(inner, way, residual=x, overwrite=True), w.leave)
        return Sum(x.view(len(text), *shape[1:]), residual=_repeated(stream.value(), len(text)))


def _transformer_layer(
    w: TransformerLayer, heads: int, y: Tensor, x: Tensor, pixels: int, text: Tensor
) -> tuple[Tensor, Tensor]:
    """What a layer's last product is of, and what it is added to, of the stream x [T, C] and its norm `y`.

    Before the layer there may be half as many images as texts.
    """
    width, tokens = x.shape[1], len(text) * pixels
    q, k, v = linear(y, w.qkv).view(-1, pixels, 3 * width).chunk(3, -1)
    y, x = _into(w.norm2, attention(q, k, v, heads), w.out, x)
    q, x = _repeated(linear(y, w.query), tokens), _repeated(x, tokens)
    q = q.view(-1, pixels, width)
    k, v = text[..., w.first_text : w.first_text + 2 * width].chunk(2, -1)
    y, x = _into(w.norm3, attention(q, k, v, heads), w.text_out, x)
    poll_point()
    return gated_linear(y, w.up, "gelu"), x


def _repeated(x: Tensor, count: int) -> Tensor:
    """`x`, again and again until its first dimension has so many."""
    return x if len(x) == count else torch.cat([x] * (count // len(x)))


def _into(norm: Norm, x: Tensor, way: PackedLinear, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """What goes into the next layer: the norm of the stream behind a product, and the stream."""
    return linear_norm(x, way, norm.weight, norm.bias, _LAYER_EPS, residual)


def sinusoids(timesteps: Tensor, spec: UnetSpec) -> Tensor:
    """[steps, channels] fp32: sines and cosines of the timesteps at periods from 2 pi to 10,000 times that."""
    half = spec.channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - spec.freq_shift)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) * exponents)
    waves = (angles.cos(), angles.sin()) if spec.flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, -1), (0, spec.channels % 2))
