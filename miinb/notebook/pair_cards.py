"""Two answers to one prompt: side by side, the first difference marked, the times as bars and in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from miinb.commands.screen import Table
from miinb.notebook import cards
from miinb.notebook.cards import QUIET, Card, duration, escaped, grid
from miinb.wording import printable

if TYPE_CHECKING:
    from miinb.results import Result

#: A difference of times below this is none.
_SAME = 0.02
#: A mark goes back to the beginning of its word by so many characters at most: some scripts have no spaces.
_LONGEST_WORD = 16
_BARS = ("rgba(86,180,233,.8)", "rgba(230,159,0,.8)")
_FLOW = "white-space:pre-wrap;overflow-wrap:anywhere"
#: The mark is not selected with the text, so that a copy is the text alone.
_SIGN = "user-select:none;-webkit-user-select:none;font-weight:bold"
_MARKED = "background:rgba(213,94,0,.25);border-bottom:3px double rgb(213,94,0);border-radius:3px"
_COLUMN = "flex:1 1 20em;min-width:0"


@dataclass
class Side:
    """One deployment's answer.

    Attributes:
        deployment: its name.
        model: what it serves; token numbers are compared only between equal models.
        text: so far, or the whole.
        result: once it is complete.
        error: why there is none.
    """

    deployment: str
    model: str = ""
    text: str = ""
    result: Result | None = None
    error: str = ""

    @property
    def done(self) -> bool:
        """Whether the whole answer is there; one that was stopped cannot be compared."""
        return self.result is not None and "cancelled" not in self.result.finish_reasons

    @property
    def e2e_s(self) -> float:
        """Seconds of the whole answer; 0 without one."""
        return self.result.timing.e2e_s if self.result else 0.0

    @property
    def tokens(self) -> int:
        """How many it has; 0 without a result."""
        return self.result.usage.output_tokens if self.result else 0


Sides = tuple[Side, Side]


def first_difference(left: str, right: str) -> int | None:
    """The character at which two texts begin to differ; None if they are equal."""
    if left == right:
        return None
    equal = takewhile(lambda two: two[0] == two[1], zip(left, right, strict=False))
    return sum(1 for _ in equal)


def difference_words(sides: Sides) -> str:
    """Where the answers differ, in a sentence."""
    left, right = sides
    place = first_difference(left.text, right.text)
    if place is None:
        return "The answers are the same."
    token = _token_of(sides)
    at = f"token {token + 1}, character {place + 1}" if token is not None else f"character {place + 1}"
    return f"The answers differ from {at} on (marked ≠)."


def _token_of(sides: Sides) -> int | None:
    """The first token that differs, counted from 0; None where tokens cannot be compared."""
    left, right = sides
    if not (left.result and right.result and left.model == right.model and left.tokens and right.tokens):
        return None
    pairs = list(zip(left.result.token_ids[0], right.result.token_ids[0], strict=False))
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))


def speed_words(sides: Sides, names: Sequence[str]) -> str:
    """How fast the second is beside the first, in a sentence; "" where one of them has no answer.

    Answers of one length are compared by their whole time, others by their time for each token.
    """
    left, right = sides
    if not (left.e2e_s and right.e2e_s and left.tokens and right.tokens):
        return ""
    equal = left.tokens == right.tokens
    ratio = left.e2e_s / right.e2e_s if equal else (left.e2e_s / left.tokens) / (right.e2e_s / right.tokens)
    per = "" if equal else f" for each token (the answers have {left.tokens} and {right.tokens})"
    return ratio_words(ratio, names, per)


def ratio_words(ratio: float, names: Sequence[str], per: str = "") -> str:
    """How fast the second is, in a sentence; `ratio` is the first one's time over its, `per` goes before the stop."""
    if abs(ratio - 1) < _SAME:
        return f"{names[1]} is as fast as {names[0]}{per}."
    if ratio > 1:
        return f"{names[1]} is {_times(ratio)} faster than {names[0]}{per}."
    return f"{names[1]} is slower than {names[0]}: it takes {_times(1 / ratio)} as long{per}."


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1.1 else f"{ratio:.1f}x" if ratio < 20 else f"{ratio:.0f}x"


def text_html(side: Side, mark: int | None = None) -> str:
    """A side's text with the first difference marked: by color, a double line and the sign ≠."""
    if side.error:
        return f'<div style="{_FLOW}">⚠ {escaped(side.error)}</div>'
    if mark is None:
        return cards.pre(side.text)
    start = _word_start(side.text, mark)
    before, rest = side.text[:start], side.text[start:]
    found = re.match(r"\s*\S+", rest)
    word = found[0] if found else rest
    after = rest[len(word) :]
    shown = escaped(word) if word else '<span style="opacity:.72">(ends here)</span>'
    sign = f'<span style="{_SIGN}">≠</span>'
    marked = f'<span class="miinb-difference" title="first difference" style="{_MARKED}">{sign}{shown}</span>'
    return cards.preformatted(f"{escaped(before)}{marked}{escaped(after)}")


def _word_start(text: str, place: int) -> int:
    """Where the word around a character begins: a whole word is found more easily than its end."""
    start = max(text.rfind(space, 0, place) for space in " \n\t") + 1
    return start if place < len(text) and not text[place].isspace() and place - start <= _LONGEST_WORD else place


def times_card(sides: Sides, names: Sequence[str], speed: str) -> Card:
    """The times of both sides as bars, and what they say; `speed` is of `speed_words`."""
    named = (("first token", "ttft_s"), ("each further token", "tpot_s"), ("whole answer", "e2e_s"))
    return bars_card(sides, names, named, " ".join(part for part in (difference_words(sides), speed) if part))


def bars_card(sides: Sides, names: Sequence[str], named: Iterable[tuple[str, str]], words: str) -> Card:
    """Times of both sides as bars, below a sentence.

    Args:
        sides: the answers, left first.
        names: how the sides are called.
        named: what each time is called, and its name in `timing`.
        words: the sentence.
    """
    rows, plain = [], []
    for what, values in _measures(sides, named):
        most = max(values)
        for name, value, color in zip(names, values, _BARS, strict=True):
            share = value / most if most else 0.0
            rows.append((what, name, duration(value), cards.bar(share, "16em", color)))
            plain.append((what, name, duration(value), "█" * round(share * 20)))
    columns = ("time", "deployment", "", "")
    said = f'<div style="margin:.4em 0"><b>{escaped(words)}</b></div>'
    return said + (grid(Table(columns, rows)) if rows else ""), f"{words}\n{Table(columns, plain)}" if plain else words


def _measures(sides: Sides, named: Iterable[tuple[str, str]]) -> list[tuple[str, tuple[float, float]]]:
    if any(side.result is None for side in sides):
        return []
    timings = [side.result.timing for side in sides if side.result]
    pairs = [(what, (getattr(timings[0], name), getattr(timings[1], name))) for what, name in named]
    return [(what, values) for what, values in pairs if min(values) > 0]


def pair_card(prompt: str, sides: Sides, names: Sequence[str], *, speed: str | None, foot: str) -> Card:
    """A prompt with both answers, static.

    Args:
        prompt: what was asked.
        sides: the answers, left first.
        names: how the sides are called.
        speed: of `speed_words`; None where times may not be shown, which would tell the deployments apart.
        foot: the last line.
    """
    marks = marks_of(sides)
    columns = "".join(
        f'<div style="{_COLUMN}"><div style="{QUIET}">{escaped(name)}</div>{text_html(side, mark)}</div>'
        for name, side, mark in zip(names, sides, marks, strict=True)
    )
    head = f'<div style="opacity:.72">{cards.pre(prompt)}</div><hr style="opacity:.35;margin:.4em 0">'
    both = f'<div style="display:flex;flex-wrap:wrap;gap:1.5em">{columns}</div>'
    complete = all(side.done for side in sides)
    times = times_card(sides, names, speed) if speed is not None and complete else ("", "")
    html, _ = cards.card("", body=[head, both, times[0]], foot=foot)
    texts = [f"[{name}]\n{side.error or side.text}" for name, side in zip(names, sides, strict=True)]
    return html, printable("\n".join([f"> {prompt}", *texts, *filter(None, (times[1],)), f"({foot})"]))


def marks_of(sides: Sides) -> tuple[int | None, int | None]:
    """Where each side is marked: nowhere if the texts are equal, or one is not whole."""
    if not all(side.done for side in sides):
        return None, None
    place = first_difference(sides[0].text, sides[1].text)
    return place, place
