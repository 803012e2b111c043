"""One row per request and the numbers that follow from it: the schema, the definitions, and `Runs`.

The words of benchmarks (TTFT, TPOT, ITL, percentiles, cost, speed-up) are defined here, once, in `DEFINITIONS`; every
frame carries them in `attrs["definitions"]`, and the environment of its runs in `attrs["env"]`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from miinb.errors import InvalidValue, did_you_mean

if TYPE_CHECKING:
    from _typeshed import StrPath

    from miinb.bench.cost import CostTable

NAN = math.nan

#: What each measure means; carried by every frame and every file.
DEFINITIONS: dict[str, str] = {
    "ttft_s": "time to first token: submit to the first non-empty chunk, on the client's clock",
    "tpot_s": "time per output token: (e2e_s - ttft_s) / (output_tokens - 1)",
    "itl": (
        "inter-token latency: the raw gaps between chunks (itl_s of a request has all of them); percentiles of the "
        "summary are over the gaps of all requests, itl_p50_s and itl_max_s of a request over its own"
    ),
    "e2e_s": "submit to the end of the answer, on the client's clock; with rate, from the planned arrival",
    "queue_s": "waiting for the scheduler",
    "preprocess_s": "tokenizing (and other work before the model)",
    "model_s": (
        "from admission to the last token in rank 0; of pictures text_encode_s + steps_s + vae_s, those of the last "
        "batch where a request has more pictures than one holds"
    ),
    "postprocess_s": "detokenizing (and other work after the model); of pictures making the slowest file",
    "image_s": "seconds per image: e2e_s / images of the request",
    "steps_s": "all denoising steps of the batch that a picture was in; step_s is steps_s / steps",
    "vae_s": "making pixels of latents, until those of the batch's last picture of the request were there",
    "img_s": "images per second: images of the successful requests / duration_s",
    "overhead": (
        "of the server and the client: (e2e_s - model_s) / model_s, median over the requests of points with one in "
        "flight whose pictures fit one batch; of others it would count waiting for each other"
    ),
    "psnr_db": (
        "peak signal-to-noise ratio of a picture to the baseline's of the same prompt and seed, values of 0 to 255; of "
        "a point that of the picture that differs most, psnr_p50_db the median picture's; infinite: identical"
    ),
    "mse": "mean squared difference of a request's pictures to the baseline's, in the order of their seeds",
    "max_abs_diff": "largest difference of a value (0 to 255) of a picture to the baseline's",
    "percentiles": (
        "over rows with status 'ok' that are no warm-up; p99 is empty below 100 samples, p95 and p5 below 20, "
        "p90 below 10"
    ),
    "passes": (
        "with repeat: rates and percentiles are medians over the passes, smallest and largest values and counts are "
        "of all passes together; *_spread is (largest - smallest) / median over the passes"
    ),
    "slo_share": (
        "share of the requests, failed ones among them, that met every objective of slo; one that does not apply "
        "(TPOT of a single token) is met"
    ),
    "goodput_req_s": "requests that met every objective of slo / duration_s",
    "saturated": (
        "of a sweep: the last load that was worth it, after which throughput gained less than 5 % or most requests "
        "missed an objective"
    ),
    "failures": "kinds of errors with their numbers, those that the user stopped left out",
    "duration_s": "first submit to last end of a point's measured requests, summed over its blocks",
    "seq_s": "encoder tasks: texts of the successful requests / duration_s",
    "output_tok_s": (
        "output tokens of the successful requests / duration_s; of encoder tasks, which write none, the input's tokens"
    ),
    "total_tok_s": "prompt and output tokens of the successful requests / duration_s; of encoder tasks the input's",
    "tok_s_per_gpu": "output_tok_s / n_gpus (a machine without a GPU counts as one)",
    "usd_per_mtok": (
        "price_usd_per_gpu_hour * n_gpus / 3600 / output_tok_s * 1e6; empty without the user's price; a machine "
        "without a GPU counts as one"
    ),
    "usd_per_1k_texts": "the same of a thousand texts of encoder tasks, usd_per_1k_images of a thousand images",
    "speedup": "median e2e_s of the baseline / median e2e_s of the arm at the same point (of several passes the median "
    "of theirs); interval: 95 % bootstrap, requests that ran or waited together drawn together",
    "perplexity": "exp of the mean negative log-likelihood of a text's tokens, each after those before it in a window",
    "perplexity_change": (
        "perplexity / that of the run's unquantized arm - 1; perplexity_change_lo and _hi: 95 % interval (normal, over "
        "the differences of single tokens)"
    ),
    "same_next": "share of the text's places where the likeliest next token is the unquantized arm's",
    "outputs_equal": "check='exact': every compared answer is the baseline's for the same prompt: its text, its pixels",
    "equal_share": (
        "share of the baseline's output tokens before the first difference, mean over the answers; of encoder tasks "
        "the share of equal labels, tokens or spans, of pictures that of identical ones"
    ),
}


@dataclass(slots=True)
class Record:
    """One request of a benchmark. Times in seconds, sizes in bytes; NaN or None where it does not apply."""

    run_id: str
    seq: int
    arm: str
    session: str = ""
    instance_id: str = ""
    task: str = ""
    model: str = ""
    revision: str | None = None
    engine: str = ""
    dtype: str = ""
    tp: int = 1
    replicas: int = 1
    batch_size: float = NAN
    concurrency: float = NAN
    rate_rps: float = NAN
    point: int = 0  # which workload point (one concurrency or rate) of the run
    block: int = 0  # arms alternate block by block
    pass_no: int = 0  # which pass over the point (repeat)
    prompt_id: str = ""
    prompt_tokens: float = NAN
    cached_tokens: float = NAN
    output_tokens: float = NAN
    asked_tokens: float = NAN  # how many new ones the request wanted
    images: float = NAN
    steps: float = NAN
    width_px: float = NAN
    height_px: float = NAN
    guidance: float = NAN
    seed: int | None = None
    t_submit: str = ""  # UTC, ISO 8601; a datetime in the frame
    t_rel_s: float = NAN  # since the run began
    queue_s: float = NAN
    preprocess_s: float = NAN
    ttft_s: float = NAN
    tpot_s: float = NAN
    itl_p50_s: float = NAN
    itl_max_s: float = NAN
    itl_s: list[float] | None = None  # every gap between two chunks
    model_s: float = NAN
    text_encode_s: float = NAN
    steps_s: float = NAN
    vae_s: float = NAN
    step_s: float = NAN
    image_s: float = NAN
    postprocess_s: float = NAN
    e2e_s: float = NAN
    chunk_count: int = 0
    warmup: bool = False
    status: Literal["ok", "cancelled", "timeout", "error"] = "ok"
    error: str | None = None
    slo_met: bool | None = None  # every objective; None where none was set
    finish_reason: str | None = None
    output_sha256: str | None = None
    equal: bool | None = None  # same answer as the baseline's
    equal_share: float = NAN  # share of the baseline's tokens before the first difference, of equal labels or pictures
    mse: list[float] | None = None  # of each picture to the baseline's
    max_abs_diff: list[int] | None = None
    artifact: str | None = None


REQUEST_COLUMNS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(Record))


def new_run_id() -> str:
    """A run id that sorts by time: "20260131-142501-3f9a"."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def utc_now() -> str:
    """This moment, UTC, ISO 8601 with milliseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def requests_frame(rows: Iterable[Mapping[str, Any]], env: Mapping[str, Any]) -> pd.DataFrame:
    """The tidy frame of request rows; missing columns get their defaults, unknown ones are kept at the end."""
    rows = list(rows)
    defaults = {f.name: f.default for f in dataclasses.fields(Record) if f.default is not dataclasses.MISSING}
    frame = pd.DataFrame(rows)
    missing = {name: defaults.get(name) for name in REQUEST_COLUMNS if name not in frame.columns}
    for name, default in missing.items():
        frame[name] = pd.Series([default] * len(rows), index=frame.index, dtype=object if default is None else None)
    frame = frame[[*REQUEST_COLUMNS, *(name for name in frame.columns if name not in REQUEST_COLUMNS)]]
    for field in dataclasses.fields(Record):
        if field.type == "float":
            frame[field.name] = pd.to_numeric(frame[field.name]).astype("float64")
    frame["t_submit"] = pd.to_datetime(frame["t_submit"].replace("", None), utc=True)
    frame["warmup"] = frame["warmup"].astype(bool)
    frame["pass_no"] = pd.to_numeric(frame["pass_no"]).fillna(0).astype(int)  # files of earlier versions have none
    frame.attrs = {"definitions": dict(DEFINITIONS), "env": dict(env)}
    return frame


class Runs:
    """One or several benchmark runs.

    Attributes:
        requests: one row per request (columns: `Record`).
        env: what each run ran on, by run id: host, arms, workload, warnings.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], env: Mapping[str, Mapping[str, Any]]) -> None:
        """From request rows (dicts with the fields of `Record`) and the environment of each run id."""
        self.env: dict[str, dict[str, Any]] = {run_id: dict(facts) for run_id, facts in env.items()}
        self.requests = requests_frame(rows, self.env)
        for run_id in self.requests["run_id"].dropna().unique():
            self.env.setdefault(run_id, {})

    @functools.cached_property
    def summary(self) -> pd.DataFrame:
        """One row per run, arm and workload point (a concurrency or a rate)."""
        from miinb.bench.summary import summarize

        return summarize(self.requests)

    def __len__(self) -> int:
        return len(self.env)

    def __add__(self, other: Runs) -> Runs:
        """All requests of both; of one that both have (by run id and number), and of a run's facts, the other's."""
        if not isinstance(other, Runs):
            return NotImplemented
        theirs = pd.MultiIndex.from_frame(other.requests[["run_id", "seq"]])
        mine = self.requests[~pd.MultiIndex.from_frame(self.requests[["run_id", "seq"]]).isin(theirs)]
        return Runs([*_rows(mine), *_rows(other.requests)], {**self.env, **other.env})

    def select(self, run_id: str) -> Runs:
        """The one run of this id or name.

        Raises:
            InvalidValue: there is no such run (the near name is in the hint), or there are several of this name.
        """
        named = [key for key, facts in self.env.items() if facts.get("name") == run_id and run_id not in self.env]
        if len(named) > 1:
            raise InvalidValue(f"{len(named)} runs are called {run_id!r}.", hint=f"Choose by id: {', '.join(named)}.")
        key = run_id if run_id in self.env else next(iter(named), None)
        if key is None:
            names = [str(facts["name"]) for facts in self.env.values() if facts.get("name")]
            raise InvalidValue(f"There is no run {run_id!r}.", hint=did_you_mean(run_id, [*self.env, *names]))
        return Runs(_rows(self.requests[self.requests["run_id"] == key]), {key: self.env[key]})

    def compare(self, baseline: str | None = None, *, best: bool = False) -> pd.DataFrame:
        """Every other arm against `baseline` at the same point: ratios above 1 mean better than it.

        Without a name it is the arm "baseline"; where there is none, the first arm.

        Args:
            baseline: name of the arm.
            best: of text-to-image: each arm at the point where it makes most images a second, in place of the same one.

        Raises:
            InvalidValue: no arm has that name, or `best` of runs that make no images.
        """
        if best:
            from miinb.bench.best_batch import at_their_best

            return at_their_best(self.requests, self.summary, baseline)
        from miinb.bench.summary import comparison

        return comparison(self.requests, self.summary, baseline)

    @property
    def differences(self) -> pd.DataFrame:
        """One row for each compared picture: its seed, `psnr_db` and `max_abs_diff` to the baseline's."""
        from miinb.bench.image_measures import by_seed

        return by_seed(self.requests)

    def cost(self, slo: Any = None, *, price: float | None = None, attain: float = 0.9) -> CostTable:
        """Throughput and cost by plan and load; its `.answer` says which is the cheapest under the limits `slo`.

        Raises:
            InvalidValue: see `miinb.bench.cost.table`.
        """
        from miinb.bench.cost import table

        return table(self, slo, price=price, attain=attain)

    @property
    def percentiles(self) -> pd.DataFrame:
        """One row per run, arm, point and measure: p50, p90, p95, p99, empty where the samples are too few."""
        from miinb.bench.display import percentiles

        return percentiles(self.summary)

    def save(self, path: StrPath) -> Path:
        """Append these runs to the directory `path`, one folder of JSON Lines a run; `load_runs` reads it back."""
        from miinb.bench.store import save

        return save(self, Path(path))

    def to_csv(self, path: StrPath) -> Path:
        """Write the requests as CSV and, beside it, `.meta.json` with the definitions and the environment."""
        from miinb.bench.store import write_csv

        return write_csv(self, Path(path))

    def to_jsonl(self, path: StrPath) -> Path:
        """Write the requests as JSON Lines and, beside it, `.meta.json`; `load_runs` reads both back."""
        from miinb.bench.store import write_jsonl

        return write_jsonl(self, Path(path))

    def to_parquet(self, path: StrPath) -> Path:
        """Write the requests as Parquet (needs pyarrow)."""
        from miinb.bench.store import write_parquet

        return write_parquet(self, Path(path))

    def report(self, path: StrPath) -> Path:
        """Write one self-contained HTML file: tables, charts, environment.

        Raises:
            InvalidValue: it cannot be written there, or has another ending than .html or .htm.
        """
        from miinb.bench.report import write_report

        return write_report(self, Path(path))

    def __repr__(self) -> str:
        from miinb.bench.display import runs_text

        return runs_text(self)

    def _repr_html_(self) -> str:
        from miinb.bench.display import runs_html

        return runs_html(self)


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The frame's rows as plain values: datetimes as text, missing values as None."""
    rows: list[dict[str, Any]] = []
    for row in frame.to_dict("records"):
        rows.append({str(name): plain(value) for name, value in row.items()})
    return rows


def plain(value: Any) -> Any:
    """A JSON-ready scalar: numpy numbers become Python's, NaN and NaT None, datetimes ISO text."""
    if value is None or value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, datetime.datetime):
        return value.isoformat(timespec="milliseconds")
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def rows_of(runs: Runs) -> list[dict[str, Any]]:
    """The request rows of runs, JSON-ready."""
    return _rows(runs.requests)


def load_runs(path: StrPath) -> Runs:
    """The runs that `Runs.save` wrote: a directory of runs, or the folder of one; or the file of `Runs.to_jsonl`.

    Raises:
        InvalidValue: there is no run at `path`.
    """
    from miinb.bench.store import load

    return load(Path(path))
