"""A step's inputs: from the scheduler's plan to tensors on the device, through buffers that live as long as the engine.

The device's buffers keep their addresses, so that a CUDA graph may read them, and lie one behind the other, so that a
step is one copy. On a GPU the host's side is pinned and there are two of it, taken in turns: the copy of one step may
still be under way while the next step is written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch

from miinb.engine.decoder import StepBatch
from miinb.engine.rows import Row, StepPlan

#: Rows of the block table are as wide as the longest row of the step, in such steps: few shapes, so few kernels.
TABLE_STEP = 16

#: In memory's order: the block table, of which a step uses a part, is the last.
_FIELDS = {
    "token_ids": torch.int64,
    "positions": torch.int64,
    "cache_slots": torch.int64,
    "logit_rows": torch.int64,
    "row_slots": torch.int64,
    "sample_slots": torch.int64,
    "query_start": torch.int32,
    "lengths": torch.int32,
    "block_table": torch.int32,
}


class _Buffer:
    """One piece of memory with every field in it, as tensors and as numpy arrays."""

    def __init__(self, sizes: Mapping[str, int], device: torch.device | str, *, pinned: bool = False) -> None:
        counts = {name: sizes[name] * dtype.itemsize for name, dtype in _FIELDS.items()}
        ends = dict(zip(counts, accumulate(-(-count // 16) * 16 for count in counts.values()), strict=True))
        self.memory = torch.zeros(max(ends.values()), dtype=torch.uint8, device=device, pin_memory=pinned)
        self.starts = {name: end - -(-counts[name] // 16) * 16 for name, end in ends.items()}
        self.fields = {
            name: self.memory[start : start + counts[name]].view(_FIELDS[name]) for name, start in self.starts.items()
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
        buckets: numbers of rows that there are CUDA graphs for, ascending. A step of single tokens is padded to the
            next one: rows of length 0 whose key and value go nowhere.
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
        self._host = [_Buffer(sizes, "cpu", pinned=pinned) for _ in range(2 if pinned else 1)]
        self._views = [{name: tensor.numpy() for name, tensor in host.fields.items()} for host in self._host]
        self._device = _Buffer(sizes, device) if pinned else self._host[0]
        self.buckets: Sequence[int] = ()
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
        samples = np.array(plan.samples)
        logits = int(samples.sum())
        bucket = self._bucket(rows) if tokens == rows == logits else 0
        row_of = self._places[:rows] if tokens == rows else np.repeat(self._places[:rows], counts)
        positions = self._places[:tokens] + (starts - ends + counts)[row_of]
        out["positions"][:tokens] = positions
        pages = self._tables[slots[row_of], positions // self._page_tokens]
        out["cache_slots"][:tokens] = pages * np.int64(self._page_tokens) + positions % self._page_tokens
        out["query_start"][0] = 0
        out["query_start"][1 : rows + 1] = ends
        out["lengths"][:rows] = starts + counts
        out["row_slots"][:rows] = slots
        # Pages of a place side by side: a graph knows the distance between places, but not how many a step has.
        stride = bucket or rows
        out["block_table"][: width * stride].reshape(width, stride)[:, :rows] = self._tables[slots, :width].T
        out["logit_rows"][:logits] = (ends - 1)[samples]
        out["sample_slots"][:logits] = slots[samples]
        if not logits:  # chunks alone; kernels do not like empty batches, so one row's logits are made and forgotten
            out["logit_rows"][0] = tokens - 1
        unknown = self._write_tokens(plan, out["token_ids"])
        if bucket > rows:
            self._pad(out, rows, bucket)
        return self._to_device(rows, tokens, logits, width, unknown, int(counts.max()), bucket)

    def _bucket(self, rows: int) -> int:
        at = bisect_left(self.buckets, rows)
        return self.buckets[at] if at < len(self.buckets) else 0

    def _pad(self, out: Mapping[str, np.ndarray], rows: int, bucket: int) -> None:
        for name in ("token_ids", "positions", "row_slots", "lengths"):
            out[name][rows:bucket] = 0
        out["cache_slots"][rows:bucket] = -1
        out["query_start"][rows + 1 : bucket + 1] = self._places[rows + 1 : bucket + 1]
        out["logit_rows"][rows:bucket] = self._places[rows:bucket]

    def bucket_batch(self, bucket: int) -> StepBatch:
        """The batch that a CUDA graph of so many rows reads: the same memory in every step, padded and all."""
        used = dict.fromkeys(_FIELDS, bucket) | {"query_start": bucket + 1, "block_table": bucket * self._width}
        return self._batch(used, bucket, self._width, 1, bucket)

    def look_up(self, count: int) -> None:
        """Put each slot's newest token in the place of the leading `count` tokens that the host does not know."""
        ids = self._device.fields["token_ids"][:count]
        slots = self._device.fields["row_slots"][:count]
        torch.where(ids < 0, self.last_tokens[slots], ids, out=ids)

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

    def _to_device(
        self, rows: int, tokens: int, logits: int, width: int, unknown: int, max_query: int, bucket: int
    ) -> StepBatch:
        table = width * (bucket or rows)
        if self._copies:
            end = self._device.starts["block_table"] + 4 * table
            self._device.memory[:end].copy_(self._host[self._turn].memory[:end], non_blocking=True)
        if unknown and not bucket:  # a graph looks them up itself
            self.look_up(unknown)
        self.sample_slots = self._device.fields["sample_slots"][:logits]
        used = dict.fromkeys(("token_ids", "positions", "cache_slots"), tokens)
        used |= {"query_start": rows + 1, "lengths": rows, "block_table": table, "logit_rows": max(logits, 1)}
        return self._batch(used, rows, width, max_query, bucket)

    def _batch(self, used: Mapping[str, int], rows: int, width: int, max_query: int, bucket: int) -> StepBatch:
        fields = self._device.fields
        return StepBatch(
            token_ids=fields["token_ids"][: used["token_ids"]],
            positions=fields["positions"][: used["positions"]],
            query_start=fields["query_start"][: used["query_start"]],
            lengths=fields["lengths"][: used["lengths"]],
            block_table=fields["block_table"][: used["block_table"]].view(width, bucket or rows)[:, :rows].t(),
            slots=fields["cache_slots"][: used["cache_slots"]],
            logit_rows=fields["logit_rows"][: used["logit_rows"]],
            max_query=max_query,
            bucket=bucket,
        )
