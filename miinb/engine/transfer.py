"""From files to tensors on a device, a piece at a time: the host holds a few pieces, never a tensor or a file.

For a GPU several threads read into pinned memory of their own and copy from there, each on its own stream: the disk (or
the page cache), the host's memory and the bus work at once. A piece of another dtype or order is converted on the GPU.
For a CPU the bytes are read to where they stay, if they can stay as they are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

#: Bytes of a piece, which is some rows of a tensor (one at least).
PIECE_BYTES = 4 << 20
MOST_THREADS = 8

#: `room(count, dtype)` is a tensor on the host that a piece may be read into: [count].
Room = Callable[[int, torch.dtype], Tensor]
#: `read(first, last, room)` is the source of the rows from first to last (excluded), on the host.
Read = Callable[[int, int, Room], Tensor]


class Transfer:
    """Copies to a device.

    Args:
        device: where the tensors are; a GPU without a number is the current one.
        threads: how many pieces at a time; None: by the device.
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        numbered = str(device) != "cuda"
        self._device = device if numbered else torch.device("cuda", torch.cuda.current_device())
        many = min(MOST_THREADS, len(os.sched_getaffinity(0))) if device.type == "cuda" else 1
        count = many if threads is None else threads
        self._pool = ThreadPoolExecutor(count, "read", self._enter) if count > 1 else None
        self._local = threading.local()

    def _enter(self) -> None:
        """A thread begins: CUDA's current device is one of each thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def fill(self, target: Tensor, row_bytes: int, read: Read) -> None:
        """Fill a tensor, and return when it is filled.

        Args:
            target: any strides; the first dimension counts rows.
            row_bytes: of one row in the source.
            read: gives rows of the source, of the elements of `target`'s rows in their order.
        """
        rows = target.shape[0]
        step = max(1, PIECE_BYTES // max(1, row_bytes))
        pieces = [(first, min(first + step, rows)) for first in range(0, rows, step)]
        if self._pool is None or len(pieces) == 1:
            for first, last in pieces:
                self._copy(target[first:last], first, last, read)
        else:
            for future in [self._pool.submit(self._copy, target[a:b], a, b, read) for a, b in pieces]:
                future.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _copy(self, target: Tensor, first: int, last: int, read: Read) -> None:
        if self._device.type != "cuda":
            source = read(first, last, lambda count, dtype: own_memory(target, count, dtype))
            if source.data_ptr() != target.data_ptr():
                target.copy_(source.view(target.shape))
            return
        source = read(first, last, self._pinned).view(target.shape)
        stream = self._stream()
        with torch.cuda.stream(stream):
            # A plain copy goes straight to its place; any other is made from a copy of the piece on the GPU.
            plain = source.dtype == target.dtype and target.is_contiguous()
            target.copy_(source if plain else source.to(self._device, non_blocking=True), non_blocking=True)
        stream.synchronize()

    def _pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """This thread's memory for a piece."""
        size = count * dtype.itemsize
        memory: Tensor | None = getattr(self._local, "memory", None)
        if memory is None or memory.numel() < size:
            memory = torch.empty(max(size, PIECE_BYTES), dtype=torch.uint8, pin_memory=True)
            self._local.memory = memory
        return memory[:size].view(dtype)

    def _stream(self) -> Any:
        """This thread's stream."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return self._local.stream


def own_memory(target: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The memory of a tensor itself if such a source can stay there as it is, else some new."""
    if target.is_contiguous() and target.dtype == dtype and target.numel() == count:
        return target.view(-1)
    return torch.empty(count, dtype=dtype)


def read_into(descriptor: int, memory: Tensor, offset: int) -> None:
    """Fill memory [n] of any dtype from a file.

    Raises:
        EOFError: the file ends before.
    """
    view = memory.view(torch.uint8).numpy().data
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise EOFError
        view, offset = view[count:], offset + count
