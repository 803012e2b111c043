"""Speculation: which rows verify how many guessed tokens in a step, and what becomes of the guesses. No torch.

A guess is accepted where the model, having seen all before it, chooses that very token: the answer is the one without
speculation. That holds for sampled rows too, as the noise of a draw depends on its seed and place alone.
"""

from __future__ import annotations

from miinb.config import GenerationParams
from miinb.engine.lookup import DRAFT_TOKENS, PromptLookup
from miinb.engine.pages import PagePool
from miinb.engine.rows import Row, RowState, StepPlan


def most_places(max_batch: int, max_step_tokens: int, *, speculative: bool) -> int:
    """Most places in a step: of rows, and of the tokens of drafts."""
    least = 1 + DRAFT_TOKENS if speculative else 0
    return min(max(max_batch, least), max_step_tokens)


class Drafts:
    """Adds drafts to plans and judges them.

    Attributes:
        proposed, accepted: tokens since the start.
    """

    def __init__(self) -> None:
        self.proposed = self.accepted = 0

    def enable(self, row: Row, params: GenerationParams) -> None:
        """Let a row speculate, if it may. Penalties count the tokens of a row, so they take them one by one."""
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        if params.speculative and penalties == (1.0, 0.0, 0.0):
            row.lookup = PromptLookup()

    def add(self, plan: StepPlan, places: int, pool: PagePool) -> None:
        """Put drafts into so many free places; they take no page from a row and no token from a prompt."""
        spare = places
        for i in range(len(plan.rows)):
            row, known = plan.rows[i], len(plan.rows[i].token_ids)
            if row.lookup is None or plan.starts[i] != known - 1:
                continue  # its newest token is on its way
            room = (len(row.pages) + pool.free) * pool.page_tokens - known
            most = min(spare, DRAFT_TOKENS, row.limit - row.length, room)
            draft = row.lookup.propose(row.token_ids, most) if most > 0 else []
            if not draft:
                continue
            while len(row.pages) * pool.page_tokens < known + len(draft):
                row.pages.append(pool.allocate())
            row.draft, row.draft_start = draft, known
            row.draft_tokens += len(draft)
            self.proposed += len(draft)
            spare -= len(draft)
            for _ in draft:
                plan.add(row, 1)

    def confirm(self, row: Row, start: int) -> bool:
        """Whether the place at `start` of a row with a draft got the token that the row has there.

        The first place is that of the row's own token. There the draft is taken back; its tokens come again one by one.
        """
        known = len(row.token_ids)
        at = start - row.draft_start
        if at < 0:
            change = -len(row.draft)
        elif start == known - 1 and row.token_ids[start] == row.draft[at]:
            change = 1
            row.accepted_tokens += 1
            self.accepted += 1
        else:
            return False
        row.length += change
        if row.state is RowState.RUNNING:
            row.computed += change
        return True
