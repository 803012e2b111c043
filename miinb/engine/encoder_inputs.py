"""An encoder's steps as tensors on the device, through memory that lives as long as the engine.

A step's fields lie one behind the other, so that they are one copy. Where they begin follows from their sizes alone: a
CUDA graph, which has sizes of its own, finds them at the same addresses in every step. On a GPU the host's side is
pinned and there are two of it, taken in turns: the copy of one step may still be under way while the next is written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miinb.engine.encode_queue import EncodeStep
from miinb.engine.encoder import EncoderBatch

Numbers = NDArray[Any]
#: Steps of so many tokens are short: padding them to a graph costs less than launching their kernels one by one.
SMALL_STEP = 512


class Sizes(NamedTuple):
    """Of a step or of a graph, in the order in which graphs are chosen.

    Attributes:
        tokens: T.
        max_length: of a sequence.
        sequences: S.
        rows: L.
    """

    tokens: int
    max_length: int
    sequences: int
    rows: int

    def holds(self, step: Sizes) -> bool:
        """Whether a graph of these sizes computes the step, and padding it does not cost more than it saves."""
        most = step.tokens + max(SMALL_STEP, step.tokens // 4)
        return (
            step.tokens <= self.tokens <= most
            and step.max_length <= self.max_length
            and step.sequences <= self.sequences
            and step.rows <= self.rows
        )


class _Place(NamedTuple):
    """Where steps of some sizes lie.

    Attributes:
        fields: the host's, of each turn.
        host: the same bytes, of each turn.
        device: where they are copied to.
        batch: the device's fields.
    """

    fields: list[list[Numbers]]
    host: list[Tensor]
    device: Tensor
    batch: EncoderBatch


class EncoderInputs:
    """Writes steps into buffers.

    Args:
        max_tokens: most tokens of a step.
        device: where it is computed.
        padding: a token that has no place in its sequence, and what stands for it in the positions.

    Attributes:
        graphs: sizes that there are CUDA graphs for, ascending. A step is padded to the first that holds it, with
            tokens and sequences that nobody reads: sequences without tokens, and tokens of no sequence.
    """

    def __init__(self, max_tokens: int, device: torch.device, padding: tuple[int, int] | None = None) -> None:
        self._padding = padding
        most = Sizes(max_tokens, max_tokens, max_tokens, max_tokens)
        size = sum(_field_bytes(most))
        self._copies = device.type == "cuda"
        self._host = [
            torch.zeros(size, dtype=torch.uint8, pin_memory=self._copies) for _ in range(2 if self._copies else 1)
        ]
        self._device = torch.zeros(size, dtype=torch.uint8, device=device) if self._copies else self._host[0]
        self._turn = 0
        self._counting = np.arange(max_tokens)
        self._places: dict[Sizes, _Place] = {}  # of the graphs' steps, which come often
        self.graphs: Sequence[Sizes] = ()
        self._sizes = Sizes(0, 0, 0, 0)
        self._written = self._place(self._sizes)

    @property
    def captured(self) -> bool:
        """Whether the step that was written last is one of the graphs'."""
        return self._sizes in self.graphs

    def write(self, step: EncodeStep) -> None:
        """Write a step for `send`: in the sizes of the first graph that holds it, or in its own."""
        tokens, sequences, count = len(step.token_ids), len(step.lengths), len(step.rows)
        own = Sizes(tokens, step.longest, sequences, count)
        large = islice(self.graphs, bisect_left(self.graphs, own), None)
        sizes = next((graph for graph in large if graph.holds(own)), own)
        self._turn = (self._turn + 1) % len(self._host)
        self._sizes, self._written = sizes, self._place(sizes)
        token_ids, type_ids, positions, rows, starts = self._written.fields[self._turn]
        token_ids[:tokens] = step.token_ids
        type_ids[:tokens] = 0 if step.type_ids is None else step.type_ids
        starts[: sequences + 1] = step.starts
        if sequences == 1:
            positions[:tokens] = self._counting[:tokens]
        else:
            np.subtract(self._counting[:tokens], np.repeat(step.starts[:-1], step.lengths), out=positions[:tokens])
        if self._padding is not None:
            _leave_out(*self._padding, step, positions[:tokens])
        rows[:count] = step.rows
        if sizes != own:  # what was here before may be of a larger step
            token_ids[tokens:] = type_ids[tokens:] = positions[tokens:] = rows[count:] = 0
            starts[sequences + 1 :] = tokens

    def send(self) -> EncoderBatch:
        """The batch that was written last; it is valid until the next one is sent (on a CPU, written)."""
        place = self._written
        if self._copies:
            place.device.copy_(place.host[self._turn], non_blocking=True)
        return place.batch

    def batch(self, sizes: Sizes) -> EncoderBatch:
        """The place where steps of these sizes are sent to."""
        token_ids, type_ids, positions, rows, starts = _fields(self._device, sizes)
        return EncoderBatch(token_ids, type_ids, positions, starts, rows, sizes.max_length)

    def _place(self, sizes: Sizes) -> _Place:
        """Where steps of these sizes lie; kept for those of graphs."""
        found = self._places.get(sizes)
        if found is None:
            used = sum(_field_bytes(sizes))
            fields = [[field.numpy() for field in _fields(memory, sizes)] for memory in self._host]
            found = _Place(fields, [memory[:used] for memory in self._host], self._device[:used], self.batch(sizes))
            if sizes in self.graphs:
                self._places[sizes] = found
        return found


def _leave_out(token: int, instead: int, step: EncodeStep, positions: Numbers) -> None:
    """Count the token in no sequence's positions, as transformers does; texts may have it."""
    found = step.token_ids == token
    if np.count_nonzero(found):  # quicker than any()
        before = np.concatenate([[0], np.cumsum(found)])
        positions -= before[1:] - np.repeat(before[step.starts[:-1]], step.lengths)
        positions[found] = instead


#: Of token_ids, type_ids, positions, rows and starts: in memory's order.
_DTYPES = (torch.int64, torch.int64, torch.int64, torch.int64, torch.int32)


def _counts(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.tokens, sizes.tokens, sizes.tokens, sizes.rows, sizes.sequences + 1)


def _field_bytes(sizes: Sizes) -> list[int]:
    return [-(-count * dtype.itemsize // 16) * 16 for count, dtype in zip(_counts(sizes), _DTYPES, strict=True)]


def _fields(memory: Tensor, sizes: Sizes) -> list[Tensor]:
    found, at = [], 0
    for count, dtype, size in zip(_counts(sizes), _DTYPES, _field_bytes(sizes), strict=True):
        found.append(memory[at : at + count * dtype.itemsize].view(dtype))
        at += size
    return found
