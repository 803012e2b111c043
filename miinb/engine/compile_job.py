"""The rank's side of `compile.py`: kernels are compiled by other processes while this one imports and reads weights.

Nothing here imports torch, so that a rank can start the job before it does anything else. When all were compiled, a
mark beside them says so: the next start of the same model with the same code needs no job, whose imports alone take
seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import platformdirs

from miinb import models
from miinb.config import DeploymentConfig
from miinb.errors import MiinbError
from miinb.messages import Phase

log = logging.getLogger(__name__)

#: After so long what is not compiled is left to its first use.
LIMIT_S = 90.0
MOST_PROCESSES = 8
#: Fields of a deployment that its kernels do not depend on.
_OTHERS = {"name", "gpus", "replicas", "persist", "port", "start_timeout_s", "idle_timeout_s"}


@dataclass(slots=True)
class Outcome:
    """What the job did.

    Attributes:
        done, total: kernels compiled or found in the cache, of how many.
        waited_s: seconds that the rank waited for it.
        before: whether an earlier start had compiled them all.
    """

    done: int = 0
    total: int = 0
    waited_s: float = 0.0
    before: bool = False


class CompileJob:
    """The process that compiles. It ends with this one, whatever happens.

    Args:
        process: None: there is nothing to do.
        mark: the file that is to say so the next time.

    Attributes:
        outcome: known after `wait`.
    """

    def __init__(self, process: subprocess.Popen[bytes] | None, mark: Path | None = None) -> None:
        self._process = process
        self._mark = mark
        self._output = b""
        self.outcome = Outcome()

    @classmethod
    def start(cls, config: DeploymentConfig, device: int = 0, *, limit_s: float = LIMIT_S) -> CompileJob | None:
        """Start compiling the kernels of a deployment for a GPU; None where there is none or no kernels are needed.

        Args:
            config: the deployment's.
            device: the GPU's number among those that CUDA shows this process.
            limit_s: seconds after which the job gives up.
        """
        use_cache()
        wanted = config.engine == "optimized" and config.device != "cpu"
        capability = gpu_capability(device) if wanted else None
        if capability is None:
            return None
        mark = _mark(config, capability)
        if (total := _marked(mark)) is not None:
            job = cls(None)
            job.outcome = Outcome(total, total, before=True)
            return job
        processes = max(1, min(len(os.sched_getaffinity(0)) // 2 // config.replicas, MOST_PROCESSES))
        order = {
            "config": config.model_dump(mode="json"),
            "capability": capability,
            "parent": os.getpid(),
            "processes": processes,
            "limit_s": limit_s,
        }
        return cls.of_order(order, mark)

    @classmethod
    def of_order(cls, order: dict[str, object], mark: Path | None = None) -> CompileJob:
        """Start the process with its JSON line (`compile.Order`)."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # it forks
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "miinb.engine.compile"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,  # stderr is the rank's log
            env={**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""},
        )
        if process.stdin is not None:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.close()
        return cls(process, mark)

    def wait(self, report: Callable[[Phase], None], limit_s: float = LIMIT_S) -> Outcome:
        """Wait until the kernels are compiled; what is not by then is compiled where it is first used.

        Args:
            report: told "compile" with how many are done.
            limit_s: how long to wait at most.
        """
        if self._process is None:
            return self.outcome
        started = time.monotonic()
        while (line := self._line(started + limit_s)) is not None:
            values = json.loads(line)
            if "failed" in values:
                for kernel, reason in values["failed"].items():
                    log.warning("%s was not compiled in advance: %s", kernel, reason)
                if not values["failed"]:
                    self._set_mark()
                break
            self.outcome.done, self.outcome.total = values["done"], values["total"]
            report(Phase("compile", values["done"], values["total"]))
        else:
            log.warning("kernels: compiling in advance did not end; the rest is compiled at first use")
        self.close()
        self.outcome.waited_s = time.monotonic() - started
        return self.outcome

    def _set_mark(self) -> None:
        if self._mark is not None and self.outcome.done == self.outcome.total:
            try:
                self._mark.parent.mkdir(mode=0o700, exist_ok=True)
                self._mark.write_text(str(self.outcome.total))
            except OSError as error:  # a full disk: the next start looks again
                log.warning("%s cannot be written: %s", self._mark, error)

    def _line(self, deadline: float) -> bytes | None:
        """The next line of the process; None when it has ended or the time is over."""
        if self._process is None or self._process.stdout is None or self._process.stdout.closed:
            return None
        output = self._process.stdout.fileno()
        while b"\n" not in self._output:
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            piece = os.read(output, 1 << 16)
            if not piece:
                return None
            self._output += piece
        line, _, self._output = self._output.partition(b"\n")
        return line

    def close(self) -> None:
        """End it, done or not."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _mark(config: DeploymentConfig, capability: tuple[int, int]) -> Path | None:
    """The file that says that all is compiled, named by all that decides which kernels there are and how they look.

    None: the model cannot be read, of which others tell.
    """
    try:
        model = models.inspect(
            config.model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            load_format=config.load_format,
        )
        versions = [version(name) for name in ("torch", "triton")]
    except (MiinbError, PackageNotFoundError):
        return None
    settings = sorted(item for item in os.environ.items() if item[0].startswith("TRITON_"))
    asked = config.model_dump(mode="json", exclude=_OTHERS)
    known = hashlib.sha256(repr((asked, model, capability, versions, settings)).encode())
    package = Path(__file__).parent.parent
    for file in sorted(file for part in ("engine", "kernels") for file in (package / part).rglob("*.py")):
        known.update(file.read_bytes())
    return use_cache() / "compiled" / known.hexdigest()


def _marked(mark: Path | None) -> int | None:
    """How many kernels a mark tells of; None: there is none."""
    try:
        return None if mark is None else int(mark.read_text())
    except (OSError, ValueError):
        return None


def log_late_compilation() -> None:
    """From now on this process's log names each kernel that was not found in the cache."""
    from triton import knobs

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            log.info("compiled at first use: %s", src.name)

    knobs.compilation.listener = listen


def use_cache() -> Path:
    """Triton's cache of this process and its children: TRITON_CACHE_DIR, else in the user's cache folder."""
    folder = os.environ.setdefault("TRITON_CACHE_DIR", str(Path(platformdirs.user_cache_dir("miinb")) / "triton"))
    return Path(folder)


def gpu_capability(device: int) -> tuple[int, int] | None:
    """The compute capability of a GPU, asked of the driver: CUDA itself is not started. None: there is no such GPU."""
    from miinb.hardware import detect

    gpus = detect().gpus
    return gpus[device].capability if device < len(gpus) else None
