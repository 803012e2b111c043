"""Ranks above 0 of a tensor-parallel encoder: they compute the steps that rank 0 packs.

Rank 0 sends each step before it computes it, and nothing comes back but failures. A rank that fails within a step says
so, then takes part in what is left of the step's reductions with zeros. A message is little-endian: six u32 (the step's
number, its longest sequence, whether it has token types, T, S and L), then int32: token_ids [T], lengths [S], rows [L],
and type_ids [T] if there are some.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from miinb.engine.compute import STEP_ERRORS, OnError, in_step, request_error
from miinb.engine.encode_queue import EncodeStep, starts_of
from miinb.engine.encoder import Encoder, EncoderBatch
from miinb.engine.encoder_inputs import EncoderInputs
from miinb.engine.links import Leader, Link
from miinb.errors import MiinbError, from_name
from miinb.messages import EngineInfo

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<6I")


def write_step(number: int, step: EncodeStep) -> bytes:
    """The message of a step."""
    sizes = (len(step.token_ids), len(step.lengths), len(step.rows))
    fields = [step.token_ids, step.lengths, step.rows, *(() if step.type_ids is None else (step.type_ids,))]
    head = _HEADER.pack(number & 0xFFFFFFFF, step.longest, step.type_ids is not None, *sizes)
    return b"".join((head, *(field.astype("<i4").tobytes() for field in fields)))


def read_step(data: bytes) -> tuple[int, EncodeStep]:
    """The number and the step of a message; whose sequences they are only rank 0 knows."""
    number, longest, typed, *sizes = _HEADER.unpack_from(data)
    numbers = np.frombuffer(data, "<i4", offset=_HEADER.size)
    token_ids, lengths, rows, type_ids = np.split(numbers, np.cumsum(sizes))
    starts = starts_of(lengths.astype(np.int64))
    return number, EncodeStep(
        pieces=[], token_ids=token_ids, type_ids=type_ids if typed else None, lengths=lengths.astype(np.int64),
        starts=starts, longest=longest, rows=rows.astype(np.int64), row_counts=[],
    )  # fmt: skip


class EncodeFollowers:
    """The followers as rank 0's executor sees them.

    Args:
        leader: its wires.
        encoder: rank 0's part.
        inputs: the steps' memory.
    """

    def __init__(self, leader: Leader, encoder: Encoder, inputs: EncoderInputs) -> None:
        self._leader = leader
        self._encoder = encoder
        self._inputs = inputs
        self._number = 0
        self._failures: dict[int, MiinbError] = {}

    @contextmanager
    def computing(self, step: EncodeStep) -> Iterator[int]:
        """Have the followers compute a step that has been written, which this rank computes within; its number.

        Raises:
            PeerLost: another rank is gone.
        """
        self._number += 1
        self._leader.send(write_step(self._number, step))
        with sharing(self._encoder, self._inputs, step, lambda error: None):
            yield self._number

    def failure(self, number: int) -> MiinbError | None:
        """Why a step failed on a follower, once its results are here. Raises PeerLost."""
        for words in self._leader.news():
            self._failures[words["step"]] = from_name(words["error"], words["message"], hint=words["hint"])
        found = self._failures.pop(number, None)
        # After the last reduction a follower may fail at what rank 0 has made itself: too late to matter.
        self._failures = {step: error for step, error in self._failures.items() if step > number}
        return found

    def close(self) -> None:
        """They end."""
        self._leader.close()


class EncodeFollower:
    """A rank above 0.

    Args:
        info: what this rank serves.
        encoder: its part of the model.
        outputs: of `encoder`, or of its graphs.
        inputs: the steps' memory.
        link: to rank 0.
    """

    def __init__(
        self,
        info: EngineInfo,
        encoder: Encoder,
        outputs: Callable[[EncoderBatch], Tensor],
        inputs: EncoderInputs,
        link: Link,
    ) -> None:
        self.info = info
        self._encoder = encoder
        self._outputs = outputs
        self._inputs = inputs
        self._link = link

    @torch.inference_mode()
    def run(self) -> None:
        """Compute steps until rank 0 has ended.

        A step's place on the host is free when the next but one comes: rank 0 sends it after it has read this one's
        results, which are sums over all ranks.

        Raises:
            PeerLost: a rank is gone in the middle of a step.
        """
        while data := self._link.receive():  # an empty message ends it, too
            number, step = read_step(data)
            self._inputs.write(step)
            try:
                with sharing(self._encoder, self._inputs, step, partial(self._tell, number)):
                    self._outputs(self._inputs.send())
            except STEP_ERRORS:
                log.exception("step %d of %d tokens raised", number, len(step.token_ids))

    def _tell(self, number: int, error: Exception) -> None:
        known = request_error(error)
        self._link.tell({"step": number, "error": type(known).__name__, "message": known.message, "hint": known.hint})

    def close(self) -> None:
        """Rank 0 learns that this rank has ended."""
        self._link.close()


@contextmanager
def sharing(encoder: Encoder, inputs: EncoderInputs, step: EncodeStep, on_error: OnError) -> Iterator[None]:
    """Within it a rank computes its part of a step that has been written; see `compute.in_step`."""
    if encoder.group is None:
        yield
        return

    def stand_in() -> None:
        encoder.stand_in(len(step.token_ids), len(step.rows))

    with in_step(encoder.group, captured=lambda: inputs.captured, on_error=on_error, stand_in=stand_in):
        yield
