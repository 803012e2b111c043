"""How a request's options say that an encoder's outputs are to be reduced. Data and checks; `heads.py` computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from miinb.errors import InvalidRequest, UnsupportedModel, did_you_mean
from miinb.tasks import FEW_LABELS, TASKS

Rows = Literal["first", "all", "wanted"]

#: Which of a sequence's tokens each task wants outputs of.
ROWS: dict[str, Rows] = {
    "text-classification": "first",
    "token-classification": "all",
    "question-answering": "all",
    "fill-mask": "wanted",
    "feature-extraction": "all",
}
#: Options of an `EncodeRequest` by task, and what they are without it; docs/internals.md says what they mean.
OPTIONS: dict[str, dict[str, Any]] = {
    "text-classification": {"function": "", "top_k": 0},
    "token-classification": {},
    "question-answering": {},
    "fill-mask": {"top_k": 5, "targets": ()},
    "feature-extraction": {"pooling": "mean", "normalize": False},
}
CHOICES = {"function": ("softmax", "sigmoid", "none"), "pooling": ("mean", "first", "none")}


@dataclass(frozen=True, slots=True, order=True)
class Reduction:
    """How a request's outputs are reduced.

    Attributes:
        task: Hugging Face's name.
        function: text-classification: what makes scores of logits.
        top_k: how many of the best scores, best first; 0: all, in the model's order.
        targets: fill-mask: the token ids to choose among; (): all.
        pooling: feature-extraction: how the tokens' vectors become one a sequence; "none": they do not.
        normalize: feature-extraction: vectors of length 1.
    """

    task: str
    function: str = "softmax"
    top_k: int = 0
    targets: tuple[int, ...] = ()
    pooling: str = "none"
    normalize: bool = False

    @property
    def one_a_sequence(self) -> bool:
        """Whether there is one row of results a sequence (else one a row of outputs)."""
        return self.task == "text-classification" or (self.task == "feature-extraction" and self.pooling != "none")


def check_task(task: str) -> None:
    """Raise UnsupportedModel for a task that encoders do not serve."""
    if task not in OPTIONS:
        raise UnsupportedModel(f"{task} is not served yet.", hint=f"Served: {', '.join(OPTIONS)}.")


def parse_reduction(task: str, options: Mapping[str, Any], *, function: str, vocab_size: int) -> Reduction:
    """The reduction of a request's options.

    Args:
        task: of the deployment.
        options: of the request; None is the default.
        function: what a text classifier's logits become unless the request says.
        vocab_size: `targets` are below it.

    Raises:
        InvalidRequest: an unknown or wrong option.
    """
    values = dict(OPTIONS[task])
    for name, value in options.items():
        if name not in values:
            raise InvalidRequest(f"{task} has no option {name!r}.", hint=did_you_mean(name, values))
        if value is not None:
            values[name] = value
    if "function" in values:
        values["function"] = values["function"] or function or "softmax"
    for name, known in CHOICES.items():
        if name in values and values[name] not in known:
            raise InvalidRequest(f"{name}: {values[name]!r} is not one of {', '.join(known)}.")
    top_k = values.get("top_k", 0)
    if not isinstance(top_k, int) or top_k < 0:
        raise InvalidRequest(f"top_k: {top_k!r} is no number of answers.")
    if "targets" in values:
        values["targets"] = _targets(values["targets"], vocab_size)
    return Reduction(task, **values)


def usual_reduction(task: str, *, function: str, vocab_size: int, labels: int) -> Reduction:
    """The reduction of a request without options of its own.

    Args:
        task: of the deployment.
        function: see `parse_reduction`.
        vocab_size: see `parse_reduction`.
        labels: how many a classifier has.
    """
    options = {name: option.default for name, option in TASKS[task].options.items() if name in OPTIONS[task]}
    if task == "text-classification" and 0 < labels <= FEW_LABELS:
        del options["top_k"]
    return parse_reduction(task, options, function=function, vocab_size=vocab_size)


def _targets(given: Any, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(given, (list, tuple)):
        raise InvalidRequest(f"targets: {given!r} is no list of token ids.")
    for token_id in given:
        if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"targets: {token_id!r} is no token id.")
    return tuple(given)
