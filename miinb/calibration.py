"""The text that int4's rounding is fitted to: checked before anything starts, read by the rank. Never imports torch."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from miinb.errors import InvalidValue
from miinb.wording import one_line, size_words

#: Largest file: a rank fits to some 50,000 tokens, which are spread over all of a text.
MOST_BYTES = 64 << 20
#: Topics of Python's own documentation that make the sample.
_TOPICS = ("specialnames", "compound", "types", "string-methods", "debugger", "execmodel", "strings", "try", "calls")
_HINT = "Give the path of a text file, a list of texts, 'auto' or 'off'."


def is_given(source: str | Sequence[str]) -> bool:
    """Whether the option `calibration` is the user's own text rather than "auto" or "off"."""
    return source not in ("auto", "off")


def calibration_text(source: str | Sequence[str]) -> str:
    """The text of the option `calibration` ("off" has none and is not asked for).

    Raises:
        InvalidValue: a file cannot be read, is no file of text or larger than `MOST_BYTES`; or there is no text.
    """
    if source == "auto":
        import pydoc_data.topics

        topics = pydoc_data.topics.topics
        return "\n\n".join(topics[name] for name in _TOPICS if name in topics)
    if isinstance(source, str):
        what = one_line(source) or "an empty path"
        text = _read(source, what)
    else:
        what, text = "the list", "\n\n".join(source)
    if not text.strip():
        raise InvalidValue(f"options.calibration: {what} holds no text.", hint=_HINT)
    if "\0" in text:
        raise InvalidValue(f"options.calibration: {what} is no text: it holds a NUL character.", hint=_HINT)
    return text


def _read(source: str, what: str) -> str:
    try:
        file = Path(source).expanduser()
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "no regular file"
            raise InvalidValue(f"options.calibration: {what} is {kind}.", hint=_HINT)
        if facts.st_size > MOST_BYTES:
            raise InvalidValue(
                f"options.calibration: {what} has {size_words(facts.st_size)}, above {size_words(MOST_BYTES)}.",
                hint="Give a part of it: some hundred thousand characters are enough.",
            )
        return file.read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:  # of expanduser; a NUL in the path, bytes that are no UTF-8
        raise InvalidValue(f"options.calibration: {what} cannot be read ({error}).", hint=_HINT) from None
