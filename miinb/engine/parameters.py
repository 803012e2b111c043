"""How many numbers a model's weights hold, counted from its spec and policy as it loads them."""

from __future__ import annotations

from dataclasses import dataclass

from miinb.engine.encoder_spec import EncoderSpec
from miinb.engine.spec import LAYER_NORMS, DecoderSpec, Policy, linear_shape

#: Linear layers of each layer; `weights.py` fuses what the checkpoint has apart.
_LAYER_LINEARS = ("qkv", "out", "up", "down")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers in the weights.

    Attributes:
        matrices: in the linear layers' weights, a head of its own included: what weight-only quantization makes small.
        others: in embeddings, norms and biases.
    """

    matrices: int
    others: int

    @property
    def total(self) -> int:
        """All of them; a tied head counts once."""
        return self.matrices + self.others


def count_parameters(spec: DecoderSpec, policy: Policy) -> Parameters:
    """The parameters of a whole decoder (not of a rank's share)."""
    linears = [_linear(spec, part) for part in _LAYER_LINEARS]
    matrices = spec.layers * sum(weight for weight, _ in linears)
    others = spec.layers * (sum(bias for _, bias in linears) + _layer_norms(spec, policy))
    for part in ("project_in", "project_out") if spec.embed_size else ():
        matrices += _linear(spec, part)[0]
    head, head_bias = _linear(spec, "head")
    if not spec.tied:
        matrices += head
    others += head_bias
    width = spec.embed_size or spec.hidden_size
    others += spec.vocab_size * width + spec.positions * spec.hidden_size
    each = 2 if spec.norm == "layer" else 1
    others += each * (spec.final_norm * spec.hidden_size + spec.embed_norm * width)
    return Parameters(matrices, others)


def rank_matrices(spec: DecoderSpec, matrices: int, ranks: int) -> int:
    """How many of a decoder's numbers in matrices each rank has: its share, and of few key/value heads a copy.

    Args:
        spec: of the whole model.
        matrices: of `count_parameters`.
        ranks: that share them.
    """
    copied = -spec.kv_heads % ranks  # heads that are on more ranks than one, once for each rank too many
    return -(-(matrices + 2 * copied * spec.head_size * spec.hidden_size * spec.layers) // ranks)


#: Dtypes of weights alone: numbers with scales (kernels/formats.py has the layouts).
QUANTIZED = ("int8", "int4", "fp8")
#: Columns of a quantized matrix that share a scale; in fp8 all of a row do.
_GROUP = 64


def activation_bytes(dtype: str, *, on_gpu: bool) -> float:
    """Bytes of an activation, and of a number in the cache, by the dtype of the weights."""
    if dtype in QUANTIZED:
        return 2.0 if on_gpu else 4.0
    return {"fp32": 4.0}.get(dtype, 2.0)


def row_bytes(columns: int, dtype: str, *, on_gpu: bool) -> int:
    """Bytes of a row of a quantized matrix, with its scales."""
    if dtype == "fp8":
        return -(-columns // 16) * 16 + 4
    groups = -(-columns // _GROUP)
    if dtype == "int4":
        return -(-columns // 32) * 16 + groups * 4
    return -(-columns // 16) * 16 + groups * 2 if on_gpu else columns + groups * 4


def quantized_bytes(
    spec: DecoderSpec, policy: Policy, dtype: str, ranks: int = 1, *, on_gpu: bool, tables: bool = True
) -> int:
    """Bytes of a decoder's quantized weights, of each of several ranks those of the first.

    Args:
        spec: of the whole model.
        policy: of its family.
        dtype: one of `QUANTIZED`.
        ranks: that share it.
        on_gpu: the form of the numbers, and of what is not quantized.
        tables: whether the embedding and the head are int8.
    """
    local, number = spec.shard(ranks), activation_bytes(dtype, on_gpu=on_gpu)
    others = count_parameters(spec, policy).others - spec.vocab_size * (spec.embed_size or spec.hidden_size)
    size = int(others * number)
    parts = (*_LAYER_LINEARS * spec.layers, *(("project_in", "project_out") if spec.embed_size else ()))
    for part in parts:
        sizes, columns, _, _ = linear_shape(local, part)
        size += sum(sizes) * row_bytes(columns, dtype, on_gpu=on_gpu)
    columns = spec.embed_size or spec.hidden_size
    row = row_bytes(columns, "int8", on_gpu=on_gpu) if tables else int(columns * number)
    return size + (spec.vocab_size + (0 if spec.tied else local.vocab_size)) * row


#: A CPU's int8 tiles (kernels/cpu_blocks.py): of so many outputs (with AVX-512 of twice as many, which matters to tiny
#: models alone), and for each output and group of columns the numbers, a scale, and what their sum begins with.
TILE_OUTPUTS = 16
_TILE_BYTES = _GROUP + 4 + 4


def count_encoder(spec: EncoderSpec) -> Parameters:
    """The parameters of an encoder (or of a rank's share of it) with its head, as `encoder_weights.py` has them."""
    matrices, others = _encoder_numbers(spec)
    return Parameters(sum(rows * columns for rows, columns in matrices), others)


def quantized_encoder_bytes(spec: EncoderSpec, dtype: str, tile: int = TILE_OUTPUTS, *, on_gpu: bool = False) -> int:
    """Bytes of an encoder with quantized matrices: in a CPU's tiles of so many outputs, or in the form of a GPU."""
    matrices, others = _encoder_numbers(spec)
    size = int(activation_bytes(dtype, on_gpu=on_gpu)) * others
    table = (spec.vocab_size, spec.embed_size)
    if on_gpu:
        if spec.decodes:  # int8 too where others are fp8
            matrices.remove(table)
            size += table[0] * row_bytes(table[1], "int8", on_gpu=True)
        return size + sum(rows * row_bytes(columns, dtype, on_gpu=True) for rows, columns in matrices)
    if spec.decodes and spec.tied:  # the embedding, which tokens are looked up in too, stays as it is
        matrices.remove(table)
        size += spec.vocab_size * (spec.embed_size + 4 * -(-spec.embed_size // _GROUP))
    for rows, columns in matrices:
        size += -(-rows // tile) * tile * -(-columns // _GROUP) * _TILE_BYTES
    return size


def rank_encoder(spec: EncoderSpec, ranks: int) -> EncoderSpec:
    """What each rank has of an encoder; one that does not divide (AutoTP may still split it) counts whole."""
    return spec if spec.misfit(ranks) else spec.shard(ranks)


def encoder_bytes(spec: EncoderSpec, dtype: str, ranks: int = 1, *, on_gpu: bool) -> int:
    """Bytes of an encoder's weights with its head, of each of several ranks those of the first."""
    local = rank_encoder(spec, ranks)
    if dtype in QUANTIZED:
        return quantized_encoder_bytes(local, dtype, on_gpu=on_gpu)
    return int(count_encoder(local).total * activation_bytes(dtype, on_gpu=on_gpu))


#: Of the tokens of a step, one in so many is a mask whose logits over the vocabulary are wanted: about one a sentence.
_WANTED_SHARE = 16


def step_bytes(spec: EncoderSpec, number: float, tokens: int) -> int:
    """About what a step of so many tokens takes besides the weights: the widest part of a layer, or the head.

    Args:
        spec: of the encoder with its head.
        number: bytes of an activation.
        tokens: of all sequences of the step.
    """
    layer = max(spec.hidden_size + 4 * spec.heads * spec.head_size, 3 * spec.hidden_size + spec.inner_size)
    rows = -(-tokens // {"first": spec.max_length, "all": 1, "wanted": _WANTED_SHARE}[spec.head.rows])
    outputs = max((spec.width(part) for part in spec.head.layers), default=spec.hidden_size)
    return int(max(tokens * layer * number, rows * outputs * (number + 4)))  # outputs are reduced in fp32


def _encoder_numbers(spec: EncoderSpec) -> tuple[list[tuple[int, int]], int]:
    """[rows, columns] of each matrix that may be quantized, and the numbers in all else."""
    body = [spec.linear_shape(part) for part in (*_LAYER_LINEARS * spec.layers, *("project",) * spec.projected)]
    matrices = [(sum(sizes), columns) for sizes, columns, _ in body]
    others = 4 * spec.hidden_size * spec.layers + 2 * spec.embed_size  # norms
    places = spec.max_length + (spec.padding is not None)
    others += spec.embed_size * (places + (spec.token_types if spec.token_types > 1 else 0))
    words = (spec.vocab_size, spec.embed_size)
    for layer, shape in zip(spec.head.layers, spec.head_shapes(), strict=True):
        others += 2 * shape[0] if layer.norm else 0
        matrices.append(shape)
    others += sum(rows for rows, _ in matrices)  # biases
    if not spec.decodes or not spec.tied:  # the embedding is no matrix of the head, whose own is among them
        others += words[0] * words[1]
    return matrices, others


def _linear(spec: DecoderSpec, part: str) -> tuple[int, int]:
    """Numbers in a linear layer's weight and in its bias."""
    sizes, width, has_bias, _ = linear_shape(spec, part)
    return sum(sizes) * width, sum(sizes) if has_bias else 0


def _layer_norms(spec: DecoderSpec, policy: Policy) -> int:
    each = 2 if spec.norm == "layer" else 1
    norms = sum(part in policy.weights for part in LAYER_NORMS)
    return norms * each * spec.hidden_size + (2 * spec.head_size if spec.qk_norm else 0)
