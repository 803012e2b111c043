"""Callbacks of a user, which may raise: what was measured is worth more than they are."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def harmless(callback: Callable[P, object] | None, name: str) -> Callable[P, None] | None:
    """`callback`, called no more once it has raised, with a warning that says so; None for None.

    Args:
        callback: of the user.
        name: of the argument that it came by.
    """
    if callback is None:
        return None
    broken = False

    @functools.wraps(callback)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal broken
        if broken:
            return
        try:
            callback(*args, **kwargs)
        except Exception as error:
            broken = True
            text = f"{name} raised {type(error).__name__}: {error}. It is called no more; the run goes on."
            warnings.warn(text, stacklevel=2)

    return call
