import json
import types

import pytest

from miinb.notebook.expansion import expand, looked_up

NAMES = {
    "city": "Paris",
    "n": 3,
    "row": {"a": "A", 1: "one", "b c": "BC"},
    "items": ["x", "y"],
    "thing": types.SimpleNamespace(size=7, inner=types.SimpleNamespace(name="deep")),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{city} has {n}", "Paris has 3"),
        ("{row[a]} {row['a']} {row[1]} {row[b c]}", "A A one BC"),
        ("{items[0]} {items[-1]}", "x y"),
        ("{thing.size} {thing.inner.name}", "7 deep"),
        ("{{city}}", "{city}"),
        ("{{nowhere}}", "{{nowhere}}"),
        ('{"a": {city}}', '{"a": Paris}'),
    ],
)
def test_plain_look_ups_become_text(text: str, expected: str) -> None:
    assert expand(text, NAMES) == expected


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"city": {"n": [1, {}]}}),
        "{unknown} {city + 1} {city()} {n:.2f} {city!r} { city }",
        r"\frac{1}{2} \text{x} {x_1}",
        "{row[zz]} {items[9]} {thing.missing} {n.x.y}",
        "{} {{}} {{{{ }}}} }{ {0}",
        "$city ${city_of}",
    ],
)
def test_every_other_brace_stays(text: str) -> None:
    assert expand(text, NAMES) == text


def test_one_name_alone_is_an_object() -> None:
    assert looked_up("{items}", NAMES) is NAMES["items"]
    assert looked_up("{thing.inner.name}", NAMES) == "deep"
    for text in ("{nowhere}", "{{items}}", "a {items}", "{items} ", "items", "", "{items[9]}", "{items}{n}"):
        assert looked_up(text, NAMES) is None
