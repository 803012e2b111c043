"""What the summary says of pictures: times by part, the server's overhead, how far they are from the baseline's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from miinb.bench.pixels import Pixels, difference
from miinb.bench.records import NAN, Record
from miinb.image_difference import psnr_db

#: Parts of a picture's time that have a median in the summary.
PARTS = ("text_encode", "steps", "vae", "step")
COLUMNS = (
    *("steps", "width_px", "height_px", "guidance"),
    *("image_min_s", "image_p5_s", "image_p50_s", "image_p90_s", "image_p95_s", "image_p99_s", "image_max_s"),
    *(f"{part}_p50_s" for part in PARTS),
    *("steps_per_s", "overhead", "psnr_db", "psnr_p50_db", "max_abs_diff"),
)


def facts(ok: pd.DataFrame, first: pd.Series, arm: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of pictures of a point that are no rates.

    Args:
        ok: its successful requests.
        first: a row of the point.
        arm: facts of the arm.
    """
    found: dict[str, Any] = {name: float(ok[name].median()) for name in ("width_px", "height_px", "guidance")}
    found |= {"steps": float(first["steps"]), "image_min_s": ok["image_s"].min(), "image_max_s": ok["image_s"].max()}
    found |= {f"{part}_p50_s": float(ok[f"{part}_s"].median()) for part in PARTS}
    step = found["step_p50_s"]
    found["steps_per_s"] = 1 / step if step > 0 else NAN
    return found | {"overhead": _overhead(ok, arm)} | differences(ok)


def _overhead(ok: pd.DataFrame, arm: Mapping[str, Any]) -> float:
    """Share of the model's time that a request takes besides; NaN where requests or batches wait for each other."""
    most = int(arm.get("max_batch") or 0)
    alone = ok[(ok["concurrency"] == 1) & (ok["model_s"] > 0) & ok["steps_s"].notna()]
    alone = alone[alone["images"] <= most] if most else alone
    return float((alone["e2e_s"] / alone["model_s"] - 1).median()) if len(alone) else NAN


def differences(ok: pd.DataFrame) -> dict[str, float]:
    """PSNR of the worst and of the median picture, and the largest difference of all."""
    values = [psnr_db(mse) for mse in _joined(ok["mse"])]
    most = _joined(ok["max_abs_diff"])
    if not values:
        return {"psnr_db": NAN, "psnr_p50_db": NAN, "max_abs_diff": NAN}
    ranked = sorted(values)
    return {"psnr_db": ranked[0], "psnr_p50_db": ranked[(len(ranked) - 1) // 2], "max_abs_diff": max(most)}


def _joined(column: pd.Series) -> list[float]:
    """The numbers of all lists of a column."""
    known = [each for each in column if isinstance(each, (list, tuple))]
    return [float(value) for value in itertools.chain(*known) if value is not None and not math.isnan(value)]


def note_differences(record: Record, expected: Sequence[Pixels], made: Sequence[Pixels]) -> bool:
    """How far a request's pictures are from the reference's, into its record; whether all are identical.

    Raises:
        ValueError: they have other sizes, or another number.
    """
    pairs = [difference(one, other) for one, other in zip(expected, made, strict=True)]
    record.mse, record.max_abs_diff = [mse for mse, _ in pairs], [most for _, most in pairs]
    record.equal_share = sum(most == 0 for most in record.max_abs_diff) / len(pairs)
    return record.equal_share == 1.0


def by_seed(requests: pd.DataFrame) -> pd.DataFrame:
    """One row a compared picture: `mse`, `psnr_db` and `max_abs_diff` to the baseline's of the same prompt and seed."""
    rows = []
    for _, row in requests[requests["mse"].map(lambda value: isinstance(value, (list, tuple)))].iterrows():
        for place, (mse, most) in enumerate(zip(row["mse"], row["max_abs_diff"], strict=True)):
            shared = {name: row[name] for name in ("run_id", "arm", "point", "batch_size", "prompt_id")}
            seed = None if pd.isna(row["seed"]) else int(row["seed"]) + place
            rows.append({**shared, "seed": seed, "mse": mse, "psnr_db": psnr_db(mse), "max_abs_diff": most})
    columns = ("run_id", "arm", "point", "batch_size", "prompt_id", "seed", "mse", "psnr_db", "max_abs_diff")
    return pd.DataFrame(rows, columns=list(columns))
