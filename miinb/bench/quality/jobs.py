"""What goes from the process that asks to the one that runs an arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miinb.bench.headline import suites
from miinb.config import DeploymentConfig

SUITE = "quality"


@dataclass(frozen=True, slots=True)
class Reading:
    """The text that every arm predicts, and the requests that its speed is measured with.

    Attributes:
        text: its name.
        sha256: of the text.
        windows: tokens; each begins with what the tokenizer puts before a text.
        first: index in each window of the first token that is predicted.
        decode: one request after another.
    """

    text: str
    sha256: str
    windows: tuple[tuple[int, ...], ...]
    first: int
    decode: suites.Workload

    @property
    def suite(self) -> str:
        """Names the run."""
        return SUITE

    @property
    def limit_s(self) -> float:
        """Seconds that all of it may take."""
        return self.decode.limit_s

    @property
    def batches(self) -> tuple[int, ...]:
        """None are tried."""
        return ()

    @property
    def window(self) -> int:
        """Tokens of the longest window."""
        return max(map(len, self.windows))

    def about(self) -> dict[str, Any]:
        """What the run's environment says of it."""
        return {
            **self.decode.about(),
            "text": self.text,
            "text_sha256": self.sha256,
            "text_tokens": sum(len(window) - self.first for window in self.windows),
            "window": self.window,
        }


@dataclass(frozen=True, slots=True)
class Job:
    """An arm: a deployment's configuration as the planner resolved it, and what it reads.

    Attributes:
        model: its name.
        arm: its label and dtype.
        config: of the deployment; nothing in it is "auto".
        workloads: the one reading.
    """

    model: str
    arm: suites.Arm
    config: DeploymentConfig
    workloads: tuple[Reading]

    @property
    def task(self) -> str:
        """Hugging Face's name."""
        return "text-generation"

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return self.config.dtype

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return self.config.device
