"""miinb: make Hugging Face models fast, serve them from a notebook, and show the gain.

Every public name loads when it is first used: `import miinb` itself loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miinb import constants, errors, models
    from miinb.bench.records import load_runs
    from miinb.bench.runner import compare
    from miinb.compat import deploy, mii_query_handle, terminate
    from miinb.deployment import deployments
    from miinb.diagnosis import doctor
    from miinb.session import Session, attach

__version__ = "0.1.0"

__all__ = [
    "Session",
    "attach",
    "compare",
    "constants",
    "deploy",
    "deployments",
    "doctor",
    "errors",
    "load_ipython_extension",
    "load_runs",
    "mii_query_handle",
    "models",
    "terminate",
    "unload_ipython_extension",
]

#: Public names and the modules that hold them; a name that is a module itself maps to "".
_HOMES = {
    "Session": "miinb.session",
    "attach": "miinb.session",
    "deployments": "miinb.deployment",
    "compare": "miinb.bench.runner",
    "load_runs": "miinb.bench.records",
    "deploy": "miinb.compat",
    "mii_query_handle": "miinb.compat",
    "terminate": "miinb.compat",
    "doctor": "miinb.diagnosis",
    "constants": "",
    "errors": "",
    "models": "",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'miinb' has no attribute {name!r}")
    found = getattr(importlib.import_module(home), name) if home else importlib.import_module(f"miinb.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext miinb`: register the magics."""
    importlib.import_module("miinb.notebook.magics").load_ipython_extension(shell)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext miinb`: remove what `%load_ext` registered; deployments live on."""
    importlib.import_module("miinb.notebook.magics").unload_ipython_extension(shell)
