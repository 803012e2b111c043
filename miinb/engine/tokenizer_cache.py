"""Keeps what transformers made of a tokenizer's files: making it takes seconds, of a GGUF file many."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path

import platformdirs

from miinb.models import ModelInfo

#: Conversions that are kept, a few megabytes each; the oldest go.
MOST = 32
#: Of what is kept: conversions of another form are not found.
_FORM = 2
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx"}


def place_of(info: ModelInfo) -> Path:
    """Where the conversion of these very files (by path, size and time) with this transformers is kept."""
    files = info.files if info.format == "gguf" else [f for f in info.folder.iterdir() if f.suffix not in _WEIGHTS]
    stats = [(str(file.absolute()), (s := file.stat()).st_size, s.st_mtime_ns) for file in sorted(files)]
    key = json.dumps([_FORM, importlib.metadata.version("transformers"), stats])
    return Path(platformdirs.user_cache_dir("miinb")) / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:32]


def fetch(place: Path, target: Path) -> bool:
    """Copy a kept conversion to `target`. Returns whether there was one."""
    if not (place / "tokenizer.json").is_file():
        return False
    for file in place.iterdir():
        shutil.copyfile(file, target / file.name)
    return True


def keep(made: Path, place: Path) -> None:
    """Keep a conversion. A cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        whole = Path(tempfile.mkdtemp(dir=place.parent, prefix=".new-"))
        shutil.copytree(made, whole, dirs_exist_ok=True)
        try:
            os.rename(whole, place)
        except OSError:  # another start was faster
            shutil.rmtree(whole)
        kept = sorted(place.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for old in kept[:-MOST]:
            shutil.rmtree(old, ignore_errors=True)
