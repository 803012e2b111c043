"""Cards: what objects look like in a cell. One template; every card is (html, plain text) and both are safe to show.

Colors come from the page (`currentColor` and see-through grays), so that cards are legible in light and dark themes.
Text of models, paths and errors is untrusted: it is escaped here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miinb.commands.screen import Table, logprob_tables
from miinb.errors import MiinbError
from miinb.image_results import ImageResult
from miinb.messages import Plan, Status
from miinb.wording import printable, size_words

if TYPE_CHECKING:
    from miinb.results import Result
    from miinb.session import Session

Card = tuple[str, str]


class Html(str):
    """HTML that is safe already: as a cell of a grid it is not escaped."""


_LINE = "1px solid rgba(128,128,128,.35)"
_BOX = (
    f"border:{_LINE};border-radius:6px;padding:.5em .9em;margin:.25em 0;max-width:72em;overflow-x:auto;line-height:1.45"
)
_PRE = (
    "white-space:pre-wrap;overflow-wrap:anywhere;word-break:normal;"
    "margin:0;padding:0;background:none;color:inherit;font-size:1em"
)
QUIET = "opacity:.72;font-size:.92em"
_CELL = (
    "text-align:left;vertical-align:top;padding:.15em 1.2em .15em 0;background:none;"
    "max-width:48em;overflow-wrap:break-word"
)
_NAME = f"{_CELL};font-weight:normal;opacity:.72"
#: A mark and a color for each state; the word beside them says the same.
_STATES = {
    "ready": ("●", "#2e9e4f"),
    "busy": ("●", "#2e9e4f"),
    "starting": ("◐", "#c27c0e"),
    "draining": ("◐", "#c27c0e"),
    "stopped": ("○", "#808080"),
    "failed": ("✕", "#d1383d"),
    "lost": ("✕", "#d1383d"),
}


def duration(seconds: float) -> str:
    """Seconds as people read them: "0.8 ms", "35 ms", "1.42 s", "2 min 5 s"."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 0.9995:
        milliseconds = seconds * 1000
        return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def escaped(text: str) -> str:
    """Untrusted text as HTML."""
    return escape(printable(text))


def pre(text: str) -> str:
    """Untrusted text as HTML that shows exactly its characters."""
    return preformatted(escaped(text))


def preformatted(html: str) -> str:
    """HTML that is safe already, in the look of `pre`."""
    return f'<pre style="{_PRE}">{html}</pre>'


def box(html: str) -> str:
    """Safe HTML in a card's frame."""
    return f'<div class="miinb-card" style="{_BOX}">{html}</div>'


def bar(share: float, width: str = "10em", color: str = "rgba(86,180,233,.8)") -> Html:
    """A share from 0 to 1 as a bar; the number has to stand beside it."""
    frame = f"display:inline-block;width:{width};border-radius:2px;background:rgba(128,128,128,.16);line-height:1"
    part = min(max(share * 100, 0.5), 100.0)
    look = f"display:inline-block;height:.75em;border-radius:2px;background:{color};width:{part:.1f}%"
    return Html(f'<span style="{frame}"><span style="{look}"></span></span>')


def state(word: str) -> str:
    """A state as HTML: mark, color and word."""
    mark, color = _STATES.get(word, ("●", "#808080"))
    return f'<span style="white-space:nowrap"><span style="color:{color}">{mark}</span> {escape(word)}</span>'


def card(
    title: str, chip: str = "", *, facts: Sequence[tuple[str, Any]] = (), body: Iterable[str] = (), foot: str = ""
) -> Card:
    """The template: a title with a state, named facts, HTML parts and a quiet last line.

    Args:
        title: plain text.
        chip: a state word, or "".
        facts: (name, value) pairs; empty values are left out.
        body: HTML that is safe already; its plain text is the caller's business.
        foot: plain text.
    """
    head = f"<div><b>{escape(printable(title))}</b>{' &nbsp; ' + state(chip) if chip else ''}</div>" if title else ""
    table, words = facts_table(facts)
    last = f'<div style="{QUIET}">{escape(printable(foot))}</div>' if foot else ""
    lines = (f"{title} ({chip})" if chip else title, words, foot)
    return box(f"{head}{table}{''.join(body)}{last}"), printable("\n".join(line for line in lines if line))


def facts_table(facts: Sequence[tuple[str, Any]]) -> Card:
    """Named facts without a frame, a row each; empty values are left out."""
    known = [(name, str(value)) for name, value in facts if value not in ("", None)]
    if not known:
        return "", ""
    rows = "".join(
        f'<tr style="background:none"><th scope="row" style="{_NAME}">{escape(name)}</th>'
        f'<td style="{_CELL}">{escape(printable(value))}</td></tr>'
        for name, value in known
    )
    width = max(len(name) for name, _ in known)
    text = printable("\n".join(f"  {name:<{width}}  {value}" for name, value in known))
    return f'<table style="border:none;border-collapse:collapse;margin:.3em 0">{rows}</table>', text


def grid(table: Table) -> str:
    """A table as HTML; its cells are plain values, or `Html`."""
    head = "".join(f'<th scope="col" style="{_CELL};border-bottom:{_LINE}">{_cell(c)}</th>' for c in table.columns)
    rows = "".join(
        '<tr style="background:none">' + "".join(f'<td style="{_CELL}">{_cell(cell)}</td>' for cell in row) + "</tr>"
        for row in table.rows
    )
    return f'<table style="border:none;border-collapse:collapse;margin:.3em 0"><tr>{head}</tr>{rows}</table>'


def _cell(value: Any) -> str:
    """A value as HTML; short ones ("8 s") stay on one line."""
    if isinstance(value, Html):
        return value
    text = escape(printable(str(value)))
    return f'<span style="white-space:nowrap">{text}</span>' if len(text) <= 16 else text


def table_card(table: Table) -> Card:
    """A table of plain values."""
    html, _ = card(table.title, body=[grid(table)] if table.rows else [], foot=table.note)
    return html, printable(str(table))


def _at_home(path: str) -> str:
    """A path with "~" for the home folder: shorter, and a shared notebook does not tell whose it is."""
    home = str(Path.home())
    return "~" + path.removeprefix(home) if path.startswith(home + "/") else path


def session_card(session: Session) -> Card:
    """A deployment: what it serves, how, and where it stands. Asks the server only if it is alive."""
    facts: list[tuple[str, Any]] = [
        ("model", _at_home(session.model)),
        ("task", _task(session)),
        ("engine", session.engine),
    ]
    chip = session.state
    if chip not in ("stopped", "failed", "lost"):
        try:
            facts = status_facts(session.status())
        except Exception:  # a card never fails: the deployment may end at this moment
            chip = session.state
    title = f"Session {session.name}"
    foot = f'session.generate("…"), session.panel(), or %mii gen "…" -d {session.name}' if chip == "ready" else ""
    return card(title, chip, facts=facts, foot=foot)[0], card(title, chip, facts=facts)[1]


def _task(session: Session) -> str:
    """The session's task; "" when it was never asked for and the deployment has ended."""
    try:
        return session.task
    except MiinbError:
        return ""


def status_facts(status: Status) -> list[tuple[str, Any]]:
    """What a status says, as named facts."""
    cache = f", KV cache in {status.kv_dtype}" if status.kv_dtype != "auto" else ""
    work = f"{status.requests} done, {status.in_flight} in flight, {status.queued} waiting"
    return [
        ("model", _at_home(status.model)),
        ("task", status.task),
        ("engine", f"{status.engine}, {status.dtype} on {status.device}{cache}"),
        ("processes", f"{len(status.ranks)} rank{'s' * (len(status.ranks) != 1)}, supervisor pid {status.pid}"),
        ("memory", _memory_words(status)),
        ("up", duration(max(round(status.uptime_s), 0)).replace(".00 s", " s") + (", persistent" * status.persist)),
        ("requests", work),
        (
            "phase",
            f"{status.phase.name} {status.phase.text}".strip() if status.phase and status.state == "starting" else "",
        ),
    ]


def _memory_words(status: Status) -> str:
    """What all ranks hold; on GPUs what of it weights, cache and graphs are, and what is free."""
    if not (memory := sum(rank.memory_bytes for rank in status.ranks)):
        return ""
    kinds = {"weights": "weights_bytes", "KV cache": "kv_cache_bytes", "graphs": "graphs_bytes"}
    on_gpus = [rank for rank in status.ranks if rank.gpu is not None]
    sums = {kind: sum(getattr(rank, name) for rank in on_gpus) for kind, name in kinds.items()}
    parts = ", ".join(f"{size_words(count)} {kind}" for kind, count in sums.items() if count)
    free = {rank.gpu: rank.free_bytes for rank in on_gpus if rank.free_bytes}
    left = ", ".join(f"{size_words(count)} free on GPU {gpu}" for gpu, count in sorted(free.items()))
    return size_words(memory) + f" ({parts})" * bool(parts) + f"; {left}" * bool(left)


def status_card(status: Status) -> Card:
    """A deployment at this moment."""
    return card(f"Deployment {status.name}", status.state, facts=[*status_facts(status), ("address", status.address)])


def plan_card(plan: Plan) -> Card:
    """What was chosen and why, a line each; warnings last."""
    table = Table(("what", "choice", "why"), [(line.what, line.choice, line.reason) for line in plan.lines])
    warnings = [f"<div>⚠ {escape(printable(text))}</div>" for text in plan.warnings]
    html, head = card(f"Plan: {plan.engine}, {plan.dtype} on {plan.device}", body=[grid(table), *warnings])
    return html, printable(f"{head}\n{plan}")


def timing_line(result: Result) -> str:
    """ "42 tokens · first token 35 ms · 84 tokens/s · 0.50 s · length"."""
    if isinstance(result, ImageResult):
        from miinb.notebook.image_cards import images_line

        return images_line(result)
    tokens, timing = result.usage.output_tokens, result.timing
    parts = [f"{tokens} token{'s' * (tokens != 1)}"]
    if timing.ttft_s:
        parts.append(f"first token {duration(timing.ttft_s)}")
    if timing.e2e_s and tokens > 1:
        rate = tokens / timing.e2e_s  # not 1 / tpot_s: chunks that arrive merged make that too short
        parts.append(f"{rate:.0f} tokens/s" if rate >= 10 else f"{rate:.1f} tokens/s")
    if timing.e2e_s:
        parts.append(f"{duration(timing.e2e_s)} in all")
    parts.append(finish_words(result.finish_reasons))
    if cached := result.usage.cached_tokens:
        parts.append(f"{cached} of {result.usage.prompt_tokens} prompt tokens from the cache")
    if dropped := result.dropped_messages:
        parts.append(f"{dropped} oldest message{'s' * (dropped != 1)} left out to fit the context")
    return " · ".join(part for part in parts if part)


def finish_words(reasons: Sequence[str]) -> str:
    """Why the answers ended, in words."""
    words = {"stop": "ended by itself", "length": "reached max_new_tokens", "cancelled": "stopped"}
    return ", ".join(dict.fromkeys(words.get(reason, reason) for reason in reasons))


def result_card(result: Result, written: Callable[[str], str] = pre) -> Card:
    """An answer, or several, and how long it took. Static: it needs no kernel and no widgets.

    Args:
        result: the answer.
        written: makes safe HTML of an untrusted text.
    """
    texts = list(result.texts)
    if len(texts) == 1:
        body = [written(texts[0])]
        plain = texts[0]
    else:
        body = [f'<div style="{QUIET}">{i + 1} of {len(texts)}</div>{written(text)}' for i, text in enumerate(texts)]
        plain = "\n\n".join(f"[{i + 1} of {len(texts)}]\n{text}" for i, text in enumerate(texts))
    line = timing_line(result)
    tables = logprob_tables(result)
    body += [f'<div style="{QUIET}">{table.title} {table.note}</div>{grid(table)}' for table in tables]
    html, _ = card("", body=body, foot=line)
    return html, printable("\n".join([plain, *map(str, tables), f"({line})"]))


def live_card(text: str, line: str, written: Callable[[str], str] = pre) -> Card:
    """An answer that still grows."""
    html, _ = card("", body=[written(text)] if text else [], foot=line)
    return html, printable(f"{text}\n({line})")


def bundle(made: Card) -> dict[str, str]:
    """The MIME bundle of a card, for `_repr_mimebundle_`."""
    return {"text/html": made[0], "text/plain": made[1]}
