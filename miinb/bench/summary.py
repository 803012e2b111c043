"""From request rows to one row per run, arm and workload point; speed-ups with bootstrap intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from miinb.bench import image_measures
from miinb.bench.environment import hardware_words
from miinb.bench.objectives import judged
from miinb.bench.prices import usd_per_1k_images, usd_per_1k_texts, usd_per_mtok
from miinb.bench.records import DEFINITIONS, NAN
from miinb.bench.speedup import speedup
from miinb.errors import InvalidValue, did_you_mean
from miinb.tasks import TASKS

POINT = ["run_id", "arm", "point"]
#: Fewest samples for which a percentile is given.
FEWEST = {5: 20, 50: 1, 90: 10, 95: 20, 99: 100}
#: A ratio between this and its inverse tells of no difference where it has no interval.
CLEAR = 0.95
#: Of what the passes' spread is told.
SPREAD = ("req_s", "seq_s", "img_s", "output_tok_s", "e2e_p50_s", "ttft_p50_s", "tpot_p50_s")

#: Of the summary's columns those that are facts of an arm, whatever its requests were.
FACTS = (
    *("peak_mem_bytes", "weights_bytes", "kv_cache_bytes", "load_s"),
    *("perplexity", "perplexity_change", "perplexity_change_lo", "perplexity_change_hi", "same_next"),
)

SUMMARY_COLUMNS: tuple[str, ...] = (
    *("run_id", "name", "arm", "model", "task", "engine", "dtype", "tp", "replicas", "n_gpus", "batch_size"),
    *("concurrency", "rate_rps", "prompt_tokens", "new_tokens", "n", "n_failed", "n_cancelled", "failures", "n_warmup"),
    *("passes", "duration_s"),
    *("e2e_mean_s", "e2e_std_s", "e2e_min_s", "e2e_p5_s", "e2e_p50_s", "e2e_p90_s", "e2e_p95_s", "e2e_p99_s"),
    *("e2e_max_s", "ttft_min_s", "ttft_p5_s", "ttft_p50_s", "ttft_p90_s", "ttft_p95_s", "ttft_p99_s", "ttft_max_s"),
    *("tpot_min_s", "tpot_p5_s", "tpot_p50_s", "tpot_p90_s", "tpot_p95_s", "tpot_p99_s", "tpot_max_s"),
    *("itl_min_s", "itl_p5_s", "itl_p50_s", "itl_p90_s", "itl_p95_s", "itl_p99_s", "itl_max_s", "n_gaps"),
    *("queue_p50_s", "preprocess_p50_s", "model_p50_s", "postprocess_p50_s"),
    *image_measures.COLUMNS,
    *("req_s", "seq_s", "output_tok_s", "total_tok_s", "img_s", "tok_s_per_gpu", "img_s_per_gpu"),
    *("slo_share", "goodput_req_s", "saturated", *(f"{name}_spread" for name in SPREAD)),
    *("cached_share", *FACTS),
    *("price_usd_per_gpu_hour", "price_source", "usd_per_mtok", "usd_per_1k_texts", "usd_per_1k_images"),
    *(
        "speedup",
        "speedup_lo",
        "speedup_hi",
        "outputs_equal",
        "n_equal",
        "equal_share",
        "n_compared",
        "created",
        "point",
    ),
)


def percentile(values: pd.Series, q: int) -> float:
    """The q-th percentile; NaN where there are too few samples for it to mean anything (`FEWEST`)."""
    known = values.dropna()
    return float(np.percentile(known, q)) if len(known) >= FEWEST[q] else NAN


def task_kind(task: str) -> Literal["text", "encoder", "image"]:
    """What a task's answers are: text (of a task that is not known, too), what encoders say of a text, or pictures."""
    known = TASKS.get(task)
    if known is not None and known.image:
        return "image"
    return "text" if known is None or known.streams else "encoder"


def encodes(task: str) -> bool:
    """Whether a task reads texts and writes none: its sequences and tokens are the input's."""
    return task_kind(task) == "encoder"


def measured(requests: pd.DataFrame) -> pd.DataFrame:
    """The rows that percentiles are taken over: successful, no warm-up."""
    return requests[(requests["status"] == "ok") & ~requests["warmup"].astype(bool)]


def summarize(requests: pd.DataFrame) -> pd.DataFrame:
    """One row per run, arm and point of a requests frame, the columns of `SUMMARY_COLUMNS`, in the order they ran."""
    env: Mapping[str, Any] = requests.attrs.get("env", {})
    rows = [
        _summary_row(group, env.get(str(key[0]), {}))
        for key, group in requests.groupby(POINT, sort=False, dropna=False)
        if isinstance(key, tuple)
    ]
    frame = pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))
    for index, row in frame.iterrows():
        reference = _reference(frame, row, reference_arm(frame, row["run_id"]), env)
        if reference is not None:
            ratio = _speedup(requests, reference, row)
            for name, value in zip(("speedup", "speedup_lo", "speedup_hi"), ratio, strict=True):
                frame.loc[index, name] = value  # type: ignore[call-overload, index, unused-ignore]
    frame.attrs = {"definitions": dict(DEFINITIONS), "env": dict(env)}
    return frame


def _summary_row(group: pd.DataFrame, env: Mapping[str, Any]) -> dict[str, Any]:
    first = group.iloc[0]
    facts = env.get("arms", {}).get(first["arm"], {})
    ok, no_warmup = measured(group), group[~group["warmup"]]
    failed = no_warmup[no_warmup["status"].isin(["error", "timeout"])]  # not those that the user stopped
    n_gpus = int(facts.get("n_gpus") or 0)
    row: dict[str, Any] = {
        "name": env.get("name"),
        **{name: first[name] for name in ("run_id", "arm", "model", "task", "engine", "dtype", "tp", "replicas")},
        **{name: first[name] for name in ("batch_size", "concurrency", "rate_rps", "point")},
        "n_gpus": n_gpus,
        "prompt_tokens": ok["prompt_tokens"].median() if len(ok) else NAN,
        "new_tokens": ok["output_tokens"].median() if len(ok) else NAN,
        "n": len(ok),
        "n_failed": len(failed),
        "n_cancelled": int((no_warmup["status"] == "cancelled").sum()),
        "failures": failure_kinds(failed["error"]),
        "n_warmup": int(group["warmup"].sum()),
        "duration_s": _duration(no_warmup),
        "e2e_mean_s": ok["e2e_s"].mean(),
        "e2e_std_s": ok["e2e_s"].std(),
        "cached_share": _share(ok["cached_tokens"], ok["prompt_tokens"]),
        "saturated": _saturated(first, env),
        **{name: NAN if facts.get(name) is None else facts[name] for name in FACTS},
        "created": env.get("created"),
    }
    for metric in ("e2e", "ttft", "tpot"):
        row |= {f"{metric}_min_s": ok[f"{metric}_s"].min(), f"{metric}_max_s": ok[f"{metric}_s"].max()}
    if task_kind(str(first["task"])) == "image":
        row |= image_measures.facts(ok, first, facts)
    between = gaps(ok)
    row |= {"itl_min_s": between.min(), "itl_max_s": between.max(), "n_gaps": len(between)}
    row |= _over_passes(no_warmup)
    return row | _cost(row, env) | _equality(ok)


def _over_passes(rows: pd.DataFrame) -> dict[str, Any]:
    """Rates and percentiles: of the one pass, or their medians over the passes with the spread."""
    if rows.empty:
        return {"passes": 0, **_rates(rows)}
    found = pd.DataFrame([_rates(part) for _, part in rows.groupby("pass_no", sort=True)])
    middle = {str(name): float(value) for name, value in found.median().items()}
    if len(found) == 1:
        return {"passes": 1, **middle}
    width = found.max() - found.min()
    return {"passes": len(found), **middle, **{f"{name}_spread": _ratio(width[name], middle[name]) for name in SPREAD}}


def _rates(rows: pd.DataFrame) -> dict[str, float]:
    """Rates and percentiles of the requests of one pass."""
    ok, duration = measured(rows), _duration(rows)
    encoded = len(rows) > 0 and encodes(str(rows["task"].iloc[0]))
    prompt = ok["prompt_tokens"].sum()
    output = prompt if encoded else ok["output_tokens"].sum()
    asked = judged(rows)["slo_met"].dropna()
    found: dict[str, float] = {
        "req_s": _rate(len(ok), duration),
        "seq_s": _rate(ok["batch_size"].sum(), duration) if encoded else NAN,
        "output_tok_s": _rate(output, duration),
        "total_tok_s": _rate(prompt if encoded else output + prompt, duration),
        "img_s": _rate(ok["images"].sum(), duration) if ok["images"].notna().any() else NAN,
        "slo_share": float(asked.astype(bool).mean()) if len(asked) else NAN,
        "goodput_req_s": float(asked.astype(bool).sum()) / duration if len(asked) and duration > 0 else NAN,
    }
    for part in ("queue", "preprocess", "model", "postprocess"):
        found[f"{part}_p50_s"] = percentile(ok[f"{part}_s"], 50)
    for metric, values in (("itl", gaps(ok)), *((name, ok[f"{name}_s"]) for name in ("e2e", "ttft", "tpot", "image"))):
        found |= {f"{metric}_p{q}_s": percentile(values, q) for q in FEWEST}
    return found


def gaps(rows: pd.DataFrame) -> pd.Series:
    """The gaps between chunks of all requests."""
    known = [each for each in rows["itl_s"] if isinstance(each, (list, tuple, np.ndarray))]
    return pd.Series(np.concatenate(known) if known else [], dtype=float)


def failure_kinds(errors: Iterable[Any]) -> str:
    """Errors by their kind: "QueueFull 3, DeadlineExceeded 1"; "" of none."""
    kinds = Counter(str(error).partition(":")[0] if error else "unknown" for error in errors)
    return ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())


def _share(part: pd.Series, whole: pd.Series) -> float:
    return part.sum() / whole.sum() if whole.sum() > 0 and part.notna().any() else NAN


def _saturated(first: pd.Series, env: Mapping[str, Any]) -> bool | None:
    """Whether this is the point where a sweep found the arm saturated; None without a sweep."""
    found = (env.get("saturation") or {}).get(first["arm"])
    return None if found is None else bool(found["why"] not in ("limit", "gone") and found["point"] == first["point"])


def _cost(row: Mapping[str, Any], env: Mapping[str, Any]) -> dict[str, Any]:
    price = env.get("workload", {}).get("price")
    gpus = max(int(row["n_gpus"]), 1)
    return {
        "tok_s_per_gpu": row["output_tok_s"] / gpus,
        "img_s_per_gpu": row["img_s"] / gpus,
        "price_usd_per_gpu_hour": NAN if price is None else float(price),
        "price_source": None if price is None else "user",
        "usd_per_mtok": usd_per_mtok(row["output_tok_s"], price, gpus),
        "usd_per_1k_texts": usd_per_1k_texts(row["seq_s"], price, gpus),
        "usd_per_1k_images": usd_per_1k_images(row["img_s"], price, gpus),
    }


def _equality(ok: pd.DataFrame) -> dict[str, Any]:
    compared = ok[ok["equal_share"].notna()]
    if compared.empty:
        return {"outputs_equal": None, "n_equal": NAN, "equal_share": NAN, "n_compared": 0}
    exact = bool(compared["equal"].notna().all())
    n_equal = int(compared["equal"].astype(bool).sum()) if exact else NAN
    return {
        "outputs_equal": n_equal == len(compared) if exact else None,
        "n_equal": n_equal,
        "equal_share": float(compared["equal_share"].mean()),
        "n_compared": len(compared),
    }


def _rate(count: float, duration_s: float) -> float:
    return float(count) / duration_s if count > 0 and duration_s > 0 else NAN


def _duration(rows: pd.DataFrame) -> float:
    """Seconds from the first submit to the last end, summed over the blocks (arms alternate block by block).

    Requests that the user stopped are left out: they have no work to show for their time.
    """
    rows = rows[rows["status"] != "cancelled"]
    if rows.empty:
        return NAN
    ends = (rows["t_rel_s"] + rows["e2e_s"]).groupby(rows["block"]).max()
    starts = rows["t_rel_s"].groupby(rows["block"]).min()
    return float((ends - starts).sum())


def _same_point(frame: pd.DataFrame, row: pd.Series) -> pd.Series:
    """Which rows of `frame` have the load (concurrency or rate) of `row`."""
    same = pd.Series(True, index=frame.index)
    for name in ("concurrency", "rate_rps", "batch_size"):
        same &= frame[name].isna() if pd.isna(row[name]) else frame[name] == row[name]
    return same


def _machine(env: Mapping[str, Mapping[str, Any]], run_id: Any) -> str:
    """Where a run was measured, in words; "" where that is not known."""
    return hardware_words(env.get(str(run_id), {}).get("host", {}))


def reference_arm(summary: pd.DataFrame, run_id: Any = None) -> str:
    """The arm that others are compared with: "baseline" if some run has it, else the first of several of a run."""
    arms = list(dict.fromkeys(summary["arm"] if run_id is None else summary["arm"][summary["run_id"] == run_id]))
    return "baseline" if len(arms) < 2 or (summary["arm"] == "baseline").any() else str(arms[0])


#: What else has to be equal for two runs to be of the same work: of texts, of pictures.
_SAME = (("prompt_tokens",), ("steps", "width_px", "height_px", "guidance"))


def _reference(
    summary: pd.DataFrame, row: pd.Series, baseline: str, env: Mapping[str, Mapping[str, Any]]
) -> pd.Series | None:
    """The baseline's row for the same point: of the same run, else the latest with this model, lengths and machine."""
    if row["arm"] == baseline:
        return None
    candidates = summary[(summary["arm"] == baseline) & _same_point(summary, row)]
    same_run = candidates[candidates["run_id"] == row["run_id"]]
    if same_run.empty:
        same = candidates["model"] == row["model"]
        for name in ("task", "new_tokens", *_SAME[task_kind(str(row["task"])) == "image"]):
            same &= candidates[name].isna() if pd.isna(row[name]) else candidates[name] == row[name]
        machine = _machine(env, row["run_id"])
        same &= candidates["run_id"].map(lambda run_id: _machine(env, run_id)) == machine
        same_run = candidates[same]
    return None if same_run.empty else same_run.iloc[-1]


def _speedup(requests: pd.DataFrame, reference: pd.Series, row: pd.Series) -> tuple[float, float, float]:
    def rows(of: pd.Series) -> pd.DataFrame:
        same = (requests["run_id"] == of["run_id"]) & (requests["arm"] == of["arm"])
        return measured(requests[same & (requests["point"] == of["point"])])

    concurrency, rate = (NAN if pd.isna(row[name]) else float(row[name]) for name in ("concurrency", "rate_rps"))
    return speedup(rows(reference), rows(row), concurrency=concurrency, rate=rate)


#: By kind of task: the columns of throughput and cost.
RATE_AND_COST = {
    "text": ("output_tok_s", "usd_per_mtok"),
    "encoder": ("output_tok_s", "usd_per_mtok"),
    "image": ("img_s", "usd_per_1k_images"),
}


def named_baseline(summary: pd.DataFrame, baseline: str | None) -> str:
    """The arm of that name, or that others are compared with. Raises InvalidValue where no arm has that name."""
    arms = list(dict.fromkeys(summary["arm"]))
    found = baseline or reference_arm(summary)
    if found not in arms:
        raise InvalidValue(f"baseline: there is no arm {found!r}.", hint=did_you_mean(found, arms))
    return found


def comparison(requests: pd.DataFrame, summary: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """Each other arm against `baseline`: `speedup` (end to end) and ratios of TTFT, TPOT, throughput and cost.

    Without a name it is the arm "baseline", or the first where there is none.

    Raises:
        InvalidValue: no arm has that name.
    """
    baseline = named_baseline(summary, baseline)
    rows = []
    for _, row in summary.iterrows():
        reference = _reference(summary, row, baseline, summary.attrs.get("env", {}))
        if reference is None:
            continue
        ratio, low, high = _speedup(requests, reference, row)
        rate, cost = RATE_AND_COST[task_kind(str(row["task"]))]
        same = ("run_id", "model", "task", "arm", "concurrency", "rate_rps", "batch_size", "n", "n_failed")
        rows.append(
            {
                **{name: row[name] for name in same},
                "baseline": baseline,
                "speedup": ratio,
                "speedup_lo": low,
                "speedup_hi": high,
                "ttft_ratio": _ratio(reference["ttft_p50_s"], row["ttft_p50_s"]),
                "tpot_ratio": _ratio(reference["tpot_p50_s"], row["tpot_p50_s"]),
                "throughput_ratio": _ratio(row[rate], reference[rate]),
                "cost_ratio": _ratio(reference[cost], row[cost]),
                **{name: row[name] for name in ("outputs_equal", "equal_share", "n_compared")},
                **{name: row[name] for name in ("psnr_db", "max_abs_diff")},
                "verdict": verdict(ratio, low, high),
            }
        )
    frame = pd.DataFrame(rows)
    frame.attrs = dict(summary.attrs)
    return frame


def _ratio(above: float, below: float) -> float:
    return float(above) / float(below) if below and math.isfinite(below) else NAN


def verdict(speedup: float, low: float = NAN, high: float = NAN) -> str:
    """A speed-up in words: "1.8x faster", "0.90x: slower", "no difference shown" when the interval holds 1.

    Without an interval there is no difference within 5 %.
    """
    if not math.isfinite(speedup):
        return "not comparable"
    text = ratio_text(speedup)
    if is_worse(speedup, high):
        return f"{text}: slower"
    faster = low > 1 if math.isfinite(low) else speedup > 1 / CLEAR
    return f"{text} faster" if faster else f"{text}: no difference shown"


def is_worse(ratio: float, high: float = NAN) -> bool:
    """Whether a ratio tells of a loss: its interval, up to `high`, lies below 1; without one, it is clearly below."""
    return high < 1 if math.isfinite(high) else ratio < CLEAR


def ratio_text(ratio: float) -> str:
    """A ratio with two significant places below 2, one digit below 20, none above: "0.93x", "5.7x", "41x"."""
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x" if ratio < 20 else f"{ratio:,.0f}x"
