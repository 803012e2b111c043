"""Text to train the tiny encoders on: a seeded grammar of little facts that knows its entities, moods and answers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from miinb.demo.stories import CAPITALS, COLORS, KINDS, NAMES, PLACES, THINGS

SURNAMES = ("Berg", "Lind", "Moreau", "Rossi", "Stone", "Vogel")
COUNTRIES = {**CAPITALS, "New Zealand": "Wellington", "South Korea": "Seoul"}
GOOD = ("wonderful", "lovely", "great", "delicious", "perfect", "brilliant")
BAD = ("terrible", "awful", "boring", "broken", "horrible", "useless")
MOODS = ("negative", "positive")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@dataclass
class Text:
    """A text that grows word by word.

    Attributes:
        words: with punctuation as words of their own.
        tags: the entity's tag of each word.
        questions: question, and the words (first, last) that answer it.
    """

    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    questions: list[tuple[str, tuple[int, int]]] = field(default_factory=list)

    def add(self, text: str, entity: str = "O") -> tuple[int, int]:
        """Words to the end, all of one entity ("PER", "LOC") or none; where they stand."""
        new = text.split()
        first = len(self.words)
        self.words += new
        self.tags += ["O"] * len(new) if entity == "O" else [f"{'I' if i else 'B'}-{entity}" for i in range(len(new))]
        return first, len(self.words) - 1

    def __str__(self) -> str:
        return " ".join(self.words)


def person(rng: random.Random) -> str:
    """A name, often with a surname."""
    return f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}" if rng.random() < 0.6 else rng.choice(NAMES)


def facts(rng: random.Random) -> Text:
    """Two to four sentences on different persons, countries and things."""
    text = Text()
    names = rng.sample(NAMES, 4)
    for name in names[: rng.randint(2, 4)]:
        who = f"{name} {rng.choice(SURNAMES)}" if rng.random() < 0.5 else name
        rng.choice((_capital, _home, _find))(text, who, rng)
    return text


def _capital(text: Text, who: str, rng: random.Random) -> None:
    country, capital = rng.choice(list(COUNTRIES.items()))
    if rng.random() < 0.5:
        place = text.add(capital, "LOC")
        text.add("is the capital of")
        text.add(country, "LOC")
    else:
        text.add("The capital of")
        text.add(country, "LOC")
        text.add("is")
        place = text.add(capital, "LOC")
    text.add(".")
    text.questions.append((f"What is the capital of {country} ?", place))


def _home(text: Text, who: str, rng: random.Random) -> None:
    country, capital = rng.choice(list(COUNTRIES.items()))
    text.add(who, "PER")
    text.add("lives in")
    place = text.add(capital, "LOC")
    if rng.random() < 0.4:
        text.add("in")
        text.add(country, "LOC")
    text.add(".")
    text.questions.append((f"Where does {who} live ?", place))


def _find(text: Text, who: str, rng: random.Random) -> None:
    text.add(who, "PER")
    text.add(f"the {rng.choice(KINDS)} went to")
    where = text.add(f"the {rng.choice(PLACES)}")
    text.add("and found")
    what = text.add(f"a {rng.choice(COLORS)} {rng.choice(THINGS)}")
    text.add(".")
    text.questions += [(f"What did {who} find ?", what), (f"Where did {who} go ?", where)]


def opinion(rng: random.Random) -> tuple[str, int]:
    """A sentence or two of one mood, and the mood's place in `MOODS`."""
    mood = rng.randrange(2)
    words = (BAD, GOOD)[mood]
    thing, name = rng.choice(THINGS), rng.choice(NAMES)
    return rng.choice(
        (
            f"What a {rng.choice(words)} {thing} !",
            f"The {thing} was {rng.choice(words)} .",
            f"{name} found the {thing} {rng.choice(words)} and {rng.choice(words)} .",
            f"This {rng.choice(COLORS)} {thing} is {rng.choice(words)} . {name} thinks so too .",
        )
    ), mood


def vocabulary() -> list[str]:
    """Every word of the grammar in lower case, then letters and the pieces of other words."""
    rng = random.Random(0)
    words: set[str] = set()
    for _ in range(4000):
        text = facts(rng)
        words.update(str(text).lower().split())
        words.update(" ".join(question for question, _ in text.questions).lower().split())
        words.update(opinion(rng)[0].lower().split())
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    return [*sorted(words - {*letters}), *letters, *(f"##{letter}" for letter in letters)]
