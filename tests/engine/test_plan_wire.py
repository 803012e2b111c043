"""Plans as bytes: a follower's picture of the rows is rank 0's, whatever the scheduler does."""

from __future__ import annotations

import random
import time

import pytest

from miinb.config import GenerationParams
from miinb.engine.plan_wire import PlanReader, PlanWriter
from miinb.engine.rows import Row, StepPlan
from miinb.engine.scheduler import Scheduler
from miinb.errors import MiinbError
from miinb.messages import SequenceRequest


def place_tokens(plan: StepPlan) -> list[list[int]]:
    """The tokens of each place that the plan itself knows."""
    found = []
    for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
        known = [*row.token_ids, *row.draft] if row.lookup is not None and row.draft else row.token_ids
        found.append(list(known[start : start + count]))
    return found


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_follower_sees_the_rows_of_rank_0(seed: int, speculative: bool) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(
        pages=20, page_tokens=4, max_batch=5, max_length=60, vocab_size=9, max_step_tokens=16, speculative=speculative
    )
    writer, reader = PlanWriter(), PlanReader()
    left, number = 40, 0
    while left or scheduler.busy:
        if left and rng.random() < 0.4:
            left -= 1
            prompt = [rng.randrange(9) for _ in range(rng.randrange(1, 30))]
            params = GenerationParams(max_new_tokens=rng.randrange(1, 30), seed=left, logit_bias={3: 0.5})
            scheduler.submit(SequenceRequest(left, prompt, params, time.monotonic()))
        scheduler.take_events()
        plan = scheduler.schedule(time.monotonic())
        if plan is None:
            continue
        number += 1
        blank = scheduler.take_blank()
        step = reader.read(writer.write(number, plan, 5, blank))
        assert (step.number, step.needs, step.blank) == (number, 5, blank)
        seen = step.plan
        assert (seen.starts, seen.counts, seen.samples, seen.copies) == (
            plan.starts, plan.counts, plan.samples, plan.copies,
        )  # fmt: skip
        told = {row.slot for row in seen.admitted}
        assert told >= {row.slot for row in plan.admitted}
        for theirs, ours in zip(seen.rows, plan.rows, strict=True):
            assert same(theirs, ours), (theirs.row_id, ours.row_id)
        if speculative:  # every place's token, but those of chunks, which are in the prompt
            theirs = [
                [row.draft[start - row.draft_start]] if count == 1 else row.token_ids[start : start + count]
                for row, start, count in zip(seen.rows, seen.starts, seen.counts, strict=True)
            ]
            assert theirs == place_tokens(plan)
        if rng.random() < 0.1:
            writer.forget(plan.rows)
            scheduler.abandon(plan, {rng.choice(plan.rows)}, MiinbError("raised"))
        else:
            drawn = [rng.randrange(2) for _ in plan.rows]
            scheduler.complete(plan, drawn, [rng.random() < 0.98 for _ in plan.rows], time.monotonic())
    assert number > 50


def same(theirs: Row, ours: Row) -> bool:
    return (
        theirs.row_id == ours.row_id
        and theirs.slot == ours.slot
        and theirs.pages == ours.pages
        and theirs.eos == ours.eos
        and theirs.prompt_tokens == ours.prompt_tokens
        and theirs.request.params == ours.request.params
        and theirs.token_ids == ours.token_ids[: len(theirs.token_ids)]
    )
