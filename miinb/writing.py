"""Files that a user names to be written: whether that can be, and the error in words where it cannot."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from miinb.errors import InvalidValue

#: How a file of HTML may end.
HTML = (".html", ".htm")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What is written within goes to this path, or below it.

    Raises:
        InvalidValue: it cannot be written; the message has the path and the reason.
    """
    try:
        yield
    except OSError as error:
        number = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno  # a file where a folder should be
        raise InvalidValue(f"{path} cannot be written: {os.strerror(number) if number else error}.") from None


def check_folder(path: str | Path) -> None:
    """Find out whether files can be written below this folder, which need not be there yet; leaves no trace.

    Raises:
        InvalidValue: they cannot.
    """
    with writing(path):
        _try(Path(path))


def check_file(path: str | Path, endings: Sequence[str] = ()) -> None:
    """Find out whether this file can be written; its folder need not be there yet.

    Args:
        path: the file.
        endings: those that it may have, if it has one; none: any.

    Raises:
        InvalidValue: it cannot be written, or has another ending.
    """
    target = Path(path)
    if endings and target.suffix and target.suffix.lower() not in endings:
        raise InvalidValue(f"{path}: the ending {target.suffix!r} is not known.", hint=f"Use {' or '.join(endings)}.")
    with writing(path):
        if target.is_dir():
            raise InvalidValue(f"{path} cannot be written: it is a folder.")
        _try(target.parent)


def _try(folder: Path) -> None:
    """Make something in the folder, or in the nearest one above it that is there, and take it away again."""
    there = folder.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    os.rmdir(tempfile.mkdtemp(prefix=".miinb-", dir=there))
