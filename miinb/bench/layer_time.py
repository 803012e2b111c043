"""What one layer of a decoder takes in a step of single tokens: what tiles, kernels and their order are chosen by.

`python -m miinb.bench.layer_time --models llama-8b --ranks 1 2` builds one rank's share of shapes of public models with
random weights, puts all layers of a step into a CUDA graph, and replays it behind itself. Each round measures every
shape once, so that a GPU whose clock falls is seen in all. Sums over ranks are not in it. A line a shape: microseconds
a layer (median, least and most of the rounds) and the rate at which weights are read. On a CPU PyTorch computes the
step: that shows that it runs, and is not what serving takes there.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from miinb import models
from miinb.bench import presets
from miinb.engine.decoder import Decoder
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.policies import POLICIES
from miinb.engine.step_batch import StepBatch, StepRow
from miinb.engine.weights import load_weights

_PAGE = 16


@dataclass(slots=True)
class Shape:
    """One rank's share of a model.

    Attributes:
        name: what is told.
        layers: how many there are.
        weights_bytes: of a layer's matrices.
        run: computes the step once.
        seconds: a step's, one a round.
    """

    name: str
    layers: int
    weights_bytes: float
    run: Callable[[], object]
    seconds: list[float]

    def words(self) -> str:
        """The line of the table."""
        least, middle, most = (1e6 * f(self.seconds) / self.layers for f in (min, statistics.median, max))
        rate = self.weights_bytes / middle / 1e6
        return f"{self.name:32s} {middle:9.2f} us a layer ({least:.2f} to {most:.2f}), {rate:.2f} TB/s"


@torch.inference_mode()
def shape(name: str, *, ranks: int, rows: int, context: int, layers: int, dtype: str, device: str, tiny: bool) -> Shape:
    """Build a model's share and, on a GPU, the graph of its layers.

    Args:
        name: a preset.
        ranks: that share it.
        rows: of the step, one token each.
        context: tokens of each row, with the new one.
        layers: at most so many; 0: all.
        dtype: as `Session`'s.
        device: "cuda" or "cpu".
        tiny: a tiny model of the family.
    """
    place = torch.device(device)
    with tempfile.TemporaryDirectory(prefix="miinb-layer-time-") as folder:
        info = models.inspect(presets.write_into(folder, name, small=tiny), load_format="dummy")
        spec, policy = info.spec, POLICIES[info.family]
        if spec is None:
            raise RuntimeError(f"{name} is no decoder")
        count = min(layers or spec.layers, spec.layers)
        spec = dataclasses.replace(spec, layers=count, windows=spec.windows[:count])
        weights = load_weights(info, policy, spec, dtype=dtype, device=place, ranks=ranks, dummy=True)
    decoder = Decoder(spec.shard(ranks), weights)
    pages = -(-context // _PAGE)
    size = CacheSize(rows * pages, _PAGE, context, rows, 0)
    cache = KVCache(decoder.spec, size, weights.dtype, place)
    for memory in cache.memory:
        memory.zero_()
    batch = StepBatch.of_rows(
        [StepRow([5], context - 1, range(row * pages, (row + 1) * pages)) for row in range(rows)], _PAGE, place
    )
    matrices = [getattr(layer, part).weight for layer in weights.layers for part in ("qkv", "out", "up", "down")]
    total = sum(matrix.numel() * matrix.element_size() for matrix in matrices)

    def step() -> object:
        return decoder.body(batch, cache)

    run = _captured(step) if device == "cuda" else step
    words = f"{name} / {ranks}, {rows} x {context}"
    return Shape(words, count, total / count, run, [])


def _captured(step: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        step()  # compiles
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        step()
        graph.capture_end()
    return graph.replay


@torch.inference_mode()
def measure(shapes: Sequence[Shape], *, rounds: int, steps: int) -> None:
    """Note so many rounds of so many steps each of every shape, in turns."""
    for round_ in range(rounds + 1):
        for one in shapes:
            _wait()
            begun = time.perf_counter()
            for _ in range(steps):
                one.run()
            _wait()
            if round_:  # the first warms up
                one.seconds.append((time.perf_counter() - begun) / steps)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    """Build all shapes, measure them in turns, and print a line each."""
    parser = argparse.ArgumentParser(prog="python -m miinb.bench.layer_time", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=presets.DECODERS, default=["llama-8b"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1], help="whose share one rank has")
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="tokens of a step, one a sequence")
    parser.add_argument("--context", type=int, default=200, help="tokens of each sequence")
    parser.add_argument("--layers", type=int, default=0, help="at most so many; 0: all")
    parser.add_argument("--dtype", default="bf16", help="as a Session's")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20, help="of each shape in a round")
    parser.add_argument("--tiny", action="store_true", help="tiny models: shows that everything runs")
    options = parser.parse_args(arguments)
    shapes = list(_shapes(options))
    measure(shapes, rounds=options.rounds, steps=options.steps)
    for one in shapes:
        print(one.words(), flush=True)


def _shapes(options: argparse.Namespace) -> Iterator[Shape]:
    for name in options.models:
        for ranks in options.ranks:
            for rows in options.rows:
                yield shape(
                    name,
                    ranks=ranks,
                    rows=rows,
                    context=options.context,
                    layers=options.layers,
                    dtype=options.dtype,
                    device=options.device,
                    tiny=options.tiny,
                )


if __name__ == "__main__":
    main()
