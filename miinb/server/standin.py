"""A rank without a model: `python -m miinb.server.standin`, for benchmarks and tests of the frontend alone.

Speaks the frames of `frames.py` like a real rank 0 and is started the same way. It answers a prompt with its own
tokens, again and again, one token a row and step. An encoder's numbers are the token ids, and each one's id is itself.
A picture takes one step of its own for each that is asked for, and has one color: the seed's last byte.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miinb.image_messages import PaintedEvent, PaintProgress, PaintRequest
from miinb.image_params import steps_of
from miinb.messages import (
    EncodedEvent,
    EncodeRequest,
    EngineInfo,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Plan,
    SequenceRequest,
    TokenLogprob,
    TokensEvent,
)
from miinb.server.frames import CancelRow, EngineStatus, ToRank
from miinb.server.ipc import RankSocket


@dataclass(slots=True)
class Running:
    """A row and how far it is."""

    request: SequenceRequest
    t_start: float = 0.0
    done: int = 0


class StandIn:
    """The loop of a rank without a model.

    Args:
        line: the JSON line of a rank: "folder", "replica", and optionally "task", "vocab_size", "max_length",
            "max_batch", "tokenizer_folder", "step_s" (least time of a step).
    """

    def __init__(self, line: Mapping[str, Any]) -> None:
        self.info = EngineInfo(
            replica=line.get("replica", 0),
            model="stand-in",
            task=line.get("task", "text-generation"),
            engine="stand-in",
            dtype="fp32",
            device="cpu",
            vocab_size=line.get("vocab_size", 1000),
            max_length=line.get("max_length", 4096),
            max_batch=line.get("max_batch", 256),
            eos_token_ids=(),
            tokenizer_folder=line.get("tokenizer_folder", "tokenizer"),
            plan=Plan("stand-in", "cpu", "fp32"),
        )
        self.step_s = float(line.get("step_s", 0.0))
        self.socket = RankSocket.connect(Path(line["folder"]) / "engine.sock")
        self.waiting: list[Running] = []
        self.running: dict[int, Running] = {}
        self.painting: dict[int, list[Any]] = {}  # by row: the request, and its steps so far

    def run(self) -> None:
        """Serve until the frontend is gone."""
        self.socket.send(self.info)
        next_step = time.monotonic()
        while True:
            busy = bool(self.running or self.waiting or self.painting)
            wait_s = max(0.0, next_step - time.monotonic()) if busy else None
            for message in self.socket.receive(wait_s):
                self.take(message)
            now = time.monotonic()
            if now >= next_step:
                next_step = max(next_step + self.step_s, now - self.step_s)
                self.step(now)
            self.socket.flush()

    def take(self, message: ToRank) -> None:
        """One message of the frontend."""
        if isinstance(message, SequenceRequest):
            self.waiting.append(Running(message))
        elif isinstance(message, CancelRow):
            self.waiting = [row for row in self.waiting if not self._cancelled(row, message)]
            if (row := self.running.pop(message.row_id, None)) is not None:
                self.finish(row, message.reason)
            if self.painting.pop(message.row_id, None) is not None:
                self.socket.send(FinishedEvent(message.row_id, message.reason, 0.0, 0.0, 0.0, 0, 0))
        elif isinstance(message, PaintRequest):
            self.painting[message.row_id] = [message, 0]
            self.socket.send(PaintProgress(message.row_id, 0, steps_of(message.params)))
        elif isinstance(message, EncodeRequest):
            self.encode(message)
        else:
            self.socket.send(EngineStatus({"running": len(self.running), "waiting": len(self.waiting)}))

    def encode(self, request: EncodeRequest) -> None:
        """Answer at once: of each row that the task has (docs/internals.md) the token's id, as value and as id."""
        task, lengths, tokens = self.info.task, request.lengths, request.token_ids
        columns, rows = int(request.options.get("top_k", 1)), tokens
        if task == "fill-mask":
            rows = [tokens[place] for place in request.wanted]
        elif task == "question-answering":
            columns = 2
        elif task == "text-classification" or request.options.get("pooling", "none") != "none":
            rows = [tokens[at] for at in itertools.accumulate(lengths[:-1], initial=0)]
        numbers = [token for token in rows for _ in range(columns)]
        ids = array("i", numbers).tobytes() if "top_k" in request.options else b""
        self.socket.send(EncodedEvent(request.row_id, columns, array("f", numbers).tobytes(), ids))

    def _cancelled(self, row: Running, message: CancelRow) -> bool:
        if row.request.row_id != message.row_id:
            return False
        self.finish(row, message.reason)
        return True

    def step(self, now: float) -> None:
        """Admit what fits; one token for each row."""
        while self.waiting and len(self.running) < self.info.max_batch:
            row = self.waiting.pop(0)
            if row.request.deadline is not None and now > row.request.deadline:
                self.fail(row, "DeadlineExceeded", "The request's time limit passed in the queue.")
                continue
            row.t_start = now
            self.running[row.request.row_id] = row
        for row in tuple(self.running.values()):
            ids = self.answer(row)
            row.done += len(ids)
            self.socket.send(TokensEvent(row.request.row_id, ids, self._logprobs(row, ids)))
            if row.done >= row.request.params.max_new_tokens:
                del self.running[row.request.row_id]
                self.finish(row, "length")

        self.paint()

    def paint(self) -> None:
        """A step of every picture."""
        for row_id, state in tuple(self.painting.items()):
            state[1] += 1
            params, total = state[0].params, steps_of(state[0].params)
            every = params.preview_steps
            width = 4 if every and state[1] % every == 0 else 0
            self.socket.send(PaintProgress(row_id, state[1], total, width, bytes(3 * width * width)))
            if state[1] == total:
                del self.painting[row_id]
                width, height, seed = params.width or 16, params.height or 8, params.seed or 0
                facts = {"prompt_tokens": 3, "cut": "", "negative_cut": "", "batch": len(self.painting) + 1}
                times = dict.fromkeys(("queue_s", "text_encode_s", "steps_s", "vae_s"), 0.5)
                pixels = bytes([seed & 255]) * (3 * width * height)
                if (source := state[0].source) is not None:  # what it has got, for tests
                    pixels = bytes(value for value in source.mask for _ in range(3)) or source.image
                scheduler = params.scheduler or "PNDMScheduler"
                self.socket.send(PaintedEvent(row_id, width, height, seed, False, scheduler, facts, times, pixels))

    def answer(self, row: Running) -> Sequence[int]:
        """The next tokens of a row."""
        prompt = row.request.token_ids
        return [prompt[row.done % len(prompt)]]

    def _logprobs(self, row: Running, ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
        count = row.request.params.logprobs
        if count is None:
            return ()
        return tuple(TokenLogprob(i, -0.5, tuple((i + k, -0.5 - k) for k in range(count))) for i in ids)

    def finish(self, row: Running, reason: FinishReason) -> None:
        """The end of a row."""
        request, now = row.request, time.monotonic()
        begin = row.t_start or now
        self.socket.send(
            FinishedEvent(
                request.row_id, reason, begin - request.t_submit, now - begin, 0.0, len(request.token_ids), row.done
            )
        )

    def fail(self, row: Running, error: str, message: str, hint: str = "") -> None:
        """The failure of a row alone."""
        self.running.pop(row.request.row_id, None)
        self.socket.send(FailedEvent(row.request.row_id, error, message, hint))


def main() -> None:
    """Read the JSON line of stdin and serve until the frontend is gone."""
    try:
        StandIn(json.loads(sys.stdin.readline())).run()
    except ConnectionError as error:
        print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
