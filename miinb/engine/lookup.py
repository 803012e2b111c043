"""Prompt lookup: the next tokens are guessed from equal text before them (Saxena 2023, "Prompt Lookup Decoding").

What follows the latest earlier occurrence of the last few tokens is proposed, and the model verifies all of it in one
step. Summaries, code edits and answers with quotes repeat much of their prompt. No torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

#: Most tokens of a draft: with the row's own token they fill a CUDA graph of eight rows.
DRAFT_TOKENS = 7
#: Lengths of the tail that is looked for, in this order; a single token is equal too often by chance.
TAILS = (3, 2)


class PromptLookup:
    """Proposes the next tokens of one row."""

    __slots__ = ("_text", "_tokens")

    def __init__(self) -> None:
        self._text = bytearray()  # the tokens, four bytes each: the search is then one of the interpreter's own
        self._tokens = 0

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """What may follow these tokens: none, or `most`.

        Args:
            token_ids: the row's tokens; those of the last call and what came since.
            most: so many are proposed.
        """
        self._text += array("i", token_ids[self._tokens :]).tobytes()
        self._tokens = total = len(token_ids)
        for tail in TAILS:
            start = self._find(tail) + tail
            if start >= tail:
                draft = list(token_ids[start : start + most])
                while len(draft) < most:  # the text repeats itself up to its end: so goes the draft
                    draft.append(draft[len(draft) - (total - start)])
                return draft
        return []

    def _find(self, tail: int) -> int:
        """Where the latest earlier occurrence of the last `tail` tokens begins; below -`tail`: there is none."""
        text = self._text
        pattern = text[-4 * tail :]
        end = len(text) - 4
        while (at := text.rfind(pattern, 0, end)) % 4:  # between two tokens; -1 is odd too
            if at < 0:
                return -tail - 1
            end = at + len(pattern) - 1
        return at // 4
