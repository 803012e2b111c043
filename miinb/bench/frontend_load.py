"""How much the frontend alone carries: `python -m miinb.bench.frontend_load`.

A real frontend process and a rank without a model (`miinb.server.standin`) that hands out one token a stream and step.
Two measurements: tokens a second in many concurrent streams, with the processor time that the frontend takes for it;
and what frontend and client add to the first token of a 20-token prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from miinb.client import Client
from miinb.config import DeploymentConfig, GenerationParams
from miinb.errors import MiinbError
from miinb.messages import GenerateRequest, RequestEnd
from miinb.rpc.address import unix_address

START_S = 60.0
CONNECTIONS = 8
PROMPT = "Once upon a time there was a little fox who lived near a river and liked to count the stars at night"


@dataclass(frozen=True, slots=True)
class Load:
    """A measured load. Processor shares are in cores (1.0: one core all the time).

    Attributes:
        offered_tok_s: what the stand-in hands out when the frontend keeps up; 0 for as much as it can.
        tok_s: tokens that the clients got, divided by the time from the first request to the last end.
    """

    streams: int
    offered_tok_s: float
    tok_s: float
    chunks_s: float
    duration_s: float
    frontend_cores: float
    rank_cores: float
    load_cores: float


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Milliseconds above the rank's own time (queue and model) until the client has the first token."""

    prompt_tokens: int
    requests: int
    p50_ms: float
    p95_ms: float


@contextlib.contextmanager
def processes(line: Mapping[str, Any]) -> Iterator[tuple[str, psutil.Process, psutil.Process]]:
    """A frontend and a stand-in rank; yields the address and the two processes."""
    from miinb.demo import tiny_model

    folder = Path(tempfile.mkdtemp(prefix="miinb-load-"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        shutil.copytree(tiny_model(), folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
        config = DeploymentConfig(model="stand-in").model_dump(mode="json")
        base = {"folder": str(folder), "config": config, "name": "load"}
        for module, values in (("frontend", base), ("standin", {**base, **line})):
            process = subprocess.Popen([sys.executable, "-m", f"miinb.server.{module}"], stdin=subprocess.PIPE)
            started.append(process)
            if process.stdin is not None:
                process.stdin.write(json.dumps(values).encode() + b"\n")
                process.stdin.flush()
        address = unix_address(Path(folder, "rpc.sock"))
        _wait_ready(address)
        yield address, psutil.Process(started[0].pid), psutil.Process(started[1].pid)
    finally:
        for process in started:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_ready(address: str) -> None:
    client = Client(address)
    end = time.monotonic() + START_S
    while not client.health():
        if time.monotonic() > end:
            raise MiinbError(f"The frontend was not ready within {START_S:.0f} s.")
        time.sleep(0.05)
    client.close()


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure_load(*, streams: int, rate: float, tokens: int) -> Load:
    """Tokens a second in `streams` concurrent streams of `tokens` tokens, `rate` tokens a second each (0: no limit)."""
    line = {"step_s": 1 / rate if rate else 0.0, "max_batch": streams, "max_length": 1 << 20, "vocab_size": 1 << 16}
    with processes(line) as (address, frontend, rank):
        asyncio.run(_drive(address, streams, 32))  # warm: channels, code paths
        watched = (frontend, rank, psutil.Process(os.getpid()))
        before = [_cpu_s(process) for process in watched]
        begin = time.perf_counter()
        chunks = asyncio.run(_drive(address, streams, tokens))
        duration_s = time.perf_counter() - begin
        used = [(_cpu_s(process) - cpu_s) / duration_s for process, cpu_s in zip(watched, before, strict=True)]
    return Load(
        streams,
        streams * rate,
        streams * tokens / duration_s,
        chunks / duration_s,
        duration_s,
        used[0],
        used[1],
        used[2],
    )


async def _drive(address: str, streams: int, tokens: int) -> int:
    """Run the streams to their ends; the number of chunks. The messages stay bytes: the load must not be the limit."""
    import grpc.aio

    from miinb.rpc import codec

    request = codec.encode_generate(GenerateRequest(PROMPT, GenerationParams(max_new_tokens=tokens)))
    options = (("grpc.use_local_subchannel_pool", 1),)  # else all channels share one connection
    channels: list[Any] = [grpc.aio.insecure_channel(address, options=options) for _ in range(CONNECTIONS)]

    async def one(number: int) -> int:
        call = channels[number % len(channels)].unary_stream(codec.GENERATE)(request, timeout=600)
        messages = [message async for message in call]
        end = codec.decode_event(messages[-1])
        if not isinstance(end, RequestEnd) or end.usage.output_tokens != tokens:
            raise MiinbError(f"A stream ended with {end} instead of {tokens} tokens.")
        return len(messages) - 2  # without the two ends

    try:
        return sum(await asyncio.gather(*(one(number) for number in range(streams))))
    finally:
        for channel in channels:
            await channel.close()


def measure_first_token(*, requests: int, prompt_tokens: int = 20) -> FirstToken:
    """What is between the client's call and its first token, beside the rank's own time; one request at a time."""
    with processes({}) as (address, _, _):
        client = Client(address)
        prompt = PROMPT
        while client.generate(prompt, max_new_tokens=1).usage.prompt_tokens > prompt_tokens:
            prompt = prompt.rpartition(" ")[0]
        added = []
        for _ in range(requests):
            result = client.generate(prompt, max_new_tokens=1)
            timing = result.timing
            added.append((timing.ttft_s - timing.queue_s - timing.model_s) * 1e3)
        client.close()
    added = sorted(added)
    count = result.usage.prompt_tokens
    return FirstToken(count, requests, statistics.median(added), added[int(0.95 * (len(added) - 1))])


def main() -> None:
    """Measure and print one line of JSON a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--streams", type=int, default=256, help="concurrent streams")
    parser.add_argument("--rate", type=float, default=200.0, help="tokens a second of each stream; 0: no limit")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of each stream")
    parser.add_argument("--requests", type=int, default=200, help="requests for the first token; 0: leave it out")
    options = parser.parse_args()
    load = measure_load(streams=options.streams, rate=options.rate, tokens=options.tokens)
    print(json.dumps({"load": asdict(load)}))
    if options.requests:
        print(json.dumps({"first_token": asdict(measure_first_token(requests=options.requests))}))


if __name__ == "__main__":
    main()
