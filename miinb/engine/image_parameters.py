"""How many numbers the weights of an image pipeline hold, from its configurations: where there are no files to ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miinb.engine.diffusion_spec import BlockSpec, UnetSpec, VaeSpec, diffusion_spec


def count_pipeline(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Parameters of UNet, VAE and text encoder.

    Raises:
        UnsupportedModel: the engine does not know the UNet or the VAE.
    """
    spec = diffusion_spec(configs)
    return count_unet(spec.unet) + count_vae(spec.vae) + _text_encoder(configs["text_encoder"])


def count_unet(spec: UnetSpec) -> int:
    """Parameters of a UNet."""
    wide = 4 * spec.channels
    ends = _conv(spec.inputs, spec.channels) + _conv(spec.channels, spec.outputs) + 2 * spec.channels
    time = _linear(spec.channels, wide) + _linear(wide, wide)
    return ends + time + sum(_block(block, wide, spec.text_width) for block in spec.blocks)


def quantized_matrices(spec: UnetSpec) -> list[tuple[int, int]]:
    """Rows and columns of what `unet_weights.py` quantizes."""
    found = list[tuple[int, int]]()
    for block in spec.blocks:
        width, count = block.channels, _transformers(block)
        layer = [(3 * width, width), *((width, width),) * 3, (8 * width, width), (width, 4 * width)]
        layer.append((2 * width, spec.text_width))  # keys and values of the text
        found += count * [(width, width), (width, width), *block.layers * layer]
    return found


def _transformers(block: BlockSpec) -> int:
    if not block.heads:
        return 0
    return 1 if block.module == "mid_block" else len(block.resnets)


def count_vae(spec: VaeSpec) -> int:
    """Parameters of a VAE: its decoder, and the encoder that belongs to it (of one residual block less a level)."""
    wide, narrow, z = spec.mid.channels, spec.up[-1].channels, spec.inputs
    middle = _block(spec.mid, 0, 0, attends=False) + 2 * wide + 4 * _linear(wide, wide)
    decoder = _conv(z, wide) + middle + 2 * narrow + _conv(narrow, spec.outputs)
    decoder += sum(_block(block, 0, 0) for block in spec.up) + spec.quant_conv * _linear(z, z)
    encoder = (
        _conv(spec.outputs, narrow) + middle + 2 * wide + _conv(wide, 2 * z) + spec.quant_conv * _linear(2 * z, 2 * z)
    )
    widths = [block.channels for block in reversed(spec.up)]
    for level, width in enumerate(widths):
        before, count = widths[max(level - 1, 0)], len(spec.up[0].resnets) - 1
        encoder += _resnet(before, width, 0) + (count - 1) * _resnet(width, width, 0)
        encoder += _conv(width, width) if level + 1 < len(widths) else 0
    return decoder + encoder


def _block(block: BlockSpec, time: int, text: int, *, attends: bool = True) -> int:
    width = block.channels
    count = sum(_resnet(*pair, time) for pair in block.resnets) + block.sampled * _conv(width, width)
    if not block.heads or not attends or not text:
        return count
    own, to_text = 3 * width * width + _linear(width, width), 2 * width * text + width * width + _linear(width, width)
    mlp = _linear(width, 8 * width) + _linear(4 * width, width)
    each = 2 * width + 2 * _linear(width, width) + block.layers * (6 * width + own + to_text + mlp)
    return count + _transformers(block) * each


def _resnet(inputs: int, outputs: int, time: int) -> int:
    count = 2 * inputs + _conv(inputs, outputs) + 2 * outputs + _conv(outputs, outputs)
    return count + (_linear(time, outputs) if time else 0) + (_linear(inputs, outputs) if inputs != outputs else 0)


def _conv(inputs: int, outputs: int) -> int:
    return 9 * inputs * outputs + outputs


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _text_encoder(config: Mapping[str, Any]) -> int:
    """CLIP's, with the defaults of its configuration."""
    width, inner = int(config.get("hidden_size", 512)), int(config.get("intermediate_size", 2048))
    layer = 4 * width + 4 * _linear(width, width) + _linear(width, inner) + _linear(inner, width)
    tables = int(config.get("vocab_size", 49408)) + int(config.get("max_position_embeddings", 77))
    return int(config.get("num_hidden_layers", 12)) * layer + tables * width + 2 * width
