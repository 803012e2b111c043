"""Where a model's files are: a path, or a hub name in the local cache or, online, fetched. Never imports torch."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from miinb.errors import BrokenCheckpoint, ModelNotFound, did_you_mean


def locate(model: str | Path, *, revision: str | None = None) -> Path:
    """The folder (or GGUF file) of a model: a path as it is, a hub name from the local cache or, online, fetched.

    Raises:
        ModelNotFound: with the nearest names of the folder or of the cache.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path.resolve()
    name = str(model)
    if name.count("/") > 1 or name.startswith(("/", ".", "~")) or name.endswith(".gguf") or "\\" in name:
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"Did you mean {path.parent / near[0]}?" if near else "Give a folder, a .gguf file or a hub name."
        raise ModelNotFound(f"There is no folder {name}.", hint=hint)
    return _hub_folder(name, revision)


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    folder: Path | None = None
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.gguf"]
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if not (folder / "config.json").exists() or any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf")):
            return folder
    except HFValidationError:
        raise ModelNotFound(f"{name!r} is neither a folder nor a hub name.") from None
    except OSError:
        pass  # not cached
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if not offline:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, etag_timeout=5))
        except Exception as error:  # the client's errors have no common base; all mean "not to be had"
            reason = type(error).__name__
    if folder is not None:
        return folder
    why = "HF_HUB_OFFLINE is set" if offline else f"the hub could not give it ({reason})"
    raise ModelNotFound(f"{name!r} is no folder and not in the local cache, and {why}.", hint=_cached_hint(name))


def _cached_hint(name: str) -> str:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = [repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        cached = []
    return did_you_mean(name, cached) if cached else "The local cache is empty; give a folder."


def gguf_file(place: Path) -> Path | None:
    """The GGUF file that was given or that a folder without other weights holds.

    Raises:
        ModelNotFound: another file was given, or the folder holds several.
    """
    if place.is_file():
        if place.suffix != ".gguf":
            raise ModelNotFound(f"{place} is a file.", hint="Give the model's folder, or a .gguf file.")
        return place
    files = sorted(place.glob("*.gguf"))
    if not files or any(place.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise ModelNotFound(
            f"{place} holds {len(files)} GGUF files.", hint=f"Give one of them: {', '.join(f.name for f in files[:5])}."
        )
    return files[0]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder.

    Raises:
        ModelNotFound: there is none; with the folder inside that has one.
        BrokenCheckpoint: it is damaged.
    """
    file = folder / "config.json"
    if not file.exists():
        near = [entry.name for entry in folder.iterdir() if (entry / "config.json").exists()] if folder.is_dir() else []
        hint = f"Did you mean {folder / near[0]}?" if near else "A model folder has a config.json."
        raise ModelNotFound(f"{folder} is no model: it has no config.json.", hint=hint)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenCheckpoint(f"{file} is damaged ({error}).", hint="Fetch the model again.") from None
    if not isinstance(config, dict):
        raise BrokenCheckpoint(f"{file} is damaged: it holds no object.", hint="Fetch the model again.")
    return config


#: What tokenizers of all kinds are kept in.
_TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "*.vocab",
    "merges.txt",
    "*.tiktoken",
    "*.spm",
    "tekken.json",
    "*.gguf",
)


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder without any file of a tokenizer, before anything starts. Raises BrokenCheckpoint."""
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise BrokenCheckpoint(
            f"{folder} has no tokenizer: neither tokenizer.json nor another file of one.",
            hint="Save it beside the model: tokenizer.save_pretrained(folder).",
        )
