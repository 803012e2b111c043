"""The least time that a token takes on this machine: its weights, read once, at the speed of a copy; without torch."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

from miinb.errors import MiinbError
from miinb.launching import environment
from miinb.models import ModelInfo

#: Families whose input reads a row of a table of positions, and what config.json calls its length.
POSITIONS = {"gpt2": "n_positions", "gpt_neo": "max_position_embeddings", "opt": "max_position_embeddings"}
LIMIT_S = 300.0


def token_bytes(model: ModelInfo, weights_bytes: float) -> float:
    """Bytes of weights that one token reads: all but the tables of which it reads a row."""
    table = 0 if model.config.get("tie_word_embeddings", True) else model.vocab_size * model.hidden_size
    table += model.config.get(POSITIONS.get(model.family, ""), 0) * model.hidden_size
    return weights_bytes * (1 - float(table) / model.parameters)


@functools.cache
def copy_bytes_s(device: str) -> float:
    """Bytes a second that a large copy reads and writes on "cuda" or "cpu", measured once by a process of its own.

    Raises:
        MiinbError: it could not be measured.
    """
    command = [sys.executable, "-P", "-m", "miinb.bench.headline.floors", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True, env=environment())
        return float(json.loads(done.stdout.splitlines()[-1])["copy_bytes_s"])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        raise MiinbError(f"The speed of a copy on {device} could not be measured ({type(error).__name__}).") from error
