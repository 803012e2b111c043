"""A UNet's weights: queries, keys and values of one input in one matrix, and what is computed once a prompt in one.

Quantized are the transformers' matrices, which are most of them; convolutions, norms and what the time goes through are
not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from miinb.engine.diffusion_spec import BlockSpec, UnetSpec, unet_spec
from miinb.engine.image_blocks import Resnet, Upsampler
from miinb.engine.image_weights import ImageBuilder, Tensors, open_tensors, read_config
from miinb.engine.quantize import Quantizer
from miinb.engine.unet import Block, Transformer, TransformerLayer, Unet, UnetWeights
from miinb.kernels.linear import PackedLinear

#: Those of a `TransformerLayer`.
_MATRICES = ("qkv", "out", "query", "text_out", "up", "down")


def load_unet(
    folder: Path, *, dtype: torch.dtype, device: torch.device, half: bool = False, quantizer: Quantizer | None = None
) -> Unet:
    """The UNet of a folder with config.json and safetensors.

    Args:
        folder: of the UNet.
        dtype: of activations, and of all weights that are not quantized.
        device: where they go.
        half: see `weight_files`.
        quantizer: of the transformers' matrices; None: they are in `dtype`.

    Raises:
        UnsupportedModel: there is something in it that this engine does not have.
        BrokenCheckpoint: files are missing or damaged.
    """
    spec = unet_spec(read_config(folder))
    with open_tensors(folder, dtype, device, half=half) as tensors:
        weights = unet_weights(spec, tensors, quantizer)
        tensors.finish()
    return Unet(spec, weights)


def unet_weights(spec: UnetSpec, tensors: Tensors, quantizer: Quantizer | None = None) -> UnetWeights:
    """All weights of such a UNet; see `load_unet`."""
    return _Builder(spec, tensors, quantizer).weights()


class _Builder(ImageBuilder):
    def __init__(self, spec: UnetSpec, tensors: Tensors, quantizer: Quantizer | None) -> None:
        super().__init__(tensors)
        self._spec = spec
        self._quantizer = quantizer
        self._time_width = 4 * spec.channels
        self._shifts: list[PackedLinear] = []
        self._text: list[Tensor] = []
        self._shift_count = self._text_count = 0

    def weights(self) -> UnetWeights:
        spec, width, wide = self._spec, self._spec.channels, self._time_width
        down = [self._block(block, "downsamplers") for block in spec.down]
        mid = self._block(spec.mid)
        up = [self._block(block, "upsamplers") for block in spec.up]
        biases = [packed.bias for packed in self._shifts if packed.bias is not None]
        return UnetWeights(
            conv_in=self.conv("conv_in", width, spec.inputs),
            time1=self.linear("time_embedding.linear_1", wide, width),
            time2=self.linear("time_embedding.linear_2", wide, wide),
            shifts=PackedLinear(torch.cat([packed.weight for packed in self._shifts]), torch.cat(biases)),
            keys_values=self._quantized(PackedLinear(torch.cat(self._text))),
            down=down,
            mid=mid,
            up=up,
            norm_out=self.norm("conv_norm_out", width),
            conv_out=self.conv("conv_out", spec.outputs, width),
            rounding=self._quantizer.rounding if self._quantizer else 0.0,
        )

    def _quantized(self, packed: PackedLinear) -> PackedLinear:
        """A matrix as the quantizer makes it, if there is one; with its bias as it was."""
        if self._quantizer is None:
            return packed
        rows, columns = packed.weight.shape
        numbers, scale = self._quantizer.empty(rows, columns, packed.weight.device)
        self._quantizer.quantize(packed.weight, numbers, scale)
        return PackedLinear(numbers, packed.bias, scale)

    def _block(self, block: BlockSpec, sampler: str = "") -> Block:
        resnets = [self._resnet(f"{block.module}.resnets.{i}", *pair) for i, pair in enumerate(block.resnets)]
        count = (len(resnets) if sampler else 1) if block.heads else 0
        transformers = [self._transformer(f"{block.module}.attentions.{i}", block) for i in range(count)]
        built = Block(resnets, transformers)
        if block.sampled:
            conv = self.conv(f"{block.module}.{sampler}.0.conv", block.channels, block.channels)
            if sampler == "upsamplers":
                built.double = Upsampler.of(conv)
            else:
                built.halve = conv
        return built

    def _resnet(self, module: str, inputs: int, outputs: int) -> Resnet:
        """A block, whose first convolution's bias goes into its projection of the time embedding."""
        w = self.resnet(module, inputs, outputs)
        time = self.linear(f"{module}.time_emb_proj", outputs, self._time_width)
        if time.bias is not None and w.shift is not None:
            time.bias += w.shift[0]
        w.shift, w.first_shift = None, self._shift_count
        self._shifts.append(time)
        self._shift_count += outputs
        return w

    def _transformer(self, module: str, block: BlockSpec) -> Transformer:
        """A transformer, whose last bias goes through the way out, so that the last sum is a product's own."""
        width = block.channels
        w = Transformer(
            norm=self.norm(f"{module}.norm", width),
            enter=self.linear(f"{module}.proj_in", width, width),
            layers=[self._layer(f"{module}.transformer_blocks.{i}", width) for i in range(block.layers)],
            leave=self.linear(f"{module}.proj_out", width, width),
        )
        last = w.layers[-1].down
        if last.bias is not None and w.leave.bias is not None:
            w.leave.bias += (w.leave.weight.float() @ last.bias.float()).to(w.leave.bias.dtype)
            last.bias = None
        w.enter, w.leave = self._quantized(w.enter), self._quantized(w.leave)
        for layer in w.layers:
            for name in _MATRICES:
                setattr(layer, name, self._quantized(getattr(layer, name)))
        return w

    def _layer(self, module: str, width: int) -> TransformerLayer:
        own, text, mlp = f"{module}.attn1", f"{module}.attn2", f"{module}.ff.net"
        first = self._text_count
        self._text += [self.matrix(f"{text}.to_{kind}", width, self._spec.text_width) for kind in "kv"]
        self._text_count += 2 * width
        return TransformerLayer(
            norm1=self.norm(f"{module}.norm1", width),
            qkv=self.stacked([f"{own}.to_{kind}" for kind in "qkv"], width, width),
            out=self.linear(f"{own}.to_out.0", width, width),
            norm2=self.norm(f"{module}.norm2", width),
            query=self.linear(f"{text}.to_q", width, width, bias=False),
            text_out=self.linear(f"{text}.to_out.0", width, width),
            norm3=self.norm(f"{module}.norm3", width),
            up=_gate_first(self.linear(f"{mlp}.0.proj", 8 * width, width)),
            down=self.linear(f"{mlp}.2", width, 4 * width),
            first_text=first,
        )


def _gate_first(packed: PackedLinear) -> PackedLinear:
    """The checkpoint has the gate's rows in the second half, the operators in the first."""
    bias = None if packed.bias is None else torch.cat(packed.bias.chunk(2)[::-1])
    return PackedLinear(torch.cat(packed.weight.chunk(2)[::-1]), bias)
