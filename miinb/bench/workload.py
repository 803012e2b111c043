"""What a benchmark asks: prompts given or made to length, the loads they come at, and equal seeds for every arm."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miinb.config import BenchConfig, GenerationParams
from miinb.errors import InvalidValue

if TYPE_CHECKING:
    from pathlib import Path

#: Pieces of a text (or of two) as (start, end) offsets, special tokens as empty ones: what sizes a synthetic prompt.
Offsets = Callable[..., list[tuple[int, int]]]
#: Makes an input of an encoder task.
Maker = Callable[[random.Random], Any]

PROMPT_COLUMNS = ("prompt", "text", "query")
#: Where no tokenizer is at hand: English words a token, about.
WORDS_PER_TOKEN = 0.75
WORDS = " ".join(
    (
        "time year people way day man thing woman life child world school state family student group country problem",
        "hand part place case week company system program question work government number night point home water room",
        "mother area money story fact month lot right study book eye job word business issue side kind head house",
        "service friend father power hour game line end member law car city community name president team minute idea",
        "body information back parent face level office door health person art war history party result change morning",
        "reason research girl guy moment air teacher force education light garden river stone bridge music winter",
        "summer letter window table make take see come think look want give use find tell ask seem feel try leave call",
        "keep let begin help show hear play run move live believe bring happen write sit stand lose pay meet include",
        "continue set learn lead understand watch follow stop create speak read spend grow open walk win teach offer",
        "remember consider appear buy serve send the of and to in for on with at by from about into over after under",
        "again once here there when where why how all any both each few more most other some such only own same so",
        "than too very good new first last long great little old big high small large next early young important",
        "public bad able warm quiet green heavy simple strong clear",
    )
).split()

_HEROES = ("brave cat", "clever fox", "shy bear", "young owl", "quiet mouse", "happy dog", "little bird", "gentle frog")
#: Prompts for a first measurement: stories, which both default models continue.
STORY_PROMPTS = [f"Once upon a time, there was a {hero}" for hero in _HEROES]


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send. `offset_s` is its planned arrival after the block's start (open loop), else 0.

    `prompt` is a text; of encoder tasks a list of inputs.
    """

    prompt: Any
    prompt_id: str
    seed: int
    warmup: bool = False
    offset_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """One load of a workload: closed loop with `concurrency` requests in flight, or Poisson arrivals at `rate`."""

    index: int
    concurrency: int | None
    rate: float | None
    warmup: tuple[Job, ...]
    blocks: tuple[tuple[Job, ...], ...]  # arms alternate block by block

    @property
    def label(self) -> str:
        """The load in words."""
        return f"concurrency {self.concurrency}" if self.rate is None else f"{self.rate:g} requests/s"


def configure(workload: Any = None, fields: Mapping[str, Any] | None = None) -> BenchConfig:
    """The benchmark's configuration from what a user passes: prompts in any form, a BenchConfig, or single fields.

    Args:
        workload: None (synthetic prompts), a prompt, a list of prompts, a pandas Series or DataFrame with a column
            "prompt", a mapping of BenchConfig's fields, or a BenchConfig.
        fields: fields of BenchConfig; they win over `workload`.

    Raises:
        UnknownOption, InvalidValue: a field does not exist or has a value that it cannot have.
    """
    values = _values(workload) | dict(fields or {})
    config = BenchConfig.parse(values)
    given = config.model_fields_set
    if config.rate is not None and "concurrency" in given:
        raise InvalidValue("rate and concurrency exclude each other.", hint="rate is an open loop; leave one out.")
    if config.do_sample and "check" in given and config.check != "none":
        raise InvalidValue(
            "check: sampled answers of two engines differ by design.", hint="Use do_sample=False to compare answers."
        )
    if config.prompts is not None and not config.prompts:
        raise InvalidValue("prompts: the list is empty.")
    if config.prompts is not None and "prompt_tokens" in given:
        raise InvalidValue("prompt_tokens: prompts were given and have their own length.")
    most = 1 if config.rate is not None else max(config.concurrency)
    if "requests" not in given:
        all_prompts = math.ceil(len(config.prompts or ()) / config.batch_size)
        return config.model_copy(update={"requests": max(config.requests, 2 * most, all_prompts)})
    if config.requests < most:
        raise InvalidValue(
            f"requests: {config.requests} requests cannot keep {most} in flight.", hint=f"Use requests={2 * most}."
        )
    return config


def _values(workload: Any) -> dict[str, Any]:
    if workload is None:
        return {}
    if isinstance(workload, BenchConfig):
        return workload.model_dump(exclude_unset=True)
    if isinstance(workload, str):
        return {"prompts": [workload]}
    if isinstance(workload, Mapping):
        question = {"question", "context"} <= set(workload)  # an input, no fields of BenchConfig
        return {"prompts": [dict(workload)]} if question else dict(workload)
    if hasattr(workload, "columns"):
        if {"question", "context"} <= set(workload.columns):
            return {"prompts": workload[["question", "context"]].astype(str).to_dict("records")}
        return {"prompts": [str(text) for text in workload[_prompt_column(list(workload.columns))]]}
    if isinstance(workload, Iterable):
        prompts = list(workload)
        if all(isinstance(text, str) for text in prompts) or all(isinstance(text, Mapping) for text in prompts):
            return {"prompts": prompts}
    raise InvalidValue(
        f"workload: cannot take prompts from {type(workload).__name__}.",
        hint="Give a prompt, a list of prompts, a frame with a column 'prompt', or BenchConfig's fields.",
    )


def _prompt_column(columns: list[Any]) -> Any:
    found = [name for name in PROMPT_COLUMNS if name in columns] or (columns if len(columns) == 1 else [])
    if not found:
        raise InvalidValue(
            "workload: no column of the frame is named 'prompt'.", hint=f"Columns: {', '.join(map(str, columns))}."
        )
    return found[0]


def points(config: BenchConfig, offsets: Offsets | None = None, make: Maker | None = None) -> list[Point]:
    """The loads of a configuration with their requests; the same for every arm, and for every run of the same seed.

    Synthetic prompts differ from each other and from point to point, so that no prefix cache can help. Prompts that
    the user gives are used in order, and again when there are more requests.

    Args:
        config: the benchmark.
        offsets: the model's tokenizer for synthetic prompts; None sizes them by words.
        make: makes an input of an encoder task: requests are then lists of `config.batch_size` inputs.
    """
    loads = [(None, rate) for rate in config.rate] if config.rate else [(c, None) for c in config.concurrency]
    return [_point(config, index, c, rate, _asked(config, offsets, make)) for index, (c, rate) in enumerate(loads)]


def _asked(config: BenchConfig, offsets: Offsets | None, make: Maker | None) -> Callable[[random.Random, int], Any]:
    """What request number n asks: of the prompts that were given, or made."""
    given = config.prompts

    def one(rng: random.Random, number: int) -> Any:
        if given:
            return given[number % len(given)]
        return make(rng) if make else synthetic_prompt(config.prompt_tokens, rng, offsets)

    def many(rng: random.Random, number: int) -> list[Any]:
        return [one(rng, number * config.batch_size + place) for place in range(config.batch_size)]

    return many if make else one


def _point(
    config: BenchConfig,
    index: int,
    concurrency: int | None,
    rate: float | None,
    asked: Callable[[random.Random, int], Any],
) -> Point:
    rng = random.Random(f"{config.seed}/{index}")
    n_warmup = max(config.warmup, concurrency or 1) if config.warmup else 0
    arrival = 0.0
    jobs: list[Job] = []
    for number in range(n_warmup + config.requests):
        warm = number < n_warmup
        which = number if warm or not config.prompts else number - n_warmup
        prompt = asked(rng, which)
        prompt_id = f"p{which % len(config.prompts)}" if config.prompts else f"s{index}-{number}"
        arrival += rng.expovariate(rate) if rate and not warm else 0.0
        seed = (config.seed + number) % (1 << 62)
        jobs.append(Job(prompt, prompt_id, seed, warm, 0.0 if warm else arrival))
    rest = jobs[n_warmup:]
    half = len(rest) // 2
    # Two blocks an arm (A B B A) cancel a slow drift of the machine; a short block would only measure ramps.
    split = rate is None and half >= 4 * (concurrency or 1)
    blocks = (tuple(rest[:half]), tuple(rest[half:])) if split else (tuple(rest),)
    return Point(index, concurrency, rate, tuple(jobs[:n_warmup]), blocks)


def synthetic_prompt(tokens: int, rng: random.Random, offsets: Offsets | None) -> str:
    """Random English words of `tokens` tokens, special tokens included (about so many without a tokenizer)."""
    if offsets is None:
        return " ".join(rng.choices(WORDS, k=max(1, round(tokens * WORDS_PER_TOKEN))))
    for _ in range(8):
        text = " ".join(rng.choices(WORDS, k=tokens + 1))
        pieces = [piece for piece in offsets(text) if piece[1] > piece[0]]
        special = len(offsets("")) if tokens > 1 else 0
        keep = max(tokens - special, 1)
        text = text[: pieces[min(keep, len(pieces)) - 1][1]]
        if len(offsets(text)) == tokens:  # a cut word can become other tokens; draw again
            break
    return text


def generation_params(config: BenchConfig, job: Job) -> dict[str, Any]:
    """The arguments of one request: equal work for every arm, whatever the model would like to stop at."""
    params: dict[str, Any] = {
        "max_new_tokens": config.new_tokens,
        "min_new_tokens": config.new_tokens,
        "ignore_eos": True,
        "seed": job.seed,
    }
    if config.do_sample:
        params |= {"do_sample": True, "temperature": config.temperature}
    GenerationParams.parse(params)
    return params


def tokenizer_offsets(folder: Path | str | None) -> Offsets | None:
    """The offsets function of the tokenizer.json in `folder`; None without one."""
    import os

    path = os.path.join(folder, "tokenizer.json") if folder else ""
    if not os.path.isfile(path):
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)

    def offsets(text: str, second: str | None = None) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = tokenizer.encode(text, second).offsets
        return found

    return offsets
