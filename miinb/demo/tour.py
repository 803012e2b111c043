"""The demonstration: a model is fetched, served, asked, and measured against plain transformers; or makes pictures."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from miinb.config import BenchConfig, parse_generation
from miinb.demo import MODEL_VARIABLE, default_model, tiny_model
from miinb.demo.picture_tour import check_folder, picture_tour, title
from miinb.errors import InvalidValue, MiinbError

if TYPE_CHECKING:
    from miinb.session import Session

PROMPT, NEW_TOKENS = "Once upon a time,", 64
NOTEBOOK, IMAGE_NOTEBOOK = "01_first_answer.ipynb", "06_images.ipynb"
NOTEBOOKS = Path(__file__).with_name("notebooks")
INTERRUPTED = 130  # a shell's exit status after Ctrl-C


def parser() -> argparse.ArgumentParser:
    """The options of `miinb demo`."""
    made = argparse.ArgumentParser(prog="miinb demo", description=__doc__)
    default = "SmolLM2-135M-Instruct, fetched once; of pictures a tiny Stable Diffusion inside the package"
    made.add_argument("--model", help=f"folder or hub name (default: {default})")
    made.add_argument("--tiny", action="store_true", help="the tiny model inside the package: no download, seconds")
    made.add_argument("--images", action="store_true", help="make pictures of prompts instead of text")
    made.add_argument("--notebook", action="store_true", help="open JupyterLab on a notebook instead")
    made.add_argument("--prompt", help=f"default: {PROMPT!r}; of pictures: four of colored shapes")
    made.add_argument("--max-new-tokens", "-n", type=int, help=f"of the answer (default: {NEW_TOKENS})")
    made.add_argument("--price", type=float, help="US dollars an hour of this machine (or GPU), for the cost")
    made.add_argument("--out", type=Path, default=Path(), help="folder for what is written (default: this one)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        if args.model and args.tiny:
            raise InvalidValue("--tiny: not together with --model.")
        if args.images:
            _refuse_text_options(args)
        if args.notebook:
            return open_notebook(args)
        if args.images:
            picture_tour(args.model, args.prompt, args.out)
        else:
            tour(args)
    except KeyboardInterrupt:
        print("\nStopped. No process of the demonstration is left.", file=sys.stderr)
        return INTERRUPTED
    except MiinbError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def tour(args: argparse.Namespace) -> None:
    """Fetch, serve, ask, measure; ends every process that it started, also when it fails."""
    from miinb.session import Session

    check_folder(args.out)
    prompt = PROMPT if args.prompt is None else args.prompt
    new_tokens = NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    # refused now rather than after the start
    parse_generation({"max_new_tokens": new_tokens})
    BenchConfig.parse({"price": args.price})
    if not prompt:
        raise InvalidValue("--prompt: it is empty.")
    model = args.model or (tiny_model() if args.tiny else default_model())
    title(1, f"Serving {model}")
    with Session(model, "text-generation", name=None) as optimized:
        print(f"{optimized.name}: ready, loaded in {optimized.load_s:.1f} s\n{optimized.plan()}")
        title(2, "An answer, as it comes")
        answer(optimized, prompt, new_tokens)
        title(3, "The same model in plain transformers (the baseline), then both measured in turns")
        with Session(model, "text-generation", engine="baseline", dtype=_dtype(optimized)) as baseline:
            measure(optimized, baseline, args)
    print("\nEvery process of the demonstration has ended. Next: miinb demo --notebook")


def _refuse_text_options(args: argparse.Namespace) -> None:
    """Raise InvalidValue for an option that pictures do not have."""
    for name in ("max_new_tokens", "price"):
        if getattr(args, name) is not None:
            raise InvalidValue(f"--{name.replace('_', '-')}: not together with --images.")
    if args.notebook and args.model:
        raise InvalidValue("--model: not together with --images --notebook.", hint="Set MODEL in its first cell.")


def answer(session: Session, prompt: str, max_new_tokens: int) -> None:
    """Print an answer while it is made, then its timing."""
    print(prompt, end="", flush=True)
    stream = session.stream(prompt, max_new_tokens=max_new_tokens)
    for chunk in stream:
        print(chunk.text, end="", flush=True)
    usage, timing = stream.result.usage, stream.result.timing
    rate = f", {usage.output_tokens / timing.e2e_s:.0f} tokens/s in all" if timing.e2e_s > 0 else ""
    print(f"\n[{usage.output_tokens} tokens, the first after {1000 * timing.ttft_s:.0f} ms{rate}]")


def measure(optimized: Session, baseline: Session, args: argparse.Namespace) -> None:
    """Benchmark both, print the table, write the chart."""
    from miinb.bench import charts
    from miinb.bench.runner import compare
    from miinb.bench.workload import STORY_PROMPTS

    runs = compare(
        [baseline, optimized],
        STORY_PROMPTS,
        requests=len(STORY_PROMPTS),
        new_tokens=32,
        warmup=1,
        concurrency=[1, len(STORY_PROMPTS)],
        price=args.price,
        check="close",
    )
    print(runs)
    path = charts.save(charts.draw("latency", runs), args.out / "miinb-demo.png")
    print(f"chart: {path.resolve()}")


def open_notebook(args: argparse.Namespace) -> int:
    """JupyterLab on the first notebook, or on that of pictures, until the user ends it."""
    if importlib.util.find_spec("jupyterlab") is None:
        raise InvalidValue("--notebook: JupyterLab is not installed.", hint="pip install 'miinb[demo]'")
    model = args.model or (str(tiny_model()) if args.tiny else None)
    environment = {**os.environ, MODEL_VARIABLE: str(model)} if model else None
    command = [sys.executable, "-m", "jupyterlab", str(writable_notebook(IMAGE_NOTEBOOK if args.images else NOTEBOOK))]
    if os.geteuid() == 0:  # containers; JupyterLab refuses root otherwise
        command.append("--allow-root")
    lab = subprocess.Popen(command, env=environment)
    while True:
        try:
            return lab.wait()
        except KeyboardInterrupt:  # the terminal sends Ctrl-C to JupyterLab too, which asks and ends by itself
            continue


def writable_notebook(name: str = NOTEBOOK) -> Path:
    """A notebook: the checkout's own, or a copy in ./miinb-notebooks when miinb is installed from a wheel."""
    if NOTEBOOKS.is_symlink() and os.access(NOTEBOOKS, os.W_OK):
        return (NOTEBOOKS / name).resolve()
    target = Path("miinb-notebooks")
    target.mkdir(exist_ok=True)
    for source in NOTEBOOKS.glob("*.ipynb"):
        if not (target / source.name).exists():  # a copy that the user may have changed stays
            shutil.copyfile(source, target / source.name)
    return (target / name).resolve()


def _dtype(session: Session) -> str:
    """The dtype that really runs: the arms are compared in the same one."""
    return session.plan().dtype
