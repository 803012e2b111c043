"""Markdown of models: what it looks like, and that nothing in it can act."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miinb.notebook.markdown import next_alike, rendered

TAGS = {"div", "pre", "p", "b", "i", "code", "br", "hr", "ul", "ol", "li", "blockquote"}
ATTRIBUTES = {"class", "style", "start"}
STYLES = re.compile(r"[a-z0-9:;.,()% -]*")


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        assert all(STYLES.fullmatch(value or "") for name, value in attrs if name == "style")
        if tag not in ("br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(rendered(text))
    reader.close()
    return reader


ACTING = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](https://example.org/x.png)",
    "**<b onclick=alert(1)>**",
    "`<i>`",
    "```html\n<script>x</script>\n```",
    '```"><script>x</script>\ny',
    "> <iframe src=x>",
    "1. <svg onload=x>",
    r"$\href{javascript:alert(1)}{x}$",
]


@pytest.mark.parametrize("text", ACTING)
def test_nothing_acts(text: str) -> None:
    reader = read(text)
    assert reader.tags <= TAGS
    assert reader.attributes <= ATTRIBUTES
    assert 'class="miinb-markdown tex2jax_ignore mathjax_ignore"' in rendered(text)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*ACTING, *"*_`~#>-+1.\n <&\"'ab", "**", "```", "\n\n", "\x00", "\x1b["]), max_size=30))
def test_whatever_is_written_only_these_tags_come(parts: list[str]) -> None:
    reader = read("".join(parts))
    assert reader.tags <= TAGS
    assert reader.attributes <= ATTRIBUTES
    assert not reader.open


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain", "<p>plain</p>"),
        ("# Title #", "<p><b>Title</b></p>"),
        ("a **b** *c* _d_ `e*f*`", "<p>a <b>b</b> <i>c</i> <i>d</i> <code>e*f*</code></p>"),
        ("`a ``b` c``", "<p><code>a ``b</code> c``</p>"),
        ("``a `b`` `c", "<p><code>a `b</code> `c</p>"),
        ("` `` ``` x `` y", "<p>` <code> ``` x </code> y</p>"),
        ("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>"),
        ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("> a\n> b", "<blockquote>a<br>b</blockquote>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("a\nb", "<p>a<br>b</p>"),
    ],
)
def test_marks(text: str, html: str) -> None:
    assert rendered(text) == f'<div class="miinb-markdown tex2jax_ignore mathjax_ignore">{html}</div>'


def test_code_is_exactly_as_it_was_written() -> None:
    html = rendered("before\n```python\nif a < b:\n    **x**\n\n```\nafter\n```\nnot closed")
    assert "if a &lt; b:\n    **x**\n</pre>" in html
    assert "<p>after</p>" in html
    assert ">not closed</pre>" in html
    assert html.count("<pre") == 2


@pytest.mark.parametrize(
    "piece",
    ["`", "` `` ", "**a ", "*a ", "_a ", "~", "# ", "#", "- ", "> ", "**", "a`", "1. "],
)
@pytest.mark.parametrize("shape", ["{}", "# a{}b", "~~~{}`", "a{} \tb"])
def test_no_text_takes_long(piece: str, shape: str) -> None:
    for text in (shape.format(piece * 10_000), shape.format(" " * 40_000)):
        assert len(rendered(text)) < 100 * len(text) + 1000  # one that takes long meets the suite's time limit


class Counted(list[int]):
    """A list that counts how many values were read from it."""

    reads = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.reads += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        for value in super().__iter__():
            self.reads += 1
            yield value

    def __reversed__(self) -> Iterator[int]:
        for value in super().__reversed__():
            self.reads += 1
            yield value


@pytest.mark.parametrize("lengths", [[1] * 1000, list(range(1000)), [1, 2] * 500, [1, *[2] * 999]])
def test_a_tick_is_looked_at_once(lengths: list[int]) -> None:
    values = Counted(lengths)
    found = next_alike(values)
    assert values.reads == len(lengths)
    expected = [next((at for at in range(i + 1, len(lengths)) if lengths[at] == lengths[i]), None) for i in range(1000)]
    assert found == expected
