"""Sums over tensor-parallel ranks on linked GPUs: the engine's kernel against NCCL.

`python -m miinb.bench.collectives` starts a rank a GPU. For messages of the sizes of decode steps it first checks that
every sum is fp64's but for rounding, and the same bit for bit on every rank, by a CUDA graph replayed with numbers that
change; then it times NCCL launched by Python, NCCL in a graph, the kernel in a graph, and both with the residual's
addition and the norm that follow every sum in a decoder. It takes a minute and ends after 90 s whatever happens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miinb import hardware
from miinb.bench.environment import environment, hardware_words
from miinb.errors import RankFailed

LIMIT_S = 90.0
_RANK = "miinb.bench.collective_ranks"
_LOG_CHARS = 2000


def measure(ranks: int, *, pushed: int | None = None, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Run the ranks to their end.

    Args:
        ranks: how many, each with a GPU.
        pushed: bytes of the largest message that is pushed; None: as the engine has it.
        limit_s: seconds after which they are ended.

    Returns:
        What rank 0 wrote (`collective_ranks.run`), with the machine as `environment`.

    Raises:
        RankFailed: a rank failed, or they took too long; all have ended.
    """
    with tempfile.TemporaryDirectory(prefix="miinb-collectives-") as place:
        folder = Path(place)
        processes = [_start(rank, ranks, folder, pushed) for rank in range(ranks)]
        try:
            _wait(processes, folder, time.monotonic() + limit_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {"environment": environment(), **result}


def _start(rank: int, ranks: int, folder: Path, pushed: int | None) -> subprocess.Popen[bytes]:
    asked = [] if pushed is None else [str(pushed)]
    with (folder / f"rank-{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", _RANK, str(rank), str(ranks), str(folder), *asked],
            env={**os.environ, "MASTER_PORT": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed or time.monotonic() > deadline:
            break
        if None not in codes:
            return
        time.sleep(0.05)
    rank = failed[0] if failed else 0
    log = (folder / f"rank-{rank}.log").read_text(encoding="utf-8", errors="replace")[-_LOG_CHARS:]
    what = f"Rank {rank} failed" if failed else "The ranks took too long"
    raise RankFailed(f"{what}. The end of rank {rank}'s log:\n{log}", hint="NCCL_DEBUG=INFO makes NCCL say more.")


def right(result: dict[str, Any]) -> bool:
    """Whether every sum and norm was right, and alike on all ranks."""
    return all(not one["wrong"] and not one["apart"] and one["norm_error"] <= 2e-2 for one in result["checks"])


def table(result: dict[str, Any]) -> str:
    """The times in words and columns."""
    head = f"{'rows':>5} {'hidden':>6} {'KB':>6} |{'NCCL eager':>11} {'NCCL':>7} {'kernel':>7} {'ratio':>6} |"
    lines = [f"{head}{'NCCL + norm':>12} {'fused':>7} {'ratio':>6}"]
    for one in result["times"]:
        alone, both = one["nccl"] / one["ours"], one["nccl_norm"] / one["ours_norm"]
        lines.append(
            f"{one['rows']:5d} {one['hidden']:6d} {one['bytes'] / 1024:6.0f} |{one['nccl_eager']:11.1f} "
            f"{one['nccl']:7.1f} {one['ours']:7.1f} {alone:5.1f}x |{one['nccl_norm']:12.1f} {one['ours_norm']:7.1f} "
            f"{both:5.1f}x{'' if one['used'] else '  (the engine takes NCCL)'}"
        )
    count = result["checked"] * len(result["checks"])
    verdict = "all right, and alike on all ranks" if right(result) else "WRONG: see the checks in the JSON"
    machine = hardware_words(result["environment"])
    lines.append(f"Microseconds, {result['ranks']} ranks, bf16; {machine}, NCCL {result['nccl']}.")
    lines.append(f"{count} messages checked: {verdict}. {result['seconds']:.0f} s.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, or 1 where a sum was wrong or the kernel cannot be used here."""
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.collectives", description=__doc__)
    parser.add_argument("--ranks", type=int, help="default: one a GPU")
    parser.add_argument("--pushed", type=int, metavar="BYTES", help="largest message written to the others' memory")
    parser.add_argument("--out", type=Path, default=Path("collectives.json"), help="file of the results")
    options = parser.parse_args(arguments)
    gpus = len(hardware.detect().gpus)
    ranks = options.ranks or gpus
    if not 2 <= ranks <= gpus:
        parser.error(f"sums need two ranks or more, a GPU each: {gpus} can be seen")
    result = measure(ranks, pushed=options.pushed)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["reason"]:
        print(f"The kernel is not used here: {result['reason']}.")
        return 1
    print(f"{table(result)}\nRecord: {options.out}")
    return 0 if right(result) else 1


if __name__ == "__main__":
    sys.exit(main())
