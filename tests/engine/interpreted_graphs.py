"""A deployment's steps through `GraphRunner` on a CPU: kernels by Triton's interpreter, graphs that compute again.

Run as a program by `test_graphs.py`: prints the tokens of the prompts on its command line, one list a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import tests.kernels.interpreter  # noqa: F401
from miinb import models
from miinb.config import EngineOptions
from miinb.engine.decoder import Decoder
from miinb.engine.executor import StepExecutor
from miinb.engine.graphs import GraphRunner
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.policies import POLICIES
from miinb.engine.step_batch import StepBatch
from miinb.engine.weights import load_weights
from miinb.kernels import decode_attention
from miinb.messages import EngineInfo, Plan
from tests.engine.recomputing import Recomputing
from tests.engine.test_cuda import generate


class Runner(GraphRunner):
    """On a GPU the tokens of a replay are copied before the next one; a CPU's executor reads them where they are."""

    def greedy(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor]:
        token_ids, finite = super().greedy(batch)
        return token_ids.clone(), finite.clone()


def main(folder: Path, prompts: list[list[int]], new_tokens: int) -> None:
    decode_attention._LEAST_HEAD = 1  # so that it takes part, though heads are tiny
    info = models.inspect(folder)
    policy = POLICIES[info.family]
    spec = policy.spec(info.config)
    decoder = Decoder(spec, load_weights(info, policy, spec, dtype="fp32", device=torch.device("cpu")))
    cache = KVCache(spec, CacheSize(24, 16, 64, 3, 0), torch.float32, torch.device("cpu"))
    cache.memory[0].zero_()
    engine_info = EngineInfo(
        replica=0, model="", task="text-generation", engine="optimized", dtype="", device="cpu",
        vocab_size=spec.vocab_size, max_length=64, max_batch=3, eos_token_ids=(), tokenizer_folder="",
        plan=Plan("optimized", "cpu", ""),
    )  # fmt: skip
    executor = StepExecutor(info=engine_info, decoder=decoder, cache=cache, options=EngineOptions(max_step_tokens=16),
                            launch_ahead=True)  # fmt: skip
    recorder = Recomputing()
    compute = executor.compute
    compute.runner = Runner(decoder, cache, compute.inputs, 3, 16, recorder)
    tokens = generate(executor, prompts, max_new_tokens=new_tokens)
    print(json.dumps({"tokens": tokens, "steps": executor.status()["steps"], "replays": recorder.replays}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
