"""DeepSpeed's all-reduce through shared memory, with guards: it is compiled at first use, and a build can hang.

It is 8 us where gloo takes 280 (two ranks, one row). It is compiled in a folder of its own by one process at a time
(`python -m miinb.engine.shared_memory`), which a start waits for only so long: then gloo is used, the compiler goes on,
and the next start has it. The segments lose their names as soon as every rank has mapped them.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

#: How long a start waits for the compiler: 40 s on two quiet cores.
BUILD_S = 90.0
#: What the operator maps for each rank; a container often has 64 MiB in all.
SEGMENT_BYTES = 68 << 20
_FOLDER = Path("/dev/shm")
_BUILDER = "ShareMemCommBuilder"
_loaded: list[Any] = []
_building: list[subprocess.Popen[bytes]] = []


def unusable(ranks: int) -> str:
    """Why the operator cannot be used here ("" if it can); compiles it if that has not been done, and loads it.

    Args:
        ranks: of the replica.
    """
    if platform.machine() == "x86_64" and "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        return "the CPU has no AVX2"
    if shutil.which("ninja") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        return "there is no C++ compiler or no ninja"
    if not os.access(_FOLDER, os.W_OK | os.X_OK):  # the operator would wait for its segments for ever
        return f"{_FOLDER} is not there or not writable"
    space = os.statvfs(_FOLDER)
    if space.f_bavail * space.f_frsize < ranks * SEGMENT_BYTES:
        return f"/dev/shm has less than {ranks * SEGMENT_BYTES >> 20} MiB free"
    try:
        if not _built().exists():
            _building.append(subprocess.Popen([sys.executable, "-P", "-m", __name__], stdin=subprocess.DEVNULL))
            if _building[0].wait(BUILD_S):
                return "DeepSpeed's operator cannot be compiled here: the log of rank 0 says why"
        load()
    except subprocess.TimeoutExpired:
        return "DeepSpeed's operator is being compiled, for the next start"
    except (OSError, ImportError, AttributeError) as error:
        return f"DeepSpeed's operator cannot be loaded ({type(error).__name__})"
    return ""


def load() -> None:
    """Load the operator, which has been compiled, and hand it to DeepSpeed.

    Raises:
        OSError, ImportError, AttributeError: that failed.
    """
    if _loaded:
        return
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(_BUILDER)
    place = _built().parent / builder.name / f"{builder.name}.so"
    spec = importlib.util.spec_from_file_location(builder.name, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is no library")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Or it would look for the sources' age with ninja, and wait for ever on the lock of a process that was killed.
    builder._loaded_ops[builder.name] = module
    _loaded.append(module)


def build() -> None:
    """Compile the operator, unless another process has done so meanwhile."""
    os.nice(10)
    with _locked():
        folder = _built().parent
        if not _built().exists():
            for path in folder.iterdir():  # what a build that was killed left, PyTorch's lock among it
                shutil.rmtree(path)
            os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
            from deepspeed.accelerator import get_accelerator

            get_accelerator().create_op_builder(_BUILDER).load(verbose=False)
            _built().touch()


def level() -> int:
    """Of the loaded operator: 2 sums fp32 and half precision, 1 fp32 alone, 0 nothing (or it is not loaded)."""
    return int(_loaded[0].vector_kernel_level()) if _loaded else 0


def unlink(rank: int) -> None:
    """Take the name of this rank's segment away; the memory goes with the last process that has it."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    (_FOLDER / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def _built() -> Path:
    """Exists when the operator has been compiled, beside it: one folder for each combination of versions."""
    versions = [importlib.metadata.version(name) for name in ("torch", "deepspeed")]
    key = "-".join([*versions, platform.python_version(), platform.machine()])
    folder = Path(platformdirs.user_cache_dir("miinb")) / "extensions" / key
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / "built"


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """The folder for this process alone; the system takes the lock from one that is killed.

    Raises:
        TimeoutError: another process had it for too long.
    """
    folder = _built().parent
    deadline = time.monotonic() + BUILD_S
    with (folder.parent / f"{folder.name}.lock").open("w") as stream:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise TimeoutError("another process compiles it, and does not end")
            time.sleep(0.05)
        yield


if __name__ == "__main__":
    build()
