"""Points within long computations at which cancels come in.

A step of a large picture, or its way through the VAE, takes a CPU minutes. So who computes there calls `poll_point`
before each operation that may be long (the modules of diffusers by hooks: `poll_in`), and who runs it says with
`polled` what is done at these points. That may raise, which ends the computation. Outside of `polled`, as on a GPU,
whose steps are short, a point is a comparison, and a captured graph has none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from torch import nn

#: Least time between two polls.
EVERY_S = 0.05
#: Multiplications and additions of one operation between two points, where it can be computed in parts: one core takes
#: about a second for so many in fp32, and an eighth in bf16 where it has AMX.
MOST_OPERATIONS = 1e11

_poll: Callable[[], None] | None = None
_due = 0.0


@contextlib.contextmanager
def polled(poll: Callable[[], None]) -> Iterator[None]:
    """Within it `poll` is called at points, every `EVERY_S` at most; what it raises is raised there."""
    global _poll
    before, _poll = _poll, poll
    try:
        yield
    finally:
        _poll = before


def poll_point() -> None:
    """Look whether the computation is still wanted. Raises what `poll` does."""
    global _due
    if _poll is None:
        return
    now = time.monotonic()
    if now >= _due:
        _due = now + EVERY_S
        _poll()


def parts_of(operations: float) -> int:
    """In how many parts an operation is computed, with a point before each; 1 outside of `polled`."""
    return 1 if _poll is None else max(1, round(operations / MOST_OPERATIONS))


def poll_in(module: nn.Module) -> None:
    """Make points of a module: its wide convolutions, and the layer norms, which stand before attentions and MLPs."""
    for each in module.modules():
        if isinstance(each, nn.LayerNorm) or (isinstance(each, nn.Conv2d) and each.kernel_size != (1, 1)):
            each.register_forward_pre_hook(_point)


def _point(module: nn.Module, inputs: object) -> None:
    poll_point()
