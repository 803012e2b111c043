"""Runs the arms of a model one after another, compares them token by token, and keeps the book."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from miinb import models
from miinb.bench.headline.book import Book
from miinb.bench.headline.isolation import Worker
from miinb.bench.headline.suites import Workload
from miinb.bench.headline.trace import Measured
from miinb.bench.quality.jobs import SUITE, Job
from miinb.bench.quality.planning import Arms, plan_jobs, read_windows
from miinb.bench.quality.texts import read
from miinb.bench.records import NAN, Runs
from miinb.errors import InvalidValue, MiinbError
from miinb.wording import number, size_words

#: What is compared where nothing is named: the checkpoint's dtype first.
DTYPES = ("auto", "int8", "int4")
#: Of a normal distribution: 95 % lie within so many standard errors.
_WITHIN = 1.96


def measure(
    model: str | Path,
    arms: Arms = DTYPES,
    text: str | Path | Sequence[str] | None = None,
    *,
    text_tokens: int = 8192,
    window: int = 512,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    repeats: int = 5,
    device: str = "auto",
    options: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    limit_s: float = 3600.0,
    out: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Runs:
    """One run: each arm's perplexity on a text, its speed with one request at a time, and the bytes of its weights.

    All arms are planned before a process starts. They run one after another, the first unquantized one before the
    others, which are compared with it token by token. One that fails is said in the run, and the others go on.

    Args:
        model: folder or hub name, of a model that generates text by the optimized engine.
        arms: dtypes; or by its name what each arm sets: "dtype", "kv_dtype" and "options" of `Session`.
        text: a text file, or a list of texts; None: `texts.licenses`.
        text_tokens: at most so many of the text are read, from its beginning.
        window: it is cut into parts of so many tokens, each read alone.
        prompt_tokens, new_tokens: of the requests whose speed is measured; their tokens are random.
        repeats: most such requests, which end after some seconds.
        device: as for `Session`.
        options: engine options of all arms; an arm's own hold over them.
        revision, trust_remote_code: as for `Session`.
        limit_s: seconds that an arm may take (and five minutes more for its start); then it is ended.
        out: a folder to which the run is appended as arms end; `load_runs` reads it.
        say: told what is going on.

    Raises:
        InvalidValue: arms, text or lengths are wrong, or no arm is unquantized.
        ConfigError, ModelError, OutOfMemory: the planner refuses an arm.
    """
    _check_counts(text_tokens=(text_tokens, 2), window=(window, 8), prompt_tokens=(prompt_tokens, 1))
    _check_counts(new_tokens=(new_tokens, 2), repeats=(repeats, 1))
    if not limit_s > 0:
        raise InvalidValue(f"limit_s: {limit_s!r} is no time.")
    info = models.inspect(model, revision=revision, trust_remote_code=trust_remote_code)
    info.task("text-generation")
    decode = Workload(SUITE, ((prompt_tokens, new_tokens),), repeats=repeats, limit_s=limit_s)
    reading = read_windows(info, read(text), text_tokens, window, decode)
    same: dict[str, Any] = {"model": str(model), "task": "text-generation", "device": device}
    same |= {"revision": revision, "trust_remote_code": trust_remote_code}
    jobs = plan_jobs(arms, reading, info, same, options or {})
    return _run(jobs, Path(out) if out is not None else None, say)


def _check_counts(**counts: tuple[int, int]) -> None:
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidValue(f"{name}: {value!r} is no whole number of at least {least}.")


def _run(jobs: Sequence[Job], out: Path | None, say: Callable[[str], None]) -> Runs:
    """Each job into the book; the first is the reference."""
    worker, book = Worker("miinb.bench.quality.engine_side"), Book({}, out)
    reference: Mapping[str, Any] = {}
    for job in jobs:
        about = job.workloads[0].about() | {"reference": jobs[0].arm.label}
        found = _measured(worker, job)
        reference = found.facts if job is jobs[0] else reference
        found.facts = compared(found.facts, reference)
        book.add(job, found, about)
        say(f"{job.model} {job.arm.label}: {_words(found)}")
    return book.runs()


def _measured(worker: Worker, job: Job) -> Measured:
    """What the arm's process found, its failure too; each arm has a process of its own."""
    try:
        (found,) = worker.run(job)
    except MiinbError as failure:
        return Measured(SUITE, error=failure.message)
    else:
        return found
    finally:
        worker.close()


def compared(facts: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's facts with what single tokens tell about it and the reference, in place of the tokens themselves.

    `perplexity_change` is its perplexity over the reference's, less 1; `_lo` and `_hi` bound it with 95 % (normal, over
    the differences of single tokens); `same_next` is the share of places with the reference's likeliest next token.
    """
    found = {name: value for name, value in facts.items() if name not in ("losses", "likeliest")}
    if "losses" not in facts or "losses" not in reference:
        return found
    more = np.array(facts["losses"]) - np.array(reference["losses"])
    mean = float(more.mean())
    error = float(more.std(ddof=1)) / math.sqrt(len(more)) if len(more) > 1 else NAN
    found["perplexity_change"] = math.expm1(mean)
    found["perplexity_change_lo"] = math.expm1(mean - _WITHIN * error)
    found["perplexity_change_hi"] = math.expm1(mean + _WITHIN * error)
    found["same_next"] = float(np.mean(np.array(facts["likeliest"]) == np.array(reference["likeliest"])))
    return found


def _words(found: Measured) -> str:
    if found.error:
        return f"failed: {found.error}"
    token_s = statistics.median(row["tpot_s"] for row in found.records if not row["warmup"])
    change = found.facts.get("perplexity_change", 0.0)
    return (
        f"perplexity {number(found.facts['perplexity'])}{f' ({change:+.2%})' if change else ''}, "
        f"{number(1 / token_s)} tokens/s, {size_words(found.facts['weights_bytes'])} of weights"
    )


def table(runs: Runs) -> pd.DataFrame:
    """One row an arm of runs of `measure`: what it costs, and what it gains against the run's unquantized arm.

    Returns:
        Columns `arm`, `dtype`, `perplexity`, `change`, `change_lo`, `change_hi` (shares: 0.01 is one percent),
        `same_next`, `tok_s` (one request: 1 / median TPOT), `faster` (than the reference), `weights_bytes`, `of_bytes`
        (the share of the reference's), `load_s`.
    """
    rows = runs.summary
    references = {
        run_id: rows[(rows["run_id"] == run_id) & (rows["arm"] == env.get("workload", {}).get("reference"))]
        for run_id, env in runs.env.items()
    }

    def against(name: str) -> pd.Series:
        base = [
            float(references[run_id][name].iloc[0]) if len(references[run_id]) else NAN for run_id in rows["run_id"]
        ]
        return pd.Series(base, index=rows.index, dtype=float)

    return pd.DataFrame(
        {
            **{name: rows[name] for name in ("arm", "dtype", "perplexity")},
            **{f"change{end}": rows[f"perplexity_change{end}"] for end in ("", "_lo", "_hi")},
            "same_next": rows["same_next"],
            "tok_s": 1 / rows["tpot_p50_s"],
            "faster": against("tpot_p50_s") / rows["tpot_p50_s"],
            "weights_bytes": rows["weights_bytes"],
            "of_bytes": rows["weights_bytes"] / against("weights_bytes"),
            "load_s": rows["load_s"],
        }
    )
