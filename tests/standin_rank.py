"""A stand-in rank that notes what it is told and misbehaves on command: the first word of the prompt is the command."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miinb.messages import EncodeRequest, SequenceRequest
from miinb.server.frames import CancelRow, ToRank
from miinb.server.standin import Running, StandIn
from miinb.server.text import TextCodec


class Noting(StandIn):
    """Commands: "SLOW" (20 ms a token), "NAN" (fails after three tokens), "DIE" (the process ends after three tokens),
    "GONE" (replica 0 ends before the first).
    """

    def __init__(self, line: dict[str, Any]) -> None:
        super().__init__(line)
        folder = Path(line["folder"]) / self.info.tokenizer_folder
        self.text = TextCodec.load(folder) if folder.exists() else None
        self.events = Path(line["events"]).open("a", buffering=1)  # noqa: SIM115 (open as long as the process)

    def note(self, kind: str, **values: Any) -> None:
        self.events.write(json.dumps({"kind": kind, "replica": self.info.replica, **values}) + "\n")

    def take(self, message: ToRank) -> None:
        if isinstance(message, SequenceRequest):
            self.note("submit", row_id=message.row_id, seed=message.params.seed, tokens=len(message.token_ids))
        elif isinstance(message, CancelRow):
            self.note("cancel", row_id=message.row_id, reason=message.reason)
        elif isinstance(message, EncodeRequest):
            self.note("encode", lengths=list(message.lengths), options=message.options)
        super().take(message)

    def answer(self, row: Running) -> Sequence[int]:
        prompt = self.text._tokenizer.decode(list(row.request.token_ids)) if self.text else ""
        command = prompt.split(" ")[0]
        if command == "SLOW":
            time.sleep(0.02)
        if (command == "DIE" and row.done == 3) or (command == "GONE" and self.info.replica == 0):
            self.socket.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if command == "NAN" and row.done == 3:
            self.fail(row, "NonFinite", "The logits of this row are NaN.", "Try fp32.")
            row.done = -(1 << 30)  # never at its end
            return []
        return super().answer(row)


if __name__ == "__main__":
    try:
        Noting(json.loads(sys.stdin.readline())).run()
    except ConnectionError as error:
        print(error, file=sys.stderr)
