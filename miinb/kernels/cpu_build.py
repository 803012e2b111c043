"""Compiles the C operators for this machine, once, into the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
import torch  # noqa: F401  (its OpenMP runtime has to be loaded before the library that uses it)

_NAMES = ("cpu.c", "cpu_linear.c", "cpu_product.c", "cpu_packed_attention.c")
SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
_HEADER_NAMES = ("cpu.h", "cpu_split.h", "cpu_int4.h", "cpu_weights.h", "cpu_outer.h", "cpu_amx.h")
HEADERS = tuple(Path(__file__).with_name(name) for name in _HEADER_NAMES)
#: No -ffast-math: NaN must stay NaN for a row to be found broken.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-std=gnu11")
#: GCC takes half of an AVX-512 register where it makes vectors of a loop itself (activations, softmax).
WHOLE_VECTORS = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
TIMEOUT_S = 120


class Unavailable(RuntimeError):
    """The library cannot be made here; the text says why."""


def build(cache: Path | None = None) -> Path:
    """The compiled library, from the cache or made now. Processes that start together compile it once.

    Raises:
        Unavailable: there is no compiler, it failed, or PyTorch's OpenMP runtime was not found.
    """
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if compiler is None:
        raise Unavailable("there is no C compiler")
    runtime = _openmp_runtime()
    folder = cache or Path(platformdirs.user_cache_dir("miinb")) / "cpu-kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / f"{_key(compiler, runtime)}.so"
    if library.exists():
        return library
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel if its holder is killed
        if not library.exists():
            _compile(compiler, runtime, library)
    return library


def _compile(compiler: str, runtime: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        made = Path(place) / "kernels.so"
        objects = [str(Path(place) / f"{source.stem}.o") for source in SOURCES]
        flags = (*FLAGS, *WHOLE_VECTORS)
        commands = [
            [compiler, *flags, "-c", str(source), "-o", to] for source, to in zip(SOURCES, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(commands)) as pool:
            for _ in pool.map(_run, commands):
                pass
        # Linked with the runtime that PyTorch has loaded, not the system's: a second one has threads of its own,
        # and two pools spinning on the same cores are many times slower.
        _run([compiler, "-shared", "-o", str(made), *objects, str(runtime), "-lm", "-Wl,--no-undefined"])
        made.replace(library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the C compiler failed ({type(error).__name__})") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Unavailable(f"the C compiler failed ({lines[-1][:200]})")


def _openmp_runtime() -> Path:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.split(maxsplit=5)[-1]
        if re.search(r"/lib(gomp|iomp5|omp)[^/]*\.so", path):
            return Path(path)
    raise Unavailable("PyTorch has loaded no OpenMP runtime")


def _key(compiler: str, runtime: Path) -> str:
    """What the library depends on: its source, how it is built, and the CPU (home folders are shared by machines)."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    cpu = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    sources = [source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS)]
    parts = (*sources, " ".join((*FLAGS, *WHOLE_VECTORS)), version, str(runtime), cpu.group(0) if cpu else "")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
