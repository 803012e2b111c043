"""Random weights of a public shape with a task's head, written once as transformers saves them, for both arms."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from miinb.bench import presets
from miinb.bench.encoders.suites import Job
from miinb.tasks import TASKS

#: Labels of a head; others have transformers' two.
LABELS = {"token-classification": 9, "text-classification": 3}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def auto_class(task: str) -> Any:
    """transformers' Auto class of a task."""
    return getattr(transformers, TASKS[task].auto_class)


def write(job: Job) -> Path:
    """The folder of a job's checkpoint, made unless it is there; whole or not at all."""
    target = Path(job.folder)
    if target.is_dir():
        return target
    part = target.with_name(f"{target.name}.part")
    presets.write(job.model, part, **(presets.tiny(job.model) if job.tiny else {}))
    kept = {name: (part / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    more = {"num_labels": LABELS[job.task]} if job.task in LABELS else {}
    settings = transformers.AutoConfig.from_pretrained(part, local_files_only=True, **more)
    torch.manual_seed(0)
    with torch.device(job.device):
        model = auto_class(job.task).from_config(settings)
    dtype = torch.float32 if job.device == "cpu" else DTYPES[job.dtype]
    model.to(dtype).save_pretrained(part)
    for name, data in kept.items():
        (part / name).write_bytes(data)
    shutil.move(part, target)
    del model
    gc.collect()
    return target


def matrix_weights(folder: Path, task: str) -> int:
    """Weights that every token is multiplied with (all but tables of which it reads a row; a tied decoder counts)."""
    settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = auto_class(task).from_config(settings)
    layers = (module for module in model.modules() if not isinstance(module, torch.nn.Embedding))
    return sum(part.numel() for layer in layers for part in layer.parameters(recurse=False))


def attention_work(folder: Path) -> int:
    """Operations of attention a token and token of its sequence: two products, two operations each, in every layer."""
    values = json.loads((folder / "config.json").read_text())
    layers = values.get("num_hidden_layers") or values["n_layers"]
    hidden = values.get("hidden_size") or values["dim"]
    return int(4 * layers * hidden)
