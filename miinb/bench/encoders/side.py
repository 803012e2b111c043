"""What an arm in process does: make inputs ready, run them, and give the answers that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from miinb.bench.encoders.answers import Answer
from miinb.bench.encoders.inputs import Encoded


@dataclass(slots=True)
class Run:
    """A pass: what came out (as the side keeps it), seconds in the model and before it."""

    results: Any
    model_s: float
    queue_s: float = 0.0


class Side(Protocol):
    """A model loaded as an arm.

    Attributes:
        batched: it runs padded batches, of which a size must be chosen.
        compiled: each shape is a compilation of its own.
    """

    batched: bool
    compiled: bool

    def prepare(self, sequences: Sequence[Encoded], size: int) -> Any:
        """Inputs of a pass, before the clock starts; `size` of a padded batch, 0: all at once."""

    def run(self, ready: Any) -> Run:
        """A pass, from the prepared inputs to its results. Raises MiinbError if it fails."""

    def answers(self, ready: Any, run: Run, count: int) -> list[Answer]:
        """Of the first `count` sequences; empty where the pass did not keep them."""

    def facts(self) -> dict[str, Any]:
        """What a run keeps of the arm besides its requests."""

    def close(self) -> None:
        """Let go of the model."""
