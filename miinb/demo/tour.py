"""The demonstration: a model is fetched, served, asked, and measured against plain transformers."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit status."""
    raise NotImplementedError
