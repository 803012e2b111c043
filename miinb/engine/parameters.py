"""How many numbers a decoder's weights hold, counted from its spec and policy as `weights.py` lays them out."""

from __future__ import annotations

from dataclasses import dataclass

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


def _linear(spec: DecoderSpec, part: str) -> tuple[int, int]:
    """Numbers in a linear layer's weight and in its bias."""
    sizes, width, has_bias, _ = linear_shape(spec, part)
    return sum(sizes) * width, sum(sizes) if has_bias else 0


def _layer_norms(spec: DecoderSpec, policy: Policy) -> int:
    each = 2 if spec.norm == "layer" else 1
    norms = sum(part in policy.weights for part in LAYER_NORMS)
    return norms * each * spec.hidden_size + (2 * spec.head_size if spec.qk_norm else 0)
