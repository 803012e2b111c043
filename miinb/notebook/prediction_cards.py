"""What predictions look like: entities and answers marked in their text, scores as bars, embeddings compared.

Static HTML with plain text beside it. Colors are tints of Okabe and Ito's palette, which color-blind people can tell
apart, over the page's own background; the label or the number stands beside each, so no color is the only sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miinb.commands.screen import Table
from miinb.notebook.cards import QUIET, Card, Html, bar, card, duration, escaped, grid
from miinb.predictions import Answer, Entity, Fill, Label
from miinb.wording import printable

if TYPE_CHECKING:
    from miinb.predictions import Predictions

SHOWN = 8  # inputs
TEXT = 2000  # characters of a text whose entities are marked
LINE = 66  # characters of a text in a table
AROUND = 160  # characters of the context before and after an answer
COMPARED = 8  # embeddings, pair by pair
NARROW = 30  # characters of a text beside what compares it

_PALETTE = ("86,180,233", "230,159,0", "0,158,115", "204,121,167", "213,94,0", "240,228,66", "0,114,178", "128,128,128")
_EDGES = ("solid", "dashed", "dotted", "double")  # where there are more labels than colors
_BLUE, _ORANGE = _PALETTE[:2]
_FLOW = "white-space:pre-wrap;overflow-wrap:anywhere;margin:.3em 0"


def predictions_card(predictions: Predictions, note: str = "") -> Card:
    """The answers to the first inputs, and what the others are; `note` is added to the last line."""
    if predictions.task == "feature-extraction":
        blocks = _embeddings(predictions)
    elif predictions.task == "text-classification" and len(predictions) > 1 and all(len(p) == 1 for p in predictions):
        blocks = [_labels_of_many(predictions)]
    else:
        blocks = [
            _numbered(number, len(predictions), _KINDS[predictions.task](_input(predictions, number), answers))
            for number, answers in enumerate(predictions[:SHOWN])
        ]
    foot = " · ".join(part for part in (timing_line(predictions), note) if part)
    html, _ = card("", body=[html for html, _ in blocks], foot=foot)
    return html, printable("\n\n".join([*(text for _, text in blocks), f"({foot})"]))


def timing_line(predictions: Predictions) -> str:
    """ "3 inputs · model 0.8 ms · 1.2 ms in all"."""
    count, timing = len(predictions), predictions.timing
    parts = [f"{count:,} input{'s' * (count != 1)}"]
    if count > SHOWN:
        parts[0] += f": the first {SHOWN}, and {count - SHOWN:,} more in .frame (or [{SHOWN}] and so on)"
    if 0 < timing.model_s <= timing.e2e_s:  # not of calls that ran together, whose times are counted twice
        parts.append(f"model {duration(timing.model_s)}")
    if timing.e2e_s:
        parts.append(f"{duration(timing.e2e_s)} in all")
    return " · ".join(parts)


def _input(predictions: Predictions, number: int) -> Any:
    return predictions.inputs[number] if number < len(predictions.inputs) else ""


def _numbered(number: int, count: int, block: Card) -> Card:
    if count == 1:
        return block
    html, text = block
    return f'<div style="{QUIET};margin-top:.5em">[{number}]</div>{html}', f"[{number}] {text}"


def _short(text: str, most: int = LINE) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def _paragraph(text: str) -> str:
    return f'<div style="{_FLOW}">{escaped(text)}</div>'


def _quiet(text: str) -> str:
    return f'<div style="{QUIET}">{escaped(text)}</div>'


# Scores


def _bar(score: float) -> Html:
    """A score from 0 to 1 as a bar of 10 em; nothing for what is no share (logits)."""
    if not 0 <= score <= 1:
        return Html("")
    return bar(score, color=f"rgba({_BLUE},.7)")


def _blocks(score: float) -> str:
    """The same for a terminal, 20 characters wide."""
    return "█" * round(score * 20) or "▏" if 0 <= score <= 1 else ""


def _scored(name: str, rows: Sequence[tuple[str, float]], more: str = "") -> Card:
    """Names with their scores and bars, and the plain text of it."""
    html = grid(Table((name, "score", ""), [(label, f"{score:.4f}", _bar(score)) for label, score in rows]))
    text = str(Table((name, "score", ""), [(label, f"{score:.4f}", _blocks(score)) for label, score in rows]))
    return html + more, text


def _labels(text: str, labels: Sequence[Label]) -> Card:
    html, plain = _scored("label", [(one.label, one.score) for one in labels])
    return _paragraph(_short(text, TEXT)) + html, f"{_short(text)}\n{plain}"


def _labels_of_many(predictions: Predictions) -> Card:
    """The only label of each text, one a line."""
    found = [(_short(_input(predictions, i)), one) for i, (one,) in enumerate(predictions[:SHOWN])]
    columns = ("text", "label", "score", "")
    html = grid(Table(columns, [(text, one.label, f"{one.score:.4f}", _bar(one.score)) for text, one in found]))
    plain = Table(columns, [(_short(t, 60), o.label, f"{o.score:.4f}", _blocks(o.score)) for t, o in found])
    return html, str(plain)


def _fills(text: str, answers: Sequence[Any]) -> Card:
    """The tokens for a mask, or for each of several."""
    masks: list[Sequence[Fill]] = list(answers) if answers and isinstance(answers[0], list) else [answers]
    html, plain = [_paragraph(_short(text, TEXT))], [_short(text)]
    for number, fills in enumerate(masks):
        if len(masks) > 1:
            html.append(_quiet(f"mask {number + 1} of {len(masks)}"))
            plain.append(f"mask {number + 1} of {len(masks)}")
        # A token's text may begin with a space, which is no part of the word that it stands for.
        table, words = _scored("token", [(one.token_str.strip() or repr(one.token_str), one.score) for one in fills])
        html.append(table)
        plain.append(words)
    return "".join(html), "\n".join(plain)


# Entities


def _kind(entity: Entity) -> str:
    """The label without the mark of its place in the name: PER of B-PER and I-PER."""
    return entity.entity[2:] if entity.entity[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") else entity.entity


def _entities(text: str, entities: Sequence[Entity]) -> Card:
    """The text with its entities marked, and a table of those that have no place of their own in it."""
    shown = text[:TEXT]
    placed, others = _placed(shown, entities)
    styles = {kind: _style(number) for number, kind in enumerate(dict.fromkeys(map(_kind, entities)))}
    parts, place = [], 0
    for start, end, group in placed:
        kind = _kind(group[0])
        scores = ", ".join(f"{one.entity} {one.score:.3f}" for one in group)
        parts += [escaped(shown[place:start]), _mark(shown[start:end], kind, styles[kind], scores)]
        place = end
    parts.append(escaped(shown[place:]))
    html = f'<div style="{_FLOW};line-height:1.9">{"".join(parts)}</div>'
    if len(text) > TEXT:
        html += _quiet(f"… {len(text) - TEXT:,} more characters")
    counts = [(kind, sum(_kind(one) == kind for one in entities)) for kind in styles]
    html += _legend([(f"{kind} {count}", styles[kind]) for kind, count in counts]) if counts else _quiet("No entities.")
    if others:
        html += _quiet("not marked above:") + grid(_entity_table(others))
    return html, f"{_short(text)}\n{_entity_table(entities)}"


def _entity_table(entities: Sequence[Entity]) -> Table:
    rows = [(one.word, one.entity, f"{one.score:.4f}", _span(one.start, one.end)) for one in entities]
    return Table(("word", "entity", "score", "characters"), rows, note="" if rows else "No entities.")


def _placed(text: str, entities: Iterable[Entity]) -> tuple[list[tuple[int, int, list[Entity]]], list[Entity]]:
    """Places to mark, in order and without overlap, each with its entities; and the entities that have none.

    Tokens of one name that follow each other (I- after B-, or a word's pieces) are marked together.
    """
    placed: list[tuple[int, int, list[Entity]]] = []
    others: list[Entity] = []
    known = [one for one in entities if one.start is not None and one.end is not None]
    others += [one for one in entities if one.start is None or one.end is None]
    for one in sorted(known, key=lambda entity: (entity.start or 0, entity.end or 0)):
        start, end = one.start or 0, one.end or 0
        if not (placed[-1][1] if placed else 0) <= start < end <= len(text):
            others.append(one)
        elif placed and _continues(text, placed[-1], one):
            first, _, group = placed[-1]
            placed[-1] = (first, end, [*group, one])
        else:
            placed.append((start, end, [one]))
    return placed, others


def _continues(text: str, before: tuple[int, int, list[Entity]], one: Entity) -> bool:
    gap = text[before[1] : one.start]
    follows = not gap or (gap.isspace() and (one.entity[:2] == "I-" or one.entity == before[2][-1].entity))
    return follows and _kind(one) == _kind(before[2][-1]) and one.entity[:2] not in ("B-", "S-", "U-")


def _style(number: int) -> str:
    color = _PALETTE[number % len(_PALETTE)]
    edge = _EDGES[number // len(_PALETTE) % len(_EDGES)]
    return f"background:rgba({color},.25);border-bottom:3px {edge} rgb({color})"


def _mark(text: str, label: str, style: str, title: str) -> str:
    """A marked piece of text. Its label is not selected with it, so that a copy is the text alone."""
    look = f"{style};border-radius:3px;padding:.1em .2em;box-decoration-break:clone;-webkit-box-decoration-break:clone"
    badge = "font-size:.7em;font-weight:600;opacity:.85;margin-left:.4em;user-select:none;-webkit-user-select:none"
    name = f'<span style="{badge}">{escaped(label)}</span>' if label else ""
    return f'<span style="{look}" title="{escaped(title)}">{escaped(text)}{name}</span>'


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f'<span style="{style};border-radius:3px;padding:.05em .4em;margin-right:.8em">{escaped(name)}</span>'
        for name, style in entries
    )
    return f'<div style="{QUIET};margin:.4em 0">{items}</div>'


def _span(start: int | None, end: int | None) -> str:
    return "" if start is None or end is None else f"{start} to {end}"


# Answers


def _answers(given: Any, answers: Sequence[Answer]) -> Card:
    """The question, the best answer in its context, and the others as a table."""
    question, context = (given["question"], given["context"]) if isinstance(given, Mapping) else ("", str(given))
    html = [f"<div><b>{escaped(_short(question, TEXT))}</b></div>"]
    plain = [_short(question, TEXT)]
    if not answers:
        return "".join([*html, _quiet("No answer was found.")]), "\n".join([*plain, "No answer was found."])
    best = answers[0]
    before, found, after = _surroundings(context, best)
    mark = _mark(found, f"{best.score:.4f}", _style(0), f"score {best.score:.6f}") if found else ""
    html.append(f'<div style="{_FLOW}">{escaped(before)}{mark}{escaped(after)}</div>')
    if not found:
        html.append(f"<div>{escaped(_said(best))} &nbsp; {best.score:.4f}</div>")
    plain.append(f"{before}[{found}]{after}" if found else before)
    rows = [(_said(one), f"{one.score:.4f}", _bar(one.score), _span(one.start, one.end)) for one in answers[1:]]
    if rows:
        html += [_quiet("further answers"), grid(Table(("answer", "score", "", "characters"), rows))]
    texts = [(_said(one), f"{one.score:.4f}", _span(one.start, one.end)) for one in answers]
    plain.append(str(Table(("answer", "score", "characters"), texts)))
    return "".join(html), "\n".join(plain)


def _said(answer: Answer) -> str:
    return answer.answer if answer.answer else "(the context has no answer)"


def _surroundings(context: str, answer: Answer) -> tuple[str, str, str]:
    """The context before the answer, the answer, the context after it; shortened where it is long."""
    start, end = answer.start, answer.end
    if not (answer.answer and 0 <= start < end <= len(context)):
        return _short(context, 2 * AROUND), "", ""
    first, last = max(0, start - AROUND), min(len(context), end + AROUND)
    before, after = context[first:start], context[end:last]
    if first:
        before = "…" + before.partition(" ")[2] if " " in before.strip() else "…" + before
    if last < len(context):
        after = after.rpartition(" ")[0] + " …" if " " in after.strip() else after + "…"
    return before, context[start:end], after


# Embeddings


def _embeddings(predictions: Predictions) -> list[Card]:
    """A line for each text; of a few, how alike they are pair by pair."""
    import numpy

    count = len(predictions)
    vectors = [answers[0].embedding for answers in predictions[:SHOWN]]
    if any(vector.ndim > 1 for vector in vectors):
        shapes = [f"{len(vector)} x {vector.shape[-1]}" for vector in vectors]
        texts = [_short(_input(predictions, number)) for number in range(len(vectors))]
        table = Table(("text", "tokens x numbers"), list(zip(texts, shapes, strict=True)))
        return [(grid(table), str(table))]
    compared = 2 <= count <= COMPARED
    columns = ["", "text", "norm"]
    rows: list[list[Any]] = []
    for number, vector in enumerate(vectors):
        text = _short(_input(predictions, number), NARROW if compared else LINE)
        rows.append([f"[{number}]", text, f"{numpy.linalg.norm(vector):.3f}"])
    note = f"{len(vectors[0])} numbers each." if vectors else "No texts."
    html, plain = rows, rows
    if compared:
        note += f" Columns [0] to [{count - 1}]: cosine similarity."
        columns += [f"[{number}]" for number in range(count)]
        cosines = list(_cosines(vectors))
        html = [[*row, *map(_heat, line)] for row, line in zip(rows, cosines, strict=True)]
        plain = [[*row, *map(_cosine, line)] for row, line in zip(rows, cosines, strict=True)]
    return [(grid(Table(columns, html)) + _quiet(note), str(Table(columns, plain, note=note)))]


def _cosines(vectors: Sequence[Any]) -> Iterator[list[float]]:
    import numpy

    rows = numpy.stack(vectors).astype(numpy.float64)
    norms = numpy.linalg.norm(rows, axis=1)
    with numpy.errstate(invalid="ignore", divide="ignore"):  # a vector of zeros is like nothing
        yield from ((rows @ rows.T) / numpy.outer(norms, norms)).tolist()


def _cosine(value: float) -> str:
    return f"{value:.2f}" if value == value else "–"


def _heat(value: float) -> Html:
    share = min(abs(value), 1.0) * 0.6 if value == value else 0.0
    color = _BLUE if value >= 0 else _ORANGE
    look = f"display:inline-block;margin-right:-.8em;padding:.1em .5em;background:rgba({color},{share:.2f})"
    return Html(f'<span style="{look}">{_cosine(value)}</span>')


#: How the answers to one input are shown.
_KINDS: dict[str, Callable[[Any, Sequence[Any]], Card]] = {
    "text-classification": _labels,
    "token-classification": _entities,
    "question-answering": _answers,
    "fill-mask": _fills,
}
