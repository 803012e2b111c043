"""`python -m miinb.bench.quality MODEL`: quality against speed of a model's dtypes; prints, stores, draws."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from miinb.bench.quality import DTYPES, measure, table
from miinb.errors import MiinbError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        runs = measure(
            options.model,
            options.dtypes,
            options.text,
            text_tokens=options.text_tokens,
            window=options.window,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            repeats=options.repeats,
            device=options.device,
            options={"calibration": options.calibration},
            limit_s=options.limit_s,
            out=options.out,
            say=lambda words: print(words, flush=True),
        )
        print(table(runs).to_string(index=False))
        if options.chart:
            from miinb.bench import charts

            print(charts.save(charts.draw("quality", runs), options.chart))
    except MiinbError as error:
        print(f"{type(error).__name__}: {error.line()}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.quality", description=__doc__)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), help="one must be unquantized (auto int8 int4)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="the text (licenses that are installed here)")
    parser.add_argument("--text-tokens", type=int, default=8192, help="most tokens of it (8192)")
    parser.add_argument("--window", type=int, default=512, help="tokens that are read together (512)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of the requests that are timed (128)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of the requests that are timed (128)")
    parser.add_argument("--repeats", type=int, default=5, help="most requests of an arm (5)")
    parser.add_argument("--calibration", default="auto", help="int4: a text file, or off (auto)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="an arm is ended after so many seconds (3600)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="append the run to this folder")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw it (.png, .svg, .pdf)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
