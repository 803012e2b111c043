"""One process of a deployment as the supervisor sees it: how it starts, what it reports, how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from miinb.messages import Phase, from_dict

#: Exit code of a rank that ended because another one of its replica did.
PEER_LOST = 75
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
#: Signs of a lack of memory in a log, when the process could not say so itself.
_MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "memoryerror",
    "std::bad_alloc",
    "failed to map segment",
    "memory allocation still failed",  # OpenBLAS
)


class Process:
    """A frontend or a rank. Its standard output and error go to a log file, its reports come through a pipe.

    It leads its own process group (its compilers end with it), and the kernel kills it when the supervisor dies.
    """

    def __init__(
        self,
        label: str,
        module: str,
        line: Mapping[str, Any],
        *,
        log: Path,
        env: Mapping[str, str],
        replica: int | None = None,
        rank: int = 0,
    ) -> None:
        self.label = label
        self.log = log
        self.replica = replica  # None: the frontend
        self.rank = rank
        self.phase: Phase | None = None
        self.ready: dict[str, Any] | None = None
        self.failure: dict[str, str] | None = None
        self.silent = False  # it has closed its pipe
        self._buffer = b""
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        self.status_fd = read_end
        try:
            with log.open("ab") as output:
                self._popen = subprocess.Popen(
                    [sys.executable, "-P", "-m", module],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**env, "MIINB_STATUS_FD": str(write_end)},
                    pass_fds=(write_end,),
                    process_group=0,
                    preexec_fn=_die_with(os.getpid()),
                )
        finally:
            os.close(write_end)
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.tell(line)
        if replica is not None and self._popen.stdin is not None:
            self._popen.stdin.close()  # a rank is told nothing more

    def tell(self, line: Mapping[str, Any]) -> None:
        """One JSON line to its standard input; the frontend reads more than the first."""
        stdin = self._popen.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(json.dumps(line).encode() + b"\n")
                stdin.flush()

    def reports(self) -> list[dict[str, Any]]:
        """The reports that have come in since the last call; phase, ready and failure are kept."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.status_fd, 1 << 16):
                self._buffer += piece
            self.silent = True
        *lines, self._buffer = self._buffer.split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                report = json.loads(line)
                if "phase" in report:
                    self.phase = from_dict(Phase, report["phase"])
                self.ready = report.get("ready", self.ready)
                self.failure = report.get("failed", self.failure)
                found.append(report)
        return found

    @property
    def exit_code(self) -> int | None:
        """Its exit code (negative: the signal), None while it runs."""
        return self._popen.poll()

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to it and to all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        """Kill what is left of its group, reap it, and close the descriptors."""
        self.signal_group(signal.SIGKILL)
        self._popen.wait()
        os.close(self.pidfd)
        os.close(self.status_fd)
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()

    def cause(self, *, starting: bool, oom_kills: int = 0) -> dict[str, str]:
        """Why it ended, in the form of the "failed" line.

        Args:
            starting: it ended before it was ready.
            oom_kills: how many processes the machine has killed for memory since the start.
        """
        tail = log_tail(self.log, 40)
        if self.failure is not None:
            return {"hint": "", "details": tail, **self.failure}
        code = self.exit_code
        how = f"exit code {code}" if code is None or code >= 0 else f"signal {signal.Signals(-code).name}"
        when = "during start-up" if starting else "while it served"
        memory = any(sign in tail.lower() for sign in _MEMORY_SIGNS) or (code == -signal.SIGKILL and oom_kills > 0)
        hint = ""
        if memory:
            hint = "Memory ran out: take a smaller model, max_length or max_batch."
        elif code == -signal.SIGKILL:
            hint = "Something killed it; often that is a limit of the container's memory."
        error = ("OutOfMemory" if memory else "RankFailed") if starting else "Unavailable"
        return {"error": error, "message": f"{self.label} ended {when} ({how}).", "hint": hint, "details": tail}


def _die_with(supervisor: int) -> Callable[[], None]:
    def before_exec() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # it died before the line above
            os._exit(1)

    return before_exec


def culprit(ranks: list[Process], child: Process) -> Process:
    """Which of a replica's ranks ended first, when one has ended: the others end because it did."""
    ended = (rank for rank in ranks if rank.exit_code is not None)
    return next((rank for rank in ended if rank.exit_code != PEER_LOST), child)


def log_tail(log: Path, lines: int) -> str:
    """The last lines of a log file ("" if there is none), read from its end."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 500 * lines))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def machine_oom_kills() -> int:
    """How many processes this machine has killed for lack of memory since it booted."""
    for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0
