"""One of several ranks, whose boards lie in files: `TRITON_INTERPRET=1 python all_reduce_rank.py RANK RANKS FOLDER`.

The kernel runs as it is: the interpreter computes its programs one after another, in the same order on every rank, and
its atomics are the CPU's. Writes each message's outputs to FOLDER/rank-N.pt.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tests.kernels.interpreter  # noqa: F401
from miinb.kernels.all_reduce import PROGRAMS, Boards, all_reduce, boards_bytes, reduce_norm
from miinb.kernels.best_of_ranks import best_of_ranks

LIMIT, SHORT = 1 << 15, 2400
EPS = 1e-5
#: Rows of a choice of tokens that follows every pass: few, one, more than the kernel takes at a time.
CHOICES = (5, 1, 300, 9, 1, 2)
VOCABULARY = 1000
#: (rows, hidden, dtype, norm, residual, bias): more rows than programs, odd widths, launches of every size in turn; of
#: two bytes short ones, which are pushed, and others.
MESSAGES: list[tuple[int, int, torch.dtype, str, bool, bool]] = [
    (1, 48, torch.float32, "rms", True, False),
    (3, 48, torch.float32, "layer", True, True),
    (5, 36, torch.float32, "none", False, False),
    (1, 36, torch.float32, "layer", True, False),
    (9, 20, torch.float16, "rms", True, False),
    (2, 64, torch.bfloat16, "layer", False, True),
    (7, 100, torch.bfloat16, "none", False, False),
    (1, 48, torch.float16, "rms", False, False),
    (5, 40, torch.float16, "post", True, True),
    (9, 40, torch.float16, "post", True, True),
    (1, 200, torch.float16, "rms", True, False),
    (6, 24, torch.bfloat16, "none", False, False),
    (2, 104, torch.float16, "layer", True, True),
    (9, 48, torch.float16, "rms", True, False),
    (9, 144, torch.float16, "rms", True, False),
    (3, 48, torch.float32, "two", True, True),
    (5, 48, torch.bfloat16, "two", True, True),
]
PASSES = 6


def inputs(number: int, rank: int) -> dict[str, Any]:
    """What a rank has for a message; all but `x` is the same on every rank."""
    rows, hidden, dtype, norm, residual, bias = MESSAGES[number % len(MESSAGES)]
    shared = torch.Generator().manual_seed(number)
    own = torch.Generator().manual_seed(1000 * (number + 1) + rank)

    def rand(*shape: int, generator: torch.Generator = shared) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    shape = (2, hidden) if norm == "two" else (hidden,)
    return {
        "x": rand(rows, hidden, generator=own),
        "weight": rand(*shape) if norm != "none" else None,
        "bias": rand(*shape) if bias else None,
        "residual": rand(rows, hidden) if residual else None,
        "centered": norm in ("layer", "post", "two"),
        "keep": norm != "post",
    }


def candidates(number: int, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's largest logits and their places, with equal ones on several ranks, and infinite ones."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    rows = CHOICES[number % len(CHOICES)]
    value = torch.randint(-2, 2, (rows,), generator=generator).float()
    value[torch.randint(rows, (rows // 4,), generator=generator)] = torch.inf
    value[torch.randint(rows, (rows // 4,), generator=generator)] = -torch.inf
    return value, torch.randint(VOCABULARY, (rows,), generator=generator)


def write_boards(ranks: int, folder: Path) -> None:
    """The files, all zeros, before any rank starts."""
    for rank in range(ranks):
        (folder / f"board-{rank}").write_bytes(bytes(boards_bytes(ranks, LIMIT, SHORT)))


def boards_of(rank: int, ranks: int, folder: Path) -> Boards:
    """This rank's view of the files."""
    size = boards_bytes(ranks, LIMIT, SHORT)
    memory = [
        torch.from_file(str(folder / f"board-{i}"), shared=True, size=size, dtype=torch.uint8) for i in range(ranks)
    ]
    addresses = torch.tensor([part.data_ptr() for part in memory])
    # Few programs: a launch then has fewer than rows.
    return Boards(addresses, torch.zeros(PROGRAMS, dtype=torch.int64), rank, LIMIT, SHORT, 4, keep=tuple(memory))


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    boards = boards_of(rank, ranks, folder)
    outputs, chosen = [], []
    late = random.Random(rank)
    for number in range(PASSES * len(MESSAGES)):
        given = inputs(number, rank)
        time.sleep(late.choice((0.0, 0.0, 0.02)))  # now this rank is behind, now that one
        if given["weight"] is None:
            total = all_reduce(given["x"], boards)
            outputs.append((total, total))
        else:
            x, weight, bias = given.pop("x"), given.pop("weight"), given.pop("bias")
            y, total = reduce_norm(x, boards, weight, bias, EPS, **given)
            outputs.append((y, total if given["keep"] else y))
        if number % len(MESSAGES) == len(MESSAGES) - 1:
            value, token_id = candidates(number // len(MESSAGES), rank)
            chosen.append(best_of_ranks(value, token_id, boards, rank * VOCABULARY))
    # A rank that failed in a step takes part with plain sums where the others normalize.
    given = inputs(0, rank)
    if rank:
        mixed = all_reduce(given["x"], boards)
    else:
        x, weight, bias = given.pop("x"), given.pop("weight"), given.pop("bias")
        mixed = reduce_norm(x, boards, weight, bias, EPS, **given)[1] - given["residual"]
    found = {"outputs": outputs, "chosen": chosen, "epochs": boards.epochs, "mixed": mixed}
    torch.save(found, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main()
