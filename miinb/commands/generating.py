"""What the commands that generate text do: `gen`, `chat` and `reset`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miinb.commands import picturing
from miinb.commands.context import STDIN, Context, named, stdin
from miinb.commands.options import GENERATION, IMAGES, TIMEOUT, given
from miinb.errors import InvalidRequest, InvalidValue
from miinb.tasks import find_task

if TYPE_CHECKING:
    from miinb.results import Result
    from miinb.session import Session

Values = Mapping[str, Any]

FORMATS = ("text", "markdown", "json")


def _text(context: Context, values: Values, body: str | None, command: str) -> str:
    words = " ".join(values["prompt"] or ())
    if words and body is not None:
        raise InvalidValue(
            f"{command}: a prompt on the line and in the cell.", hint="Give one of them; a deployment goes after -d."
        )
    if words == STDIN or not (words or body is not None or context.in_notebook or sys.stdin.isatty()):
        body = stdin(context, command).read()
    text = body.removesuffix("\n") if body is not None else words
    if not text.strip():
        raise InvalidValue(f"{command}: the prompt is empty.", hint=f'{context.prog} {command} "Once upon a time"')
    return text


def _generating(context: Context, values: Values) -> Session:
    """The deployment that is asked. Raises InvalidRequest, before anything is shown, where it generates no text."""
    session = context.session(values["deployment"])
    if not (task := find_task(session.task)).streams:
        raise InvalidRequest(f"{session.name} serves {task.name}.", hint=f"Use {'gen' if task.image else 'predict'}.")
    return session


def _generation(context: Context, values: Values) -> dict[str, Any]:
    options = given(values, (*GENERATION, TIMEOUT))
    if context.settings.max_new_tokens:
        options.setdefault("max_new_tokens", context.settings.max_new_tokens)
    return options


def _answer(context: Context, values: Values, session: Session, asked: Any, options: dict[str, Any]) -> Result:
    """Ask, and show the answer: while it grows, if it is one and nobody wants it otherwise.

    `asked` is a prompt, a list of them, or the messages of a chat.
    """
    form = values["format"] or ("markdown" if context.settings.render_markdown else "text")
    turns = isinstance(asked, list) and isinstance(asked[0], dict)
    several = options.get("num_return_sequences", 1) > 1 or (isinstance(asked, list) and not turns)
    if several and values["stream"]:
        raise InvalidValue("--stream: the texts of several answers would mix.", hint="Leave it out.")
    hidden = values.get("quiet") or form == "json"  # JSON is printed as the command's value
    if not (several or hidden or values["stream"] is False):
        streamed: Result = context.screen.stream(session.stream(asked, **options), markdown=form == "markdown")
        return streamed
    result: Result = session.chat(asked, **options) if turns else session.generate(asked, **options)
    if not hidden:
        context.screen.show(result, markdown=form == "markdown")
    return result


def gen(context: Context, values: Values, body: str | None) -> Result:
    """New text after a prompt, an answer by the chat template that no conversation remembers, or pictures."""
    text = _text(context, values, body, "gen")
    if not (prompts := _batch(text, values["batch"])):
        raise InvalidValue("gen: the prompt is empty.", hint="It has lines of --- alone.")
    if picturing.makes_images(session := context.session(values["deployment"])):
        return picturing.pictures(context, values, session, prompts)
    session = _generating(context, values)
    for option in (option for option in IMAGES if values.get(option.target) is not None):
        flag = option.flags[-1]
        raise InvalidRequest(f"{flag}: {session.name} serves {session.task}, not pictures.", hint=f"Leave {flag} out.")
    asked: Any = prompts if len(prompts) > 1 else prompts[0]
    if values["chat"] or values["system"]:
        if len(prompts) > 1:
            raise InvalidValue("gen: --chat takes one text.", hint="Leave --batch out.")
        asked = [*_system(values), {"role": "user", "content": prompts[0]}]
    return _answer(context, values, session, asked, _generation(context, values))


def _system(values: Values) -> list[dict[str, str]]:
    return [{"role": "system", "content": values["system"]}] if values["system"] else []


def _batch(text: str, how: str | None) -> list[str]:
    if how == "lines":
        return [line for line in text.splitlines() if line.strip()]
    return parts_of(text) if how == "parts" else [text]


def parts_of(text: str) -> list[str]:
    """The parts of a text between lines of "---"; such lines may be its first and its last."""
    return [part.strip("\n") for part in re.split(r"^---$", text, flags=re.MULTILINE) if part.strip()]


def chat(context: Context, values: Values, body: str | None) -> Result:
    """The next turn of a conversation; `reset` begins a new one. Of a terminal each is the first."""
    text = _text(context, values, body, "chat")
    session = _generating(context, values)
    turns = list(context.chats.get(session.name, ()))
    if values["system"]:
        turns = [*_system(values), *(turn for turn in turns if turn["role"] != "system")]
    turns.append({"role": "user", "content": text})
    result = _answer(context, values, session, turns, _generation(context, values))
    # what no longer fits the context is forgotten here too, so that a long conversation does not grow without end
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    kept = [*system, *turns[len(system) + result.dropped_messages :]]
    context.chats[session.name] = [*kept, {"role": "assistant", "content": result.text}]
    return result


def reset(context: Context, values: Values, body: str | None) -> str:
    """Forget the conversation with a deployment."""
    if not context.in_notebook:
        raise InvalidValue("reset: a terminal's chat is one turn, which nothing remembers.")
    session = context.session(named(values, "reset"))
    context.chats.pop(session.name, None)
    return f"The conversation with {session.name} begins anew."
