"""CUDA graphs of an encoder with its head: what Python costs a step becomes one launch.

A graph is keyed by its sizes (`encoder_inputs.Sizes`): packed tokens and longest sequence, with room for so many
sequences and rows as steps of that kind have. A step is padded to it; where sequences begin is data that it reads from
the memory of `EncoderInputs`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miinb.engine.encoder import EncoderBatch
from miinb.engine.encoder_inputs import EncoderInputs, Sizes
from miinb.engine.encoding import EncoderModel
from miinb.engine.graphs import MOST_BYTES, Recorder, Replay
from miinb.engine.heads import Reduced, reduce
from miinb.engine.reduction import Reduction, Rows
from miinb.kernels.shares import best_shares
from miinb.wording import size_words

#: Steps of more tokens run eagerly: the GPU computes while Python launches.
MOST_TOKENS = 16384
#: Steps of up to so many tokens gain most from a graph: theirs come first.
SMALL_TOKENS = 4096
#: Attention takes fewer tokens at a time in sequences of no more than so many.
SHORT = 32
#: Graphs whose head has rows of its own choice, as many as masks, have no more: the outputs of each are a vocabulary.
MOST_ROWS = 512


def graph_sizes(max_tokens: int, max_length: int, rows: Rows) -> list[Sizes]:
    """Sizes of the graphs, ascending: close together where a step is short.

    Args:
        max_tokens: most tokens of a step.
        max_length: of the model's sequences.
        rows: which the head has: of each sequence one, all tokens, or some.
    """
    most = min(max_tokens, MOST_TOKENS)
    steps = (range(16, 64, 16), range(64, 256, 32), range(256, 512, 64), range(512, 1024, 128), range(1024, 2048, 256))
    large = (range(2048, SMALL_TOKENS, 512), range(SMALL_TOKENS, most, 1024))
    tokens = {n for part in (*steps, *large) for n in part if n < most} | {most}
    found = []
    for count in sorted(tokens):
        longest = min(count, max_length)
        for length in (longest,) if longest <= SHORT or count > SMALL_TOKENS else (SHORT, longest):
            sequences = max(8, count // (8 if length <= SHORT else 16))
            wanted = {"first": sequences, "all": count, "wanted": min(max(8, count // 16), MOST_ROWS)}[rows]
            found.append(Sizes(count, length, sequences, wanted))
    return found


def capture_order(sizes: Sequence[Sizes]) -> list[Sizes]:
    """The small steps' graphs, then the large ones'; of each group the largest first, as the others fit in its memory.

    After it come the small ones: where time ends the captures, it is the steps between that are padded further.
    """
    small = [size for size in sizes if size.tokens <= SMALL_TOKENS]
    large = list(sizes[len(small) :])
    return [size for group in (small, large) for size in (*group[-1:], *group[:-1])]


def most_bytes(step_bytes: int) -> int:
    """Memory that the graphs may take of what is free now: `MOST_BYTES`, or a sixteenth where that is more; never what
    a step without a graph needs (`step_bytes`).
    """
    free = torch.cuda.mem_get_info()[0]
    return min(max(MOST_BYTES, free // 16), free - step_bytes)


class GraphedEncoder:
    """An encoder that runs a step as a CUDA graph where there is one (see `encoding.EncoderModel`).

    Args:
        encoder: the model.
        inputs: the steps' memory; its `graphs` are set.
        reduction: of the requests that a graph also reduces the outputs for.
        sizes: of the graphs, ascending; not all are made where they take too long or too much memory.
        recorder: None: `Recorder`.
    """

    def __init__(
        self,
        encoder: EncoderModel,
        inputs: EncoderInputs,
        reduction: Reduction,
        sizes: Sequence[Sizes],
        recorder: Recorder | None = None,
    ) -> None:
        self._encoder = encoder
        self._reduction = reduction
        self._recorder = recorder or Recorder()
        self._replays: dict[Sizes, Replay] = {}
        batch = _blank(inputs, sizes[0])
        like = encoder.outputs(batch)
        reduced = reduce(like, reduction, batch.starts, best_shares)
        # All graphs write here: vocabularies are wide, and one of each graph would take much memory.
        rows = max(size.rows for size in sizes)
        self._outputs = like.new_empty((rows, like.shape[1]))
        self._numbers = reduced.numbers.new_empty((rows, reduced.numbers.shape[1]))
        self._has_ids = reduced.has_ids
        for size in capture_order(sizes):
            if self._recorder.full():
                break
            self._capture(inputs, size)
        self._recorder.settle()
        inputs.graphs = sorted(self._replays)

    def __str__(self) -> str:
        if not self._replays:
            return "none: too little time or memory"
        counts = sorted({size.tokens for size in self._replays})
        took = f"captured in {self._recorder.seconds:.1f} s, {size_words(self._recorder.bytes)}"
        return f"{len(self._replays)} of steps of {counts[0]} to {counts[-1]} tokens, {took}"

    @torch.inference_mode()
    def _capture(self, inputs: EncoderInputs, size: Sizes) -> None:
        batch, outputs = _blank(inputs, size), self._outputs[: size.rows]

        def step() -> tuple[Tensor, Tensor]:
            outputs.copy_(self._encoder.outputs(batch))
            numbers = reduce(outputs, self._reduction, batch.starts, best_shares).numbers
            return outputs, self._numbers[: len(numbers)].copy_(numbers)

        self._replays[size], _ = self._recorder.record(step)

    def outputs(self, batch: EncoderBatch) -> Tensor:
        """See `encoding.EncoderModel`."""
        replay = self._replay(batch)
        if replay is None:
            return self._encoder.outputs(batch)
        replay()
        return self._outputs[: len(batch.rows)]

    def reduced(self, batch: EncoderBatch, reduction: Reduction) -> Reduced | None:
        """See `encoding.Reducing`."""
        replay = self._replay(batch) if reduction == self._reduction else None
        if replay is None:
            return None
        replay()
        return Reduced(self._numbers, self._has_ids)

    def _replay(self, batch: EncoderBatch) -> Replay | None:
        # An eager step that happens to have a graph's sizes lies where the graph reads.
        return self._replays.get(Sizes(len(batch.token_ids), batch.max_length, len(batch.starts) - 1, len(batch.rows)))


def _blank(inputs: EncoderInputs, size: Sizes) -> EncoderBatch:
    """Padding alone."""
    batch = inputs.batch(size)
    for tensor in (batch.token_ids, batch.type_ids, batch.positions, batch.rows, batch.starts):
        tensor.zero_()
    return batch
