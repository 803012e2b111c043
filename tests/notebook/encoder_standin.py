"""A stand-in for `Session` of an encoder task."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy
from standin import StandIn

from miinb.asking import task_inputs
from miinb.predictions import Answer, Embedding, Entity, Fill, Label, Predictions, PredictTiming


def _answers(task: str, values: dict[str, str], evil: str) -> list[Any]:
    text = next(iter(values.values()))
    if task == "text-classification":
        return [Label(f"good{evil}", 0.9), Label("bad", 0.1)]
    if task == "token-classification":
        return [Entity(f"PER{evil}", 0.99, text[:3], 0, 3)]
    if task == "question-answering":
        return [Answer(values["context"][:3], 0.8, 0, 3), Answer(values["context"], 0.1, 0, len(values["context"]))]
    return [Fill(f"Paris{evil}", 0.7, 5, text)]


@dataclass
class EncoderStandIn(StandIn):
    task: str = "text-classification"
    evil: str = ""
    gate: threading.Event | None = None
    asked: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    async def apredict(self, inputs: Any, **options: Any) -> Predictions:
        self.asked.append((inputs, options))
        plain = task_inputs(self.task, inputs)
        while self.gate is not None and not self.gate.is_set():
            await asyncio.sleep(0.005)
        texts = [next(iter(one.values())) if len(one) == 1 else one for one in plain]
        timing = PredictTiming(model_s=0.002, e2e_s=0.004)
        if self.task == "feature-extraction":
            array = numpy.eye(len(texts), 4, dtype=numpy.float32) + 0.5
            rows = [[Embedding(row)] for row in array]
            return Predictions(rows, task=self.task, inputs=texts, timing=timing, array=array)
        answers = [_answers(self.task, one, self.evil) for one in plain]
        return Predictions(answers, task=self.task, inputs=texts, timing=timing)
