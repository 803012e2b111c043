"""Service-level objectives: which requests met them, and which loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from miinb.bench_fields import OBJECTIVES

if TYPE_CHECKING:
    from miinb.bench.records import Record

#: Share of the requests that have to meet the objectives for a load to count as within them, as in DistServe (Zhong et
#: al., 2024, arXiv:2401.09670), which goodput is taken from.
ATTAIN = 0.9


def met(record: Record, slo: Mapping[str, float]) -> bool:
    """Whether a request met every objective; what it does not have (TPOT of one token) it cannot miss."""
    return record.status == "ok" and not any(getattr(record, OBJECTIVES[name]) > limit for name, limit in slo.items())


def met_rows(requests: pd.DataFrame, slo: Mapping[str, float]) -> pd.Series:
    """The same of each row of a requests frame."""
    late = pd.Series(False, index=requests.index)
    for name, limit in slo.items():
        late |= requests[OBJECTIVES[name]] > limit
    return (requests["status"] == "ok") & ~late


def judged(requests: pd.DataFrame) -> pd.DataFrame:
    """The rows that objectives are counted over: measured or failed; no warm-up, nothing that the user stopped."""
    return requests[~requests["warmup"].astype(bool) & (requests["status"] != "cancelled")]


def rejudged(
    requests: pd.DataFrame, slo: Mapping[str, float] | None = None, price: float | None = None
) -> pd.DataFrame:
    """A copy of a requests frame as if it had been measured with other objectives or another price (None: its own)."""
    copy = requests.copy()
    changes: dict[str, Any] = {}
    if slo is not None:
        copy["slo_met"] = met_rows(requests, slo).astype(object)
        changes["slo"] = dict(slo)
    if price is not None:
        changes["price"] = price
    env: dict[str, Any] = requests.attrs.get("env", {})
    ids = [str(run_id) for run_id in requests["run_id"].dropna().unique()]
    known = {key: env.get(key, {}) for key in (*env, *ids)}
    copy.attrs = {
        **requests.attrs,
        "env": {key: {**facts, "workload": {**facts.get("workload", {}), **changes}} for key, facts in known.items()},
    }
    return copy
