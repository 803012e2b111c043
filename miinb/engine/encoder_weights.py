"""An encoder's weights: from a checkpoint by name straight into the fused layout of one rank, without a second copy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor

from miinb.engine.decoder import Norm
from miinb.engine.encoder import EncoderLayer, EncoderWeights, HeadWeights, Matrix
from miinb.engine.encoder_spec import EncoderPolicy, EncoderSpec, HeadLayer
from miinb.engine.finite import check_finite
from miinb.engine.quantize import Quantizer
from miinb.engine.readers import DummyWeights, Reader, Region
from miinb.engine.spec import rank_share
from miinb.engine.weights import activation_dtype, equal, open_reader, quantizers
from miinb.errors import UnsupportedModel
from miinb.kernels.linear import PackedLinear
from miinb.messages import Phase
from miinb.models import ModelInfo

#: Lays a matrix out for the device's products; what it returns goes to the operator `linear` alone.
Pack = Callable[[PackedLinear], Matrix]


def _as_it_is(packed: PackedLinear) -> PackedLinear:
    return packed


@dataclass(slots=True)
class _Builder:
    """Fills one rank's weights; `consumed` holds the checkpoint names that were read."""

    info: ModelInfo
    policy: EncoderPolicy
    spec: EncoderSpec  # of the whole model
    reader: Reader
    dtype: torch.dtype
    device: torch.device
    quantizer: Quantizer | None
    tables: Quantizer | None  # of the embedding, where it is a matrix of the head, and of a head as large
    pack: Pack
    ranks: int = 1
    rank: int = 0
    consumed: set[str] = field(default_factory=set)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def fill(self, target: Tensor, name: str, region: Region) -> None:
        self.reader.fill(target, name, region)
        self.consumed.add(name)

    def module(self, part: str) -> str:
        """The checkpoint's module of a part that has one."""
        (module,) = self.policy.weights[part].modules
        return module

    def vector(self, name: str, size: int) -> Tensor:
        target = self.empty(size)
        self.fill(target, name, Region((size,), slice(0, size)))
        return target

    def norm(self, module: str, size: int) -> Norm:
        return Norm(self.vector(f"{module}.weight", size), self.vector(f"{module}.bias", size))

    def table(self, part: str, rows: int, skipped: int = 0) -> Tensor:
        """A table of embeddings, from a row on; the row before it, if there is one, is behind the others."""
        width = self.spec.embed_size
        target = self.empty(rows + bool(skipped), width)
        places = {skipped: target[:rows]} | ({skipped - 1: target[rows:]} if skipped else {})
        for first, found in places.items():
            region = Region((skipped + rows, width), slice(first, first + len(found)), slice(0, width))
            self.fill(found, f"{self.module(part)}.weight", region)
        return target

    def positions(self) -> Tensor:
        """The table of positions; a single token type is every token's, and so a part of it."""
        places = self.table("positions", self.spec.max_length, self.spec.position_offset)
        return places + self.table("token_types", 1) if self.spec.token_types == 1 else places

    def matrix(self, names: list[str], regions: list[Region], quantizer: Quantizer | None) -> PackedLinear:
        """Parts of the checkpoint's matrices, of equal width, one below the other; quantized if asked."""
        height, width = sum(region.height for region in regions), regions[0].width
        if quantizer is None:
            packed = PackedLinear(self.empty(height, width))
        else:
            weight, scale = quantizer.empty(height, width, self.device)
            packed = PackedLinear(weight, scale=scale)
        at = 0
        for name, region in zip(names, regions, strict=True):
            rows = slice(at, at + region.height)
            if quantizer is None or packed.scale is None:
                self.fill(packed.weight[rows], name, region)
            else:
                plain = self.empty(region.height, width)
                if self.device.type == "cuda":  # what is read goes there on other streams
                    torch.cuda.current_stream(self.device).synchronize()
                self.fill(plain, name, region)
                quantizer.quantize(plain, packed.weight[rows], packed.scale[rows])
            at += region.height
        return packed

    def whole(self, name: str, rows: int, columns: int, quantizer: Quantizer | None) -> PackedLinear:
        """One of the checkpoint's matrices, the same on every rank; quantized if asked."""
        return self.matrix([name], [Region((rows, columns), slice(0, rows), slice(0, columns))], quantizer)

    def linear(self, part: str, layer: int = 0) -> Matrix:
        """The rank's share of a fused linear layer of the body; the first rank alone has a bias that follows a sum."""
        source = self.policy.weights[part]
        modules = [module.format(i=layer) for module in source.modules]
        sizes, width, unit = self.spec.linear_shape(part)
        columns = rank_share(width, self.rank, self.ranks, unit) if source.split == "row" else slice(0, width)
        split = source.split == "column"
        shares = [rank_share(size, self.rank, self.ranks, unit) if split else slice(0, size) for size in sizes]
        regions = [Region((size, width), share, columns) for size, share in zip(sizes, shares, strict=True)]
        packed = self.matrix([f"{module}.weight" for module in modules], regions, self.quantizer)
        biases = [f"{module}.bias" for module in modules]
        if source.split == "row" and self.rank > 0:
            self.consumed.update(biases)
            return self.packed(packed)
        packed.bias, at = self.empty(packed.weight.shape[0]), 0
        for name, region in zip(biases, regions, strict=True):
            end = at + region.height
            self.fill(packed.bias[at:end], name, Region(region.shape[:1], region.rows))
            at = end
        return self.packed(packed)

    def packed(self, packed: PackedLinear) -> Matrix:
        """The layer in the layout of the device. Raises BrokenCheckpoint where what is quantized is not finite."""
        if packed.scale is not None and self.device.type != "meta":
            check_finite([packed.scale], self.info, self.dtype)
        return self.pack(packed)

    def layer(self, i: int) -> EncoderLayer:
        hidden = self.spec.hidden_size
        return EncoderLayer(
            qkv=self.linear("qkv", i),
            out=self.linear("out", i),
            up=self.linear("up", i),
            down=self.linear("down", i),
            attn_norm=self.norm(self.module("attn_norm").format(i=i), hidden),
            mlp_norm=self.norm(self.module("mlp_norm").format(i=i), hidden),
        )

    def words(self) -> PackedLinear:
        """The tokens' embedding, quantized only where it is a matrix of the head too."""
        rows, width = self.spec.vocab_size, self.spec.embed_size
        if self.spec.decodes and self.spec.tied:
            return self.whole(f"{self.module('words')}.weight", rows, width, self.tables)
        return PackedLinear(self.table("words", rows))

    def head_layer(self, layer: HeadLayer, shape: tuple[int, int], words: PackedLinear) -> HeadWeights:
        outputs, inputs = shape
        decodes = layer.outputs == "vocab"
        tied, quantizer = decodes and self.spec.tied, self.tables if decodes else self.quantizer
        weight = f"{layer.module}.weight"
        if not tied:
            packed = self.whole(weight, outputs, inputs, quantizer)
        elif weight in self.reader.names():  # transformers unties those that differ, whatever config.json says
            own = self.whole(weight, outputs, inputs, quantizer)
            packed = words if equal(own, words) else own
        else:
            packed = words
        bias = self.vector(self._bias(layer, tied), outputs)
        linear = PackedLinear(packed.weight, bias, packed.scale)  # of `words` itself there is no second layout
        return HeadWeights(
            linear if packed is words else self.packed(linear), self.norm(layer.norm, outputs) if layer.norm else None
        )

    def _bias(self, layer: HeadLayer, tied: bool) -> str:
        """The name of a layer's bias; checkpoints may have two, of which one counts."""
        own, there = f"{layer.module}.bias", self.reader.names()
        found = [name for name in (own, layer.bias) if name in there]
        self.consumed.update(found)
        if tied and layer.bias in there:
            return layer.bias
        return found[0] if found else own


def load_encoder_weights(
    info: ModelInfo,
    policy: EncoderPolicy,
    spec: EncoderSpec,
    *,
    dtype: str,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    dummy: bool = False,
    levels: int = 127,
    pack: Pack = _as_it_is,
    report: Callable[[Phase], None] = lambda phase: None,
) -> EncoderWeights:
    """One rank's weights of an encoder, and all of its head.

    Args:
        info: the model's files; `models.ModelInfo.serving` has seen that the head is in them.
        policy: of its family.
        spec: of the whole model, not of the rank, with the head of the task.
        dtype: "fp32", "bf16", "fp16", or "int8" or "fp8" for matrices of those (a head over the
            vocabulary always of int8) and the rest in `activation_dtype`.
        device: where the weights go.
        rank: which share.
        ranks: how many there are.
        dummy: random weights instead of the checkpoint's.
        levels: the largest number of int8 weights.
        pack: lays each matrix out for the device's products, when it is read.
        report: told "load", layer by layer.

    Raises:
        BrokenCheckpoint: a tensor is missing or has another shape.
        UnsupportedModel: the checkpoint holds tensors that the policy does not know.
    """
    with ExitStack() as stack:
        reader = DummyWeights(device) if dummy else open_reader(info, policy.prefix, device, stack)
        quantizer, tables = quantizers(dtype, device, levels)
        kind = activation_dtype(dtype, device, info.dtype)
        build = _Builder(info, policy, spec, reader, kind, device, quantizer, tables, pack, ranks, rank)
        words = build.words()
        layers = []
        for i in range(spec.layers):
            report(Phase("load", i, spec.layers))
            layers.append(build.layer(i))
        weights = EncoderWeights(
            words=words.weight,
            words_scale=words.scale,
            positions=build.positions(),
            token_types=build.table("token_types", spec.token_types) if spec.token_types > 1 else None,
            embed_norm=build.norm(build.module("embed_norm"), spec.embed_size),
            project=build.linear("project") if spec.projected else None,
            layers=layers,
            head=[build.head_layer(*each, words) for each in zip(spec.head.layers, spec.head_shapes(), strict=True)],
        )
        weights.rounding = quantizer.rounding if quantizer else 0.0
        weights.unread = _left_over(reader.names() - build.consumed, policy, info.source)
    report(Phase("load", spec.layers, spec.layers))
    return weights


def _left_over(left: set[str], policy: EncoderPolicy, source: str) -> tuple[str, ...]:
    """The heads' modules that were not read; an unknown tensor would change the answer, and raises UnsupportedModel."""
    heads = {layer.module: layer for head in policy.heads.values() for layer in head.layers}
    modules = {name for layer in heads.values() for name in (layer.module, layer.norm) if name}
    others = {layer.bias for layer in heads.values()}
    unknown, unread = [], set()
    for name in sorted(left):
        module = name.rpartition(".")[0]
        if any(fnmatch(name, pattern) for pattern in policy.ignored):
            continue
        if module in modules or name in others:
            unread.add(module)
        else:
            unknown.append(name)
    if unknown:
        text = f"{source} has {len(unknown)} tensors unknown to {policy.family}: {', '.join(unknown[:3])}."
        raise UnsupportedModel(text)
    return tuple(sorted(unread))
