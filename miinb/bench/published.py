"""Figures that were not measured in the run that they are drawn beside: DeepSpeed-MII's of 2022, and vLLM's.

MII's are read off the charts of its README (v0.0.4): fp16, batch 1, milliseconds, for text generation per generated
token. "public" and "azure" are its two variants. Read by pixel: error about 0.05 ms (0.3 ms for the models on several
GPUs); the Stable Diffusion row is a printed label. Most of its figures do not state their GPU; tokens a second are of
an A100-80GB, and its dollars imply about $280 a GPU-hour, so only their ratios mean something.

vLLM's (0.24.0) were measured apart on one H100 80GB: offline `LLM`, random weights, fp16, CUDA graphs and compilation
at their defaults, prefix caching off; the workloads are those of the headline's suites.
"""

from __future__ import annotations

import functools
import re
from importlib import resources

import pandas as pd

from miinb.bench.charts.frames import summary_of
from miinb.bench.charts.names import short_model
from miinb.bench.records import NAN
from miinb.bench.summary import SUMMARY_COLUMNS, task_kind
from miinb.errors import InvalidValue, did_you_mean

#: Columns of the data: the arm's name in a chart.
ARMS = {"baseline": "baseline (2022)", "public": "MII public (2022)", "azure": "MII Azure (2022)"}


@functools.cache
def _read(name: str) -> pd.DataFrame:
    with resources.as_file(resources.files("miinb.bench") / "data" / name) as path:
        return pd.read_csv(path)


def latency() -> pd.DataFrame:
    """One row per model of MII's figures: `<arm>_model_ms` and `<arm>_e2e_ms`."""
    return _read("mii_2022_latency.csv").copy()


def throughput() -> pd.DataFrame:
    """One row per model: `<arm>_tok_s_per_gpu` and the printed dollars per million tokens."""
    return _read("mii_2022_throughput.csv").copy()


#: The arm of `vllm`'s figures, and what a caption says of them.
VLLM = "vLLM 0.24 (another run)"
VLLM_NOTE = f"{VLLM}: measured apart on one H100 80GB, random weights, fp16, its defaults; not in this run."


def vllm(suite: str, model: str) -> float:
    """vLLM's milliseconds a token (suite "decode") or output tokens a second ("throughput", "ragged"); NaN: none."""
    table = _read("vllm_0.24_h100.csv")
    rows = table[(table["suite"] == suite) & (table["model"] == model)]
    column = "ms_per_token" if suite == "decode" else "output_tok_s"
    return NAN if rows.empty else float(rows[column].iloc[0])


#: Of MII's models with each task's head, one of each shape: by the preset's name and the task.
ENCODERS: dict[tuple[str, str], str] = {
    ("roberta-large", "fill-mask"): "roberta-large",
    ("roberta-large", "question-answering"): "deepset/roberta-large-squad2",
    ("roberta-large", "token-classification"): "Jean-Baptiste/roberta-large-ner-english",
    ("roberta-large", "text-classification"): "roberta-large-mnli",
    ("roberta-base", "fill-mask"): "roberta-base",
    ("roberta-base", "question-answering"): "deepset/roberta-base-squad2",
    ("roberta-base", "text-classification"): "cardiffnlp/twitter-roberta-base-sentiment",
    ("bert-large", "fill-mask"): "bert-large-uncased",
    ("bert-large", "question-answering"): "bert-large-uncased-whole-word-masking-finetuned-squad",
    ("bert-large", "token-classification"): "dslim/bert-large-NER",
    ("bert-base", "fill-mask"): "bert-base-uncased",
    ("bert-base", "question-answering"): "nyust-eb210/braslab-bert-drcd-384",
    ("bert-base", "token-classification"): "dslim/bert-base-NER",
    ("bert-base", "text-classification"): "ProsusAI/finbert",
}


#: Text to image: Stable Diffusion 1.x, one image of 512 x 512 in 50 steps on an A100-80GB.
IMAGES = "stable-diffusion-v1-4"
_SD_1 = re.compile(r"stable-diffusion-v?1[.-]\d", re.IGNORECASE)


def beside(frame: object, model: str | None = None) -> pd.DataFrame:
    """The summary of `frame` with MII's rows of the same model, for the charts to draw.

    `charts.latency(published.beside(runs), metric="tpot_s")` shows them side by side; they ran on other hardware, which
    the caption says.

    Args:
        frame: runs, requests or a summary.
        model: name in MII's figures; None takes the measured models' own names.

    Raises:
        InvalidValue: MII published nothing of that model; the near name is in the hint.
    """
    summary = summary_of(frame, "latency")
    measured = list(dict.fromkeys(zip(summary["model"], summary["task"], strict=True)))
    pairs = dict.fromkeys(measured[:1], model) if model else {key: _twin(*key) for key in measured}
    table = {short_model(figures["model"]).lower(): figures for _, figures in latency().iterrows()}
    rows = []
    for (measured_name, task), name in pairs.items():
        if name.lower() not in table:
            if task_kind(task) == "encoder" and not model:
                continue  # of that head they published nothing
            raise InvalidValue(f"MII published no figure of {name!r}.", hint=did_you_mean(name, table))
        rows += _rows(measured_name, table[name.lower()])
    if not rows:
        raise InvalidValue(f"MII published no figure of {measured[0][0]!r} with this task.", hint="Give model=.")
    both = pd.DataFrame([*summary.to_dict("records"), *rows], columns=list(SUMMARY_COLUMNS))
    kinds = {task_kind(task) for _, task in pairs}
    used = "20 new tokens" if "text" in kinds else "short texts"
    where = (
        "A100-80GB, fp16, one image of 512 x 512, 50 steps" if kinds == {"image"} else f"other hardware, fp16, {used}"
    )
    note = f"(2022): read off MII's own charts ({where}); compared among themselves."
    both.attrs = {**summary.attrs, "notes": [note]}
    return both


def _twin(model: str, task: str) -> str:
    """MII's model of the measured one's shape and task, else its own name."""
    if task_kind(task) == "image" and _SD_1.search(model):
        return IMAGES
    return short_model(ENCODERS.get((short_model(model), task), model))


def _rows(model: str, figures: pd.Series) -> list[dict[str, object]]:
    """Summary rows of one model's figures: the end-to-end milliseconds as seconds, no counts."""
    text = figures["task"] == "text-generation"
    found = []
    for column, arm in ARMS.items():
        seconds = figures[f"{column}_e2e_ms"] / 1e3
        if pd.isna(seconds):
            continue
        row: dict[str, object] = dict.fromkeys(SUMMARY_COLUMNS, NAN)
        row |= {"arm": arm, "model": model, "task": figures["task"], "dtype": "fp16", "n_failed": 0, "run_id": None}
        row |= {"tpot_p50_s" if text else "e2e_p50_s": seconds, "model_p50_s": figures[f"{column}_model_ms"] / 1e3}
        if task_kind(str(figures["task"])) == "image":
            row |= {"image_p50_s": seconds, "img_s": 1 / seconds, "n_gpus": 1, "img_s_per_gpu": 1 / seconds}
            row |= {"batch_size": 1, "steps": 50, "width_px": 512, "height_px": 512}
        found.append(row | {"concurrency": 1.0, "n_compared": 0, "outputs_equal": None, "name": None})
    return found
