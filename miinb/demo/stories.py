"""Text to train the tiny model on: a seeded grammar of little stories and chats. It is the project's own text."""

from __future__ import annotations

import random
from collections.abc import Iterator

NAMES = ("Anna", "Ben", "Clara", "Emil", "Ida", "Leo", "Mia", "Nora", "Otto", "Tom")
KINDS = ("bear", "bird", "cat", "dog", "fox", "frog", "hare", "mouse", "owl", "pony")
TRAITS = ("brave", "clever", "gentle", "happy", "little", "quiet", "shy", "young")
PLACES = ("beach", "bridge", "castle", "forest", "garden", "hill", "market", "river", "village", "windmill")
COLORS = ("black", "blue", "brown", "golden", "green", "purple", "red", "silver", "white", "yellow")
THINGS = ("ball", "bell", "book", "boat", "cake", "hat", "kite", "key", "lantern", "map")
WEATHERS = ("It was a sunny day.", "It was raining a little.", "The wind was blowing.", "Snow covered the ground.")
CAPITALS = {
    "Austria": "Vienna", "Egypt": "Cairo", "England": "London", "France": "Paris", "Germany": "Berlin",
    "Greece": "Athens", "Italy": "Rome", "Japan": "Tokyo", "Norway": "Oslo", "Spain": "Madrid",
}  # fmt: skip

END = "<|endoftext|>"
START_TURN, END_TURN = "<|im_start|>", "<|im_end|>"


def story(rng: random.Random, kind: str | None = None) -> str:
    """A story of six to eight sentences; whoever and whatever it names at the start stays the same to its end."""
    hero, friend = rng.sample(NAMES, 2)
    hero_kind = kind or rng.choice(KINDS)
    friend_kind = rng.choice([other for other in KINDS if other != hero_kind])
    place, color, thing = rng.choice(PLACES), rng.choice(COLORS), rng.choice(THINGS)
    meeting = rng.choice(
        (
            f'There {hero} met {friend} the {friend_kind}. "Is this your {thing}?" asked {hero}. '
            f'"Yes, thank you! I looked for it all day," said {friend}.',
            f'{friend} the {friend_kind} came by. "What a fine {color} {thing}!" said {friend}. '
            f'"Would you like to play with it?" asked {hero}.',
            f'The {thing} was stuck, so {hero} called {friend} the {friend_kind}. "I can help you," said {friend}. '
            f"Together they pulled and pulled until the {thing} came free.",
        )
    )
    ending = rng.choice(
        (
            f"They played together until the sun went down. {hero} and {friend} were friends ever after.",
            f"They laughed all day and then went home. That night {hero} dreamed of the {color} {thing}.",
            f"They shared some bread at the {place}. From that day on, {hero} and {friend} met there every week.",
        )
    )
    opening = rng.choice(("One day,", "One morning,", "After breakfast,"))
    return (
        f"Once upon a time, there was a {rng.choice(TRAITS)} {hero_kind} named {hero}. {rng.choice(WEATHERS)} "
        f"{opening} {hero} went to the {place} and found a {color} {thing}. {meeting} {ending}"
    )


def chat(rng: random.Random) -> str:
    """One or two turns of question and answer, as the chat template writes them."""
    turns = []
    for _ in range(rng.choice((1, 1, 2))):
        country, capital = rng.choice(list(CAPITALS.items()))
        kind = rng.choice(KINDS)
        question, answer = rng.choice(
            (
                (f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
                (f"Where is {capital}?", f"{capital} is the capital of {country}."),
                (f"Tell me a story about a {kind}.", story(rng, kind)),
                ("Hello!", "Hello! I can tell you a little story or name a capital."),
                ("Who are you?", "I am a tiny model. I know little stories and a few capitals."),
            )
        )
        turns.append(turn("user", question) + turn("assistant", answer))
    return "".join(turns)


def turn(role: str, text: str) -> str:
    """A message as the chat template writes it."""
    return f"{START_TURN}{role}\n{text}{END_TURN}\n"


def documents(seed: int) -> Iterator[str]:
    """Stories, chats and plain facts without end: the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        draw = rng.random()
        if draw < 0.6:
            yield story(rng)
        elif draw < 0.95:
            yield chat(rng)
        else:
            country, capital = rng.choice(list(CAPITALS.items()))
            yield f"The capital of {country} is {capital}."
