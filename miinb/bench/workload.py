"""What a benchmark asks: prompts given or made to length, the loads they come at, and equal seeds for every arm."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miinb.bench.prompts import fields_of, prompts_of
from miinb.bench_fields import Tokens
from miinb.config import BenchConfig, GenerationParams
from miinb.errors import Cancelled, InvalidValue

if TYPE_CHECKING:
    from pathlib import Path

#: Pieces of a text (or of two) as (start, end) offsets, special tokens as empty ones: what sizes a synthetic prompt.
Offsets = Callable[..., list[tuple[int, int]]]
#: Makes an input of an encoder task, of so many tokens.
Maker = Callable[[random.Random, int], Any]

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

#: Most requests that arrive at a rate; all are made before the first is sent.
MOST_ARRIVALS = 1_000_000
#: Fewest requests of a load in a sweep by default: whether one gains 5 % on another cannot be told from a few.
SWEPT = 16

_HEROES = ("brave cat", "clever fox", "shy bear", "young owl", "quiet mouse", "happy dog", "little bird", "gentle frog")
#: Prompts for a first measurement: stories, which both default models continue.
STORY_PROMPTS = [f"Once upon a time, there was a {hero}" for hero in _HEROES]


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send. `offset_s` is its planned arrival after the block's start (open loop), else 0.

    `prompt` is a text; of encoder tasks a list of inputs. `new_tokens` is how long its answer has to be, `images` how
    many pictures it asks for, of seeds `seed`, `seed` + 1, ...
    """

    prompt: Any
    prompt_id: str
    seed: int
    warmup: bool = False
    offset_s: float = 0.0
    new_tokens: int = 0
    images: int = 1


class Endless(Sequence[Job]):
    """Jobs without an end, for a block that ends by the clock: made when they are needed, and kept for the next arm."""

    def __init__(self, make: Callable[[], Job]) -> None:
        self._make = make
        self._made: list[Job] = []

    def reserve(self, count: int, until: float = math.inf) -> None:
        """Make so many, until that time of `perf_counter`: a tokenizer is not to size prompts while the clock runs."""
        while len(self._made) < count and time.perf_counter() < until:
            self._made.append(self._make())

    def __iter__(self) -> Iterator[Job]:
        for place in itertools.count():
            self.reserve(place + 1)
            yield self._made[place]

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, place: Any) -> Any:
        return self._made[place]


@dataclass(frozen=True, slots=True)
class Point:
    """One load of a workload: closed loop with `concurrency` requests in flight, or Poisson arrivals at `rate`.

    Arms alternate block by block. `passes` has the pass that each block belongs to, `images` how many pictures each
    request asks for.
    """

    index: int
    concurrency: int | None
    rate: float | None
    warmup: tuple[Job, ...]
    blocks: tuple[Sequence[Job], ...]
    passes: tuple[int, ...] = ()
    images: int = 1

    @property
    def load(self) -> float:
        """The concurrency or the rate."""
        return float(self.concurrency or self.rate or 0)

    @property
    def label(self) -> str:
        """The load in words."""
        return load_words("concurrency" if self.rate is None else "rate", self.load)


def load_words(kind: str, load: float) -> str:
    """ "concurrency 8", "2.5 requests/s"."""
    return f"{load:g} requests/s" if kind == "rate" else f"concurrency {load:g}"


def configure(workload: Any = None, fields: Mapping[str, Any] | None = None) -> BenchConfig:
    """The benchmark's configuration from what a user passes: prompts in any form, a BenchConfig, or single fields.

    Args:
        workload: None (synthetic prompts), a prompt, a list of prompts, a pandas Series or DataFrame with a column
            "prompt", a file (.jsonl, .csv, .txt), a mapping of BenchConfig's fields, or a BenchConfig.
        fields: fields of BenchConfig; they win over `workload`.

    Raises:
        UnknownOption, InvalidValue: a field does not exist or has a value that it cannot have.
    """
    values = fields_of(workload) | dict(fields or {})
    if "prompts" in values:
        values["prompts"] = prompts_of(values["prompts"])
    _check_loads(config := BenchConfig.parse(values))
    given = config.model_fields_set
    if config.do_sample and "check" in given and config.check != "none":
        raise InvalidValue(
            "check: sampled answers of two engines differ by design.", hint="Use do_sample=False to compare answers."
        )
    if config.prompts is not None and not config.prompts:
        raise InvalidValue("prompts: the list is empty.")
    if config.prompts is not None and "prompt_tokens" in given:
        raise InvalidValue("prompt_tokens: prompts were given and have their own length.")
    if config.prompts and config.prompt_seed is not None:
        raise InvalidValue("prompt_seed: prompts were given; none is drawn.")
    in_flight = 1 if config.rate is not None or config.sweep else max(config.concurrency)
    if "requests" not in given:
        all_prompts = math.ceil(len(config.prompts or ()) / config.batch_size)
        least = SWEPT if config.sweep else config.requests
        return config.model_copy(update={"requests": max(least, 2 * in_flight, all_prompts)})
    if config.requests < in_flight:
        raise InvalidValue(
            f"requests: {config.requests} requests cannot keep {in_flight} in flight.",
            hint=f"Use requests={2 * in_flight}.",
        )
    return config


def _check_loads(config: BenchConfig) -> None:
    """Refuse loads, lengths of time and sweeps that are empty or exclude each other."""
    given = config.model_fields_set
    images = config.num_images_per_prompt
    for name, loads in (("concurrency", config.concurrency), ("rate", config.rate), ("num_images_per_prompt", images)):
        if loads is not None and not loads:
            raise InvalidValue(f"{name}: the list is empty.", hint="Give one load or more: 1,4,16.")
        if loads and len(set(loads)) < len(loads):
            raise InvalidValue(f"{name}: a load is there twice.", hint="repeat=2 measures all loads twice.")
    if config.sweep and len(images) > 1:
        raise InvalidValue("num_images_per_prompt: a sweep takes one number.", hint="Measure each in a run of its own.")
    if config.rate is not None and "concurrency" in given:
        raise InvalidValue("rate and concurrency exclude each other.", hint="rate is an open loop; leave one out.")
    if config.duration_s is not None and "requests" in given:
        raise InvalidValue("duration_s and requests exclude each other.", hint="Give the time or the number.")
    arrivals = max(config.rate or [0.0]) * (config.duration_s or 0.0)
    if arrivals > MOST_ARRIVALS:
        raise InvalidValue(
            f"rate: {arrivals:,.0f} requests would arrive in duration_s, more than {MOST_ARRIVALS:,}.",
            hint="Give a lower rate or a shorter time.",
        )
    if not config.sweep:
        if "sweep_limit" in given:
            raise InvalidValue("sweep_limit: acts only with sweep=True.")
        return
    other = "concurrency" if config.sweep == "rate" else "rate"
    if other in given and getattr(config, other) is not None:
        raise InvalidValue(f"{other}: not in a sweep of the {config.sweep}.", hint=f'Use sweep="{other}".')
    loads = config.rate or [1.0] if config.sweep == "rate" else config.concurrency
    if len(loads) > 1:
        raise InvalidValue(
            f"{config.sweep}: a sweep finds its loads itself.", hint="Give the one that it begins with, or no sweep."
        )
    if loads[0] > config.sweep_limit:
        raise InvalidValue(f"sweep_limit: {config.sweep_limit:g} is below the first load ({loads[0]:g}).")


def points(
    config: BenchConfig,
    offsets: Offsets | None = None,
    make: Maker | None = None,
    stop: threading.Event | None = None,
) -> list[Point]:
    """The loads of a configuration with their requests; the same for every arm, and for every run of the same seed.

    Args:
        config: the benchmark.
        offsets: the model's tokenizer for synthetic prompts; None sizes them by words.
        make: makes an input of an encoder task: requests are then lists of `config.batch_size` inputs.
        stop: once it is set no more requests are made.

    Raises:
        Cancelled: `stop` was set before all were made.
    """
    loads: list[tuple[str, float]] = [("rate", rate) for rate in config.rate or ()]
    loads = loads or [("concurrency", concurrency) for concurrency in config.concurrency]
    every = [(kind, load, images) for images in config.num_images_per_prompt for kind, load in loads]
    return [
        point_at(config, index, kind, load, offsets, make, stop, images=images)
        for index, (kind, load, images) in enumerate(every)
    ]


def point_at(
    config: BenchConfig,
    index: int,
    kind: str,
    load: float,
    offsets: Offsets | None = None,
    make: Maker | None = None,
    stop: threading.Event | None = None,
    *,
    images: int | None = None,
) -> Point:
    """One load ("concurrency" or "rate") with its requests, each for so many pictures (None: as configured).

    Synthetic prompts differ from each other and from point to point, so that a prefix cache helps only where an earlier
    run had the same. Prompts that the user gives are used in order, and again when there are more requests. Lengths
    that are drawn, and the arrivals, are those of the seed at every load: loads then differ by the load alone.
    """
    concurrency, rate = (int(load), None) if kind == "concurrency" else (None, load)
    source = _Source(config, index, rate, offsets, make, stop or threading.Event())
    source.images = images or config.num_images_per_prompt[0]
    n_warmup = max(config.warmup, concurrency or 1) if config.warmup else 0
    warmup = tuple(source.job(warm=True) for _ in range(n_warmup))
    source.warmed_up()
    blocks: list[Sequence[Job]] = []
    passes: list[int] = []
    for number in range(config.repeat):
        made = _blocks(config, source, concurrency or 1)
        blocks += made
        passes += [number] * len(made)
    return Point(index, concurrency, rate, warmup, tuple(blocks), tuple(passes), source.images)


def _blocks(config: BenchConfig, source: _Source, in_flight: int) -> list[Sequence[Job]]:
    """The blocks of one pass."""
    source.begin_pass()
    if config.duration_s is not None and source.rate is None:
        return [Endless(source.job)]
    if config.duration_s is not None:
        jobs = []
        while (job := source.job()).offset_s < config.duration_s:
            jobs.append(job)
        return [tuple(jobs) or (dataclasses.replace(job, offset_s=0.0),)]  # one at least
    count = config.requests
    if config.sweep:  # the same time for every load, about; a closed loop ramps up and down once
        count = max(count, math.ceil(4 * (source.rate or in_flight)))
    rest = [source.job() for _ in range(count)]
    half = len(rest) // 2
    # Two blocks an arm (A B B A) cancel a slow drift of the machine; a short block would only measure ramps.
    split = source.rate is None and half >= 4 * in_flight
    return [tuple(rest[:half]), tuple(rest[half:])] if split else [tuple(rest)]


class _Source:
    """Makes the jobs of a point, one after another."""

    def __init__(
        self,
        config: BenchConfig,
        index: int,
        rate: float | None,
        offsets: Offsets | None,
        make: Maker | None,
        stop: threading.Event,
    ) -> None:
        self.config, self.index, self.rate = config, index, rate
        self._offsets, self._make, self._stop = offsets, make, stop
        self._texts = random.Random(f"{config.seed if config.prompt_seed is None else config.prompt_seed}/{index}")
        self._lengths = random.Random(f"{config.seed}/lengths")
        self._arrivals = random.Random(f"{config.seed}/arrivals")
        self.images = 1  # of each request
        self._number = 0  # of all jobs
        self._place = 0  # in the pass, or in the warm-up
        self._at = 0.0

    def warmed_up(self) -> None:
        """Lengths begin anew, so that those of a point do not depend on how many warm it up."""
        self._lengths = random.Random(f"{self.config.seed}/lengths")

    def begin_pass(self) -> None:
        """A pass takes given prompts from the first one on, and its arrivals begin at 0."""
        self._place, self._at = 0, 0.0

    def job(self, *, warm: bool = False) -> Job:
        """The next one. Raises Cancelled where the benchmark has been stopped."""
        if self._stop.is_set():
            raise Cancelled("The benchmark was stopped.")
        given = self.config.prompts
        new_tokens = _drawn(self.config.new_tokens, self._lengths)
        prompt = self._prompt()
        prompt_id = f"p{self._place % len(given)}" if given else f"s{self.index}-{self._number}"
        if self.rate and not warm:
            self._at += self._arrivals.expovariate(1.0) / self.rate
        seed = (self.config.seed + self._number * self.images) % (1 << 62)  # no seed twice
        self._number += 1
        self._place += 1
        return Job(prompt, prompt_id, seed, warm, self._at, new_tokens, self.images)

    def _prompt(self) -> Any:
        if self._make is None:
            return self._one(self._place)
        size = self.config.batch_size
        return [self._one(self._place * size + place) for place in range(size)]

    def _one(self, place: int) -> Any:
        if given := self.config.prompts:
            return given[place % len(given)]
        tokens = _drawn(self.config.prompt_tokens, self._lengths)
        return self._make(self._texts, tokens) if self._make else synthetic_prompt(tokens, self._texts, self._offsets)


def _drawn(tokens: Tokens, rng: random.Random) -> int:
    """The number itself, or one of the range, each as likely."""
    return tokens if isinstance(tokens, int) else rng.randint(*tokens)


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


def check_texts(config: BenchConfig, task: str) -> None:
    """Refuse prompts that are no inputs of the task. Raises InvalidValue."""
    pairs = task == "question-answering"
    if any(isinstance(prompt, Mapping) != pairs for prompt in config.prompts or ()):
        kind = 'dictionaries of "question" and "context"' if pairs else "texts"
        raise InvalidValue(f"prompts: {task} takes {kind}.")


def generation_params(config: BenchConfig, job: Job) -> dict[str, Any]:
    """The arguments of one request: equal work for every arm, whatever the model would like to stop at."""
    params: dict[str, Any] = {
        "max_new_tokens": job.new_tokens,
        "min_new_tokens": job.new_tokens,
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
