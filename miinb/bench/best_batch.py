"""Each arm at its own best: how many times the images a second, whatever batch each of them likes most."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from miinb.bench.records import NAN
from miinb.bench.speedup import Times, ratio_of_medians
from miinb.bench.summary import measured, named_baseline, task_kind, verdict
from miinb.errors import InvalidValue


def at_their_best(requests: pd.DataFrame, summary: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """One row a run and arm: its point with most images a second, against the baseline's.

    `speedup` is a ratio of images a second. In closed loops it is of medians (of seconds per image in flight), with a
    95 % bootstrap interval.

    Raises:
        InvalidValue: no arm has that name, or the runs have no images.
    """
    rows = summary[summary["task"].map(lambda task: task_kind(str(task)) == "image") & summary["img_s"].notna()]
    if rows.empty:
        raise InvalidValue("best: only runs of text-to-image have batches to choose from.", hint="Leave best out.")
    baseline = named_baseline(rows, baseline)
    best = rows.loc[rows.groupby(["run_id", "arm"], sort=False)["img_s"].idxmax()]
    found = []
    for _, row in best[best["arm"] != baseline].iterrows():
        same_run = best[(best["arm"] == baseline) & (best["run_id"] == row["run_id"])]
        if same_run.empty:
            continue
        reference = same_run.iloc[0]
        ratio, low, high = _ratio(requests, reference, row)
        shared = ("run_id", "model", "arm", "batch_size", "concurrency", "rate_rps", "img_s", "image_p50_s")
        theirs = ("batch_size", "concurrency", "rate_rps", "img_s", "image_p50_s")
        found.append(
            {
                **{name: row[name] for name in shared},
                "baseline": baseline,
                **{f"baseline_{name}": reference[name] for name in theirs},
                "speedup": ratio,
                "speedup_lo": low,
                "speedup_hi": high,
                "verdict": verdict(ratio, low, high),
            }
        )
    frame = pd.DataFrame(found)
    frame.attrs = dict(summary.attrs)
    return frame


def _ratio(requests: pd.DataFrame, reference: pd.Series, row: pd.Series) -> tuple[float, float, float]:
    if math.isnan(row["concurrency"]) or math.isnan(reference["concurrency"]):
        return float(row["img_s"] / reference["img_s"]), NAN, NAN
    block = int(max(row["concurrency"], reference["concurrency"]))
    return ratio_of_medians(_seconds(requests, reference), _seconds(requests, row), block=block)


def _seconds(requests: pd.DataFrame, point: pd.Series) -> list[Times]:
    """Seconds per image of each pass, requests in flight taken into account, in the order of the requests."""
    same = (requests["run_id"] == point["run_id"]) & (requests["arm"] == point["arm"])
    ok = measured(requests[same & (requests["point"] == point["point"])])
    times = ok["image_s"] / float(point["concurrency"])
    passes = [times[part.sort_values("seq").index].dropna() for _, part in ok.groupby("pass_no", dropna=False)]
    return [one.to_numpy(dtype=np.float64) for one in passes if len(one)]
