"""Ranks above 0 of a tensor-parallel replica: they compute the steps that rank 0 plans.

Rank 0 sends each step before it computes it. Every rank gathers the others' best candidates (or logits) and draws the
same tokens, so nothing comes back but failures. A rank that fails within a step says so, then takes part in what is
left of the step's collectives with zeros (`Decoder.stand_in`): no rank waits for ever, and rank 0 undoes the step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from miinb.config import EngineOptions
from miinb.engine.compute import STEP_ERRORS, StepCompute, request_error
from miinb.engine.decoder import Decoder
from miinb.engine.drafts import most_places
from miinb.engine.kv_cache import KVCache
from miinb.engine.links import Leader, Link
from miinb.engine.plan_wire import PlanReader, PlanWriter
from miinb.engine.rows import Row, StepPlan
from miinb.engine.sampling import Needs
from miinb.errors import MiinbError, from_name
from miinb.messages import EngineInfo

log = logging.getLogger(__name__)


@runtime_checkable
class Following(Protocol):
    """A rank above 0: this module's `Follower`, or `lockstep.BatchFollower`."""

    info: EngineInfo

    def run(self) -> None:
        """Compute what rank 0 says until it has ended. Raises PeerLost."""

    def close(self) -> None:
        """Let go of the device's memory."""


class Followers:
    """The followers as rank 0's executor sees them."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._writer = PlanWriter()
        self._failures: dict[int, MiinbError] = {}

    @classmethod
    def of(cls, leader: Leader | None) -> Followers | None:
        """None without wires: there are none."""
        return cls(leader) if leader is not None else None

    def publish(self, number: int, plan: StepPlan, needs: Needs, blank: Sequence[int]) -> None:
        """Have the followers compute a step. Raises PeerLost."""
        self._leader.send(self._writer.write(number, plan, int(needs), blank))

    def failure(self, number: int) -> MiinbError | None:
        """Why a step failed on a follower, once its results are here. Raises PeerLost."""
        for words in self._leader.news():
            self._failures[words["step"]] = from_name(words["error"], words["message"], hint=words["hint"])
        return self._failures.pop(number, None)

    def forget(self, rows: Iterable[Row]) -> None:
        """These rows were in a step that raised; to be called while they have their slots."""
        self._writer.forget(rows)

    def close(self) -> None:
        """They end."""
        self._leader.close()


class Follower:
    """A rank above 0.

    Args:
        info: what this rank serves; `max_batch`, `max_length` and `vocab_size` count here, and are rank 0's.
        decoder: its part of the model.
        cache: its part of the KV cache.
        options: `max_step_tokens` counts here.
        link: to rank 0.
    """

    def __init__(self, info: EngineInfo, decoder: Decoder, cache: KVCache, options: EngineOptions, link: Link) -> None:
        self.info = info
        self._link = link
        step_tokens = options.step_tokens(cache.k[0].device.type)
        self.compute = StepCompute(
            decoder,
            cache,
            max_batch=min(info.max_batch, step_tokens),
            max_length=info.max_length,
            max_step_tokens=step_tokens,
            vocab_size=info.vocab_size,
            keeps_tokens=True,  # the host never learns them here
            group=decoder.group,
            max_places=most_places(info.max_batch, step_tokens, speculative=options.speculative == "prompt_lookup"),
        )

    @torch.inference_mode()
    def run(self) -> None:
        """Compute steps until rank 0 has ended.

        Raises:
            PeerLost: a rank is gone in the middle of a step.
        """
        reader = PlanReader()
        while data := self._link.receive():  # an empty message ends it, too
            step = reader.read(data)
            try:
                self.compute.follow(step.plan, Needs(step.needs), step.blank, partial(self._tell, step.number))
            except STEP_ERRORS:
                log.exception("step %d of %d tokens raised", step.number, step.plan.tokens)

    def _tell(self, number: int, error: Exception) -> None:
        known = request_error(error)
        words: dict[str, Any] = {"error": type(known).__name__, "message": known.message, "hint": known.hint}
        self._link.tell({"step": number, **words})

    def close(self) -> None:
        """Let go of the device's memory."""
        self._link.close()
        self.compute.close()
