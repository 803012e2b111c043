"""A model as transformers loads it: what the baseline runs, and what the engine is compared with."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from miinb.config import DeploymentConfig
from miinb.engine import offload
from miinb.engine.weights import DTYPES
from miinb.errors import BrokenCheckpoint, MiinbError, MissingHead, UnsupportedModel
from miinb.messages import EngineInfo
from miinb.models import ModelInfo
from miinb.tasks import TASKS


def load_model(model: ModelInfo, config: DeploymentConfig, info: EngineInfo) -> Any:
    """The transformers model of a task, on its device, in its dtype, ready to run.

    Raises:
        MissingHead: the checkpoint lacks weights that the task needs.
        UnsupportedModel: the installed transformers does not know the family, or cannot make the model.
    """
    if model.family not in CONFIG_MAPPING and not config.trust_remote_code:
        raise UnsupportedModel(
            f"transformers {transformers.__version__} does not know the model type {model.family!r}.",
            hint="Is it misspelled in config.json? A newer transformers may know it.",
        )
    try:
        if config.options.offload == "off":
            loaded = _load_model(model, config, info)
        else:
            with offload.partitioning(config, model, info) as settings:
                loaded = offload.held(_load_model(model, config, info), settings)
        if getattr(loaded.config, "attn_logit_softcapping", None):
            loaded.set_attn_implementation("eager")  # some transformers (5.17) take sdpa, which leaves the cap out
        return loaded
    except (MiinbError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what transformers makes of an unusual config.json or checkpoint
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise UnsupportedModel(
            f"transformers cannot make the model of {model.source} ({why}).", hint="Look at its config.json."
        ) from error


def _load_model(model: ModelInfo, config: DeploymentConfig, info: EngineInfo) -> Any:
    cls = getattr(transformers, TASKS[info.task].auto_class)
    dtype = DTYPES[info.dtype]
    offloaded = config.options.offload != "off"
    device = "cpu" if config.tensor_parallel > 1 or offloaded else info.device  # the whole model may not fit a GPU
    if config.load_format == "dummy":
        torch.manual_seed(0)  # every rank must make the same
        settings = transformers.AutoConfig.from_pretrained(
            model.folder, local_files_only=True, trust_remote_code=config.trust_remote_code
        )
        with torch.device(device):
            loaded = cls.from_config(settings, dtype=dtype, trust_remote_code=config.trust_remote_code)
        return loaded.eval()
    extra = {"gguf_file": model.files[0].name} if model.format == "gguf" else {"use_safetensors": True}
    loaded, report = cls.from_pretrained(
        model.folder,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are named here
        **extra,
    )
    for name, *shapes in sorted(report["mismatched_keys"])[:1]:
        found, wanted = (list(shape) for shape in shapes)
        raise BrokenCheckpoint(
            f"{name} has shape {found}, config.json asks for {wanted}.", hint="Fetch the model again."
        )
    missing = sorted(report["missing_keys"])
    if info.task == "feature-extraction":  # its answers are the last hidden states, which a pooler does not touch
        missing = [name for name in missing if "pooler" not in name.split(".")]
    if missing:
        raise MissingHead(
            f"The checkpoint has no weights for {missing[0]}"
            + (f" and {len(missing) - 1} more." if missing[1:] else "."),
            hint=f"It cannot serve {info.task}.",
        )
    return loaded.eval() if offloaded else loaded.to(device).eval()
