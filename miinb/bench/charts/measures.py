"""What charts can show of requests: latencies, rates and costs, and how their axes and labels say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from miinb.bench.charts.names import encoding, picturing
from miinb.bench.summary import gaps
from miinb.errors import InvalidValue, did_you_mean

#: Latencies, by their column.
METRICS = {
    "e2e_s": "Time per request, end to end",
    "ttft_s": "Time to first token",
    "tpot_s": "Time per output token",
    "itl_s": "Inter-token latency",
    "image_s": "Time per image",
}


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate of the summary: its axis, its unit, and its column per GPU where there is one."""

    axis: str
    unit: str
    per_gpu: str = ""


#: Rates, by their column.
RATES = {
    "output_tok_s": Rate("Output tokens per second", "tokens/s", "tok_s_per_gpu"),
    "total_tok_s": Rate("Prompt and output tokens per second", "tokens/s"),
    "req_s": Rate("Requests per second", "requests/s"),
    "goodput_req_s": Rate("Requests within the objectives per second", "requests/s"),
    "seq_s": Rate("Texts per second", "texts/s"),
    "img_s": Rate("Images per second", "images/s", "img_s_per_gpu"),
}
#: Costs, by their column: what the dollars are for.
COSTS = {
    "usd_per_mtok": "a million tokens",
    "usd_per_1k_texts": "a thousand texts",
    "usd_per_1k_images": "a thousand images",
}


def chosen(metric: str, known: Mapping[str, Any], what: str) -> str:
    """The metric itself.

    Raises:
        InvalidValue: it is none of `known`.
    """
    if metric not in known:
        raise InvalidValue(f"metric: there is no {what} {metric!r}.", hint=did_you_mean(metric, known))
    return metric


def rate_of(rows: pd.DataFrame, metric: str | None) -> str:
    """The column of a rate; without one the usual of the rows' task: texts of encoders, images, else output tokens.

    Raises:
        InvalidValue: there is no such rate.
    """
    if metric is None:
        return "seq_s" if encoding(rows) else "img_s" if picturing(rows) else "output_tok_s"
    return chosen(metric, RATES, "rate")


def cost_of(rows: pd.DataFrame, metric: str | None) -> str:
    """The column of a cost; without one that of the rows' task: of a thousand images, else of a million tokens.

    Raises:
        InvalidValue: there is no such cost.
    """
    if metric is None:
        return "usd_per_1k_images" if picturing(rows) else "usd_per_mtok"
    return chosen(metric, COSTS, "cost")


def samples(rows: pd.DataFrame, metric: str) -> pd.Series:
    """The values of a latency in single requests, in seconds; of ITL every gap between chunks."""
    return gaps(rows) if metric == "itl_s" else rows[metric].dropna().astype(float)


def per_gpu(rows: pd.DataFrame, metric: str) -> tuple[pd.Series, str]:
    """A rate and the words of its axis: per GPU where all arms have GPUs, else of the whole machine."""
    if not (rows["n_gpus"] > 0).all():
        return rows[metric], RATES[metric].axis
    there = RATES[metric].per_gpu
    values = rows[there] if there else rows[metric] / rows["n_gpus"]
    return values.astype(np.float64), f"{RATES[metric].axis} per GPU"
