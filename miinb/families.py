"""`miinb.models()`: the table of families, what each serves, and by which engine."""

from __future__ import annotations

from dataclasses import dataclass

from miinb.engine.policies import ENCODERS, POLICIES
from miinb.models import DECODER_TASKS, ENCODER_TASKS


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """A row of `miinb.models()`: a family, what it serves, and whether the optimized engine has a form for it."""

    family: str
    tasks: tuple[str, ...]
    optimized: bool


class FamilyTable(tuple[FamilyRow, ...]):
    """The rows of `miinb.models()`, shown as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        rows = [
            f"{row.family:<16} {'optimized' if row.optimized else 'baseline':<10} {', '.join(row.tasks)}"
            for row in self
        ]
        return "\n".join([f"{'family':<16} {'engine':<10} tasks", *rows])


def families() -> FamilyTable:
    """The families that are tested; others that transformers knows run on the baseline engine."""
    decoders = ("mpt", "codegen", "olmo", "granite")
    rows = [FamilyRow(name, DECODER_TASKS, True) for name in POLICIES]
    rows += [FamilyRow(name, DECODER_TASKS, False) for name in decoders]
    rows += [FamilyRow(name, ENCODER_TASKS, True) for name in ENCODERS]
    images = FamilyRow("stable-diffusion", ("text-to-image",), True)
    return FamilyTable([*rows, FamilyRow("albert", ENCODER_TASKS, False), images])
