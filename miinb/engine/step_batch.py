"""What the decoder computes in one step: rows of tokens, as tensors on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepRow:
    """One sequence's part in a step: its new tokens, how many came before them, and its pages in order."""

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]


@dataclass(slots=True)
class StepBatch:
    """The inputs of one step, on the device.

    Attributes:
        token_ids: [T] int64, the rows' tokens one after another.
        positions: [T] int64, their places in their sequences.
        query_start: [R + 1] int32, where each row's tokens begin.
        lengths: [R] int32, each row's context after this step.
        block_table: [R, B] int32, each row's pages in order.
        slots: [T] int64, page * page_tokens + offset: where each token's key and value go.
        logit_rows: [L] int64, the tokens (indexes into T) whose logits are wanted.
        max_query: at least the most tokens of a row; 1 for pure decoding.
        bucket: what the memory behind these views is padded to for a CUDA graph: rows in pure decoding, else tokens; 0:
            it is not padded.
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    lengths: Tensor
    block_table: Tensor
    slots: Tensor
    logit_rows: Tensor
    max_query: int
    bucket: int = 0

    @classmethod
    def of_rows(cls, rows: Sequence[StepRow], page_tokens: int, device: torch.device | str = "cpu") -> StepBatch:
        """The batch of these rows; logits are wanted for the last token of each."""
        counts = [len(row.token_ids) for row in rows]
        ends = list(accumulate(counts))
        width = max(len(row.pages) for row in rows)
        positions = [p for row in rows for p in range(row.start, row.start + len(row.token_ids))]
        pages = [row.pages[p // page_tokens] for row in rows for p in range(row.start, row.start + len(row.token_ids))]
        slots = [page * page_tokens + p % page_tokens for page, p in zip(pages, positions, strict=True)]

        def tensor(values: object, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            token_ids=tensor([token for row in rows for token in row.token_ids], torch.int64),
            positions=tensor(positions, torch.int64),
            query_start=tensor([0, *ends], torch.int32),
            lengths=tensor([row.start + len(row.token_ids) for row in rows], torch.int32),
            block_table=tensor([[*row.pages, *[0] * (width - len(row.pages))] for row in rows], torch.int32),
            slots=tensor(slots, torch.int64),
            logit_rows=tensor([end - 1 for end in ends], torch.int64),
            max_query=max(counts),
        )
