"""PNG files of RGB pictures, written in milliseconds.

Pillow tries every filter on every row and deflates with zlib: 40 ms for 512 x 512 pixels, where a fast GPU makes the
whole picture in 300. Here a row is always its difference from the one above, and ISA-L deflates, some
rows in each of a few threads: 1 to 4 ms, and the file is no larger.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: The difference from the row above, which is 0 above the first.
_UP = 2
_LEVEL = 1
_PART_BYTES = 128 << 10  # at least, of what one thread deflates: its matches end where it does
_THREADS = min(8, os.cpu_count() or 1)
_POOL = ThreadPoolExecutor(_THREADS, "miinb-png")


def png_file(pixels: NDArray[np.uint8], texts: Mapping[str, str]) -> bytes:
    """A PNG file (ISO/IEC 15948).

    Args:
        pixels: [height, width, 3].
        texts: what its text chunks say, by their keywords.
    """
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, 3 * width)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of each of three colors, not interlaced
    chunks = [(b"IHDR", [header]), *((b"iTXt", [_text(keyword, text)]) for keyword, text in texts.items())]
    chunks += [(b"IDAT", _deflated(filtered)), (b"IEND", [])]
    return b"".join([_SIGNATURE, *(piece for kind, data in chunks for piece in _chunk(kind, data))])


def _deflated(rows: NDArray[np.uint8]) -> list[bytes]:
    """Pieces of the rows as one zlib stream (RFC 1950): blocks of parts that end at whole bytes follow each other."""
    count = max(1, min(_THREADS, rows.nbytes // _PART_BYTES))
    parts = np.array_split(rows, count)
    ends = [False] * (count - 1) + [True]
    head, tail = b"\x78\x01", struct.pack(">I", isal_zlib.adler32(rows))
    return [head, *_POOL.map(_deflate, parts, ends), tail]


def _deflate(rows: NDArray[np.uint8], last: bool) -> bytes:
    stream = isal_zlib.compressobj(_LEVEL, wbits=-15)  # without header and sum
    return stream.compress(rows) + stream.flush(isal_zlib.Z_FINISH if last else isal_zlib.Z_FULL_FLUSH)


def _chunk(kind: bytes, data: Sequence[bytes]) -> list[bytes]:
    """The pieces of a chunk with this data: its length, kind and sum around it."""
    total = functools.reduce(lambda crc, piece: isal_zlib.crc32(piece, crc), data, isal_zlib.crc32(kind))
    return [struct.pack(">I", sum(map(len, data))), kind, *data, struct.pack(">I", total)]


def _text(keyword: str, text: str) -> bytes:
    """Not compressed, in no language."""
    return keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode()
