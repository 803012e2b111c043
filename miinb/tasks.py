"""One row a task: what goes in, what comes out, whether it streams, and MII's names for it. Data, no behavior."""

from __future__ import annotations

from dataclasses import dataclass

from miinb.errors import InvalidValue, did_you_mean


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
    """

    name: str
    streams: bool
    inputs: tuple[str, ...]
    architectures: tuple[str, ...]
    auto_class: str
    image: bool = False


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
        ),
        Task("token-classification", False, ("query",), ("ForTokenClassification",), "AutoModelForTokenClassification"),
        Task(
            "question-answering",
            False,
            ("question", "context"),
            ("ForQuestionAnswering",),
            "AutoModelForQuestionAnswering",
        ),
        Task("fill-mask", False, ("query",), ("ForMaskedLM",), "AutoModelForMaskedLM"),
        Task("feature-extraction", False, ("query",), ("Model",), "AutoModel"),
        Task("text-to-image", False, ("query",), ("StableDiffusionPipeline",), "", image=True),
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
