"""What of a long text goes into a sequence: all of it, its beginning (or end) if asked, or windows that overlap."""

from __future__ import annotations

from collections.abc import Sequence

from miinb.errors import PromptTooLong
from miinb.server.encoders.tokenization import EncoderText


def fitted(ids: Sequence[int], text: EncoderText, limit: int, *, place: int, truncation: bool) -> Sequence[int]:
    """A text's tokens, special ones included, as they are or cut to the limit if that was asked for.

    Raises:
        PromptTooLong: they are more than the limit, and `truncation` is False.
    """
    if len(ids) <= limit:
        return ids
    room = limit - len(text.prefix) - len(text.suffix)
    if not truncation or room < 1:
        raise PromptTooLong(
            f"inputs[{place}]: it has {len(ids)} tokens, but the model takes {limit}.",
            hint="Shorten it, or have it cut: truncation=True (--truncation on a command line).",
        )
    begin, end = len(text.prefix), len(ids) - len(text.suffix)
    begin, end = (end - room, end) if text.keep_end else (begin, begin + room)
    return [*text.prefix, *ids[begin:end], *text.suffix]


def windows(count: int, room: int, overlap: int, *, from_end: bool = False) -> list[tuple[int, int]]:
    """Where windows over `count` tokens begin and end.

    Args:
        count: tokens.
        room: most tokens of a window.
        overlap: tokens that a window shares with the one before; less than `room`.
        from_end: the first window is the text's end (tokenizers that cut a text at its beginning do so).
    """
    found = [(at, min(at + room, count)) for at in range(0, max(1, count - overlap), room - overlap)]
    return [(count - end, count - begin) for begin, end in found] if from_end else found
