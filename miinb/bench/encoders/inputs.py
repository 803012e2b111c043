"""Inputs of known lengths: token ids for what is measured in process, texts for what begins with a text."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miinb.bench.encoders.suites import Workload
from miinb.bench.workload import WORDS, synthetic_prompt, tokenizer_offsets
from miinb.errors import InvalidValue

#: Tokens of a question, at most a quarter of the whole.
QUESTION = 12
#: Ids at both ends of a made-up vocabulary are special tokens.
SPECIAL = 8


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenized text: ids, their types, and the place of the mask (None without one)."""

    token_ids: list[int]
    type_ids: list[int]
    mask: int | None = None


class Inputs:
    """Makes inputs for a model's folder and a task.

    Args:
        folder: with config.json and the tokenizer.
        task: Hugging Face's name.
    """

    def __init__(self, folder: Path, task: str) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        self._task = task
        self._vocab = tokenizer.get_vocab_size()
        mask = settings.get("mask_token")
        self._mask_token = mask["content"] if isinstance(mask, dict) else mask
        self._mask = tokenizer.get_vocab().get(self._mask_token or "", 0)
        self._pair = tokenizer.encode("", "").ids
        self._single = tokenizer.encode("").ids
        self._types = "token_type_ids" in settings.get("model_input_names", ())
        self._offsets = tokenizer_offsets(folder)

    def sequences(self, lengths: Sequence[int], seed: object) -> list[Encoded]:
        """Random token ids with the task's special tokens, one sequence a length."""
        rng = random.Random(f"{seed}/ids")
        return [self._sequence(length, rng) for length in lengths]

    def _sequence(self, length: int, rng: random.Random) -> Encoded:
        def draw(count: int) -> list[int]:
            return [rng.randrange(SPECIAL, self._vocab - SPECIAL) for _ in range(count)]

        if self._task == "question-answering":
            asked = min(QUESTION, length // 4)
            first, middle, last = self._pair[:1], self._pair[1:-1], self._pair[-1:]
            rest = max(length - asked - len(self._pair), 1)
            ids = [*first, *draw(asked), *middle, *draw(rest), *last]
            before = len(first) + asked + len(middle)
            return Encoded(ids, [0] * before + [1] * (len(ids) - before) if self._types else [])
        ids = [self._single[0], *draw(max(length - 2, 1)), self._single[-1]]
        if self._task != "fill-mask":
            return Encoded(ids, [])
        place = len(ids) // 2
        ids[place] = self._mask
        return Encoded(ids, [], place)

    def texts(self, lengths: Sequence[int], seed: object) -> list[Any]:
        """Inputs of `Session.predict` made of English words, one a length (exact but for the mask's neighborhood)."""
        rng = random.Random(f"{seed}/texts")
        return [self.text(length, rng) for length in lengths]

    def one_each(self, workload: Workload) -> list[tuple[int, Any]]:
        """The number of each request of one text (negative: a warm-up), and its text: made before the clock runs."""
        numbers = range(-workload.warmup, workload.repeats)
        return [(number, *self.texts(workload.lengths, f"{workload.seed}/{number}")) for number in numbers]

    def text(self, length: int, rng: random.Random) -> Any:
        """One of them. Raises InvalidValue if the tokenizer has no mask and the task needs one."""
        if self._task == "question-answering":
            asked = min(QUESTION, max(length // 4, 1))
            context = synthetic_prompt(max(length - asked - len(self._pair) + len(self._single), 4), rng, self._offsets)
            return {"question": " ".join(rng.choices(WORDS, k=asked)), "context": context}
        text = synthetic_prompt(length, rng, self._offsets)
        if self._task != "fill-mask":
            return text
        if not self._mask_token:
            raise InvalidValue("The tokenizer has no mask token.", hint="Give prompts with a mask of their own.")
        words = text.split(" ")
        words[len(words) // 2] = self._mask_token
        return " ".join(words)
