"""Compiles the kernels of a model for a GPU, in a pool of processes that do not touch it.

`python -m miinb.engine.compile`, one JSON line on stdin (`Order`), JSON lines on stdout: `{"done": n, "total": n}` as
kernels are ready, at the end `{"failed": {kernel: why}}`. `compile_job.py` is the rank's side of it.

Which kernels a model launches, and for which kinds of arguments, is not written down a second time: the decoder itself
runs over meta tensors (shapes without numbers) in every kind of step, and Triton's own hook tells of each kernel that
it would compile. What is compiled lands in Triton's cache under the key that the rank's launches look for: it is made
of the kernels' source, the arguments' types and alignments, the options, the GPU's architecture and Triton's version.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miinb import models
from miinb.config import DeploymentConfig, EngineOptions
from miinb.engine import parity, symmetric
from miinb.engine.decoder import Decoder
from miinb.engine.encoder import Encoder, EncoderBatch
from miinb.engine.encoder_graphs import graph_sizes
from miinb.engine.encoder_inputs import Sizes
from miinb.engine.encoder_weights import load_encoder_weights
from miinb.engine.graphs import capture_order, mixed_sizes
from miinb.engine.heads import reduce
from miinb.engine.image_kernels import kernels_of_pipeline
from miinb.engine.kv_cache import DEFAULT_BATCH, CacheSize, KVCache, cache_dtype
from miinb.engine.parallel import Group
from miinb.engine.policies import ENCODERS, POLICIES, encoder_spec
from miinb.engine.recording import META, Kernel, compiling_for, recording
from miinb.engine.reduction import usual_reduction
from miinb.engine.sampling import Needs, Sampler
from miinb.engine.step_batch import StepBatch
from miinb.engine.weights import activation_dtype, load_weights
from miinb.errors import UnsupportedModel
from miinb.kernels.all_reduce import PROGRAMS, Boards
from miinb.kernels.embedding import fill_newest
from miinb.kernels.head import argmax
from miinb.kernels.shares import best_shares
from miinb.messages import from_dict
from miinb.models import ModelInfo

log = logging.getLogger("miinb.compile")

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Order:
    """The JSON line on stdin.

    Attributes:
        config: the deployment's.
        capability: of the GPU.
        parent: the process to end with.
        processes: how many compile at a time.
        limit_s: seconds after which what is left is given up.
    """

    config: Mapping[str, Any]
    capability: tuple[int, int]
    parent: int
    processes: int
    limit_s: float


def kernels_of(config: DeploymentConfig, model: ModelInfo) -> list[Kernel]:
    """The kernels that serving a model launches, none without a fused form; to be called within `compiling_for`."""
    if model.family in ENCODERS:
        try:
            return _kernels_of_encoder(config, model)
        except UnsupportedModel:
            return []
    if model.pipeline is not None:
        return kernels_of_pipeline(config, model.pipeline)
    spec = model.spec
    if spec is None:
        return []
    policy = POLICIES[model.family]
    kinds = tuple(dict.fromkeys(spec.windows)) or (None,)  # layers differ in nothing else that a kernel is compiled for
    spec = dataclasses.replace(spec, layers=len(kinds), windows=kinds if spec.windows else ())
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    ranks = config.tensor_parallel
    options = config.options
    weights = load_weights(
        model, policy, spec, dtype=dtype, device=META, ranks=ranks, dummy=True, quantize_head=options.quantize_head
    )
    activations = activation_dtype(dtype, META, model.dtype)
    local = spec.shard(ranks)
    decoder = Decoder(local, weights, group=NoPeers(ranks, options) if ranks > 1 else None)
    page_tokens = config.options.page_tokens
    pages = -(-config.options.step_tokens("cuda") // page_tokens)
    size = CacheSize(pages, page_tokens, local.max_length, 1, 0)
    cache = KVCache(local, size, cache_dtype(config.kv_dtype, activations), META)
    rows = min(config.max_batch or DEFAULT_BATCH["cuda"], config.options.step_tokens("cuda"))
    with recording() as kernels:
        for batch in [*parity.batches(decoder, page_tokens).values(), *_steps(config, rows)]:
            fill_newest(batch.token_ids, batch.token_ids, batch.token_ids)
            argmax(decoder.forward(batch, cache))
            decoder.greedy(batch, cache)
        sampler = Sampler(2, spec.vocab_size, META)
        for logits_dtype in (activations, torch.float32):  # as the model makes them, and with penalties
            for rows in (1, 2):  # columns of a table of one row are views of it, of more they are copied
                logits = _meta(rows, spec.vocab_size, dtype=logits_dtype)
                sampler.choose(logits, (), (), _meta(rows), _meta(rows), Needs.SAMPLE)
    return kernels


class NoPeers(Group):
    """The ranks' group over meta tensors: launches what each would, and talks to nobody."""

    def __init__(self, ranks: int, options: EngineOptions) -> None:
        super().__init__(0, ranks, "nccl")
        if options.all_reduce == "auto":
            addresses, epochs = _meta(ranks), _meta(PROGRAMS)
            most = symmetric.most_bytes(ranks)
            self.boards = Boards(addresses, epochs, self.rank, most, symmetric.MOST_PUSHED, PROGRAMS)

    def gather(self, x: Tensor) -> Tensor:
        """This rank's columns for all."""
        return x.repeat(1, self.size)

    def _sum(self, x: Tensor) -> Tensor:
        return x


def _kernels_of_encoder(config: DeploymentConfig, model: ModelInfo) -> list[Kernel]:
    policy, task, ranks = ENCODERS[model.family], model.task(config.task), config.tensor_parallel
    spec = encoder_spec(model.config, task, model.source)
    spec = dataclasses.replace(spec, layers=2)  # the last layer computes only the rows that the head reads
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    encoders = [  # the first rank's, and another's, where some products have no bias
        Encoder(
            spec.shard(ranks),
            load_encoder_weights(model, policy, spec, dtype=dtype, device=META, rank=rank, ranks=ranks, dummy=True),
            group=NoPeers(ranks, config.options) if ranks > 1 else None,
        )
        for rank in range(min(ranks, 2))
    ]
    labels = len(model.labels()[0])
    usual = usual_reduction(task, function=model.function(), vocab_size=spec.vocab_size, labels=labels)
    length = min(config.max_length or spec.max_length, spec.max_length)
    tokens = max(config.options.step_tokens("cuda", encoder=True), length)
    with recording() as kernels:
        for size in (*graph_sizes(tokens, length, spec.head.rows), *_large_steps(tokens, length)):
            step = _encoder_step(size)
            for encoder in encoders:
                reduce(encoder.outputs(step), usual, step.starts, best_shares)
    return kernels


def _large_steps(tokens: int, length: int) -> Iterator[Sizes]:
    """Those that run eagerly: of so many texts that the longest of them decides what attention takes at a time."""
    for longest in sorted({min(size, length) for size in (16, 32, 64, length)}):
        yield Sizes(tokens, longest, -(-tokens // longest), -(-tokens // longest))


def _encoder_step(size: Sizes) -> EncoderBatch:
    return EncoderBatch(
        token_ids=_meta(size.tokens),
        type_ids=_meta(size.tokens),
        positions=_meta(size.tokens),
        starts=_meta(size.sequences + 1, dtype=torch.int32),
        rows=_meta(size.rows),
        max_length=size.max_length,
    )


def _steps(config: DeploymentConfig, max_rows: int) -> Iterator[StepBatch]:
    """Steps of every size that is captured, and eager ones of several; what kernels ask about sizes is here."""
    page_tokens, max_tokens = config.options.page_tokens, config.options.step_tokens("cuda")
    for rows in sorted({*capture_order(max_rows), 3}):
        if rows <= max_rows:
            yield _step(rows, rows, 1, page_tokens)
    for tokens in mixed_sizes(max_tokens):
        for rows in (1, 2, 16, max_rows):  # a graph's step is padded to max_rows
            if rows <= min(max_rows, tokens // 2):
                yield _step(rows, tokens, tokens, page_tokens)


def _step(rows: int, tokens: int, max_query: int, page_tokens: int) -> StepBatch:
    """A step of so many rows and tokens, laid out in memory as `inputs.StepInputs` has it."""
    return StepBatch(
        token_ids=_meta(tokens),
        positions=_meta(tokens),
        query_start=_meta(rows + 1, dtype=torch.int32),
        lengths=_meta(rows, dtype=torch.int32),
        block_table=_meta(-(-max_query // page_tokens), rows, dtype=torch.int32).t(),
        slots=_meta(tokens),
        logit_rows=_meta(rows),
        max_query=max_query,
    )


def _meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


# The pool. Its processes are forked once the kernels are known, so that nothing is imported or sent twice.

_kernels: Sequence[Kernel] = ()


def _compile(index: int) -> None:
    kernel = _kernels[index].compile()
    _launcher()(kernel.src, kernel.metadata)


def _launcher() -> Any:
    """What makes the C function that launches a kernel: a compiler's run for each kind of signature, cached as well."""
    from triton.backends.nvidia import driver

    try:
        driver.library_dirs()
    except AssertionError:  # there is no driver of GPUs here: it compiles for another machine
        return lambda src, metadata: None
    driver.CudaUtils()
    return driver.CudaLauncher


def compile_all(kernels: Sequence[Kernel], *, processes: int, limit_s: float) -> Iterator[tuple[Kernel, str]]:
    """Compile in so many processes: each kernel as it is ready, with "" or why it could not be compiled.

    Raises:
        TimeoutError: it took too long; the processes go on until this one ends.
    """
    global _kernels
    _kernels = sorted(kernels, key=lambda kernel: -len(kernel.function.src))  # the longest take longest
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _die_with, (os.getpid(),))
    futures = {pool.submit(_compile, index): kernel for index, kernel in enumerate(_kernels)}
    for future in as_completed(futures, limit_s):
        error = future.exception()
        reason = "the process ended" if isinstance(error, BrokenProcessPool) else f"{type(error).__name__}: {error}"
        yield futures[future], "" if error is None else reason
    pool.shutdown()


def _die_with(parent: int) -> None:
    """End this process with its parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Do one order. It always ends well: what is not compiled here is compiled where it is first used."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    order = from_dict(Order, json.loads(sys.stdin.readline()))
    _die_with(order.parent)
    failed: dict[str, str] = {}
    try:
        failed = _run(order)
    except Exception as error:
        log.exception("kernels are compiled at first use")
        failed["all"] = f"{type(error).__name__}: {error}"
    _tell(failed=failed)
    os._exit(0)  # processes that are still compiling end with this one


def _run(order: Order) -> dict[str, str]:
    config = DeploymentConfig.from_json(json.dumps(order.config))
    model = models.inspect(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        load_format=config.load_format,
    )
    failed, done = {}, 0
    with compiling_for(order.capability), _one_at_a_time():
        kernels = kernels_of(config, model)
        _tell(done=0, total=len(kernels))
        for kernel, reason in compile_all(kernels, processes=order.processes, limit_s=order.limit_s):
            if reason:
                failed[kernel.name] = reason
            done += 1
            _tell(done=done, total=len(kernels))
    return failed


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Ranks that start together compile the same kernels: the first does, the others then find them."""
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel if its holder is killed
        yield


def _tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
