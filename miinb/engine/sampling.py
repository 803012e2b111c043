"""From logits to tokens: every row with its own parameters; the same logits give the same token in any batch.

The order is transformers': logit bias, repetition penalty, presence and frequency penalty (which transformers lacks;
they count new tokens only), the ban on ending before `min_new_tokens`, then for sampled rows temperature, top-k, top-p,
min-p, and the draw. The noise of a draw is a function of (seed, position, token id): `kernels/sample.py` defines it.
Log-probabilities are those of the model itself, before any of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag

import torch
from torch import Tensor

from miinb.engine.rows import Row
from miinb.kernels.sample import sample
from miinb.messages import TokenLogprob


class Needs(IntFlag):
    """What a row wants besides the largest logit."""

    NOTHING = 0
    SAMPLE = 1
    BIAS = 2
    PENALTY = 4
    MIN_NEW = 8
    LOGPROBS = 16


@dataclass(slots=True)
class Sampled:
    """One step's choice, on the device: `token_ids` [L] int64, `finite` [L] bool, and log-probabilities if wanted.

    Attributes:
        logprobs: [L] fp32 of the chosen tokens.
        top_logprobs: [L, n] fp32, largest first, and `top_ids` [L, n]; n is the most that a row asked for.
    """

    token_ids: Tensor
    finite: Tensor
    logprobs: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_ids: Tensor | None = None


class Landing:
    """Host memory that a step's choice is copied to without waiting; of a CPU it is the choice itself.

    Args:
        max_batch: most rows of a step.
        device: where the choices are made.
    """

    def __init__(self, max_batch: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._max_batch = max_batch
        self._memory: dict[str, Tensor] = {}

    def receive(self, chosen: Sampled) -> Sampled:
        """The same choice on the host; its numbers are there once the stream has come to this point."""
        if not self._on_gpu:
            return chosen
        copied = {
            field.name: self._copy(field.name, part)
            for field in dataclasses.fields(chosen)
            if (part := getattr(chosen, field.name)) is not None
        }
        return Sampled(**copied)

    def _copy(self, name: str, part: Tensor) -> Tensor:
        """A copy in pinned memory that is kept for later steps; only between contiguous tensors it does not wait."""
        memory = self._memory.get(name)
        if memory is None or memory.numel() < part.numel():
            each = part.shape[1] if part.dim() > 1 else 1
            memory = self._memory[name] = torch.empty(self._max_batch * each, dtype=part.dtype, pin_memory=True)
        place = memory[: part.numel()].view(part.shape)
        return place.copy_(part.contiguous(), non_blocking=True)


def greedy(logits: Tensor) -> Sampled:
    """The largest logit of each row [L, vocab]; `finite` is False where a logit is NaN or the largest is infinite."""
    largest, token_ids = logits.max(-1)
    return Sampled(token_ids, torch.isfinite(largest))


class Sampler:
    """Parameters of the rows in their slots, as tensors on the device.

    Args:
        max_batch: number of slots.
        vocab_size: tokens in the vocabulary.
        device: where the logits are.
    """

    def __init__(self, max_batch: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._max_batch = max_batch
        self._needs = [0] * max_batch  # plain numbers: Needs' operators are slow, and `needs` is called each step
        self._integers = torch.zeros(max_batch, 2, dtype=torch.int64, device=device)  # top_k, seed
        # temperature, top_p, min_p, repetition, presence, frequency penalty
        self._numbers = torch.zeros(max_batch, 6, device=device)
        self._written: list[tuple[float, ...]] = [()] * max_batch  # what these hold now
        self._seen: tuple[Tensor, Tensor] | None = None

    def admit(self, row: Row) -> None:
        """Take over the parameters of a row that came into its slot (also when it comes back after preemption)."""
        params = row.request.params
        needs = Needs.NOTHING
        needs |= Needs.SAMPLE if params.do_sample else needs
        needs |= Needs.BIAS if params.logit_bias else needs
        needs |= Needs.MIN_NEW if params.min_new_tokens and row.eos else needs
        needs |= Needs.LOGPROBS if params.logprobs is not None else needs
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        needs |= Needs.PENALTY if penalties != (1.0, 0.0, 0.0) else needs
        slot = row.slot
        self._needs[slot] = int(needs)
        # Temperature 0 is greedy, for rows beside sampled ones.
        draw = (params.temperature, params.top_p, params.min_p) if params.do_sample else (0.0, 1.0, 0.0)
        top_k = min(params.top_k, self.vocab_size) if params.do_sample else 0
        values = (*draw, *penalties, top_k, params.seed or 0 if params.do_sample else 0)
        if values != self._written[slot]:
            self._written[slot] = values
            self._numbers[slot] = self._send(values[:6], torch.float32)
            self._integers[slot] = self._send(values[6:], torch.int64)
        if needs & Needs.PENALTY:
            self._count(row)

    def _count(self, row: Row) -> None:
        """Count the row's tokens from scratch."""
        in_prompt, counts = self._counters()
        ids = self._send(row.token_ids, torch.int64)
        in_prompt[row.slot].zero_().index_fill_(0, ids[: row.prompt_tokens], True)
        new = ids[row.prompt_tokens :]  # bincount would wait for the device, to learn the largest id
        counts[row.slot].zero_().index_add_(0, new, torch.ones(len(new), device=self.device))

    def _counters(self) -> tuple[Tensor, Tensor]:
        """[max_batch, vocab]: whether in the prompt (bool), how often among the new tokens (fp32); made when needed."""
        if self._seen is None:
            shape = (self._max_batch, self.vocab_size)
            in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self._seen = in_prompt, torch.zeros(shape, device=self.device)
        return self._seen

    def needs(self, rows: Sequence[Row]) -> Needs:
        """What any of these rows wants."""
        needs = 0
        table = self._needs
        for row in rows:
            needs |= table[row.slot]
        return Needs(needs)

    def _send(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        """These numbers on the device, without waiting for it: it is busy with the step before."""
        pinned = self.device.type == "cuda"
        return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(self.device, non_blocking=True)

    def choose(
        self,
        logits: Tensor,
        rows: Sequence[Row],
        lengths: Sequence[int],
        positions: Tensor,
        slots: Tensor,
        needs: Needs,
    ) -> Sampled:
        """The next token of each row.

        Args:
            logits: [L, vocab].
            rows: the L rows; one with a draft comes several times.
            lengths: tokens before each new one.
            positions: [L] int64 on the device: the place in its sequence of each row's new token.
            slots: [L] int64 on the device: the rows' slots.
            needs: `self.needs(rows)`.
        """
        if needs == Needs.NOTHING:
            return greedy(logits)
        # The draw reads logits of any dtype; a copy is made only where something is changed in them.
        changed = needs & (Needs.BIAS | Needs.PENALTY | Needs.MIN_NEW)
        scores = logits.to(torch.float32, copy=True) if changed else logits
        if needs & Needs.BIAS:
            self._add_biases(scores, rows)
        if needs & Needs.PENALTY:
            self._penalize(scores, slots)
        if needs & Needs.MIN_NEW:
            self._ban_end(scores, rows, lengths)
        if needs & Needs.SAMPLE:
            temperature, top_p, min_p = self._numbers[slots, :3].unbind(1)
            top_k, seed = self._integers[slots, 0].to(torch.int32), self._integers[slots, 1]
            token_ids, finite = sample(scores, seed, positions, temperature, top_k, top_p, min_p)
            chosen = Sampled(token_ids, finite)
        else:
            chosen = greedy(scores)
        if needs & Needs.PENALTY:
            ones = torch.ones(len(rows), device=self.device)
            self._counters()[1].index_put_((slots, chosen.token_ids), ones, accumulate=True)
        if needs & Needs.LOGPROBS:
            self._add_logprobs(chosen, logits, rows)
        return chosen

    def _add_biases(self, scores: Tensor, rows: Sequence[Row]) -> None:
        places: list[int] = []
        ids: list[int] = []
        biases: list[float] = []
        for i, row in enumerate(rows):
            for token_id, bias in (row.request.params.logit_bias or {}).items():
                places.append(i)
                ids.append(token_id)
                biases.append(bias)
        at = self._send([places, ids], torch.int64)
        scores.index_put_((at[0], at[1]), self._send(biases, torch.float32), accumulate=True)

    def _penalize(self, scores: Tensor, slots: Tensor) -> None:
        in_prompt, new_counts = self._counters()
        repetition, presence, frequency = self._numbers[slots, 3:, None].unbind(1)
        counts = new_counts[slots]
        seen = in_prompt[slots] | (counts > 0)
        penalized = torch.where(scores < 0, scores * repetition, scores / repetition)
        torch.where(seen, penalized, scores, out=scores)
        scores -= counts * frequency + (counts > 0) * presence

    def _ban_end(self, scores: Tensor, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        places: list[int] = []
        ids: list[int] = []
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if length - row.prompt_tokens < row.request.params.min_new_tokens:
                places += [i] * len(row.eos)
                ids += row.eos
        if places:
            at = self._send([places, ids], torch.int64)
            scores[at[0], at[1]] = -torch.inf

    def _add_logprobs(self, chosen: Sampled, logits: Tensor, rows: Sequence[Row]) -> None:
        logprobs = logits.log_softmax(-1, dtype=torch.float32)
        most = max(row.request.params.logprobs or 0 for row in rows)
        chosen.logprobs = logprobs.gather(1, chosen.token_ids[:, None])[:, 0]
        chosen.top_logprobs, chosen.top_ids = logprobs.topk(min(most, self.vocab_size), -1)


def read_logprobs(chosen: Sampled, rows: Sequence[Row]) -> dict[int, TokenLogprob]:
    """The log-probabilities of the rows that asked for them, by place.

    Args:
        chosen: as `Landing.receive` gave it.
        rows: the rows of the step that got a token.
    """
    if chosen.logprobs is None or chosen.top_logprobs is None or chosen.top_ids is None:
        return {}
    ids, own = chosen.token_ids.tolist(), chosen.logprobs.tolist()
    top_ids, top = chosen.top_ids.tolist(), chosen.top_logprobs.tolist()
    found = {}
    for i, row in enumerate(rows):
        wanted = row.request.params.logprobs
        if wanted is not None:
            pairs = zip(top_ids[i][:wanted], top[i][:wanted], strict=True)
            found[i] = TokenLogprob(ids[i], own[i], tuple(pairs))
    return found
