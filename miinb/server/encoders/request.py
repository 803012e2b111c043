"""A predict request: its checks, what rank 0 is asked for it, and what the client gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from miinb.errors import InvalidRequest, did_you_mean
from miinb.messages import EngineInfo
from miinb.rpc import codec
from miinb.server.encoders.tokenization import EncoderText
from miinb.tasks import TASKS, Task, TaskOption


class Answers(NamedTuple):
    """What a client gets: see `messages.PredictedEvent`."""

    outputs: Sequence[Any]
    vectors: bytes = b""
    columns: int = 0


@dataclass(slots=True)
class Asked:
    """A request that has been checked.

    Attributes:
        inputs: the task's keys and their texts.
        options: every option of the task.
        text: the model's tokenizer.
        info: the model.
        limit: most tokens of a sequence, special ones included.
    """

    inputs: Sequence[Mapping[str, str]]
    options: Mapping[str, Any]
    text: EncoderText
    info: EngineInfo
    limit: int = 0

    def __post_init__(self) -> None:
        self.limit = min(self.info.max_length, self.text.max_length or self.info.max_length)


@dataclass(slots=True)
class Prepared:
    """What rank 0 is asked, and how its numbers become answers.

    Attributes:
        sequences: token ids of each sequence, special ones included.
        finish: makes the answers of the result's values [rows, columns] float32 and their ids (None: in their order).
        type_ids: of all sequences, packed; empty: all 0.
        wanted: places in the packed tokens.
        options: of the reduction (docs/internals.md).
        meanwhile: does what of `finish` can be done before there are results.
    """

    sequences: Sequence[Sequence[int]]
    finish: Callable[[np.ndarray, np.ndarray | None], Answers]
    type_ids: Sequence[int] = ()
    wanted: Sequence[int] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    meanwhile: Callable[[], None] = lambda: None


def checked_inputs(inputs: Sequence[Mapping[str, Any]], task: Task) -> None:
    """Refuse inputs that are not of the task. Raises InvalidRequest naming the input and its key."""
    if task.streams:
        raise InvalidRequest(f"This deployment serves {task.name}.", hint="Use generate() or stream().")
    if not 1 <= len(inputs) <= codec.MAX_INPUTS:
        raise InvalidRequest(f"inputs: {len(inputs)} given; 1 to {codec.MAX_INPUTS} fit in a call.")
    names = task.inputs
    for place, values in enumerate(inputs):
        for name in names:
            value = values.get(name)
            if not isinstance(value, str) or not value or "\0" in value:
                _refuse(place, values, name, names)
        if len(values) > len(names):
            _refuse(place, values, names[0], names)


def _refuse(place: int, values: Mapping[str, Any], name: str, names: Sequence[str]) -> None:
    where = f"inputs[{place}]"
    for given in values:
        if given not in names:
            raise InvalidRequest(
                f"{where}: {given!r} is not one of {', '.join(names)}.", hint=did_you_mean(given, names)
            )
    value = values.get(name)
    if name not in values:
        raise InvalidRequest(f"{where}: it has no {name}.", hint=f"Give {' and '.join(names)}.")
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}: {name} is {type(value).__name__}, not text.")
    if not value:
        raise InvalidRequest(f"{where}: {name} is empty.", hint="Give a text.")
    raise InvalidRequest(f"{where}: {name} holds a NUL character.")


def checked_options(given: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Every option of the task, as given or with its default.

    Raises:
        InvalidRequest: one is unknown, or has a value that it cannot have.
    """
    for name, value in given.items():
        option = task.options.get(name)
        if option is None:
            raise InvalidRequest(f"{task.name} has no option {name!r}.", hint=did_you_mean(name, task.options))
        _check_option(name, value, option)
    return {name: given.get(name, option.default) for name, option in task.options.items()}


def _check_option(name: str, value: Any, option: TaskOption) -> None:
    if type(value) not in option.kinds:
        kinds = " or ".join(_KINDS[kind] for kind in option.kinds if kind in _KINDS)
        raise InvalidRequest(f"{name}: {value!r:.60} is not {kinds}.")
    if option.choices and value not in (*option.choices, None):
        raise InvalidRequest(
            f"{name}: {value!r:.60} is none of {', '.join(option.choices)}.", hint=did_you_mean(value, option.choices)
        )
    if type(value) is int and value < option.least:
        raise InvalidRequest(f"{name}: {value} is below {option.least}.")
    if type(value) is int and value > option.most:
        raise InvalidRequest(f"{name}: {value} is above {option.most}.")


_KINDS = {bool: "True or False", int: "a whole number", str: "a text", list: "a list"}


def find_task(info: EngineInfo) -> Task:
    """The task that is served."""
    return TASKS[info.task]
