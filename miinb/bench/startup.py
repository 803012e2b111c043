"""How long a start takes: real safetensors of random weights, with a cold and a warm kernel cache.

`python -m miinb.bench.startup` writes the files of a public configuration once, drops them from the page cache, times
how long reading them alone takes, and starts a session twice: with an empty kernel cache, and with what the first start
left there. A line each tells the phases, what the start took beyond the reading, and the most GPU memory of the load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

from miinb.bench import presets
from miinb.bench.environment import environment, hardware_words
from miinb.bench.records import Record, Runs, new_run_id, utc_now
from miinb.client import Client
from miinb.messages import EngineInfo
from miinb.session import Session
from miinb.wording import size_words

_BLOCK_BYTES = 16 << 20
_READERS = 8
PHASES = ("start", "load", "compile", "verify", "capture")

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(folder: Path) -> Shapes:
    """The tensors that a checkpoint of this config.json has, by transformers' own model."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight", "embed_out.weight"} if config.tie_word_embeddings else set[str]()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def write_checkpoint(folder: Path, *, shard_bytes: int = 4 << 30) -> int:
    """Write bf16 weights beside a config.json: normal with the usual deviation of 0.02, norms 1 and biases 0.

    The same random block is repeated: what is read counts, not what it says.

    Returns:
        Bytes of all tensors.
    """
    import torch

    random = torch.randn(_BLOCK_BYTES // 2, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    one = torch.ones(_BLOCK_BYTES // 2, dtype=torch.bfloat16)
    blocks = {"weight": _bytes(random), "norm": _bytes(one), "bias": memoryview(bytes(_BLOCK_BYTES))}
    shapes = tensor_shapes(folder)
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]

    def write(file: str, names: list[str]) -> None:
        ends = list(accumulate(sizes[name] for name in names))
        header = {
            name: {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end - sizes[name], end]}
            for name, end in zip(names, ends, strict=True)
        }
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                kind = "weight" if len(shapes[name]) > 1 else name.rpartition(".")[2]
                block = blocks["norm" if kind == "weight" and len(shapes[name]) == 1 else kind]
                for left in range(sizes[name], 0, -_BLOCK_BYTES):
                    stream.write(block[: min(left, _BLOCK_BYTES)])
            stream.flush()
            os.fsync(stream.fileno())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, files, shards))
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(sizes.values())


def _bytes(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.view(torch.uint8).numpy())


def drop_page_cache(folder: Path) -> None:
    """Let the next reader of the folder's files find them on the disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_s(folder: Path) -> float:
    """Seconds that reading the files takes, by several threads and to nowhere."""

    def read(part: tuple[Path, int]) -> int:
        file, offset = part
        with file.open("rb", buffering=0) as stream:
            return os.preadv(stream.fileno(), [bytearray(_BLOCK_BYTES)], offset)

    def parts() -> Iterator[tuple[Path, int]]:
        for file in sorted(folder.glob("*.safetensors")):
            yield from ((file, offset) for offset in range(0, file.stat().st_size, _BLOCK_BYTES))

    started = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read, parts()))
    return time.perf_counter() - started


def start_once(folder: Path, arm: str, options: argparse.Namespace) -> tuple[float, EngineInfo]:
    """Start a session and stop it. Returns the seconds until it was ready, and what its engine tells of itself."""
    started = time.perf_counter()
    with Session(folder, dtype="bf16", device=options.device, name=f"startup-{arm}-{os.getpid()}") as session:
        seconds = time.perf_counter() - started
        session.generate("Hello", max_new_tokens=2)
        return seconds, described(session)


def described(session: Session) -> EngineInfo:
    """What the engine of a running session tells of itself: the phases of its start among it."""
    with contextlib.closing(Client(session.address)) as client:
        return client.describe()


def phases_words(phases_s: Mapping[str, float]) -> str:
    """The seconds of each phase, in columns as wide as `COLUMNS` has them."""
    return " ".join(f"{phases_s.get(name, 0.0):>8.1f}" for name in PHASES)


def run(options: argparse.Namespace, place: Path) -> tuple[Runs, str]:
    """Write, read and start. Returns the records and the table."""
    run_id, host = new_run_id(), environment()
    folder = presets.write(options.model, place / options.model, **dict(options.set))
    size_bytes = write_checkpoint(folder)
    if not options.cached:
        drop_page_cache(folder)
    reading_s = read_s(folder)
    os.environ["TRITON_CACHE_DIR"] = str(place / "kernels")
    records, arms, lines = [], {}, [_HEAD]
    for seq, arm in enumerate(("cold", "warm")):
        if not options.cached:
            drop_page_cache(folder)
        submitted = utc_now()
        seconds, info = start_once(folder, arm, options)
        record = Record(run_id, seq=seq, arm=arm, model=options.model, engine=info.engine, dtype=info.dtype)
        record.t_submit, record.e2e_s, record.task, record.point = submitted, seconds, info.task, 0
        records.append({name: getattr(record, name) for name in Record.__slots__})
        facts = {"ready_s": seconds, "beyond_reading_s": seconds - reading_s, "phases_s": dict(info.phases_s)}
        facts |= {"weights_bytes": info.plan.weights_bytes, "kv_cache_bytes": info.plan.kv_cache_bytes}
        facts |= {"load_peak_bytes": info.load_peak_bytes, "plan": str(info.plan).splitlines()}
        arms[arm] = facts
        lines.append(_line(arm, facts))
    workload = {"model": options.model, "checkpoint_bytes": size_bytes, "reading_s": reading_s}
    workload["cached"] = options.cached
    env = {"run_id": run_id, "name": "startup", "created": utc_now(), "host": host, "arms": arms, "workload": workload}
    head = f"{hardware_words(host)}; {options.model}, {size_words(size_bytes)} of safetensors, bf16"
    where = "from the page cache" if options.cached else "from the disk"
    rate = f"reading the files alone, {where}: {reading_s:.1f} s, {size_words(size_bytes / reading_s)}/s"
    return Runs(records, {run_id: env}), "\n".join([head, rate, *lines])


COLUMNS = " ".join(f"{name:>8}" for name in PHASES)
_HEAD = f"{'kernel cache':<12} {'ready s':>8} {'beyond':>7} {COLUMNS}  peak/weights"


def _line(arm: str, facts: dict[str, Any]) -> str:
    phases = phases_words(facts["phases_s"])
    peak = f"{facts['load_peak_bytes'] / facts['weights_bytes']:.2f}" if facts["load_peak_bytes"] else "-"
    return f"{arm:<12} {facts['ready_s']:>8.1f} {facts['beyond_reading_s']:>7.1f} {phases}  {peak:>12}"


def _field(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", choices=presets.DECODERS, default="llama-8b")
    parser.add_argument("--set", type=_field, action="append", default=[], help="a field of config.json: NAME=NUMBER")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--cached", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--folder", type=Path, help="where to put the files meanwhile; default: the temporary folder")
    parser.add_argument("--out", type=Path, help="directory to append the run's records to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        runs, text = run(options, Path(place))
    print(text)
    if options.out:
        print(f"Records: {runs.save(options.out)}")


if __name__ == "__main__":
    main()
