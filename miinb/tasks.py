"""One row a task: what goes in, what comes out, whether it streams, and MII's names for it. Data, no behavior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from miinb.errors import InvalidValue, did_you_mean


@dataclass(frozen=True, slots=True)
class TaskOption:
    """An option of `predict`; names and meanings are those of transformers' pipelines.

    Attributes:
        default: what holds without it.
        kinds: types that its value may have.
        choices: the texts that it may be; empty: any.
        least: the smallest number that it may be.
        most: the largest.
    """

    default: Any
    kinds: tuple[type, ...]
    choices: tuple[str, ...] = ()
    least: int = 0
    most: int = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Task:
    """A row of `TASKS`.

    Attributes:
        name: Hugging Face's name.
        streams: answers come token by token (`generate`, `stream`) rather than at once (`predict`).
        inputs: keys of one input, in MII's words (`query({...})`).
        architectures: endings of the class names in config.json that serve this task.
        auto_class: transformers' Auto class that loads it.
        image: the answer is an image.
        options: of a task that answers at once.
    """

    name: str
    streams: bool
    inputs: tuple[str, ...]
    architectures: tuple[str, ...]
    auto_class: str
    image: bool = False
    options: Mapping[str, TaskOption] = field(default_factory=dict)

    @property
    def asked_by(self) -> str:
        """The method of a session that asks for it."""
        return "generate" if self.streams or self.image else "predict"


#: diffusers' classes that make pictures. A model of any of them is asked in one way: a picture to begin from may come
#: with the prompt, or must.
_PIPELINES = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"),
)
_TRUNCATION = TaskOption(False, (bool,))  # cut off what the model cannot take, which is an error otherwise

#: A text classifier of no more labels gives the scores of all, and the frontend chooses the best: then requests with
#: another `top_k` are computed alike.
FEW_LABELS = 64
_LABELS = {
    "top_k": TaskOption(1, (int, NoneType), least=1),
    "function_to_apply": TaskOption(None, (str, NoneType), ("sigmoid", "softmax", "none")),
    "truncation": _TRUNCATION,
}
_ENTITIES = {
    "aggregation_strategy": TaskOption("none", (str,), ("none", "simple", "first", "average", "max")),
    "ignore_labels": TaskOption(("O",), (list, tuple)),
    "stride": TaskOption(None, (int, NoneType)),  # tokens that windows of a long text share; None: no windows
    "truncation": _TRUNCATION,
}
_ANSWERS = {
    "top_k": TaskOption(1, (int,), least=1),
    "doc_stride": TaskOption(None, (int, NoneType)),  # tokens that windows share; None: 128, or half a window
    "max_answer_len": TaskOption(15, (int,), least=1),  # tokens
    "max_seq_len": TaskOption(None, (int, NoneType), least=1),  # tokens of a window with the question; None: 384
    "max_question_len": TaskOption(None, (int, NoneType), least=1),  # tokens; the rest of the question is cut off
    "handle_impossible_answer": TaskOption(False, (bool,)),
    "align_to_words": TaskOption(True, (bool,)),
}
_FILLS = {
    "top_k": TaskOption(5, (int,), least=1),
    "targets": TaskOption(None, (str, list, tuple, NoneType)),
    "truncation": _TRUNCATION,
}
_VECTORS = {
    "pooling": TaskOption("mean", (str,), ("mean", "first", "none")),
    "normalize": TaskOption(False, (bool,)),
    "truncation": _TRUNCATION,
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("text-generation", True, ("query",), ("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM"),
        Task(
            "conversational",
            True,
            ("text", "conversation_id", "past_user_inputs", "generated_responses"),
            ("ForCausalLM", "LMHeadModel"),
            "AutoModelForCausalLM",
        ),
        Task(
            "text-classification",
            False,
            ("query",),
            ("ForSequenceClassification",),
            "AutoModelForSequenceClassification",
            options=_LABELS,
        ),
        Task(
            "token-classification",
            False,
            ("query",),
            ("ForTokenClassification",),
            "AutoModelForTokenClassification",
            options=_ENTITIES,
        ),
        Task(
            "question-answering",
            False,
            ("question", "context"),
            ("ForQuestionAnswering",),
            "AutoModelForQuestionAnswering",
            options=_ANSWERS,
        ),
        Task("fill-mask", False, ("query",), ("ForMaskedLM",), "AutoModelForMaskedLM", options=_FILLS),
        Task("feature-extraction", False, ("query",), ("Model",), "AutoModel", options=_VECTORS),
        Task("text-to-image", False, ("query",), _PIPELINES, "", image=True),
    )
}

#: Names that users write for a task's own name.
ALIASES = {
    "embeddings": "feature-extraction",
    "ner": "token-classification",
    "sentiment-analysis": "text-classification",
}


def find_task(name: str) -> Task:
    """The row of a task's name or alias.

    Raises:
        InvalidValue: there is no such task; the near name is in the hint.
    """
    task = TASKS.get(ALIASES.get(name, name))
    if task is None:
        raise InvalidValue(f"task: there is no task {name!r}.", hint=did_you_mean(name, TASKS))
    return task


def tasks_of(architecture: str) -> tuple[str, ...]:
    """Names of the tasks that a model class of config.json's "architectures" serves."""
    named = [
        t.name for t in TASKS.values() if any(architecture.endswith(end) for end in t.architectures if end != "Model")
    ]
    if not named and architecture.endswith("Model"):
        named = ["feature-extraction"]
    return tuple(named)
