"""transformers' `generate` on several ranks in lock step: rank 0 chooses and stops, the others compute along.

DeepSpeed's AutoTP makes each rank's model a part of the whole, whose layers sum over the ranks. So every rank has to
call the model with the same tokens, as often as the others. A batch goes down the wires as JSON, then twice a step some
bytes: what rank 0's logits processors have chosen, and which rows end. Nothing comes up while all is well.

A batch that raises on rank 0 outside the model ends on all ranks, and so does one that raises on all of them alike (a
lack of memory does). A rank that fails alone within the model leaves the others waiting in a sum: it ends, the
replica's ranks end with it, and the supervisor starts them again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from miinb.engine.compute import STEP_ERRORS, request_error
from miinb.engine.generation import run_generate
from miinb.engine.links import Leader, Link
from miinb.engine.parallel import OutOfStep, PeerLost
from miinb.errors import MiinbError, Unavailable, from_name
from miinb.messages import EngineInfo

log = logging.getLogger(__name__)

#: How long ranks wait for each other after a batch has raised: what one raises, the others raise at once.
SETTLE_S = 5.0
#: First byte of a message within a batch: a step's data, or the batch is given up.
_DATA, _GIVEN_UP = b"d", b"x"


class Lead:
    """Rank 0's side.

    Args:
        leader: its wires.
        followers: how many there are.
    """

    def __init__(self, leader: Leader, followers: int) -> None:
        self._leader = leader
        self._count = followers
        self._batch = 0
        self._told: list[MiinbError | None] = []  # by followers that have left this batch

    def begin(self, **work: Any) -> None:
        """Have the followers begin a batch, or a forward. Raises PeerLost."""
        self._batch += 1
        self._told = []
        self._leader.send(json.dumps({"batch": self._batch, **work}).encode())

    def say(self, data: bytes) -> None:
        """A step's data. Raises PeerLost, and MiinbError when a follower has failed."""
        self._listen()
        for error in self._told:
            raise error or MiinbError("A rank left the batch.")
        self._leader.send(_DATA + data)

    def settle(self, error: Exception) -> tuple[MiinbError, PeerLost | None]:
        """See `settled`."""
        failure, deadline = request_error(error), time.monotonic() + SETTLE_S
        lost = error if isinstance(error, PeerLost) else None
        try:
            self._listen()
            self._leader.send(_GIVEN_UP)
            while len(self._told) < self._count and time.monotonic() < deadline:
                self._listen()
                time.sleep(0.005)
        except PeerLost as gone:
            lost = gone
        told = [error for error in self._told if error is not None]
        if lost is not None and not told:
            failure = _gone()
        elif lost is None and len(self._told) < self._count:
            lost = OutOfStep(f"This rank failed in a step that others went on with: {failure.message}")
        return told[0] if told else failure, lost

    def _listen(self) -> None:
        for words in self._leader.news():
            if words["batch"] == self._batch:
                named = words["error"]
                self._told.append(from_name(named, words["message"], hint=words["hint"]) if named else None)

    def join(self, processors: Sequence[Any], criteria: Sequence[Any], *, beams: bool) -> tuple[list[Any], list[Any]]:
        """The arguments of `generate` with what tells the followers, at the ends."""
        return [*processors, _TellChoice(self, beams=beams)], [_TellEnds(self, criteria)]

    def announce(self, model: Any) -> None:
        """From now on the followers compute each forward of `model` (of an encoder: there is no cache)."""

        def before(module: Any, args: Any, inputs: dict[str, Any]) -> None:
            tensors = {name: value.tolist() for name, value in inputs.items() if isinstance(value, Tensor)}
            others = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
            self.begin(tensors=tensors, others=others)

        model.register_forward_pre_hook(before, with_kwargs=True)

    def close(self) -> None:
        """The followers end."""
        self._leader.close()


def settled(lead: Lead | None, error: Exception) -> tuple[MiinbError, PeerLost | None]:
    """After a batch has raised: see that the other ranks leave it, too.

    Args:
        lead: to them; None: there are none, or they compute their part of each step whatever happens here.
        error: what was raised on rank 0.

    Returns:
        What the batch's rows are told, and, if this replica cannot go on, the error that has to end this rank.
    """
    if lead is not None:
        return lead.settle(error)
    return (_gone(), error) if isinstance(error, PeerLost) else (request_error(error), None)


def _gone() -> MiinbError:
    return Unavailable("Another rank of this replica ended.", hint="It is started again: ask once more.")


class _TellChoice(transformers.LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Last among rank 0's processors: tells each row's token, or under beam search all scores."""

    def __init__(self, lead: Lead, *, beams: bool) -> None:
        self._lead, self._beams = lead, beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by transformers with scores [R, vocab]."""
        self._lead.say(_pack(scores.float() if self._beams else scores.argmax(-1)))
        return scores


class _TellEnds(transformers.StoppingCriteria):  # type: ignore[misc]
    """All of rank 0's stopping criteria, whose verdict it tells."""

    def __init__(self, lead: Lead, criteria: Sequence[Any]) -> None:
        self._lead, self._criteria = lead, transformers.StoppingCriteriaList(criteria)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by transformers after each step."""
        ended: Tensor = self._criteria(input_ids, scores, **kwargs)
        self._lead.say(_pack(ended.to(torch.uint8)))
        return ended


class _HearChoice(transformers.LogitsProcessor):  # type: ignore[misc]
    """A follower's only processor: scores that make `generate` choose what rank 0 has chosen."""

    def __init__(self, follower: BatchFollower, *, beams: bool) -> None:
        self._follower, self._beams = follower, beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by transformers with scores [R, vocab]."""
        data = self._follower.hear()
        if self._beams:
            return _unpack(data, torch.float32, scores).view_as(scores)
        chosen = _unpack(data, torch.int64, scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _HearEnds(transformers.StoppingCriteria):  # type: ignore[misc]
    """A follower's only stopping criterion."""

    def __init__(self, follower: BatchFollower) -> None:
        self._follower = follower

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by transformers after each step."""
        return _unpack(self._follower.hear(), torch.uint8, input_ids).bool()


def _pack(values: Tensor) -> bytes:
    return values.cpu().contiguous().numpy().tobytes()


def _unpack(data: bytes, dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).to(like.device)


class _GivenUp(Exception):
    """Rank 0 has ended the batch."""


class BatchFollower:
    """A rank above 0 whose model transformers runs.

    Args:
        info: what this rank serves.
        model: its part of the model.
        link: to rank 0.
    """

    def __init__(self, info: EngineInfo, model: Any, link: Link) -> None:
        self.info = info
        self._model = model
        self._link = link
        self._batch = 0

    @torch.inference_mode()
    def run(self) -> None:
        """Compute batches until rank 0 has ended.

        Raises:
            PeerLost: a rank is gone in the middle of a batch.
        """
        while data := self._link.receive():  # an empty message ends it, too
            if data == _GIVEN_UP:  # of a batch that had ended here
                self._tell(None)
                continue
            work = json.loads(data)
            self._batch = work.pop("batch")
            try:
                self._compute(**work)
            except _GivenUp:
                self._tell(None)
            except STEP_ERRORS as error:
                log.exception("batch %d raised", self._batch)
                self._settle(request_error(error))

    def _compute(
        self,
        *,
        prompts: Sequence[Sequence[int]] = (),
        settings: dict[str, Any] | None = None,
        cache: str = "",
        tensors: dict[str, Any] | None = None,
        others: dict[str, Any] | None = None,
    ) -> None:
        """A batch of prompts with the `settings` of `generate`, or one forward of `tensors` and other arguments."""
        if settings is None:
            device = self._model.device
            inputs = {name: torch.tensor(values, device=device) for name, values in (tensors or {}).items()}
            self._model(**inputs, **(others or {}))
            return
        choice = _HearChoice(self, beams="num_beams" in settings)
        run_generate(self._model, prompts, settings, cache, [choice], [_HearEnds(self)])

    def hear(self) -> bytes:
        """A step's data. Raises PeerLost."""
        data = self._receive(None)
        if data == _GIVEN_UP:
            raise _GivenUp
        return data[1:]

    def _receive(self, timeout_s: float | None) -> bytes:
        data = self._link.receive(timeout_s)
        if not data:
            raise PeerLost("Rank 0 ended.")
        return data

    def _tell(self, error: MiinbError | None) -> None:
        words = (
            {"error": type(error).__name__, "message": error.message, "hint": error.hint} if error else {"error": ""}
        )
        self._link.tell({"batch": self._batch, **words})

    def _settle(self, failure: MiinbError) -> None:
        """Tell rank 0, which gives the batch up if it is not in a sum that this rank has left."""
        self._tell(failure)
        try:
            while self._receive(SETTLE_S) != _GIVEN_UP:
                pass
        except TimeoutError:
            raise OutOfStep(f"This rank failed in a step that others went on with: {failure.message}") from None

    def close(self) -> None:
        """Let go of the model."""
        self._link.close()
        self._model = None
