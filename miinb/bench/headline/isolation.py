"""The process that the arms run in: a crash, a hang or memory that is not given back costs one arm, not the run.

It is `python -m` this module: a process of multiprocessing would run the user's script once more.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from miinb import hardware
from miinb.bench.headline.book import Job
from miinb.bench.headline.trace import Measured, error_text
from miinb.errors import MiinbError
from miinb.launching import environment
from miinb.spinning import openmp_waiting

if TYPE_CHECKING:
    from miinb.bench.headline.floors import Rates

#: Seconds that loading a model may take besides its workloads, the first compilation of kernels included.
LOAD_S = 300.0
#: Bytes of GPU memory that a process may keep after an arm before it is replaced.
KEPT_BYTES = 1 << 30


class Worker:
    """Runs jobs in a child process, which is started when one is needed and replaced after a failure.

    Args:
        runner: the module whose `run_job(job, rates)` yields what each workload measured; it alone imports the engine.
    """

    def __init__(self, runner: str = "miinb.bench.headline.arms") -> None:
        self._runner = runner
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def rates(self, device: str, dtype: str, *, small: bool) -> Rates:
        """See `floors.measure`. Raises MiinbError."""
        found: Rates
        (found,) = self._ask(("rates", device, dtype, small), LOAD_S)
        return found

    def run(self, job: Job, rates: Rates | None = None) -> Iterator[Measured]:
        """What each workload of a job measured, as soon as it is there.

        Args:
            job: what to run.
            rates: the machine's, for runners that tell how near its limits an arm is.

        Raises:
            MiinbError: the model could not be loaded, or the process died or took too long; it has been ended.
        """
        passes = sum(workload.limit_s * (1 + len(workload.batches)) for workload in job.workloads)
        failed = False
        for measured in self._ask(("job", job, rates), LOAD_S + passes):
            failed = failed or bool(measured.error)
            yield measured
        if failed:  # after an error of the GPU nothing works in that process
            self.close()

    def close(self) -> None:
        """End the process; its GPU memory is free when this returns."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None and _ended(self._process) is None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        with theirs:
            end = theirs.fileno()
            command = [sys.executable, "-P", "-m", __name__, str(end), self._runner]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment(), pass_fds=[end])
        return process, ours

    def _ask(self, question: tuple[Any, ...], limit_s: float) -> Iterator[Any]:
        if self._process is None or self._connection is None:
            self._process, self._connection = self._start()
        process, connection = self._process, self._connection
        deadline, healthy = time.monotonic() + limit_s, False
        try:
            connection.send(question)
            while True:
                if not connection.poll(max(deadline - time.monotonic(), 0.0)):
                    raise MiinbError(f"The arm took more than {limit_s:.0f} s and was ended.")
                kind, value = connection.recv()
                if kind == "end":
                    healthy = value < KEPT_BYTES
                    return
                if kind == "error":
                    raise MiinbError(value)
                yield value
        except (EOFError, ConnectionError):
            raise MiinbError(f"The process died (exit status {_ended(process)}).") from None
        finally:
            if not healthy:
                self.close()


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status of a process that is about to end; None while it goes on."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)
    return process.returncode


def serve(connection: Connection, runner: str) -> None:
    """The child: answers questions until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    os.environ["TQDM_DISABLE"] = "1"
    if not hardware.detect().gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns where the user reads
    os.environ.update(openmp_waiting(crowded=False))  # as a rank has it
    from miinb.bench.headline import floors

    arms = importlib.import_module(runner)

    while True:
        try:
            kind, *arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            if kind == "rates":
                device, dtype, small = arguments
                connection.send(("value", floors.measure(device, dtype, small=small)))
            else:
                for measured in arms.run_job(*arguments):
                    connection.send(("value", measured))
            connection.send(("end", floors.memory_kept()))
        except BrokenPipeError:
            return
        except Exception as error:  # whatever it is, the parent records it and goes on with another process
            connection.send(("error", error_text(error)))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2])
