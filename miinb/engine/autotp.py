"""DeepSpeed's AutoTP: this rank's part of a transformers model.

Each rank has read the whole model before it keeps its part. AutoTP replaces the linear layers: split by columns, or by
rows with a sum over the ranks after it; embeddings and norms stay whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miinb.engine.buffers import exact_buffers, put_back
from miinb.engine.caches import ROUNDING
from miinb.errors import UnsupportedModel


class _World:
    """What DeepSpeed asks for its group: all ranks of the process group that is there, with its time limit."""

    @staticmethod
    def get_model_parallel_group() -> Any:
        return torch.distributed.group.WORLD


@torch.inference_mode()
def split(model: Any, ranks: int, *, device: str, verify: bool) -> tuple[Any, float]:
    """Keep this rank's part of a model, on its device. All ranks call it together.

    Args:
        model: the whole model, on the CPU, the same on every rank.
        ranks: how many share it.
        device: "cuda" or "cpu".
        verify: compare a few tokens' logits with the whole model's.

    Returns:
        The model, and by how much its outputs differ from the whole model's, relative to the largest (0 unless
        verified).

    Raises:
        UnsupportedModel: AutoTP fails on it, or it answers differently.
    """
    import deepspeed

    whole = _outputs(model) if verify else None
    buffers = exact_buffers(model)
    family = model.config.model_type
    try:
        model = deepspeed.init_inference(
            model,
            dtype=model.dtype,
            replace_with_kernel_inject=False,
            tensor_parallel={"tp_size": ranks, "mpu": _World(), "tp_group": _World.get_model_parallel_group()},
        ).module
        put_back(model, buffers)
        model = model.to(device).eval()
        parts = _outputs(model) if verify else None
    except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError) as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise UnsupportedModel(
            f"DeepSpeed's AutoTP fails on this {family} ({type(error).__name__}: {first}).",
            hint="Use tensor_parallel=1.",
        ) from error
    if whole is None or parts is None:
        return model, 0.0
    difference = float((parts - whole).abs().max() / whole.abs().max())
    if not difference <= ROUNDING[model.dtype]:
        raise UnsupportedModel(
            f"DeepSpeed's AutoTP splits this {family} wrongly: its outputs differ by {difference:.1%}.",
            hint="Use tensor_parallel=1; replicas=N serves copies of it.",
        )
    return model, difference


def _outputs(model: Any) -> Tensor:
    """Logits (or hidden states) of a few tokens, fp32 on the CPU."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    token_ids = torch.arange(3, 11).remainder(vocabulary)[None].to(model.device)
    found: Tensor = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids))[0]
    return found.float().cpu()
