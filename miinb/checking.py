"""`miinb check MODEL`: whether the optimized engine computes what transformers computes. In an own process, cached."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miinb import hardware, models, planner
from miinb.config import DeploymentConfig
from miinb.errors import RankFailed, StartTimeout, UnsupportedModel, from_name
from miinb.launching import environment
from miinb.models import ModelInfo
from miinb.tasks import TASKS

_COMPARISON = "miinb.engine.comparison"
#: Largest error of fp32 logits, relative to the largest logit.
_FP32_TOLERANCE = 1e-4
#: How much larger than the baseline's own error in a dtype ours may be, both against fp32.
_SHORT_DTYPE_FACTOR = 1.5
#: What an fp8 cache may add to that: root mean square of the logits' errors, relative to theirs.
_FP8_CACHE_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `check` found; errors are differences from transformers in fp32, relative to its values.

    In fp32 they are the largest difference, in shorter dtypes and with an fp8 cache the root mean square: there the
    largest is an accident of rounding.

    Attributes:
        layers: (the optimized engine's error, the baseline's own in the same dtype) after each layer.
        logits: the same of the logits, over a prompt and its continuation; of an encoder, of its head's outputs.
        tokens: the optimized engine's greedy tokens, none of an encoder; `expected_tokens` are transformers' in fp32.
        cached: an earlier result, of the same files, versions, device and dtype.
    """

    model: str
    device: str
    dtype: str
    baseline_dtype: str
    layers: tuple[tuple[float, float], ...]
    logits: tuple[float, float]
    tokens: tuple[int, ...]
    expected_tokens: tuple[int, ...]
    prompt_tokens: int
    kv_dtype: str = "auto"
    cached: bool = False

    @property
    def equal_tokens(self) -> int:
        """How many greedy tokens are equal before the first that differs."""
        pairs = zip(self.tokens, self.expected_tokens, strict=True)
        return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(self.tokens))

    @property
    def limit(self) -> float | None:
        """The largest error of the logits that passes; None where no rule is stated (quantized weights)."""
        if self.exact:
            return _FP32_TOLERANCE
        if self.baseline_dtype != self.dtype:
            return None
        return _SHORT_DTYPE_FACTOR * self.logits[1] + (_FP8_CACHE_TOLERANCE if self.kv_dtype == "fp8" else 0.0)

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded: both compute in fp32."""
        return self.dtype == "fp32" and self.kv_dtype == "auto"

    @property
    def passed(self) -> bool:
        """Whether it is the same answer: in fp32 also the same tokens."""
        if self.limit is None:
            return self.logits[0] < float("inf")
        return self.logits[0] <= self.limit and (not self.exact or self.equal_tokens == len(self.tokens))

    @property
    def measure(self) -> str:
        """What the errors are."""
        return "largest difference" if self.exact else "root mean square difference"

    @property
    def verdict(self) -> str:
        """One line: passed or failed, and why."""
        limit = "no limit is stated" if self.limit is None else f"{self.limit:.1e} allowed"
        word = "passed" if self.passed else "failed"
        if not self.tokens:
            return f"{word}: error of the outputs {self.logits[0]:.1e} ({limit})"
        equal = f"all {len(self.tokens)} greedy tokens equal"
        if (same := self.equal_tokens) < len(self.tokens):
            rounding = "" if self.exact else ", as rounding can make them at a near tie"
            equal = f"greedy tokens differ from number {same + 1} of {len(self.tokens)} on{rounding}"
        return f"{word}: error of the logits {self.logits[0]:.1e} ({limit}), {equal}"


def check(model: str | Path, **fields: Any) -> Comparison:
    """Compare the optimized engine with transformers, layer by layer, on a model's own weights.

    Args:
        model: a folder or a hub name.
        fields: of `DeploymentConfig`: task, dtype, kv_dtype, device, gpus, revision, options.

    Raises:
        UnsupportedModel: the optimized engine has no form for the model.
        OutOfMemory: it does not fit.
        RankFailed: the comparison itself failed; `details` has its log's tail.
    """
    config = DeploymentConfig.parse({"model": str(model), **fields})
    info = models.inspect(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    task = info.task(config.task)
    info = info.serving(task)
    if (info.spec if TASKS[task].streams else info.encoder) is None:
        raise info.unfused or UnsupportedModel(f"There is no policy for {task} of {info.family}.")
    machine = hardware.detect()
    resolved = planner.resolve(config, planner.plan(config, info, machine), machine)
    gpus = resolved.gpus or []
    device = machine.gpus[0].name if gpus else machine.cpu
    file = _cache_file(_key(info, resolved, device))
    found = _read(file)
    cached = found is not None
    if found is None:
        found = _run(resolved)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found), encoding="utf-8")
    values = dict(found) | {"dtype": resolved.dtype, "kv_dtype": resolved.kv_dtype, "cached": cached}
    for name in ("layers", "logits", "tokens", "expected_tokens"):
        values[name] = tuple(tuple(part) if isinstance(part, list) else part for part in values[name])
    return Comparison(model=str(model), device=device, **values)


def _key(info: ModelInfo, config: DeploymentConfig, device: str) -> str:
    """Names the result: the checkpoint, the versions (and this package's own files), the device and the dtype."""
    package = Path(__file__).parent
    sources = [*package.glob("engine/**/*.py"), *package.glob("kernels/*.[pc]*")]
    facts = {
        "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in info.files],
        "config": dict(info.config),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "sources": max(source.stat().st_mtime_ns for source in sources),
        "place": (device, config.dtype, config.kv_dtype, config.task),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _cache_file(key: str) -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("miinb")) / "checks" / f"{key}.json"


def _read(file: Path) -> Mapping[str, Any] | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _run(config: DeploymentConfig) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "result.json"), Path(folder, "log")
        try:
            with log.open("wb") as stream:
                code = subprocess.run(
                    [sys.executable, "-P", "-m", _COMPARISON, str(out)],
                    input=config.to_json().encode() + b"\n",
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=config.start_timeout_s,
                    check=False,
                    env=environment(),
                ).returncode
        except subprocess.TimeoutExpired:
            text = f"The check of {config.model} took longer than {config.start_timeout_s:g} s."
            raise StartTimeout(text, hint="Give a larger start_timeout_s.") from None
        values = _read(out)
        if values is None:
            tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise RankFailed(f"The check of {config.model} ended by itself (exit code {code}).", details=tail)
    if "failed" in values:
        failed = values["failed"]
        raise from_name(failed["error"], failed["message"], hint=failed["hint"])
    return values
