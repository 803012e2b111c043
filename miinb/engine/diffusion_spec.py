"""What the UNet and the VAE decoder of Stable Diffusion 1.x and 2.x are, as data read from their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miinb.errors import UnsupportedModel

#: Values that the computation here has, of options that other models set otherwise; what is not there has them.
_UNET_FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
_UNET_READ = {
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types"),
    *("attention_head_dim", "cross_attention_dim", "transformer_layers_per_block", "norm_num_groups", "norm_eps"),
    *("use_linear_projection", "flip_sin_to_cos", "freq_shift"),
}
#: Nothing of what is computed depends on these: attention scores are summed in fp32 whatever `upcast_attention` says.
_UNET_FREE = {"sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads"}

_VAE_FIXED = {"act_fn": "silu", "mid_block_add_attention": True}
_VAE_READ = {
    *("latent_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups"),
    *("up_block_types", "use_post_quant_conv"),
}
#: What belongs to the encoder, or to who scales the latents.
_VAE_FREE = {
    *("in_channels", "down_block_types", "sample_size", "scaling_factor", "shift_factor", "force_upcast"),
    *("use_quant_conv", "latents_mean", "latents_std"),
}

_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """Residual blocks of one resolution, each followed by a transformer where the block attends.

    Attributes:
        module: the checkpoint's.
        resnets: (channels in, channels out) of each; on the way up what is joined is counted as well.
        heads: of the attention; 0: there is none.
        layers: of each transformer.
        sampled: whether the block ends in a change of the resolution by two.
    """

    module: str
    resnets: tuple[tuple[int, int], ...]
    heads: int = 0
    layers: int = 0
    sampled: bool = False

    @property
    def channels(self) -> int:
        """Of its output."""
        return self.resnets[-1][1]


@dataclass(frozen=True, slots=True)
class UnetSpec:
    """The shape of a UNet's computation.

    Attributes:
        inputs, outputs: channels of the latents and of the prediction.
        text_width: of the text's embeddings.
        groups, eps: of the group norms (those of the transformers have an eps of 1e-6).
        linear_projection: whether the checkpoint has the transformers' projections as [out, in], not as convolutions.
        flip_sin_to_cos, freq_shift: of the sinusoids of timesteps.
        down, mid, up: the blocks, in their order.
    """

    inputs: int
    outputs: int
    text_width: int
    groups: int
    eps: float
    linear_projection: bool
    flip_sin_to_cos: bool
    freq_shift: float
    down: tuple[BlockSpec, ...]
    mid: BlockSpec
    up: tuple[BlockSpec, ...]

    @property
    def channels(self) -> int:
        """Of the first convolution's output, and so of the sinusoids."""
        return self.down[0].resnets[0][0]

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All of them, in their order."""
        return (*self.down, self.mid, *self.up)


@dataclass(frozen=True, slots=True)
class VaeSpec:
    """The shape of a VAE decoder's computation.

    Attributes:
        inputs, outputs: channels of the latents and of the picture.
        groups: of the group norms; their eps is 1e-6.
        quant_conv: whether a convolution of one place comes first.
        mid, up: the blocks; between the two residual blocks of `mid` is its attention, of one head.
    """

    inputs: int
    outputs: int
    groups: int
    quant_conv: bool
    mid: BlockSpec
    up: tuple[BlockSpec, ...]

    @property
    def scale(self) -> int:
        """Pixels of a latent's side."""
        return int(2 ** sum(block.sampled for block in self.up))


@dataclass(frozen=True, slots=True)
class DiffusionSpec:
    """What the engine computes of a pipeline."""

    unet: UnetSpec
    vae: VaeSpec


def diffusion_spec(configs: Mapping[str, Mapping[str, Any]]) -> DiffusionSpec:
    """That of a pipeline whose parts have these configurations.

    Raises:
        UnsupportedModel: there is something in them that the computation here does not have; the message says what.
    """
    unet, vae = unet_spec(configs["unet"]), vae_spec(configs["vae"])
    if not unet.inputs == unet.outputs == vae.inputs:
        channels = f"{unet.inputs} channels in, {unet.outputs} out and {vae.inputs} in the VAE"
        raise _unsupported(f"a UNet of {channels}")
    if vae.outputs != 3:
        raise _unsupported(f"a VAE of {vae.outputs} colors")
    return DiffusionSpec(unet, vae)


def unet_spec(config: Mapping[str, Any]) -> UnetSpec:
    """The computation that a config.json of diffusers' UNet2DConditionModel describes.

    Raises:
        UnsupportedModel: there is something in it that the computation here does not have; the message says what.
    """
    _check(config, "UNet2DConditionModel", _UNET_FIXED, _UNET_READ | _UNET_FREE)
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    down_types = _kinds(config, "down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), _DOWN)
    up_types = _kinds(config, "up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, _UP)
    depth = len(channels)
    if not len(down_types) == len(up_types) == depth:
        raise _unsupported(f"{len(down_types)} blocks down, {len(up_types)} up and {depth} widths")
    # The name is historical: it is the number of heads.
    heads = _each(config, "attention_head_dim", 8, depth)
    layers = _each(config, "transformer_layers_per_block", 1, depth)
    resnets = _each(config, "layers_per_block", 2, depth)
    groups = _number(config, "norm_num_groups", 32)
    _check_widths(channels, groups, heads)
    down = []
    for i, width in enumerate(channels):
        pairs = ((channels[max(i - 1, 0)], width), *((width, width),) * (resnets[i] - 1))
        attends = (heads[i], layers[i]) if down_types[i] else (0, 0)
        down.append(BlockSpec(f"down_blocks.{i}", pairs, *attends, sampled=i < depth - 1))
    up, below = [], channels[-1]
    for i, level in enumerate(reversed(range(depth))):
        width, next_width, count = channels[level], channels[max(level - 1, 0)], resnets[level] + 1
        joined = [(below if j == 0 else width) + (next_width if j == count - 1 else width) for j in range(count)]
        attends = (heads[level], layers[level]) if up_types[i] else (0, 0)
        up.append(BlockSpec(f"up_blocks.{i}", tuple((n, width) for n in joined), *attends, sampled=level > 0))
        below = width
    last = channels[-1]
    return UnetSpec(
        inputs=_number(config, "in_channels", 4),
        outputs=_number(config, "out_channels", 4),
        text_width=_number(config, "cross_attention_dim", 1280),
        groups=groups,
        eps=float(config.get("norm_eps", 1e-5)),
        linear_projection=bool(config.get("use_linear_projection", False)),
        flip_sin_to_cos=bool(config.get("flip_sin_to_cos", True)),
        freq_shift=float(config.get("freq_shift", 0)),
        down=tuple(down),
        mid=BlockSpec("mid_block", ((last, last), (last, last)), heads[-1], layers[-1]),
        up=tuple(up),
    )


def vae_spec(config: Mapping[str, Any]) -> VaeSpec:
    """The decoder that a config.json of diffusers' AutoencoderKL describes.

    Raises:
        UnsupportedModel: as of `unet_spec`.
    """
    _check(config, "AutoencoderKL", _VAE_FIXED, _VAE_READ | _VAE_FREE)
    channels = tuple(config.get("block_out_channels", (64,)))[::-1]
    kinds = _kinds(config, "up_block_types", ("UpDecoderBlock2D",), {"UpDecoderBlock2D": False})
    if len(kinds) != len(channels):
        raise _unsupported(f"{len(kinds)} blocks up and {len(channels)} widths")
    groups, count = _number(config, "norm_num_groups", 32), _number(config, "layers_per_block", 1) + 1
    _check_widths(channels, groups, (1,) * len(channels))
    up = []
    for i, width in enumerate(channels):
        pairs = ((channels[max(i - 1, 0)], width), *((width, width),) * (count - 1))
        up.append(BlockSpec(f"decoder.up_blocks.{i}", pairs, sampled=i < len(channels) - 1))
    first = channels[0]
    return VaeSpec(
        inputs=_number(config, "latent_channels", 4),
        outputs=_number(config, "out_channels", 3),
        groups=groups,
        quant_conv=bool(config.get("use_post_quant_conv", True)),
        mid=BlockSpec("decoder.mid_block", ((first, first), (first, first)), heads=1),
        up=tuple(up),
    )


def _check(config: Mapping[str, Any], kind: str, fixed: Mapping[str, Any], known: set[str]) -> None:
    if config.get("_class_name", kind) != kind:
        raise _unsupported(f"a {config['_class_name']}, not a {kind}")
    for name, value in config.items():
        if name in fixed:
            if value != fixed[name]:
                raise _unsupported(f"{name}={value!r}, not {fixed[name]!r}")
        elif name not in known and not name.startswith("_") and not _off(value):
            raise _unsupported(f"{name}={value!r}")


def _off(value: Any) -> bool:
    """Whether an option that is not known says that it is not used."""
    return value is None or value is False or (isinstance(value, list | tuple) and not any(value))


def _kinds(config: Mapping[str, Any], name: str, default: tuple[str, ...], known: Mapping[str, bool]) -> list[bool]:
    """Which blocks attend."""
    kinds = config.get(name, default)
    for kind in kinds:
        if kind not in known:
            raise _unsupported(f"a {kind} in {name}")
    return [known[kind] for kind in kinds]


def _each(config: Mapping[str, Any], name: str, default: int, depth: int) -> tuple[int, ...]:
    """One number for each resolution."""
    value = config.get(name, default)
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * depth
    if len(values) != depth or not all(isinstance(n, int) and n > 0 for n in values):
        raise _unsupported(f"{name}={value!r}")
    return values


def _number(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or value < 1:
        raise _unsupported(f"{name}={value!r}")
    return value


def _check_widths(channels: tuple[int, ...], groups: int, heads: tuple[int, ...]) -> None:
    for width, count in zip(channels, heads, strict=True):
        if width % groups or width % count:
            raise _unsupported(f"{width} channels in {groups} groups and {count} heads")


def _unsupported(what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The optimized diffusion engine does not know {what}.",
        hint='Use engine="baseline", which serves any pipeline.',
    )
