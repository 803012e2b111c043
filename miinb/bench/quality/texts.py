"""The text that perplexity is measured on: the user's, or one that is there wherever the server is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miinb.errors import InvalidValue

_HINT = "Give the path of a text file, or a list of texts."


@dataclass(frozen=True, slots=True)
class Text:
    """A text and what a caption calls it."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Tells two texts apart."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read(source: str | Path | Sequence[str] | None) -> Text:
    """The text of a file, or of a list of texts; None is `licenses`.

    Raises:
        InvalidValue: the file cannot be read, or there is no text.
    """
    if source is None:
        return licenses()
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        try:
            found = Text(path.name, path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise InvalidValue(f"text: {str(source)[:80]} cannot be read ({error}).", hint=_HINT) from None
    else:
        parts = list(source)
        if other := next((part for part in parts if not isinstance(part, str)), None):
            raise InvalidValue(f"text: {type(other).__name__} is no text.", hint=_HINT)
        found = Text(f"{len(parts)} given text{'s' * (len(parts) != 1)}", "\n\n".join(parts))
    if not found.text.strip():
        raise InvalidValue("text: there is none.", hint=_HINT)
    return found


def licenses() -> Text:
    """The licenses of Python and of transformers (Apache 2.0), some 25 kB of English.

    They are no part of Python's documentation, which int4 is fitted to by default.

    Raises:
        InvalidValue: neither is there.
    """
    found = {}
    pythons = Path(os.__file__).with_name("LICENSE.txt")
    if pythons.is_file():
        found["Python"] = pythons.read_text(encoding="utf-8", errors="replace")
    if apache := _license_of("transformers"):
        found["transformers"] = apache
    if not found:
        raise InvalidValue("text: the licenses of Python and transformers are not installed here.", hint=_HINT)
    named = " and ".join(found)
    return Text(f"the license{'s' * (len(found) > 1)} of {named}", "\n\n".join(found.values()))


def _license_of(package: str) -> str:
    """The license that an installed package brings, or ""."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    for file in files:
        if file.name == "LICENSE" and ".dist-info" in str(file):
            return Path(str(file.locate())).read_text(encoding="utf-8", errors="replace")
    return ""
