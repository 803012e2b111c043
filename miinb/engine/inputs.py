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

from miinb.engine.rows import Row, StepPlan
from miinb.engine.step_batch import StepBatch
from miinb.kernels.embedding import fill_newest

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
        self._table_lengths = np.zeros(max_batch, dtype=np.int64)
        self._places = np.arange(max(max_step_tokens, places + 1))
        self.last_tokens = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.sample_slots = self.last_tokens[:0]
        self._counted = [0] * len(self._host)  # leading places of query_start and logit_rows that count up from 0
        self._used: tuple[object, ...] = ()
        self._latest = self._batch(_Sizes(1, 1, 1, 1, 1), 1, 0)

    def write(self, plan: StepPlan) -> StepBatch:
        """The step's batch; it is valid until the next call."""
        self._turn = (self._turn + 1) % len(self._host)
        out = self._views[self._turn]
        for row in plan.admitted:
            self._table_lengths[row.slot] = 0
        slots, width = self._write_tables(plan.rows)
        rows = len(plan.rows)
        logits = plan.samples.count(True)
        tokens = plan.tokens
        decode = tokens == rows == logits
        bucket = next_bucket(rows, self.buckets) if decode else mixed_bucket(tokens, self.mixed_buckets)
        padded_rows = (bucket if decode else self._max_places) if bucket else rows
        out["row_slots"][:rows] = slots
        # Pages of a place side by side: a graph knows the distance between places, but not how many a step has.
        table = out["block_table"][: width * padded_rows].reshape(width, padded_rows)
        table[:, :rows] = self._tables[slots, :width].T
        starts = np.array(plan.starts)
        if decode:
            self._write_decode(out, slots, starts, padded_rows)
            unknown = self._write_singles(plan, rows, out["token_ids"])
        else:
            self._write_mixed(out, slots, starts, plan)
            unknown = self._write_tokens(plan, out["token_ids"])
        if bucket > tokens or padded_rows > rows:
            self._pad(out, rows, tokens, padded_rows, bucket, decode=decode)
        self._send(width * padded_rows)
        if unknown and not (decode and bucket):  # a graph of single tokens looks them up itself
            self.look_up(unknown)
        sizes = _Sizes(tokens, rows, max(logits, 1), width, padded_rows)
        most = 1 if decode else bucket or max(plan.counts)
        if (sizes, most, bucket, logits) != self._used:  # else the views are those of the step before
            self._used = (sizes, most, bucket, logits)
            self._latest = self._batch(sizes, most, bucket)
            self.sample_slots = self._device.fields["sample_slots"][:logits]
        return self._latest

    def _write_decode(self, out: Mapping[str, np.ndarray], slots: np.ndarray, starts: np.ndarray, padded: int) -> None:
        """The fields of a step in which every row computes one token and gets the next."""
        rows = len(slots)
        out["positions"][:rows] = starts
        pages, offsets = np.divmod(starts, self._page_tokens)
        out["cache_slots"][:rows] = self._tables[slots, pages] * np.int64(self._page_tokens) + offsets
        out["lengths"][:rows] = starts + 1
        out["sample_slots"][:rows] = slots
        if padded > self._counted[self._turn]:  # these two count up from 0: in place since the last decode step
            self._counted[self._turn] = padded
            out["query_start"][: padded + 1] = self._places[: padded + 1]
            out["logit_rows"][:padded] = self._places[:padded]

    def _write_mixed(
        self, out: Mapping[str, np.ndarray], slots: np.ndarray, starts: np.ndarray, plan: StepPlan
    ) -> None:
        """The fields of a step with prompts."""
        self._counted[self._turn] = 0
        rows, counts, samples = len(slots), np.array(plan.counts), np.array(plan.samples)
        ends = counts.cumsum()
        tokens, logits = int(ends[-1]), plan.samples.count(True)
        row_of = np.repeat(self._places[:rows], counts)
        positions = self._places[:tokens] + (starts - ends + counts)[row_of]
        out["positions"][:tokens] = positions
        pages, offsets = np.divmod(positions, self._page_tokens)
        out["cache_slots"][:tokens] = self._tables[slots[row_of], pages] * np.int64(self._page_tokens) + offsets
        out["lengths"][:rows] = starts + counts
        out["query_start"][0] = 0
        out["query_start"][1 : rows + 1] = ends
        out["logit_rows"][:logits] = (ends - 1)[samples]
        out["sample_slots"][:logits] = slots[samples]
        if not logits:  # chunks alone; kernels do not like empty batches, so one row's logits are made and forgotten
            out["logit_rows"][0] = tokens - 1

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
        if not decode:
            out["query_start"][rows + 1 : padded_rows + 1] = tokens

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
        fill_newest(ids, self.last_tokens, slots)

    def _write_tables(self, rows: Sequence[Row]) -> tuple[np.ndarray, int]:
        """Bring the rows' page tables up to date. Returns the rows' slots and the width that the step needs."""
        slots = np.array([row.slot for row in rows])
        pages = np.array([len(row.pages) for row in rows])
        for i in np.nonzero(pages != self._table_lengths[slots])[0].tolist():
            row = rows[i]
            known = self._table_lengths[row.slot]
            self._tables[row.slot, known : len(row.pages)] = row.pages[known:]
            self._table_lengths[row.slot] = len(row.pages)
        return slots, min(-(-int(pages.max()) // TABLE_STEP) * TABLE_STEP, self._width)

    def _write_singles(self, plan: StepPlan, count: int, out: np.ndarray) -> int:
        """The leading `count` rows' tokens, as `_write_tokens`."""
        ids = [
            row.token_ids[start]
            if start < len(row.token_ids)
            else (row.draft[start - row.draft_start] if row.draft else -1)
            for row, start in zip(plan.rows[:count], plan.starts, strict=False)
        ]
        out[:count] = ids
        return count if -1 in ids else 0

    def _write_tokens(self, plan: StepPlan, out: np.ndarray) -> int:
        """Token ids that the host knows; -1 where the token is still on the device.

        Returns:
            How many leading tokens may be unknown: rows of one token come first in a plan.
        """
        singles = plan.counts.count(1)
        at = singles
        for row, start, count in zip(plan.rows[singles:], plan.starts[singles:], plan.counts[singles:], strict=True):
            out[at : at + count] = row.token_ids[start : start + count]
            at += count
        return self._write_singles(plan, singles, out)

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
