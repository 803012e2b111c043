"""A step's inputs: from the scheduler's plan to tensors on the device, through buffers that live as long as the engine.

The device's buffers keep their addresses, so that a CUDA graph may read them. On a GPU the host's side is pinned and
there are two of it, taken in turns: the copy of one step may still be under way while the next step is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from miinb.engine.decoder import StepBatch
from miinb.engine.rows import Row, StepPlan

#: Rows of the block table are as wide as the longest row of the step, in such steps: few shapes, so few kernels.
TABLE_STEP = 16

_FIELDS = {
    "token_ids": torch.int64,
    "positions": torch.int64,
    "cache_slots": torch.int64,
    "query_start": torch.int32,
    "lengths": torch.int32,
    "logit_rows": torch.int64,
    "row_slots": torch.int64,
    "sample_slots": torch.int64,
    "block_table": torch.int32,
}


class StepInputs:
    """Writes plans into buffers.

    Args:
        max_batch: most rows.
        max_step_tokens: most tokens in a step.
        max_length: longest row.
        page_tokens: tokens in a page.
        device: where the step is computed.

    Attributes:
        sample_slots: of the last step written: the slots of the rows that get a token, [L] int64 on the device.
        last_tokens: [max_batch] int64 on the device: each slot's newest token, written by the executor.
    """

    def __init__(
        self, *, max_batch: int, max_step_tokens: int, max_length: int, page_tokens: int, device: torch.device
    ) -> None:
        pinned = device.type == "cuda"
        width = -(-max_length // page_tokens)
        self._width = width if width < TABLE_STEP else -(-width // TABLE_STEP) * TABLE_STEP
        per_token = {"token_ids", "positions", "cache_slots"}
        sizes = {name: max_step_tokens if name in per_token else max_batch + 1 for name in _FIELDS}
        sizes["block_table"] = max_batch * self._width
        self._host = [
            {name: torch.zeros(sizes[name], dtype=dtype, pin_memory=pinned) for name, dtype in _FIELDS.items()}
            for _ in range(2 if pinned else 1)
        ]
        self._views = [{name: tensor.numpy() for name, tensor in host.items()} for host in self._host]
        self._device = (
            {name: torch.zeros_like(tensor, device=device) for name, tensor in self._host[0].items()}
            if pinned
            else self._host[0]
        )
        self._copies = pinned
        self._turn = 0
        self._page_tokens = page_tokens
        self._tables = np.zeros((max_batch, self._width), dtype=np.int32)  # by slot
        self._table_lengths = [0] * max_batch
        self._places = np.arange(max(max_step_tokens, max_batch + 1))
        self.last_tokens = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.sample_slots = self.last_tokens[:0]

    def write(self, plan: StepPlan) -> StepBatch:
        """The step's batch; it is valid until the next call."""
        self._turn = (self._turn + 1) % len(self._host)
        out = self._views[self._turn]
        for row in plan.admitted:
            self._table_lengths[row.slot] = 0
        slots, width = self._write_tables(plan.rows)
        rows = len(plan.rows)
        starts, counts = np.array(plan.starts), np.array(plan.counts)
        ends = counts.cumsum()
        tokens = int(ends[-1])
        row_of = self._places[:rows] if tokens == rows else np.repeat(self._places[:rows], counts)
        positions = self._places[:tokens] + (starts - ends + counts)[row_of]
        out["positions"][:tokens] = positions
        pages = self._tables[slots[row_of], positions // self._page_tokens]
        out["cache_slots"][:tokens] = pages * np.int64(self._page_tokens) + positions % self._page_tokens
        out["query_start"][0] = 0
        out["query_start"][1 : rows + 1] = ends
        out["lengths"][:rows] = starts + counts
        out["row_slots"][:rows] = slots
        out["block_table"][: rows * width].reshape(rows, width)[:] = self._tables[slots, :width]
        samples = np.array(plan.samples)
        logits = int(samples.sum())
        out["logit_rows"][:logits] = (ends - 1)[samples]
        out["sample_slots"][:logits] = slots[samples]
        if not logits:  # chunks alone; kernels do not like empty batches, so one row's logits are made and forgotten
            out["logit_rows"][0] = tokens - 1
        unknown = self._write_tokens(plan, out["token_ids"])
        return self._to_device(rows, tokens, logits, width, unknown, int(counts.max()))

    def _write_tables(self, rows: Sequence[Row]) -> tuple[np.ndarray, int]:
        """Bring the rows' page tables up to date. Returns the rows' slots and the width that the step needs."""
        slots = []
        most = 1
        for row in rows:
            slot, pages = row.slot, len(row.pages)
            slots.append(slot)
            known = self._table_lengths[slot]
            if pages != known:
                self._tables[slot, known:pages] = row.pages[known:]
                self._table_lengths[slot] = pages
            most = max(most, pages)
        return np.array(slots), min(-(-most // TABLE_STEP) * TABLE_STEP, self._width)

    def _write_tokens(self, plan: StepPlan, out: np.ndarray) -> int:
        """Token ids that the host knows; -1 where the token is still on the device.

        Returns:
            How many leading tokens may be unknown: rows of one token come first in a plan.
        """
        singles: list[int] = []
        unknown = 0
        at = 0
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            ids = row.token_ids
            if count > 1:
                at = at or len(singles)
                out[at : at + count] = ids[start : start + count]
                at += count
            elif start < len(ids):
                singles.append(ids[start])
            else:
                singles.append(-1)
                unknown = len(singles)
        out[: len(singles)] = singles
        return unknown

    def _to_device(self, rows: int, tokens: int, logits: int, width: int, unknown: int, max_query: int) -> StepBatch:
        used = dict.fromkeys(("token_ids", "positions", "cache_slots"), tokens)
        used |= {"query_start": rows + 1, "lengths": rows, "row_slots": rows, "block_table": rows * width}
        used |= {"logit_rows": max(logits, 1), "sample_slots": logits}
        device = {name: self._device[name][:size] for name, size in used.items()}
        if self._copies:
            host = self._host[self._turn]
            for name, size in used.items():
                device[name].copy_(host[name][:size], non_blocking=True)
        if unknown:
            ids = device["token_ids"][:unknown]
            torch.where(ids < 0, self.last_tokens[device["row_slots"][:unknown]], ids, out=ids)
        self.sample_slots = device["sample_slots"]
        return StepBatch(
            token_ids=device["token_ids"],
            positions=device["positions"],
            query_start=device["query_start"],
            lengths=device["lengths"],
            block_table=device["block_table"].view(rows, width),
            slots=device["cache_slots"],
            logit_rows=device["logit_rows"],
            max_query=max_query,
        )
