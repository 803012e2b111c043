"""What `predict` gives: a dataclass for each answer of an encoder task, and `Predictions`, the list of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miinb.errors import InvalidRequest
from miinb.messages import PredictedEvent, from_dict
from miinb.tasks import TASKS

if TYPE_CHECKING:
    import numpy
    import pandas


@dataclass(frozen=True, slots=True)
class Label:
    """A class of a text and its probability."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Entity:
    """A labeled piece of a text; `start` and `end` count characters (None if the tokenizer does not know them)."""

    entity: str
    score: float
    word: str
    start: int | None
    end: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A span of the context that answers the question; "" (0 to 0) says that none does."""

    answer: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Fill:
    """A token for the mask, and the text with it."""

    token_str: str
    score: float
    token: int
    sequence: str


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """A text as a vector.

    Attributes:
        embedding: float32 [hidden]; with `pooling="none"` [tokens, hidden], a vector for each token.
    """

    embedding: numpy.ndarray

    def __eq__(self, other: object) -> bool:
        import numpy

        return isinstance(other, Embedding) and numpy.array_equal(self.embedding, other.embedding)


Prediction = Label | Entity | Answer | Fill | Embedding

#: What a task's predictions are.
PREDICTIONS: dict[str, type[Prediction]] = {
    "text-classification": Label,
    "token-classification": Entity,
    "question-answering": Answer,
    "fill-mask": Fill,
    "feature-extraction": Embedding,
}


@dataclass(frozen=True, slots=True)
class PredictTiming:
    """Where the time of a predict call went, in seconds.

    `e2e_s` is the client's clock. A list that went in several calls has the largest `queue_s` of them and the sums of
    the others; the calls ran together, so these can be more than `e2e_s`.
    """

    queue_s: float = 0.0
    preprocess_s: float = 0.0
    model_s: float = 0.0
    postprocess_s: float = 0.0
    e2e_s: float = 0.0


class Predictions(list[list[Any]]):
    """The answers of an encoder task: a list with one list for each input, in order.

    The inner lists hold `Label`, `Entity`, `Answer`, `Fill` or `Embedding`; for a text with several masks, one list
    of `Fill` for each mask.

    Args:
        answers: the lists.
        task: Hugging Face's name.
        inputs: a text for each list, or for question-answering a dictionary.
        timing: of the whole call.
        array: float32 [inputs, hidden]: the embeddings together.
    """

    def __init__(
        self,
        answers: Sequence[list[Any]] = (),
        *,
        task: str = "",
        inputs: Sequence[Any] = (),
        timing: PredictTiming | None = None,
        array: numpy.ndarray | None = None,
    ) -> None:
        super().__init__(answers)
        self.task = task
        self.inputs = list(inputs)
        self.timing = timing or PredictTiming()
        self._array = array

    def __getitem__(self, key: Any) -> Any:
        """The answers to one input, or the `Predictions` of some."""
        if not isinstance(key, slice):
            return super().__getitem__(key)
        array = None if self._array is None else self._array[key]
        answers = super().__getitem__(key)
        return Predictions(answers, task=self.task, inputs=self.inputs[key], timing=self.timing, array=array)

    @property
    def array(self) -> numpy.ndarray:
        """The embeddings as one float32 array [inputs, hidden].

        Raises:
            InvalidRequest: these are no embeddings, or each text has a vector for each of its tokens.
        """
        if self._array is None:
            ragged = self.task == "feature-extraction"
            what = "with pooling='none' texts differ in their number of vectors" if ragged else f"{self.task} has none"
            raise InvalidRequest(
                f"array: {what}.", hint="See [i][0].embedding of each." if ragged else "See .frame, or the list itself."
            )
        return self._array

    @property
    def frame(self) -> pandas.DataFrame:
        """One row for each prediction: `input`, `rank`, the input's text (or question and context), and the fields.

        An input without a prediction has no row. Fill-mask has a column `mask`: which of the text's masks. Embeddings
        have one row an input, with the vector.
        """
        import pandas

        texts = self._input_columns()
        cls = PREDICTIONS.get(self.task)
        places = {"fill-mask": ("input", "mask", "rank"), "feature-extraction": ("input",)}
        head = (*places.get(self.task, ("input", "rank")), *texts)
        columns = [*head, *(field.name for field in dataclasses.fields(cls))] if cls else None
        rows = [
            {"input": number, "mask": mask, "rank": rank, **self._named(number), **_fields(prediction)}
            for number, mask, rank, prediction in self.each()
        ]
        return pandas.DataFrame(rows, columns=columns)

    def each(self) -> Iterator[tuple[int, int, int, Any]]:
        """(input, mask, rank, prediction) of every prediction; mask is 0 where there are none or one."""
        for number, answers in enumerate(self):
            masks = answers if answers and isinstance(answers[0], list) else [answers]
            for mask, predictions in enumerate(masks):
                for rank, prediction in enumerate(predictions):
                    yield number, mask, rank, prediction

    def _input_columns(self) -> tuple[str, ...]:
        names = TASKS[self.task].inputs if self.task in TASKS else ()
        return names if len(names) > 1 else ("text",)

    def _named(self, number: int) -> dict[str, str]:
        if number >= len(self.inputs):
            return {}
        one = self.inputs[number]
        return dict(one) if isinstance(one, Mapping) else {"text": one}

    def __str__(self) -> str:
        from miinb.notebook.prediction_cards import predictions_card

        return predictions_card(self)[1]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # without it IPython prints any list as a list, whatever the bundle says

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from miinb.notebook.cards import bundle
        from miinb.notebook.prediction_cards import predictions_card

        return bundle(predictions_card(self))


def _fields(prediction: Any) -> dict[str, Any]:
    """A prediction's values by name (`dataclasses.asdict` would copy each vector)."""
    return {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}


def predictions_of(
    task: str, inputs: Sequence[Mapping[str, str]], event: PredictedEvent, e2e_s: float, *, pooled: bool = True
) -> Predictions:
    """The server's answers as the task's dataclasses.

    Args:
        task: Hugging Face's name.
        inputs: what was asked.
        event: what the server answered.
        e2e_s: how long that took.
        pooled: of embeddings: a text has one vector, not one for each token.
    """
    timing = PredictTiming(event.queue_s, event.preprocess_s, event.model_s, event.postprocess_s, e2e_s)
    texts = [next(iter(one.values())) if len(one) == 1 else dict(one) for one in inputs]
    cls = PREDICTIONS[task]
    if cls is not Embedding:
        answers = [[_prediction(cls, value) for value in values] for values in event.outputs]
        return Predictions(answers, task=task, inputs=texts, timing=timing)
    parts = vectors_of(event, pooled=pooled)
    array = parts if pooled else None
    return Predictions([[Embedding(part)] for part in parts], task=task, inputs=texts, timing=timing, array=array)


def vectors_of(event: PredictedEvent, *, pooled: bool) -> Any:
    """The vectors of each input: float32 [inputs, hidden], or a list of [tokens, hidden] where they are not pooled."""
    import numpy

    rows = numpy.frombuffer(event.vectors, numpy.float32).reshape(-1, event.columns)
    return rows if pooled else numpy.split(rows, numpy.cumsum(event.outputs)[:-1])


def _prediction(cls: type[Prediction], value: Any) -> Any:
    if isinstance(value, list):
        return [_prediction(cls, entry) for entry in value]
    if "entity_group" in value:  # entities that were put together from tokens
        value = {**value, "entity": value["entity_group"]}
    return from_dict(cls, value)
