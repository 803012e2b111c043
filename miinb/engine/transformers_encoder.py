"""transformers' own model behind the executor of encoders: the baseline, and what serves where there is no fused form.

The packed batch is padded at the right with the model's padding token and an attention mask, as a tokenizer pads: what
derives positions from the padding (RoBERTa, MPNet) finds them as in a batch of one.
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miinb.config import DeploymentConfig
from miinb.engine.caches import ROUNDING
from miinb.engine.encode_queue import Bounds
from miinb.engine.encoder import EncoderBatch
from miinb.engine.encoding import EncodeExecutor
from miinb.engine.lockstep import Lead
from miinb.engine.reduction import check_task
from miinb.messages import EngineInfo, Phase

Report = Callable[[Phase], None]
#: Most tokens of a step, for models that take long texts.
MOST_TOKENS = 65536


class TransformersEncoder:
    """A transformers model as an `encoding.EncoderModel`.

    Args:
        model: of the task's Auto class, on its device.
        task: Hugging Face's name.
        run: what is called in place of the model, such as what `torch.compile` made of it; None: the model.

    Attributes:
        pads: whether sequences of several lengths may share a batch: not where a model has no padding token.
        token_types: how many the model has; 0: it takes none.
        max_length: tokens that it has positions for; None: any number.
    """

    def __init__(self, model: Any, task: str, run: Callable[..., Any] | None = None) -> None:
        self.model = model
        self._run = model if run is None else run
        self._task = task
        text = model.config.get_text_config()
        pad = getattr(text, "pad_token_id", None)
        self.pads = pad is not None
        self._pad = 0 if pad is None else pad
        takes = "token_type_ids" in inspect.signature(model.forward).parameters
        self.token_types = (getattr(text, "type_vocab_size", 0) or 0) if takes else 0

        self.max_length = _usable_positions(model)

    def outputs(self, batch: EncoderBatch) -> Tensor:
        """See `encoding.EncoderModel`."""
        starts, longest = batch.starts, batch.max_length
        sequences, device = len(starts) - 1, starts.device
        tokens = torch.arange(len(batch.token_ids), dtype=starts.dtype, device=device)
        # Of each token in the padded batch.
        places = torch.searchsorted(starts[1:], tokens, right=True) * longest + batch.positions

        def padded(values: Tensor | int, filling: int) -> Tensor:
            memory = torch.full((sequences * longest,), filling, dtype=torch.int64, device=device)
            memory[places] = values
            return memory.view(sequences, longest)

        inputs = {"input_ids": padded(batch.token_ids, self._pad), "attention_mask": padded(1, 0)}
        if self.token_types:
            inputs["token_type_ids"] = padded(batch.type_ids, 0)
        found = self._answer(self._run(**inputs))
        return found if self._task == "text-classification" else found.flatten(0, 1)[places[batch.rows]]

    def _answer(self, answer: Any) -> Tensor:
        """What the task needs of the model's answer: [S, tokens, C]; of a text classifier [S, C]."""
        if self._task == "question-answering":
            return torch.stack([answer.start_logits, answer.end_logits], dim=-1)
        found: Tensor = answer.last_hidden_state if self._task == "feature-extraction" else answer.logits
        return found


def load_encoding(
    model: Any,
    config: DeploymentConfig,
    info: EngineInfo,
    lead: Lead | None = None,
    report: Report = lambda phase: None,
) -> EncodeExecutor:
    """The executor of a transformers model: one request at a time, as a careful user's pipeline computes; in place of
    the optimized engine as many as fit a batch, the sequences of each by length.

    Args:
        model: of the task's Auto class, on its device.
        config: `options.compile` and `max_queue` count here.
        info: what the frontend is told; `max_batch` and `max_length` count here.
        lead: to the replica's other ranks.
        report: told of the comparison of `options.compile`.

    Raises:
        UnsupportedModel: the task is not served.
    """
    check_task(info.task)
    encoder = TransformersEncoder(model, info.task)
    length = min(info.max_length, encoder.max_length or info.max_length)
    info = dataclasses.replace(info, max_length=length)
    if config.options.compile:
        encoder, line = _faster(encoder, info, report) if lead is None else (encoder, ("eager", "on one rank alone"))
        info = dataclasses.replace(info, plan=info.plan.with_line("torch.compile", *line))
    batch = info.max_batch if encoder.pads else 1
    stands_in = config.engine == "optimized"
    bounds = Bounds(
        max_length=length,
        vocab_size=info.vocab_size,
        token_types=encoder.token_types,
        max_tokens=min(batch * length, max(MOST_TOKENS, length)),
        max_sequences=batch,
        shared=stands_in,
        by_length=stands_in,
    )
    if lead is not None:
        lead.announce(model)
    return EncodeExecutor(encoder, info, bounds, max_queue=config.options.max_queue, lead=lead)


@torch.inference_mode()
def _faster(
    encoder: TransformersEncoder, info: EngineInfo, report: Report
) -> tuple[TransformersEncoder, tuple[str, str]]:
    """The model or what `torch.compile` makes of it, whichever takes less time for one text, and the plan's words."""
    report(Phase("capture", text="comparing transformers eager and compiled"))
    tokens = [(7 * i) % info.vocab_size for i in range(min(128, info.max_length))]
    batch = EncoderBatch.of_sequences([tokens], device=info.device)
    mode = "reduce-overhead" if info.device == "cuda" else "default"
    compiled = TransformersEncoder(encoder.model, info.task, torch.compile(encoder.model, mode=mode))
    wanted = encoder.outputs(batch).float()
    try:
        found = compiled.outputs(batch).float()
        if not bool((found - wanted).abs().max() <= ROUNDING[encoder.model.dtype] * wanted.abs().max()):
            return encoder, ("eager", "compiled it answers differently")
        eager_s, compiled_s = _seconds(encoder, batch), _seconds(compiled, batch)
    except Exception as error:  # a missing compiler shows in many ways
        return encoder, ("eager", f"compiling failed ({type(error).__name__})")
    times = f"a text of {len(tokens)} tokens takes {eager_s * 1e3:.2f} ms eager, {compiled_s * 1e3:.2f} ms compiled"
    return (compiled, ("on", times)) if compiled_s < eager_s else (encoder, ("eager", times))


def _seconds(encoder: TransformersEncoder, batch: EncoderBatch) -> float:
    """Of a forward, with its results on the host; warm, median of five."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        encoder.outputs(batch).cpu()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def _usable_positions(model: Any) -> int | None:
    """Rows of its learned positions; where padding has a position (RoBERTa), the tokens' come after it."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            padding = module.padding_idx
            return module.num_embeddings - (0 if padding is None else padding + 1)
    return None
