"""What is to be measured, checked and planned before anything starts: the text in windows, a job for each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import NoneType
from typing import Any

from miinb import models
from miinb.bench.arms import model_name
from miinb.bench.headline.suites import Arm, Workload
from miinb.bench.quality.jobs import Job, Reading
from miinb.bench.quality.texts import Text
from miinb.config import DeploymentConfig
from miinb.errors import InvalidValue, UnsupportedModel, did_you_mean
from miinb.preparation import prepare
from miinb.quantized_planner import QUANTIZED
from miinb.wording import one_line

Arms = Sequence[str] | Mapping[str, Mapping[str, Any]]
#: What an arm may set.
FIELDS = ("dtype", "kv_dtype", "options")


def plan_jobs(
    arms: Arms, reading: Reading, info: models.ModelInfo, same: Mapping[str, Any], options: Mapping[str, Any]
) -> list[Job]:
    """The arms as jobs in the order to run, the one that others are compared with first.

    Args:
        arms: dtypes, or what each arm sets by its name.
        reading: what each of them reads.
        info: the model.
        same: fields of `DeploymentConfig` that all arms have.
        options: engine options of all arms.

    Raises:
        InvalidValue: arms are wrong, two are the same, or none is unquantized.
        ConfigError, ModelError, OutOfMemory: the planner refuses an arm.
    """
    longest = reading.decode.longest
    length = max(reading.window, min(longest + 8, info.context_length or longest + 8))
    configs = {}
    for name, fields in _asked(arms).items():
        own = {**_shared(options, fields.get("dtype", "auto")), **_options(fields.get("options"))}
        configs[name] = _resolved({**same, "max_length": length, "max_batch": 1, **fields, "options": own}, name)
    return _in_order(configs, reading, str(same["model"]), named=isinstance(arms, Mapping))


def _options(given: object) -> dict[str, Any]:
    """Engine options as a dictionary. Raises InvalidValue."""
    if not isinstance(given, (Mapping, NoneType)):
        raise InvalidValue(f"options: {given!r} is no mapping, such as {{'calibration': 'off'}}.")
    return dict(given or {})


def _shared(options: Mapping[str, Any], dtype: object) -> dict[str, Any]:
    """The options of all arms without those that act only with other dtypes. Raises InvalidValue."""
    left_out = ("calibration",) if dtype in QUANTIZED else ("calibration", "quantize_head")
    return {name: value for name, value in _options(options).items() if dtype == "int4" or name not in left_out}


def _asked(arms: Arms) -> dict[str, Mapping[str, Any]]:
    """What each arm sets, by its name. Raises InvalidValue."""
    if isinstance(arms, str) or not isinstance(arms, (Sequence, Mapping)) or not arms:
        raise InvalidValue(
            "arms: give dtypes, such as ['auto', 'int8', 'int4'], or a mapping of names to what they set."
        )
    if not isinstance(arms, Mapping):
        if twice := next((dtype for dtype in arms if list(arms).count(dtype) > 1), None):
            raise InvalidValue(f"arms: {twice!r} is there twice.")
        return {str(dtype): {"dtype": dtype} for dtype in arms}
    for name, fields in arms.items():
        if not isinstance(name, str) or not name.strip():
            raise InvalidValue("arms: each needs a name.")
        if not isinstance(fields, Mapping):
            raise InvalidValue(f"arms: {name!r} needs a mapping, such as {{'dtype': 'int8'}}.")
        if unknown := next((key for key in fields if key not in FIELDS), None):
            raise InvalidValue(f"arms: {name!r} cannot set {unknown!r}.", hint=did_you_mean(str(unknown), FIELDS))
    return dict(arms)


def read_windows(info: models.ModelInfo, text: Text, most: int, window: int, decode: Workload) -> Reading:
    """A text as tokens in windows, each with what the tokenizer puts before a text.

    Args:
        info: the model.
        text: what is read.
        most: tokens of it at most, from its beginning.
        window: tokens of a window at most.
        decode: the requests that are timed beside.

    Raises:
        InvalidValue: the requests do not fit the model's context, or the text has too few tokens.
        UnsupportedModel: the model has no tokenizer.json.
    """
    from tokenizers import Tokenizer

    limit = info.context_length
    if limit and decode.longest > limit:
        prompt, new = decode.lengths[0]
        raise InvalidValue(
            f"prompt_tokens, new_tokens: {prompt} and {new} do not fit the context of {info.source} ({limit} tokens).",
            hint="Use fewer.",
        )
    file = info.folder / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedModel(
            f"{info.source} has no tokenizer.json, which the text is cut into tokens with.",
            hint="AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes one.",
        )
    tokenizer = Tokenizer.from_file(str(file))
    began = tokenizer.encode("a")
    prefix = [i for i, _ in takewhile(lambda pair: pair[1], zip(began.ids, began.special_tokens_mask, strict=True))]
    ids = [i for i in tokenizer.encode(text.text, add_special_tokens=False).ids if i < info.vocab_size][:most]
    first = max(1, len(prefix))
    size = min(window, limit or window) - len(prefix)
    parts = (tuple(prefix + ids[start : start + size]) for start in range(0, len(ids), size))
    windows = tuple(part for part in parts if len(part) > first)
    if not windows:
        raise InvalidValue(f"text: {text.name} has {len(ids)} tokens, too few to predict any.")
    return Reading(one_line(text.name), text.sha256, windows, first, decode)


def _resolved(fields: Mapping[str, Any], name: str) -> DeploymentConfig:
    """The arm's configuration as the planner has it. Raises MiinbError."""
    ready = prepare(DeploymentConfig.parse(fields))
    if ready.plan.engine != "optimized":
        raise UnsupportedModel(
            f"arms: plain transformers would serve {name!r}, and quality is measured of the optimized engine.",
            hint="; ".join(ready.plan.warnings),
        )
    return ready.resolved


def _in_order(configs: Mapping[str, DeploymentConfig], reading: Reading, model: str, *, named: bool) -> list[Job]:
    """The jobs, the first unquantized one before the others. Raises InvalidValue."""
    labels = {name: name if named else config.dtype for name, config in configs.items()}
    twice = [name for name, label in labels.items() if list(labels.values()).count(label) > 1]
    if twice:
        raise InvalidValue(f"arms: {' and '.join(map(repr, twice))} are the same here, {labels[twice[0]]}.")
    jobs = [
        Job(model_name(model), Arm(labels[name], "optimized", config.dtype), config, (reading,))
        for name, config in configs.items()
    ]
    plain = [job for job in jobs if job.dtype not in QUANTIZED and job.config.kv_dtype == "auto"]
    if not plain:
        raise InvalidValue(
            "arms: one must be unquantized; the others are compared with it.",
            hint="Add 'auto', the checkpoint's dtype.",
        )
    return [plain[0], *(job for job in jobs if job is not plain[0])]
