"""What predictions look like: marks in the text, bars, tables; nothing of a text becomes markup."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import numpy
import pytest
from IPython.core.formatters import DisplayFormatter
from test_cards import EVIL, Tags

from miinb.messages import PredictedEvent
from miinb.notebook.prediction_cards import SHOWN, predictions_card
from miinb.predictions import Answer, Embedding, Entity, Fill, Label, Predictions, predictions_of

TEXT = "Ada Lovelace lived in London."
PER = Entity("PER", 0.9981, "Ada Lovelace", 0, 12)
LOC = Entity("LOC", 0.999, "London", 22, 28)


def labels(*texts: str, scores: tuple[float, ...] = (0.9,)) -> Predictions:
    answers = [[Label(f"label {i}", score) for i, score in enumerate(scores)] for _ in texts]
    return Predictions(answers, task="text-classification", inputs=texts)


def entities(text: str, *found: Entity) -> Predictions:
    return Predictions([list(found)], task="token-classification", inputs=[text])


def answer(context: str, *found: Answer, question: str = "Who?") -> Predictions:
    inputs = [{"question": question, "context": context}]
    return Predictions([list(found)], task="question-answering", inputs=inputs)


def fills(text: str, *masks: list[Fill]) -> Predictions:
    return Predictions([list(masks) if len(masks) > 1 else masks[0]], task="fill-mask", inputs=[text])


def vectors(rows: Any) -> Predictions:
    array = numpy.array(rows, numpy.float32)
    texts = [f"text {i}" for i in range(len(array))]
    return Predictions([[Embedding(row)] for row in array], task="feature-extraction", inputs=texts, array=array)


def shown_text(html: str) -> str:
    """What a reader sees: no tags, no badges (they are not selected with the text)."""
    without = re.sub(r'<span style="[^"]*user-select:none[^"]*">[^<]*</span>', "", html)
    return unescape(re.sub(r"<[^>]*>", "", without))


HOSTILE = [
    labels(EVIL),
    labels(EVIL, EVIL),
    Predictions([[Label(EVIL, 0.5)]], task="text-classification", inputs=[EVIL]),
    entities(EVIL, Entity(EVIL, 0.5, EVIL, 0, 4), Entity(EVIL, 0.5, EVIL, None, None)),
    answer(EVIL, Answer(EVIL, 0.5, 0, 4), Answer(EVIL, 0.4, 0, 5), question=EVIL),
    answer(EVIL, Answer(EVIL, 0.5, 0, 4000), question=EVIL),
    fills(EVIL, [Fill(EVIL, 0.5, 1, EVIL)], [Fill(EVIL, 0.5, 1, EVIL)]),
    Predictions([[Embedding(numpy.ones(3, numpy.float32))]] * 2, task="feature-extraction", inputs=[EVIL, EVIL]),
]


@pytest.mark.parametrize("predictions", HOSTILE)
def test_nothing_untrusted_becomes_markup_or_drives_a_terminal(predictions: Predictions) -> None:
    html, text = predictions_card(predictions)
    tags = Tags()
    tags.feed(html)
    assert tags.seen <= {"div", "b", "span", "table", "tr", "th", "td", "pre"}
    assert not tags.open
    assert "&lt;img" in html
    assert "<img" in text
    assert not {"\x1b", "\x07", "\r"} & set(html + text)
    assert "background:#" not in html
    assert predictions._repr_mimebundle_() == {"text/html": html, "text/plain": text}
    assert str(predictions) == text
    assert DisplayFormatter().format(predictions)[0] == {"text/html": html, "text/plain": text}


def test_entities_are_marked_in_their_text() -> None:
    html, text = predictions_card(entities(TEXT, LOC, PER))
    assert TEXT in shown_text(html), "what is selected is the text"
    assert re.search(r">Ada Lovelace<span [^>]*user-select:none[^>]*>PER</span>", html)
    assert re.search(r'title="LOC 0.999">London<', html)
    assert "PER 1" in html
    assert text.splitlines()[0] == TEXT
    assert "Ada Lovelace" in text.splitlines()[2] or "London" in text.splitlines()[2]


def test_entities_without_a_place_of_their_own_stand_in_a_table() -> None:
    odd = [Entity("A", 0.1, "over", 8, 20), Entity("B", 0.2, "none", None, None), Entity("C", 0.3, "far", 20, 900)]
    html, text = predictions_card(entities(TEXT, PER, LOC, *odd))
    assert TEXT in shown_text(html)
    assert "not marked above" in html
    assert all(word in html and word in text for word in ("over", "none", "far"))


def test_pieces_of_one_name_are_marked_together() -> None:
    tokens = [
        Entity("B-PER", 0.9, "Ada", 0, 3),
        Entity("I-PER", 0.8, "Love", 4, 8),
        Entity("I-PER", 0.7, "##lace", 8, 12),
        Entity("B-PER", 0.9, "London", 22, 28),
    ]
    html, _ = predictions_card(entities(TEXT, *tokens))
    assert 'title="B-PER 0.900, I-PER 0.800, I-PER 0.700">Ada Lovelace<' in html
    assert "PER 4" in html


def test_no_entities_are_said() -> None:
    html, text = predictions_card(entities("nobody is here"))
    assert "No entities." in html
    assert "No entities." in text


def test_an_answer_is_marked_in_its_shortened_context() -> None:
    context = "before " * 100 + "written by Ada Lovelace in 1843 " + "after " * 100
    start = context.index("Ada")
    best, next_best = Answer("Ada Lovelace", 0.91, start, start + 12), Answer("1843", 0.02, start + 16, start + 20)
    html, text = predictions_card(answer(context, best, next_best, question="Who wrote it?"))
    assert "written by Ada Lovelace in 1843" in shown_text(html)
    assert "Who wrote it?" in html
    assert "further answers" in html
    assert len(shown_text(html)) < 600
    assert "…before" in text
    assert "by [Ada Lovelace] in" in text
    assert "0.0200" in text


def test_a_context_without_an_answer() -> None:
    for found in ([Answer("", 0.8, 0, 0)], []):
        html, text = predictions_card(answer("The sky is blue.", *found))
        assert "no answer" in html.lower()
        assert "no answer" in text.lower()


def test_every_mask_has_its_tokens() -> None:
    one = [Fill(" great", 0.75, 3, "this is great"), Fill(" bad", 0.25, 4, "this is bad")]
    html, text = predictions_card(fills("this is <mask>", one))
    assert "width:75.0%" in html
    assert "great" in text
    html, text = predictions_card(fills("<mask> is <mask>", one, one))
    assert "mask 2 of 2" in html
    assert "mask 2 of 2" in text


def test_labels_are_bars_and_logits_are_numbers() -> None:
    html, _ = predictions_card(labels("good", scores=(0.75, 0.25)))
    assert "width:75.0%" in html
    html, _ = predictions_card(labels("good", scores=(3.5, -1.25)))
    assert "width:" not in html.replace("max-width:", "")
    assert "-1.2500" in html


def test_a_few_embeddings_are_compared() -> None:
    html, text = predictions_card(vectors([[1, 0], [1, 0], [-2, 0], [0, 0]]))
    assert "1.00" in text
    assert "-1.00" in html
    assert "–" in text, "a vector of zeros is like nothing"
    for many in (1, SHOWN + 1):
        assert "cosine" not in predictions_card(vectors([[1, 0]] * many))[1]
    event = PredictedEvent([2, 1], 0, 0, 0, 0, vectors=numpy.ones(6, numpy.float32).tobytes(), columns=2)
    tokens = predictions_of("feature-extraction", [{"query": "ab"}, {"query": "a"}], event, 1.0, pooled=False)
    assert "2 x 2" in predictions_card(tokens)[1]
    assert "2 numbers each" in text


def test_of_many_inputs_the_first_are_shown() -> None:
    for found in (labels(*"ab" * 515), labels(*"ab" * 515, scores=(0.5, 0.4)), vectors([[1, 0]] * 1030)):
        html, text = predictions_card(found)
        assert "1,030 inputs" in html
        assert "1,022 more in .frame" in text
        assert len(html) < 30_000


def test_a_long_text_is_cut() -> None:
    html, text = predictions_card(
        entities("x" * 10_000, Entity("A", 0.5, "x", 0, 1), Entity("A", 0.5, "x", 9000, 9001))
    )
    assert "8,000 more characters" in html
    assert "9000 to 9001" in html
    assert len(text) < 1000
