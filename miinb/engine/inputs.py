"""A step's inputs: from the scheduler's plan to tensors on the device, through buffers that live as long as the engine.

The device's buffers keep their addresses, so that a CUDA graph may read them, and lie one behind the other, so that a
step is one copy. On a GPU the host's side is pinned and there are two of it, taken in turns: the copy of one step may
still be under way while the next step is written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from miinb.engine.decoder import StepBatch
from miinb.engine.rows import Row, StepPlan

#: Rows of the block table are as wide as the longest row of the step, in such steps: few shapes, so few kernels.
TABLE_STEP = 16

#: Steps of so many tokens are short: padding them to a graph costs less than launching their kernels one by one.
SMALL_STEP = 512

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


class _Sizes(NamedTuple):
    """How much of the buffers a step uses; `stride` is the distance between two places of the block table."""

    tokens: int
    rows: int
    logits: int
    width: int
    stride: int


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
        max_batch: most rows, each with a slot.
        max_places: most rows of a batch; a row with a draft has several. None: `max_batch`.
        max_step_tokens: most tokens in a step.
        max_length: longest row.
        page_tokens: tokens in a page.
        device: where the step is computed.

    Attributes:
        buckets: numbers of rows that there are CUDA graphs for, ascending. A step of single tokens is padded to the
            next one: rows of length 0 whose key and value go nowhere.
        mixed_buckets: numbers of tokens that there are CUDA graphs for, ascending: other steps are padded to one of
            them (see `graphs.mixed_bucket`) with tokens of no row, and to `max_places` rows without tokens.
        sample_slots: of the last step written: the slots of the rows that get a token, [L] int64 on the device.
        last_tokens: [max_batch] int64 on the device: each slot's newest token, written by the executor.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_step_tokens: int,
        max_length: int,
        page_tokens: int,
        device: torch.device,
        max_places: int | None = None,
    ) -> None:
        pinned = device.type == "cuda"
        width = -(-max_length // page_tokens)
        self._width = width if width < TABLE_STEP else -(-width // TABLE_STEP) * TABLE_STEP
        per_token = {"token_ids", "positions", "cache_slots"}
        places = max_places or max_batch
        sizes = {name: max_step_tokens if name in per_token else places + 1 for name in _FIELDS}
        sizes["block_table"] = places * self._width
        self._host = [_Buffer(sizes, "cpu", pinned=pinned) for _ in range(2 if pinned else 1)]
        self._views = [{name: tensor.numpy() for name, tensor in host.fields.items()} for host in self._host]
        self._device = _Buffer(sizes, device) if pinned else self._host[0]
        self.buckets: Sequence[int] = ()
        self.mixed_buckets: Sequence[int] = ()
        self._max_places = places
        self._copies = pinned
        self._turn = 0
        self._page_tokens = page_tokens
        self._tables = np.zeros((max_batch, self._width), dtype=np.int32)  # by slot
        self._table_lengths = [0] * max_batch
        self._places = np.arange(max(max_step_tokens, places + 1))
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
        decode = tokens == rows == logits
        bucket = next_bucket(rows, self.buckets) if decode else mixed_bucket(tokens, self.mixed_buckets)
        padded_rows = (bucket if decode else self._max_places) if bucket else rows
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
        table = out["block_table"][: width * padded_rows].reshape(width, padded_rows)
        table[:, :rows] = self._tables[slots, :width].T
        out["logit_rows"][:logits] = (ends - 1)[samples]
        out["sample_slots"][:logits] = slots[samples]
        if not logits:  # chunks alone; kernels do not like empty batches, so one row's logits are made and forgotten
            out["logit_rows"][0] = tokens - 1
        unknown = self._write_tokens(plan, out["token_ids"])
        if bucket:
            self._pad(out, rows, tokens, padded_rows, bucket, decode=decode)
        self._send(width * padded_rows)
        if unknown and not (decode and bucket):  # a graph of single tokens looks them up itself
            self.look_up(unknown)
        self.sample_slots = self._device.fields["sample_slots"][:logits]
        sizes = _Sizes(tokens, rows, max(logits, 1), width, padded_rows)
        return self._batch(sizes, int(counts.max()) if decode or not bucket else bucket, bucket)

    def _pad(
        self,
        out: Mapping[str, np.ndarray],
        rows: int,
        tokens: int,
        padded_rows: int,
        padded_tokens: int,
        *,
        decode: bool,
    ) -> None:
        """Rows of length 0, with a token each (in decoding) or without, and tokens whose key and value go nowhere."""
        for name in ("token_ids", "positions"):
            out[name][tokens:padded_tokens] = 0
        for name in ("row_slots", "lengths"):
            out[name][rows:padded_rows] = 0
        out["cache_slots"][tokens:padded_tokens] = -1
        more = slice(rows + 1, padded_rows + 1)
        out["query_start"][more] = self._places[more] if decode else tokens
        if decode:
            out["logit_rows"][rows:padded_rows] = self._places[rows:padded_rows]

    def decode_batch(self, rows: int) -> StepBatch:
        """The batch that a CUDA graph of so many single tokens reads: the same memory in every step, padded and all."""
        return self._batch(_Sizes(rows, rows, rows, self._width, rows), 1, rows)

    def mixed_batch(self, tokens: int) -> StepBatch:
        """The batch that a CUDA graph of so many tokens of any rows reads; its `logit_rows` are not padded."""
        rows = self._max_places
        return self._batch(_Sizes(tokens, rows, 1, self._width, rows), tokens, tokens)

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
            elif row.draft:
                singles.append(row.draft[start - row.draft_start])
            else:
                singles.append(-1)
                unknown = len(singles)
        out[: len(singles)] = singles
        return unknown

    def _send(self, table: int) -> None:
        """Copy what was written, with so many elements of the block table, to the device."""
        if self._copies:
            end = self._device.starts["block_table"] + 4 * table
            self._device.memory[:end].copy_(self._host[self._turn].memory[:end], non_blocking=True)

    def _batch(self, sizes: _Sizes, max_query: int, bucket: int) -> StepBatch:
        fields = self._device.fields
        tokens, rows, stride = sizes.tokens, sizes.rows, sizes.stride
        return StepBatch(
            token_ids=fields["token_ids"][:tokens],
            positions=fields["positions"][:tokens],
            query_start=fields["query_start"][: rows + 1],
            lengths=fields["lengths"][:rows],
            block_table=fields["block_table"][: sizes.width * stride].view(sizes.width, stride)[:, :rows].t(),
            slots=fields["cache_slots"][:tokens],
            logit_rows=fields["logit_rows"][: sizes.logits],
            max_query=max_query,
            bucket=bucket,
        )


def next_bucket(size: int, buckets: Sequence[int]) -> int:
    """The least of the ascending buckets that holds `size`, or 0."""
    at = bisect_left(buckets, size)
    return buckets[at] if at < len(buckets) else 0


def mixed_bucket(tokens: int, buckets: Sequence[int]) -> int:
    """The bucket of a step with prompts, or 0 where computing the padding costs more than a graph saves."""
    bucket = next_bucket(tokens, buckets)
    return bucket if bucket <= SMALL_STEP or tokens * 8 >= bucket * 7 else 0
