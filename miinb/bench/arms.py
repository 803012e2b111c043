"""The sides of a comparison: each a running session with a label and the facts that its rows carry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miinb.bench.records import NAN
from miinb.bench.summary import task_kind
from miinb.errors import InvalidValue, MiinbError
from miinb.rpc.address import socket_path
from miinb.tasks import TASKS

#: What is benchmarked: text, what encoders answer, and pictures of prompts.
BENCHED = tuple(task.name for task in TASKS.values() if not task.image or task.name == "text-to-image")
#: Arms as they are called by what they are; charts draw and comparisons take the baselines by these names.
KINDS = ("baseline", "baseline-best", "optimized")


@dataclass
class Arm:
    """One side of a benchmark.

    Attributes:
        label: "baseline", "baseline-best", "optimized", or the session's name where two would be alike; or what a
            mapping of sessions calls it.
        session: the running session.
        plan: what really runs (`Session.plan()`).
        warnings: what a reader of the figures must know about this arm.
    """

    label: str
    session: Any
    plan: Any
    warnings: list[str] = field(default_factory=list)
    peak_mem_bytes: float = NAN

    @property
    def columns(self) -> dict[str, Any]:
        """Columns of `Record` that are the same for all requests of this arm."""
        session, config = self.session, getattr(self.session, "config", None)
        return {
            "session": session.name,
            "instance_id": str(getattr(session, "instance_id", "") or ""),
            "task": session.task or "text-generation",
            "model": model_name(session.model),
            "revision": getattr(config, "revision", None),
            "engine": self.plan.engine,
            "dtype": self.plan.dtype,
            "tp": self.plan.tensor_parallel,
            "replicas": self.plan.replicas,
        }

    @property
    def tokenizer_folder(self) -> Path | None:
        """The deployment's tokenizer files, which synthetic prompts are sized with; None if they are elsewhere."""
        socket = socket_path(str(getattr(self.session, "address", "") or ""))
        folder = socket.parent / "tokenizer" if socket is not None else None
        return folder if folder is not None and folder.is_dir() else None

    def note_memory(self) -> None:
        """Look at the ranks' memory now; the largest sum seen is `peak_mem_bytes`."""
        try:
            seen = sum(rank.memory_bytes for rank in self.session.status().ranks)
        except MiinbError:
            return
        if seen > 0:
            self.peak_mem_bytes = max(seen, self.peak_mem_bytes) if self.peak_mem_bytes == self.peak_mem_bytes else seen

    def facts(self) -> dict[str, Any]:
        """What the environment of a run keeps of this arm, JSON-ready."""
        plan = self.plan
        return {
            **self.columns,
            "device": plan.device,
            "n_gpus": plan.tensor_parallel * plan.replicas if plan.device == "cuda" else 0,
            "max_batch": plan.max_batch,
            "weights_bytes": plan.weights_bytes or NAN,
            "kv_cache_bytes": plan.kv_cache_bytes or NAN,
            "peak_mem_bytes": self.peak_mem_bytes,
            "load_s": float(getattr(self.session, "load_s", None) or NAN),
            "plan": [[line.what, line.choice, line.reason] for line in plan.lines],
        }


def label(sessions: Sequence[Any] | Mapping[str, Any]) -> list[Arm]:
    """Arms of running sessions (or names of deployments), labeled; those of a mapping by its keys.

    Raises:
        InvalidValue: no session, one named twice, one whose task is not benchmarked, or tasks that are not compared.
        DeploymentNotFound: a name that no deployment has.
    """
    given = list(sessions) if isinstance(sessions, Mapping) else []
    if isinstance(sessions, Mapping):
        sessions = list(sessions.values())
    elif isinstance(sessions, str) or not isinstance(sessions, Sequence):
        sessions = [sessions]
    if not sessions:
        raise InvalidValue("sessions: give at least one running session.")
    found = [_attach(session) if isinstance(session, str) else session for session in sessions]
    for session in found:
        if not hasattr(session, "plan"):
            raise InvalidValue(f"sessions: {session!r} is no running session.", hint="Start one, or attach it.")
    names = [session.name for session in found]
    if len(set(names)) < len(names):
        raise InvalidValue(f"sessions: one is named twice in {', '.join(names)}.")
    for session in found:
        if session.task and session.task not in BENCHED:
            raise InvalidValue(
                f"sessions: {session.name} serves {session.task}, which is not benchmarked yet.",
                hint="Text generation, encoder tasks and text-to-image are.",
            )
        kinds = {task_kind(str(one.task)) for one in (session, found[0])}
        if session.task != found[0].task and kinds != {"text"}:
            raise InvalidValue(
                f"sessions: {session.name} serves {session.task}, {found[0].name} {found[0].task}.",
                hint="Compare deployments of one task.",
            )
    arms = [Arm(_kind(session), session, session.plan()) for session in found]
    for arm, name in zip(arms, _labels(arms, given), strict=True):
        arm.label = name
        if arm.session.config.engine == "optimized" and arm.plan.engine != "optimized":
            arm.warnings.append(f"{arm.label} fell back to the {arm.plan.engine} engine")
    return arms


def _labels(arms: Sequence[Arm], given: Sequence[Any]) -> list[str]:
    """The arms' names: those that are given, else kinds, else the sessions' names where a kind is there twice.

    A session that is called like a kind keeps its own before it: "optimized (baseline)" is no baseline.

    Raises:
        InvalidValue: a given name is empty or there twice.
    """
    if given:
        names = [str(name) for name in given]
        if not all(name.strip() for name in names) or len(set(names)) < len(names):
            raise InvalidValue(
                "sessions: each arm needs a name of its own.", hint=f"Given: {', '.join(map(repr, names))}."
            )
        return names
    often = Counter(arm.label for arm in arms)
    return [
        arm.label
        if often[arm.label] == 1
        else f"{arm.label} ({arm.session.name})"
        if arm.session.name in KINDS
        else str(arm.session.name)
        for arm in arms
    ]


def _kind(session: Any) -> str:
    """The arm that was asked for; where the plan fell back from it, a warning says so."""
    asked = session.config.engine
    return "baseline-best" if asked == "baseline" and session.config.options.compile else str(asked)


def model_name(model: str | Path) -> str:
    """A hub name as it is; of a folder its last part, or "org/name" of a folder in the hub's cache."""
    text = str(model)
    for part in reversed(Path(text).parts):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return Path(text).name if Path(text).is_absolute() or text.startswith((".", "~")) else text


def _attach(name: str) -> Any:
    from miinb.session import attach

    return attach(name)
