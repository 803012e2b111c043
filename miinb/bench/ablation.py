"""What made it fast? Deployments of one model that differ by one step each, measured together on equal work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pandas as pd

from miinb import models
from miinb.bench.floor import copy_bytes_s, token_bytes
from miinb.bench.records import NAN, Runs
from miinb.bench.runner import compare
from miinb.errors import InvalidValue
from miinb.session import Session


def ladder(steps: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Arguments of `Session` for each step: its own on top of those of all steps before; so are its engine options."""
    found: dict[str, dict[str, Any]] = {}
    so_far: dict[str, Any] = {}
    for name, more in steps.items():
        options = {**so_far.get("options", {}), **(more.get("options") or {})}
        so_far = {**so_far, **more, "options": options}
        found[name] = so_far
    return found


def ablation(
    model: str, steps: Mapping[str, Mapping[str, Any]], workload: Any = None, *, floor: bool = True, **fields: Any
) -> Runs:
    """Measure a ladder of deployments, each with one step more than the one before: what `charts.waterfall` draws.

    All of them run at once and take turns, so that a busy moment of the machine hits every step; they are stopped
    before this returns. A step named "baseline" is the one that answers are compared with, else the first.

    Args:
        model: folder or hub name.
        steps: what each adds, by its name: arguments of `Session`, such as `{"options": {"cuda_graphs": True}}`.
        workload: as for `compare`.
        floor: measure how fast this machine copies, and keep each step's least seconds a token (`floor_s` of its
            facts): its weights, read once.
        fields: fields of `BenchConfig`, as for `compare`.

    Raises:
        InvalidValue: fewer than two steps.
        MiinbError: a deployment cannot start, or what `compare` raises.
    """
    if len(steps) < 2:
        raise InvalidValue("steps: give two or more, each with what it adds to the one before.")
    arms = ladder(steps)
    with ExitStack() as running:
        sessions = {name: running.enter_context(Session(model, **arguments)) for name, arguments in arms.items()}
        runs = compare(sessions, workload, **fields)
        config = next(iter(sessions.values())).config
    (env,) = runs.env.values()
    for name, facts in env["arms"].items():
        facts["adds"] = dict(steps[name])
    if floor:
        model_info = models.inspect(
            config.model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            load_format=config.load_format,
        )
        _add_floors(env["arms"], model_info)
    return runs


def _add_floors(arms: Mapping[str, dict[str, Any]], model: models.ModelInfo) -> None:
    """The least seconds a token into the facts of each arm whose weights are known."""
    for facts in arms.values():
        if math.isfinite(facts["weights_bytes"]):
            facts["floor_s"] = token_bytes(model, facts["weights_bytes"]) / copy_bytes_s(facts["device"])


def table(runs: Runs) -> pd.DataFrame:
    """One row a step of an ablation: its median time, and how much faster it is than the one before.

    Returns:
        Columns `step`, `e2e_p50_s`, `output_tok_s`, `faster` (than the step before), `in_all` (than the
        first), `of_floor` (the least that its weights allow, as a share of its time), `equal_share` (of the tokens,
        up to the first that differs from the reference's).
    """
    rows = runs.summary
    before, first = rows["e2e_p50_s"].shift(), rows["e2e_p50_s"].iloc[0]
    facts = [runs.env[run_id]["arms"][arm] for run_id, arm in zip(rows["run_id"], rows["arm"], strict=True)]
    floors = pd.Series([float(one.get("floor_s") or NAN) for one in facts], index=rows.index) * rows["new_tokens"]
    return pd.DataFrame(
        {
            "step": rows["arm"],
            **{name: rows[name] for name in ("e2e_p50_s", "output_tok_s")},
            "faster": before / rows["e2e_p50_s"],
            "in_all": first / rows["e2e_p50_s"],
            "of_floor": floors / rows["e2e_p50_s"],
            "equal_share": rows["equal_share"],
        }
    )
