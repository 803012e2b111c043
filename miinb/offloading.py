"""What weights that wait elsewhere need, checked before anything starts: DeepSpeed's settings, a folder, libaio."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from ctypes.util import find_library
from pathlib import Path

from miinb.errors import InvalidValue


def settings_fault(settings: object) -> str:
    """What is wrong with the parts of DeepSpeed's settings that are read here, or ""."""
    if not isinstance(settings, Mapping):
        return f"give a dictionary, not {settings!r:.60}"
    zero = settings.get("zero_optimization")
    parts = {name: settings.get(name) for name in ("fp16", "bf16", "zero_optimization")}
    if isinstance(zero, Mapping):
        parts["zero_optimization.offload_param"] = zero.get("offload_param")
    for name, part in parts.items():
        if part is not None and not isinstance(part, Mapping):
            return f"{name}: give a dictionary, not {part!r:.60}"
    enabled = {name: (settings.get(name) or {}).get("enabled") for name in ("fp16", "bf16")}
    for name, value in enabled.items():
        if value not in (None, True, False):  # transformers' Trainer has "auto"
            return f"{name}.enabled: give True or False, not {value!r:.60}"
    if all(enabled.values()):
        return "fp16 and bf16 are both on: enable one of them"
    return ""


def check_disk(folder: str) -> None:
    """Refuse a disk that weights cannot wait on.

    DeepSpeed links a test program with libaio; the rank asks it, and has the last word where LDFLAGS says where it is.

    Args:
        folder: the option `offload_folder`.

    Raises:
        InvalidValue: it is no folder, cannot be written, or libaio is not installed.
    """
    hint = "Give a folder on a fast disk that you may write."
    try:
        if not Path(folder).is_dir():
            raise InvalidValue(f"options.offload_folder: {folder!r} is no folder.", hint=hint)
        with tempfile.TemporaryDirectory(prefix=".miinb-", dir=folder):
            pass
    except (OSError, ValueError) as error:  # a NUL in the path
        raise InvalidValue(f"options.offload_folder: {folder!r} cannot be written ({error}).", hint=hint) from None
    if "-L" not in os.environ.get("LDFLAGS", "") and find_library("aio") is None:
        raise no_libaio()


def no_libaio() -> InvalidValue:
    """The error where DeepSpeed has nothing to read a disk with."""
    return InvalidValue(
        "options.offload: DeepSpeed cannot read a disk asynchronously here, as libaio is not installed.",
        hint="Install it (Debian: apt install libaio-dev), or use options.offload='cpu'.",
    )
