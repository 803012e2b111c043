"""Markdown of a model as HTML that cannot act: every character is escaped first, and only these marks become tags.

Headings, bold, italic, code, lists, quotes and rules. HTML, images and formulas stay text, links too: what a model
writes must neither run nor fetch anything when it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from miinb.notebook.cards import escaped, pre

#: MathJax skips these: formulas can hold links.
_CLASSES = "miinb-markdown tex2jax_ignore mathjax_ignore"
_SHADED = "margin:.4em 0;padding:.3em .6em;background:rgba(128,128,128,.12)"
# None of these looks at a character more than a bounded number of times: a model may write thousands of marks.
_FENCE = re.compile(r" {0,3}(`{3,}+|~{3,}+)[^`]*$")
_HEADING = re.compile(r" {0,3}#{1,6}\s(.*)$")
_RULE = re.compile(r" {0,3}([-*_])(\s*\1){2,}\s*$")
_ITEM = re.compile(r"\s*([-*+]|\d{1,9}[.)])\s+(.*)$")
_TICKS = re.compile(r"`+")
_BOLD = re.compile(r"\*\*(?=\S)(.{1,500}?)(?<=\S)\*\*")
_ITALIC = re.compile(r"\*(?=[^\s*])([^*]+?)(?<=\S)\*|(?<!\w)_(?=\S)([^_]+?)(?<=\S)_(?!\w)")


def rendered(text: str) -> str:
    """The text as HTML."""
    blocks = "".join(_block(kind, lines) for kind, lines in _blocks(text))
    return f'<div class="{_CLASSES}">{blocks}</div>'


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Fenced code, and the lines between it grouped by what they are."""
    kinds: list[tuple[str, str]] = []
    fence, block = "", 0
    for line in text.split("\n"):
        if fence:
            if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
            else:
                kinds.append((f"code{block}", line))
        elif opened := _FENCE.match(line):
            fence, block = opened[1], block + 1
            kinds.append((f"code{block}", ""))  # an empty block is one too
        else:
            kinds.append((_kind(line), line))
    for kind, group in groupby(kinds, key=lambda pair: pair[0]):
        lines = [line for _, line in group]
        yield ("code", lines[1:]) if kind.startswith("code") else (kind, lines)


def _kind(line: str) -> str:
    if not line.strip():
        return "gap"
    if _RULE.match(line):
        return "rule"
    if _HEADING.match(line):
        return "heading"
    if item := _ITEM.match(line):
        return "ol" if item[1][0].isdigit() else "ul"
    return "quote" if line.lstrip().startswith(">") else "text"


def _block(kind: str, lines: list[str]) -> str:
    if kind == "code":
        shaded = pre("\n".join(lines))
        return f'<div style="{_SHADED}">{shaded}</div>'
    if kind == "rule":
        return "<hr>"
    if kind == "heading":
        heads = [match for line in lines if (match := _HEADING.match(line))]
        return "".join(f"<p><b>{_inline(head[1].strip().rstrip('#').rstrip())}</b></p>" for head in heads)
    if kind in ("ol", "ul"):
        items = [match for line in lines if (match := _ITEM.match(line))]
        start = f' start="{int(items[0][1][:-1])}"' if kind == "ol" else ""
        return f"<{kind}{start}>" + "".join(f"<li>{_inline(item[2])}</li>" for item in items) + f"</{kind}>"
    if kind == "quote":
        return f"<blockquote>{_lines([line.lstrip()[1:].lstrip() for line in lines])}</blockquote>"
    return f"<p>{_lines(lines)}</p>" if kind == "text" else ""


def _lines(lines: list[str]) -> str:
    return "<br>".join(map(_inline, lines))


def _inline(text: str) -> str:
    """A line's marks; inside code there are none. Code ends at as many ticks as it began with."""
    parts, end = [], 0
    runs = list(_TICKS.finditer(text))
    closing = next_alike([len(run[0]) for run in runs])
    for place, opened in enumerate(runs):
        if opened.start() >= end and (at := closing[place]) is not None:
            parts.append(_emphasis(text[end : opened.start()]))
            parts.append(f"<code>{escaped(text[opened.end() : runs[at].start()])}</code>")
            end = runs[at].end()
    return "".join([*parts, _emphasis(text[end:])])


def next_alike(values: Sequence[int]) -> list[int | None]:
    """For each value the place of the next equal one, None after the last; each is looked at once."""
    places: dict[int, int] = {}
    found: list[int | None] = []
    for place, value in zip(range(len(values) - 1, -1, -1), reversed(values), strict=True):
        found.append(places.get(value))
        places[value] = place
    return found[::-1]


def _emphasis(text: str) -> str:
    parts = [_ITALIC.sub(lambda match: f"<i>{match[1] or match[2]}</i>", part) for part in _BOLD.split(escaped(text))]
    return "".join(f"<b>{part}</b>" if place % 2 else part for place, part in enumerate(parts))  # every second was bold
