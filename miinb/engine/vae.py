"""The VAE decoder of Stable Diffusion: latents to pictures, on activations laid out as [N, H, W, C]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miinb.engine.decoder import Norm
from miinb.engine.diffusion_spec import VaeSpec, vae_spec
from miinb.engine.image_blocks import Conv, Resnet, Sum, Upsampler, attention, convolve, resnet, upsample
from miinb.engine.image_weights import ImageBuilder, Tensors, open_tensors, read_config
from miinb.kernels.linear import PackedLinear, linear

_EPS = 1e-6
#: Modules of the attention in today's checkpoints, and in those of before diffusers 0.15.
_ATTENTION = (("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn"))


@dataclass(slots=True)
class UpBlock:
    """Residual blocks of one resolution, and the convolution behind its doubling."""

    resnets: list[Resnet]
    double: Upsampler | None


@dataclass(slots=True)
class VaeWeights:
    """All weights; C is the first width.

    Attributes:
        quant: of one place, what comes first; or None.
        mid: the two residual blocks around the attention.
        norm: before the attention.
        qkv: [3 * C, C].
        out: [C, C].
    """

    quant: Conv | None
    conv_in: Conv
    mid: tuple[Resnet, Resnet]
    norm: Norm
    qkv: PackedLinear
    out: PackedLinear
    up: list[UpBlock]
    norm_out: Norm
    conv_out: Conv


class VaeDecoder:
    """A loaded decoder.

    Attributes:
        spec: the model's shape.
        weights: on their device.
    """

    def __init__(self, spec: VaeSpec, weights: VaeWeights) -> None:
        self.spec = spec
        self.weights = weights

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents.

        Args:
            latents: [N, inputs, height, width], divided by the model's scaling factor.

        Returns:
            [N, outputs, 8 * height, 8 * width] (of four resolutions), about -1 to 1, in the weights' dtype.
        """
        spec, w = self.spec, self.weights
        x = latents.to(w.conv_in.weight.dtype).permute(0, 2, 3, 1).contiguous()
        if w.quant is not None:
            x = convolve(x, w.quant.weight, w.quant.bias)
        stream = Sum(convolve(x, w.conv_in.weight), w.conv_in.bias[None])
        stream = self.middle(stream)
        for block in w.up:
            for each in block.resnets:
                stream = self.residual(each, stream)
            if block.double is not None:
                _, height, width, _ = stream.value().shape
                stream = upsample(stream, block.double, (2 * height, 2 * width))
        last = stream.norm(w.norm_out, spec.groups, _EPS, silu=True, keep=False)
        return convolve(last, w.conv_out.weight, w.conv_out.bias).permute(0, 3, 1, 2).contiguous()

    def middle(self, stream: Sum) -> Sum:
        """The lowest resolution [N, H, W, C]: a residual block, the attention, another residual block."""
        first, second = self.weights.mid
        return self.residual(second, self._attention(self.residual(first, stream)))

    def residual(self, w: Resnet, stream: Sum) -> Sum:
        """One residual block on [N, H, W, C]."""
        if w.shift is None:
            raise RuntimeError("a decoder's residual block has its first convolution's bias")
        return resnet(w, stream, w.shift, self.spec.groups, _EPS)

    def _attention(self, stream: Sum) -> Sum:
        y = stream.norm(self.weights.norm, self.spec.groups, _EPS, silu=False)
        q, k, v = linear(y.flatten(0, 2), self.weights.qkv).view(len(y), -1, 3 * y.shape[3]).chunk(3, -1)
        out = linear(attention(q, k, v, heads=1), self.weights.out)
        return Sum(out.view(y.shape), residual=stream.value())


def load_vae(folder: Path, *, dtype: torch.dtype, device: torch.device, half: bool = False) -> VaeDecoder:
    """The decoder of a VAE's folder with config.json and safetensors; the encoder is left unread.

    Raises:
        UnsupportedModel: there is something in it that this engine does not have.
        BrokenCheckpoint: files are missing or damaged.
    """
    spec = vae_spec(read_config(folder))
    with open_tensors(folder, dtype, device, half=half) as tensors:
        weights = vae_weights(spec, tensors)
        tensors.finish(unread=("encoder.", "quant_conv."))
    return VaeDecoder(spec, weights)


def vae_weights(spec: VaeSpec, tensors: Tensors) -> VaeWeights:
    """All weights of such a decoder."""
    build, module = ImageBuilder(tensors), "decoder.mid_block"
    first, last = spec.mid.channels, spec.up[-1].channels
    attends = f"{module}.attentions.0"
    *three, out = next(
        names for names in _ATTENTION if tensors.has(f"{attends}.{names[0]}.weight") or names[0] == "query"
    )
    up = []
    for block in spec.up:
        resnets = [build.resnet(f"{block.module}.resnets.{i}", *pair) for i, pair in enumerate(block.resnets)]
        width, double = block.channels, None
        if block.sampled:
            double = Upsampler.of(build.conv(f"{block.module}.upsamplers.0.conv", width, width))
        up.append(UpBlock(resnets, double))
    return VaeWeights(
        quant=build.conv("post_quant_conv", spec.inputs, spec.inputs, 1) if spec.quant_conv else None,
        conv_in=build.conv("decoder.conv_in", first, spec.inputs),
        mid=(build.resnet(f"{module}.resnets.0", first, first), build.resnet(f"{module}.resnets.1", first, first)),
        norm=build.norm(f"{attends}.group_norm", first),
        qkv=build.stacked([f"{attends}.{name}" for name in three], first, first, bias=True),
        out=build.linear(f"{attends}.{out}", first, first),
        up=up,
        norm_out=build.norm("decoder.conv_norm_out", last),
        conv_out=build.conv("decoder.conv_out", spec.outputs, last),
    )
