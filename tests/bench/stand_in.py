"""A deterministic session with the public surface that the benchmark drives: no processes, real sleeping."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from miinb.config import DeploymentConfig, parse_generation
from miinb.errors import MiinbError, Unavailable
from miinb.image_messages import Picture
from miinb.image_params import parse_images
from miinb.image_results import ImageResult, ImageTiming, pictures_result
from miinb.messages import Chunk, Plan, Status, Timing, Usage
from miinb.predictions import Label, Predictions, PredictTiming


@dataclasses.dataclass
class Answer:
    text: str
    usage: Usage
    timing: Timing
    finish_reasons: list[str]


class Stream:
    def __init__(self, session: StandIn, prompt: str, tokens: list[int], cached: int = 0) -> None:
        self.session, self.prompt, self.tokens, self.cached = session, prompt, tokens, cached
        self.cancelled = threading.Event()
        self.result: Answer | None = None

    def __iter__(self) -> Iterator[Chunk]:
        sent = []
        for token in self.tokens:
            if self.cancelled.wait(self.session.token_s):
                break
            sent.append(token)
            yield Chunk(f" w{token}", (token,))
        self.result = Answer(
            "".join(f" w{token}" for token in sent),
            Usage(len(self.prompt.split()), len(sent), self.cached),
            Timing(queue_s=self.session.token_s / 10, model_s=len(sent) * self.session.token_s),
            ["cancelled" if self.cancelled.is_set() else "length"],
        )

    def cancel(self) -> None:
        self.cancelled.set()


class StandIn:
    """`token_s` seconds a token; from token `differs_from` on answers differ; each `fail_every`-th fails.

    After `dies_after` requests it is gone. With `caches` a prompt that was there comes from a prefix cache.
    """

    task = "text-generation"
    model = "someone/small-model"
    address = ""
    load_s = 1.5

    def __init__(
        self,
        engine: str = "optimized",
        *,
        name: str = "",
        token_s: float = 0.0,
        differs_from: int | None = None,
        fail_every: int = 0,
        error: MiinbError | None = None,
        dies_after: int | None = None,
        caches: bool = False,
    ) -> None:
        self.dies_after, self.caches = dies_after, caches
        self.engine, self.name = engine, name or engine
        self.token_s, self.differs_from, self.fail_every, self.error = token_s, differs_from, fail_every, error
        self.config = DeploymentConfig(model=self.model, engine=engine)
        self.calls: list[dict[str, Any]] = []
        self.prompts: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def stream(self, prompt: str, **params: Any) -> Stream:
        parse_generation({name: value for name, value in params.items() if name != "timeout_s"})
        with self.lock:
            self.calls.append(params)
            cached = len(prompt.split()) if self.caches and prompt in self.prompts else 0
            self.prompts.append(prompt)
            number = len(self.calls)
        if self.dies_after is not None and number > self.dies_after:
            raise Unavailable("The deployment does not answer.")
        if self.fail_every and number % self.fail_every == 0:
            raise self.error or MiinbError("It broke.")
        start = sum(map(ord, prompt)) % 1000
        tokens = [start + i for i in range(params["max_new_tokens"])]
        if self.differs_from is not None:
            tokens = [t if i < self.differs_from else t + 5000 for i, t in enumerate(tokens)]
        return Stream(self, prompt, tokens, cached)

    def plan(self) -> Plan:
        return Plan(self.engine, "cpu", "bf16", weights_bytes=270 << 20, kv_cache_bytes=90 << 20)

    def status(self) -> Status:
        return Status(self.name, "ready", self.model, self.task, self.engine, "bf16", "cpu", "", 1, False, time.time())


class Predicting(StandIn):
    """Labels texts: the same for all, but for the texts that `differs` names."""

    task = "text-classification"

    def __init__(self, engine: str = "optimized", *, differs: str = "", folder: str = "", **more: Any) -> None:
        super().__init__(engine, **more)
        self.differs = differs
        self.address = f"unix:{folder}/rpc.sock" if folder else ""

    def predict(self, inputs: list[Any], *, timeout_s: float) -> Predictions:
        with self.lock:
            self.calls.append({"inputs": inputs})
        time.sleep(self.token_s)
        labels = [[Label("no" if self.differs and self.differs in text else "yes", 0.9)] for text in inputs]
        timing = PredictTiming(0.001, 0.002, 0.003, 0.004, self.token_s)
        return Predictions(labels, task=self.task, inputs=inputs, timing=timing)


class Painting(StandIn):
    """Waves of a prompt and a seed, those of odd seeds lighter by `off`; a request takes `token_s` seconds a step.

    Its server computes up to `most` pictures at once, in the time of one.
    """

    task = "text-to-image"
    model = "someone/small-diffusion"
    schedulers: tuple[str, ...] = ()

    def __init__(self, engine: str = "optimized", *, off: int = 0, most: int = 4, side: int = 32, **more: Any) -> None:
        super().__init__(engine, **more)
        self.off, self.most, self.side = off, most, side

    async def agenerate(self, prompt: str, *, timeout_s: float, **parameters: Any) -> ImageResult:
        params = parse_images(parameters)
        with self.lock:
            self.calls.append(parameters)
            self.prompts.append(prompt)
            number = len(self.calls)
        if self.fail_every and number % self.fail_every == 0:
            raise self.error or MiinbError("It broke.")
        steps_s = self.token_s * params.num_inference_steps
        begin = time.perf_counter()
        await asyncio.sleep(steps_s)
        assert params.seed is not None
        pictures = [
            self._picture(prompt, params.seed + place, place, params.width, params.height)
            for place in range(params.num_images_per_prompt)
        ]
        e2e_s = time.perf_counter() - begin
        timing = ImageTiming(0.0001, 0.0, e2e_s=e2e_s, text_encode_s=0.0002, steps_s=steps_s, vae_s=0.0003)
        return pictures_result(prompt, pictures, timing, usage=Usage(prompt_tokens=len(prompt.split())))

    def _picture(self, prompt: str, seed: int, place: int, width: int | None, height: int | None) -> Picture:
        size = (width or self.side, height or self.side)
        shift = seed + sum(map(ord, prompt))
        x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
        waves = [127 + 90 * np.sin(x / (5 + shift % 5) + y / (4 + k) + shift) for k in range(3)]
        values = np.stack(waves, axis=-1) + self.off * (seed % 2)
        buffer = io.BytesIO()
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
        return Picture(place, buffer.getvalue(), seed, *size)

    def plan(self) -> Plan:
        return Plan(self.engine, "cpu", "fp32", max_batch=self.most, weights_bytes=5 << 20, schedulers=self.schedulers)
