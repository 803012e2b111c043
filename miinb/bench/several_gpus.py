"""What two linked GPUs give: tensor-parallel ranks and replicas against one GPU, in one run on equal work.

`python -m miinb.bench.several_gpus` deploys shapes of public models with random weights, lets their arms take turns on
the same requests, and prints one table: time per token of one GPU, of two ranks, and of Hugging Face (one GPU, and
`device_map="auto"` over all); tokens a second of one replica and two, saturated; whether two ranks give one rank's
greedy tokens; what the death of a replica costs. `miinb.bench.collectives` has the sums alone. Rows can be chosen
(`--rows`), so that a short loan of a machine is enough; `--tiny --device cpu` shows anywhere that everything runs.

With `--out` runs are stored with their charts, and what is no run (the tokens, the death) as lines of `outcomes.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from miinb import models
from miinb.bench import charts, device_map, presets
from miinb.bench.environment import environment
from miinb.bench.killing import Death, free_bytes, kill_one
from miinb.bench.records import Runs, utc_now
from miinb.bench.runner import compare
from miinb.bench.store import append_rows
from miinb.bench.workload import STORY_PROMPTS
from miinb.demo import tiny_model
from miinb.errors import InvalidValue, MiinbError
from miinb.session import Session
from miinb.writing import check_folder, writing

OUTCOMES = "outcomes.jsonl"
ROWS = ("equal", "split", "replicas", "death")
MODELS = ("llama-8b", "gpt-neox-20b")
#: Of each stream that runs when a replica is killed, if the model has as many: it must not be complete by then.
DEATH_TOKENS = 4000


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """How much is asked for.

    Attributes:
        prompt_tokens, new_tokens: of each request.
        requests: of each arm of "split", one after another.
        rows: that a replica computes at once; "replicas" keeps four times as many requests in flight, so that each of
            two always has as many again that wait.
        passes: requests of "replicas" for each one in flight.
    """

    prompt_tokens: int = 128
    new_tokens: int = 128
    requests: int = 4
    rows: int = 128
    passes: int = 2


TINY = Sizes(8, 8, 2, 2, 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where the arms run."""

    device: str
    dtype: str
    folder: Path
    tiny: bool

    def model(self, name: str) -> Path:
        """A folder with a preset's configuration."""
        return presets.write_into(self.folder, name, small=self.tiny)

    def session(self, model: Path, **fields: Any) -> Session:
        """A deployment of random weights, or of a checkpoint's (`load_format="auto"`)."""
        values: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "load_format": "dummy"}
        if self.device == "cpu":
            values["options"] = {"threads": 1}
        elif not fields.get("gpus"):
            values["gpus"] = list(range(fields.get("tensor_parallel", 1)))
        return Session(model, "text-generation", **values | fields)


def started(stack: ExitStack, starts: Mapping[str, Callable[[], Session]]) -> dict[str, Session]:
    """Sessions that start at the same time, as most of a start is waiting; the stack ends them.

    Raises:
        MiinbError: one did not start.
    """
    with ThreadPoolExecutor(len(starts)) as pool:
        futures = {name: pool.submit(start) for name, start in starts.items()}
    for future in futures.values():
        if future.exception() is None:
            stack.enter_context(future.result())
    return {name: future.result() for name, future in futures.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Equality:
    """Of so many prompts those whose greedy tokens were the same on one rank and on two, `tokens` each."""

    equal: int
    prompts: int
    tokens: int

    @property
    def wrong(self) -> str:
        """What is not as it must be, if anything."""
        return "" if self.equal == self.prompts else "Two ranks give other tokens than one."

    def words(self) -> Iterator[str]:
        """In words."""
        yield f"{self.equal} of {self.prompts} prompts, {self.tokens} greedy tokens each: equal on 1 and 2 ranks"


def equal(place: Place, tokens: int = 64) -> Equality:
    """Whether two ranks give the greedy tokens of one, with trained weights, in fp32."""
    fields: dict[str, Any] = {"dtype": "fp32", "load_format": "auto", "max_length": 512}
    start = partial(place.session, tiny_model(), **fields)
    with ExitStack() as stack:
        one, two = started(stack, {"1 rank": start, "2 ranks": partial(start, tensor_parallel=2)}).values()
        asked = {"max_new_tokens": tokens, "ignore_eos": True}
        alike = [
            one.generate(prompt, **asked).token_ids == two.generate(prompt, **asked).token_ids
            for prompt in STORY_PROMPTS
        ]
    return Equality(sum(alike), len(alike), tokens)


def split(place: Place, name: str, sizes: Sizes) -> Runs:
    """One GPU, two ranks, and Hugging Face on one GPU, one request at a time."""
    model = place.model(name)
    length = sizes.prompt_tokens + sizes.new_tokens + 8
    fields: dict[str, Any] = {"max_batch": 1, "max_length": length}
    start = partial(place.session, model, **fields)
    with ExitStack() as stack:
        arms = started(
            stack,
            {
                "1 rank": start,
                "2 ranks": partial(start, tensor_parallel=2),
                "Hugging Face": partial(start, engine="baseline"),
            },
        )
        runs = compare(
            arms,
            check="none",
            prompt_tokens=sizes.prompt_tokens,
            new_tokens=sizes.new_tokens,
            requests=sizes.requests,
            warmup=1,
        )
        (line,) = [line for line in arms["2 ranks"].plan().lines if line.what == "all-reduce"]
    (env,) = runs.env.values()
    env |= {"preset": model.name, "all_reduce": line.choice}
    try:
        env["device_map_token_s"] = device_map.measure(
            model, place.dtype, prompt_tokens=sizes.prompt_tokens, new_tokens=sizes.new_tokens
        )
    except RuntimeError as error:
        env["device_map_error"] = str(error)
    return runs


def split_words(runs: Runs) -> Iterator[str]:
    """The time per token of each arm, and ratios."""
    times = runs.summary.set_index("arm")["tpot_p50_s"]
    one, two, plain = (1e3 * float(times[arm]) for arm in ("1 rank", "2 ranks", "Hugging Face"))
    env = next(iter(runs.env.values()))
    yield f"1 rank {one:.3f} ms/token, 2 ranks {two:.3f} ({one / two:.2f}x; sums: {env['all_reduce']})"
    spread = 1e3 * env.get("device_map_token_s", float("nan"))
    best = min(plain, spread) if spread == spread else plain
    told = f"{spread:.3f}" if spread == spread else env["device_map_error"]
    yield f"Hugging Face {plain:.3f} on one, device_map='auto' {told}: 2 ranks are {best / two:.2f}x the faster"


def replicas(place: Place, name: str, sizes: Sizes) -> Runs:
    """One replica and two under so many requests at once that both have all that they can compute."""
    model, flight = place.model(name), 4 * sizes.rows
    length = sizes.prompt_tokens + sizes.new_tokens + 8
    fields: dict[str, Any] = {"max_batch": sizes.rows, "max_length": length}
    gpus = {} if place.device == "cpu" else {"gpus": [[0], [1]]}
    start = partial(place.session, model, **fields)
    with ExitStack() as stack:
        runs = compare(
            started(stack, {"1 replica": start, "2 replicas": partial(start, replicas=2, **gpus)}),
            check="none",
            prompt_tokens=sizes.prompt_tokens,
            new_tokens=sizes.new_tokens,
            concurrency=[flight],
            requests=flight * sizes.passes,
        )
    (env,) = runs.env.values()
    env["preset"] = model.name
    return runs


def replicas_words(runs: Runs) -> Iterator[str]:
    """Tokens a second of each arm, and their ratio."""
    rates = runs.summary.set_index("arm")["output_tok_s"]
    one, two = float(rates["1 replica"]), float(rates["2 replicas"])
    flight = int(runs.summary["concurrency"].iloc[0])
    yield f"{flight} requests in flight: {one:,.0f} tokens/s by 1 replica, {two:,.0f} by 2 ({two / one:.2f}x)"


def death(place: Place, name: str) -> Death:
    """Two replicas under load; one is killed."""
    gpus = {} if place.device == "cpu" else {"gpus": [[0], [1]]}
    model = place.model(name)
    spec = models.inspect(model, load_format="dummy").spec
    length = min(DEATH_TOKENS + 64, spec.max_length if spec else DEATH_TOKENS + 64)
    free_before = free_bytes()
    with place.session(model, replicas=2, max_batch=8, max_length=length, **gpus) as session:
        return kill_one(session, streams=8, new_tokens=length - 64, free_before=free_before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print as it goes, and store the runs if asked. Raises SystemExit where a row failed."""
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.several_gpus", description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--models",
        nargs="+",
        choices=presets.DECODERS,
        default=list(MODELS),
        help="of split; replicas and death take the first",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few tokens: shows that everything runs")
    parser.add_argument("--out", type=Path, help="folder to append the runs to (miinb.load_runs reads it), with charts")
    options = parser.parse_args(arguments)
    if options.out is not None:
        try:
            check_folder(options.out)
        except InvalidValue as error:
            parser.error(f"--out: {error.message}")
    sizes = TINY if options.tiny else Sizes()
    with tempfile.TemporaryDirectory(prefix="miinb-several-gpus-") as folder:
        place = Place(options.device, options.dtype, Path(folder), options.tiny)
        first = options.models[0]
        work: list[tuple[str, Callable[[], Iterable[str]]]] = []
        if "equal" in options.rows:
            work.append(("greedy tokens", partial(_kept, partial(equal, place), tiny_model().name, options.out)))
        if "split" in options.rows:
            for name in options.models:
                work.append(
                    (f"tensor parallel, {name}", partial(_told, split, split_words, place, name, sizes, options.out))
                )
        if "replicas" in options.rows:
            work.append(
                (f"replicas, {first}", partial(_told, replicas, replicas_words, place, first, sizes, options.out))
            )
        if "death" in options.rows:
            killed = place.model(first).name
            work.append((f"kill -9, {first}", partial(_kept, partial(death, place, first), killed, options.out)))
        failed = [title for title, row in work if not _say(title, row)]
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def _say(title: str, row: Callable[[], Iterable[str]]) -> bool:
    """Do one row's work; a row that fails says so (and it is False), and the others are measured."""
    begin, lines, done = time.monotonic(), list[str](), True
    try:
        lines.extend(row())  # which keeps those before an error
    except MiinbError as error:
        lines.append(f"failed: {type(error).__name__}: {error.line()}")
        done = False
    print(f"{title}  [{time.monotonic() - begin:.0f} s]", *lines, sep="\n  ", flush=True)
    return done


def _kept(measure: Callable[[], Equality | Death], model: str, out: Path | None) -> Iterator[str]:
    """The words of a row that is no run; it is a line of `OUTCOMES` where it is to be stored.

    Raises:
        MiinbError: it could not be stored, or is not as it must be.
    """
    outcome = measure()
    yield from outcome.words()
    if out is not None:
        facts = {"created": utc_now(), "what": type(outcome).__name__.lower(), "model": model}
        facts |= dataclasses.asdict(outcome) | {"right": not outcome.wrong, "environment": environment()}
        with writing(out / OUTCOMES):
            out.mkdir(parents=True, exist_ok=True)
            append_rows(out / OUTCOMES, [facts])
    if outcome.wrong:
        raise MiinbError(outcome.wrong)


def _told(
    measure: Callable[[Place, str, Sizes], Runs],
    words: Callable[[Runs], Iterable[str]],
    place: Place,
    name: str,
    sizes: Sizes,
    out: Path | None,
) -> Iterator[str]:
    """A row's words; its run is stored where it is to be."""
    runs = measure(place, name, sizes)
    yield from words(runs)
    if out is not None:
        runs.save(out)
        draw(runs, out)


def draw(runs: Runs, folder: Path) -> Path:
    """The chart of a run: time per token of each arm of "split", tokens a second by replicas."""
    (env,) = runs.env.values()
    if runs.summary["replicas"].nunique() > 1:
        return charts.save(
            charts.draw("parallel_scaling", runs, by="replicas"), folder / f"replicas-{env['preset']}.png"
        )
    return charts.save(charts.draw("latency", runs, metric="tpot_s"), folder / f"split-{env['preset']}.png")


if __name__ == "__main__":
    main()
