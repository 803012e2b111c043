"""From a checkpoint by name straight into the fused layout, dtype and shard of one rank, without a second copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from miinb.engine.calibrate import Calibration
from miinb.engine.decoder import DecoderWeights, LayerWeights, Norm
from miinb.engine.quantize import Quantizer
from miinb.engine.readers import DummyWeights, GGUFWeights, Reader, Region, SafetensorsReader
from miinb.engine.spec import DecoderSpec, Policy, Source, linear_shape, rank_share
from miinb.engine.transfer import Transfer
from miinb.errors import UnsupportedModel
from miinb.kernels.linear import PackedLinear
from miinb.messages import Phase
from miinb.models import ModelInfo

#: Dtypes of weights that are what they say.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Numbers of a matrix that are there unquantized at a time, on a GPU.
_SLICE = 1 << 24


def activation_dtype(dtype: str, device: torch.device, checkpoint: str) -> torch.dtype:
    """Of activations, the cache, and all weights that are not quantized.

    Args:
        dtype: the deployment's. With quantized weights a CPU computes in fp32, a GPU in fp16 if the checkpoint is fp16,
            else in bf16; with "fp8" always in bf16, which products of fp8 come in.
        device: where.
        checkpoint: the checkpoint's dtype, by miinb's names.
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if checkpoint == "fp16" and dtype != "fp8" else torch.bfloat16


@dataclass(slots=True)
class _Builder:
    """Fills one rank's weights; `consumed` holds the checkpoint names that were read."""

    policy: Policy
    spec: DecoderSpec  # of the whole model
    reader: Reader
    dtype: torch.dtype
    device: torch.device
    ranks: int
    rank: int
    source_dtype: torch.dtype  # of a matrix that is to be quantized
    quantizer: Quantizer | None
    tables: Quantizer | None  # of the embedding and the head
    consumed: set[str]

    def has(self, part: str) -> bool:
        return part in self.policy.weights

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def fill(self, target: Tensor, name: str, region: Region) -> None:
        self.reader.fill(target, name, region)
        self.consumed.add(name)

    def vector(self, part: str, size: int, layer: int = 0, kind: str = "weight") -> Tensor:
        """A norm's weight or bias, whole on every rank."""
        return self.fill_vector(self.empty(size), part, layer, kind)

    def fill_vector(self, target: Tensor, part: str, layer: int, kind: str = "weight") -> Tensor:
        (module,) = self.policy.weights[part].modules
        size = len(target)
        name, region = f"{module.format(i=layer)}.{kind}", Region((size,), slice(0, size))
        if kind == "bias" or not self.policy.norm_offset:
            self.fill(target, name, region)
            return target
        exact = torch.empty(size, dtype=torch.float32)
        self.fill(exact, name, region)
        return target.copy_(exact + self.policy.norm_offset)

    def norm(self, part: str, layer: int = 0, *, size: int | None = None) -> Norm | None:
        if not self.has(part):
            return None
        size = size or self.spec.hidden_size
        bias = self.vector(part, size, layer, "bias") if self.spec.norm == "layer" else None
        return Norm(self.vector(part, size, layer), bias)

    def norms(self, parts: Sequence[str], layer: int) -> Norm:
        """Several norms as one: [norms, hidden]."""
        shape = (len(parts), self.spec.hidden_size)
        both = Norm(self.empty(*shape), self.empty(*shape) if self.spec.norm == "layer" else None)
        for i, part in enumerate(parts):
            self.fill_vector(both.weight[i], part, layer)
            if both.bias is not None:
                self.fill_vector(both.bias[i], part, layer, "bias")
        return both

    def matrix(self, rows: int, columns: int, quantizer: Quantizer | None) -> PackedLinear:
        """Room for a weight matrix, which may be quantized."""
        if quantizer is None:
            return PackedLinear(self.empty(rows, columns))
        weight, scale = quantizer.empty(rows, columns, self.device)
        return PackedLinear(weight, scale=scale)

    def fill_matrix(
        self, target: PackedLinear, rows: slice, name: str, region: Region, quantizer: Quantizer | None
    ) -> None:
        """Fill rows of a matrix from one tensor of the checkpoint, of which a slice at a time is there unquantized."""
        if quantizer is None or target.scale is None:
            self.fill(target.weight[rows], name, region)
            return
        for first, last, part in region.slices(_SLICE):
            plain = torch.empty((last - first, region.width), dtype=self.source_dtype, device=self.device)
            if self.device.type == "cuda":  # what is read goes there on other streams
                torch.cuda.current_stream(self.device).synchronize()
            self.fill(plain, name, part)
            to = slice(rows.start + first, rows.start + last)
            quantizer.quantize(plain, target.weight[to], target.scale[to])

    def embedding(self, rows: int, width: int) -> PackedLinear:
        """The tokens' embedding, whole on every rank."""
        (module,), (head,) = self.policy.weights["embed"].modules, self.policy.weights["head"].modules
        names = self.reader.names()
        if self.spec.tied and f"{module}.weight" not in names and f"{head}.weight" in names:
            module = head  # one tensor under the other's name
        target = self.matrix(rows, width, self.tables)
        region = Region((rows, width), slice(0, rows), slice(0, width))
        self.fill_matrix(target, slice(0, rows), f"{module}.weight", region, self.tables)
        return target

    def positions(self, rows: int, width: int) -> Tensor:
        """The table of learned positions, whole on every rank."""
        (module,) = self.policy.weights["positions"].modules
        target = self.empty(rows, width)
        self.fill(target, f"{module}.weight", Region((rows, width), slice(0, rows), slice(0, width)))
        return target

    def share(self, total: int, unit: int = 1) -> slice:
        """This rank's part of `total` rows or columns that go in whole `unit`s (heads)."""
        return rank_share(total, self.rank, self.ranks, unit)

    def vocabulary(self) -> slice:
        """This rank's rows of the head."""
        count = self.spec.vocabulary_share(self.ranks)
        return slice(self.rank * count, min((self.rank + 1) * count, self.spec.vocab_size))

    def linear(self, part: str, layer: int = 0) -> PackedLinear:
        """A fused linear layer of `part`: the rank's rows of every matrix in it, one below the other."""
        source = self.policy.weights[part]
        sizes, width, has_bias, unit = linear_shape(self.spec, part)
        columns = self.share(width, unit) if source.split == "row" else slice(0, width)
        shares = [self.share(size, unit) if source.split == "column" else slice(0, size) for size in sizes]
        shares = [self.vocabulary()] if part == "head" else shares
        quantizer = self.tables if part == "head" else self.quantizer
        packed = self.matrix(sum(s.stop - s.start for s in shares), columns.stop - columns.start, quantizer)
        bias = self.empty(packed.weight.shape[0]) if has_bias and (source.split != "row" or self.rank == 0) else None
        at = 0
        for module, total, offset, share in _matrices(source, sizes, shares, layer):
            rows = slice(offset + share.start, offset + share.stop)
            end = at + share.stop - share.start
            head_size = unit if source.by_head else 0
            region = Region((total, width), rows, columns, source.transposed, head_size)
            self.fill_matrix(packed, slice(at, end), f"{module}.weight", region, quantizer)
            if has_bias:
                self.consumed.add(f"{module}.bias")
            if bias is not None:
                self.fill(bias[at:end], f"{module}.bias", Region((total,), rows, head_size=head_size))
            at = end
        return PackedLinear(packed.weight, bias, packed.scale)

    def plain(self) -> _Builder:
        """The same, without quantized layers."""
        return replace(self, quantizer=None)  # what is read is noted in the same place

    def layer(self, i: int) -> LayerWeights:
        both = self.spec.block == "parallel_norms"
        attn_norm = self.norms(("attn_norm", "mlp_norm"), i) if both else self.norm("attn_norm", i)
        if attn_norm is None:
            raise RuntimeError(f"the policy of {self.policy.family} has no attn_norm")
        head_size = self.spec.head_size
        return LayerWeights(
            qkv=self.linear("qkv", i),
            out=self.linear("out", i),
            up=self.linear("up", i),
            down=self.linear("down", i),
            attn_norm=attn_norm,
            mlp_norm=None if both else self.norm("mlp_norm", i),
            attn_post_norm=self.norm("attn_post_norm", i),
            mlp_post_norm=self.norm("mlp_post_norm", i),
            q_norm=self.vector("q_norm", head_size, i) if self.spec.qk_norm else None,
            k_norm=self.vector("k_norm", head_size, i) if self.spec.qk_norm else None,
        )

    def head(self, embed: PackedLinear) -> PackedLinear:
        """The rank's rows of the head: of the embedding, where they are tied."""
        if not self.spec.tied:
            return self.linear("head")
        (module,) = self.policy.weights["head"].modules
        share, bias = self.vocabulary(), None
        rows = PackedLinear(embed.weight[share], None, embed.scale[share] if embed.scale is not None else None)
        if f"{module}.weight" in self.reader.names():
            own = self.linear("head")
            if not equal(PackedLinear(own.weight, None, own.scale), rows):
                return own  # transformers unties those that differ, whatever config.json says
        if self.spec.head_bias:
            bias = self.empty(share.stop - share.start)
            self.fill(bias, f"{module}.bias", Region((self.spec.vocab_size,), share))
        return PackedLinear(rows.weight, bias, rows.scale)


def _matrices(
    source: Source, sizes: list[int], shares: list[slice], layer: int
) -> Iterator[tuple[str, int, int, slice]]:
    """For each matrix of a fused layer: its module, the module's rows, where it begins in them, the rank's share."""
    modules = [module.format(i=layer) for module in source.modules]
    if source.by_head:  # whole heads, each with its share of every matrix
        parts = len(sizes)
        yield modules[0], sum(sizes), 0, slice(parts * shares[0].start, parts * shares[0].stop)
        return
    if source.sections == 1:
        for module, size, share in zip(modules, sizes, shares, strict=True):
            yield module, size, 0, share
        return
    offset = 0
    for size, share in zip(sizes, shares, strict=True):
        yield modules[0], sum(sizes), offset, share
        offset += size


def load_weights(
    info: ModelInfo,
    policy: Policy,
    spec: DecoderSpec,
    *,
    dtype: str,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    dummy: bool = False,
    quantize_head: bool = True,
    calibration: Sequence[int] = (),
    report: Callable[[Phase], None] = lambda phase: None,
) -> DecoderWeights:
    """One rank's weights.

    Args:
        info: the model's files.
        policy: of its family.
        spec: of the whole model, not of the rank.
        dtype: "fp32", "bf16", "fp16", or a quantized one for matrices of it and the rest in `activation_dtype`.
        device: where the weights go.
        rank: which share.
        ranks: how many there are.
        dummy: random weights instead of the checkpoint's.
        quantize_head: whether the embedding and the head of quantized weights are int8, or as the activations.
        calibration: with "int4", on one rank: tokens of a text that the rounding is fitted to (`calibrate.py`).
        report: told "load", layer by layer.

    Raises:
        BrokenCheckpoint: a tensor is missing or has another shape.
        MissingHead: the head is not in the checkpoint.
        UnsupportedModel: the checkpoint holds tensors that the policy does not know.
    """
    with ExitStack() as stack:
        reader = DummyWeights(device) if dummy else open_reader(info, policy.prefix, device, stack)
        kind = activation_dtype(dtype, device, info.dtype)
        source = kind if device.type == "cpu" else DTYPES.get(info.dtype, kind)
        quantizer, tables = quantizers(dtype, device)
        tables = tables if quantize_head else None
        build = _Builder(policy, spec, reader, kind, device, ranks, rank, source, quantizer, tables, set())
        width = spec.embed_size or spec.hidden_size
        embed = build.embedding(spec.vocab_size, width)
        weights = DecoderWeights(
            embed=embed.weight,
            embed_scale=embed.scale,
            layers=[],
            head=build.head(embed),
            norm=build.norm("norm") if spec.final_norm else None,
            positions=build.positions(spec.positions, spec.hidden_size) if spec.positions else None,
            embed_norm=build.norm("embed_norm", size=width) if spec.embed_norm else None,
            project_in=build.linear("project_in") if spec.embed_size else None,
            project_out=build.linear("project_out") if spec.embed_size else None,
        )
        _add_layers(build, weights, calibration, report)
        weights.rounding = quantizer.rounding if quantizer else 0.0
        _check_left_over(reader.names() - build.consumed, policy, spec, info.source)
    report(Phase("load", spec.layers, spec.layers))
    return weights


def _add_layers(
    build: _Builder, weights: DecoderWeights, calibration: Sequence[int], report: Callable[[Phase], None]
) -> None:
    fit = None
    if calibration and build.quantizer is not None and build.quantizer.kind == "int4":
        fit = Calibration(calibration, build.spec, build.quantizer.account, build.device)
    for i in range(build.spec.layers):
        report(Phase("load", i, build.spec.layers))
        if fit is None:
            weights.layers.append(build.layer(i))
        else:
            fit.add(build.plain().layer(i), weights)
    weights.fitted_tokens = fit.tokens if fit else 0


def quantizers(dtype: str, device: torch.device, levels: int = 127) -> tuple[Quantizer | None, Quantizer | None]:
    """Of layers, and of the embedding and the head, with one account; (None, None) where nothing is quantized."""
    if dtype in DTYPES:
        return None, None
    tables = Quantizer(levels=levels, words=device.type != "cpu")
    if dtype == "int8":
        return tables, tables
    return Quantizer("int4" if dtype == "int4" else "fp8", account=tables.account), tables


def open_reader(info: ModelInfo, prefix: str, device: torch.device, stack: ExitStack) -> Reader:
    """The reader of a model's files, whose names come without the prefix; `stack` closes it."""
    transfer = Transfer(device)
    stack.callback(transfer.close)
    if info.format == "gguf":
        return GGUFWeights(info, transfer)
    return SafetensorsReader(info, prefix, transfer, stack)


def _check_left_over(left: set[str], policy: Policy, spec: DecoderSpec, source: str) -> None:
    """Every tensor of a checkpoint is used or known to hold no parameters; an unknown one would change the answer."""
    ignored = [*policy.ignored, *(f"{name}.weight" for name in policy.weights["head"].modules if spec.tied)]
    unknown = sorted(name for name in left if not any(fnmatch(name, pattern) for pattern in ignored))
    if unknown:
        raise UnsupportedModel(
            f"{source} has {len(unknown)} tensors unknown to {policy.family}: {', '.join(unknown[:3])}."
        )


def equal(one: PackedLinear, other: PackedLinear) -> bool:
    """Whether two matrices are the same to the byte (not all dtypes can be compared)."""
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def weights_bytes(weights: Any) -> int:
    """Bytes of a rank's weights (a dataclass of them); a tied head counts once."""
    seen: Mapping[int, int] = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(weights)}
    return sum(seen.values())


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in weights or in a part of them; a tied head comes twice."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors(getattr(value, name))
