"""A stand-in for `Session` that answers from a list of words, for tests of commands and panels in milliseconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from miinb.config import parse_generation
from miinb.messages import Chunk, Phase, Plan, PlanLine, RankStatus, Status, Timing, Usage


@dataclass
class Answer:
    """The shape of `Result`."""

    texts: list[str]
    finish_reasons: list[str]
    usage: Usage
    timing: Timing
    dropped_messages: int = 0
    token_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def text(self) -> str:
        return self.texts[0]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from miinb.notebook import cards

        return cards.bundle(cards.result_card(self))


class Stream:
    def __init__(self, words: list[str], delay_s: float, gate: threading.Event | None, e2e_s: float) -> None:
        self._words, self._delay_s, self._gate, self.e2e_s = words, delay_s, gate, e2e_s
        self.cancelled = threading.Event()
        self.result: Any = None

    def __iter__(self) -> Iterator[Chunk]:
        sent: list[str] = []
        for i, word in enumerate(self._words):
            if self._gate is not None:
                while not self._gate.wait(0.01) and not self.cancelled.is_set():
                    pass
            if self.cancelled.is_set():
                break
            time.sleep(self._delay_s)
            sent.append(word)
            yield Chunk(word, (i,))
        reason = "cancelled" if self.cancelled.is_set() else "length"
        timing = Timing(ttft_s=0.0352, tpot_s=0.0113, e2e_s=self.e2e_s)
        ids = tuple(hash(word) for word in sent)
        self.result = Answer(["".join(sent)], [reason], Usage(5, len(sent)), timing, token_ids=(ids,))

    def cancel(self) -> None:
        self.cancelled.set()


def _check(params: dict[str, Any]) -> None:
    parse_generation({name: value for name, value in params.items() if name != "timeout_s"})


@dataclass
class StandIn:
    name: str = "tiny"
    model: str = "/models/tiny"
    task: str = "text-generation"
    engine: str = "optimized"
    state: str = "ready"
    dropped_messages: int = 0
    words: list[str] = field(default_factory=lambda: ["Once ", "upon ", "a ", "time"])
    delay_s: float = 0.0
    gate: threading.Event | None = None
    e2e_s: float = 0.51
    in_flight: int = 0
    persist: bool = False
    gpu: int | None = None
    phase: Phase | None = None
    log: str = "==> rank-0.log <==\nloaded"
    calls: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)

    def stream(self, prompt: str, **params: Any) -> Stream:
        _check(params)
        self.calls.append(("stream", prompt, params))
        return Stream(self.words, self.delay_s, self.gate, self.e2e_s)

    def generate(self, prompts: str | list[str], **params: Any) -> Answer:
        if self.task == "text-generation":
            _check(params)
        self.calls.append(("generate", prompts, params))
        count = 1 if isinstance(prompts, str) else len(prompts)
        return Answer(["".join(self.words)] * count, ["length"] * count, Usage(5, 4 * count), Timing(e2e_s=0.5))

    def chat(self, messages: list[dict[str, str]], **params: Any) -> Answer:
        self.calls.append(("chat", messages, params))
        answer = self.generate("")
        answer.dropped_messages = self.dropped_messages
        return answer

    def status(self) -> Status:
        rank = RankStatus(0, 0, 12, "ready", self.gpu, memory_bytes=3 << 29, weights_bytes=1 << 29)
        return Status(
            name=self.name,
            state=self.state,
            model=self.model,
            task=self.task,
            engine=self.engine,
            dtype="fp32",
            device="cpu",
            address="unix:/run/tiny/rpc.sock",
            pid=11,
            persist=self.persist,
            uptime_s=75.0,
            in_flight=self.in_flight,
            requests=3,
            ranks=() if self.state in ("stopped", "lost") else (rank,),
            phase=self.phase,
        )

    def stop(self, **limits: float) -> None:
        if limits:
            self.calls.append(("stop", None, limits))
        self.state = "stopped"

    def restart(self, **limits: float) -> None:
        self.calls.append(("restart", None, {}))
        if self.gate is not None:
            self.gate.wait(10)
        self.state = "ready"

    def keep(self) -> None:
        self.persist = True

    def logs(self, n: int = 50, rank: int | None = None) -> str:
        return self.log

    def plan(self) -> Plan:
        return Plan("optimized", "cpu", "fp32", lines=(PlanLine("attention", "fused", self.model),))

    def panel(self, kind: str | None = None) -> Any:
        from miinb.notebook.panels import panel

        return panel(self, kind)  # type: ignore[arg-type]
