"""Two branches of a layer at the same time, in a CUDA graph.

What attention does between its products keeps a GPU's memory idle. A parallel block's MLP reads its weights meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def fork(x: Tensor) -> torch.cuda.Stream | None:
    """A stream that goes on from here beside the current one; None where there is none, and all goes in order.

    Only of one token: kernels of several count arrivals in memory that they share (`dispatch.arrival_counters`).
    """
    if not (x.is_cuda and x.shape[0] == 1 and torch.cuda.is_current_stream_capturing()):
        return None
    stream = _stream(x.device)
    stream.wait_stream(torch.cuda.current_stream())
    return stream


@contextmanager
def on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Within it kernels go to the other stream; after it the current one waits for them."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Of the least priority: attention is what a layer waits for."""
    return torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]
