"""What serves the fused encoder: the executor or, above rank 0, a follower; bounds, and CUDA graphs on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from miinb.config import DeploymentConfig
from miinb.engine.encode_followers import EncodeFollower, EncodeFollowers
from miinb.engine.encode_queue import Bounds
from miinb.engine.encoder import Encoder
from miinb.engine.encoder_graphs import GraphedEncoder, graph_sizes, most_bytes
from miinb.engine.encoder_inputs import EncoderInputs
from miinb.engine.encoding import EncodeExecutor, EncoderModel
from miinb.engine.graphs import Recorder
from miinb.engine.parameters import step_bytes
from miinb.engine.ranks import ALONE, Ranks
from miinb.engine.reduction import ROWS, check_task, usual_reduction
from miinb.kernels.shares import best_shares
from miinb.messages import EngineInfo, Phase


def fused_executor(
    encoder: Encoder,
    config: DeploymentConfig,
    info: EngineInfo,
    report: Callable[[Phase], None],
    ranks: Ranks = ALONE,
) -> EncodeExecutor | EncodeFollower:
    """What serves a loaded encoder.

    Args:
        encoder: on its device; the rank's part.
        config: `max_batch`, `options.max_step_tokens`, `max_queue` and `cuda_graphs` count here.
        info: what the frontend is told; its plan gets lines on steps and graphs.
        report: told of the capture.
        ranks: the others of this replica.

    Raises:
        UnsupportedModel: the task is not served.
    """
    check_task(info.task)
    spec, options = encoder.spec, config.options
    length = min(info.max_length, spec.max_length)
    tokens = options.step_tokens(info.device, encoder=True)
    bounds = Bounds(length, spec.vocab_size, spec.token_types, tokens, max_sequences=config.max_batch or 0)
    inputs = EncoderInputs(max(tokens, length), torch.device(info.device), spec.padding)
    model: EncoderModel = encoder
    graphed = None
    reason = "asked for" if options.max_step_tokens else "packed, without padding"
    plan = info.plan.with_line("steps", f"{tokens} tokens", reason)
    if info.device == "cuda" and options.cuda_graphs:
        report(Phase("capture"))
        step = step_bytes(spec, encoder.weights.dtype.itemsize, max(tokens, length))
        recorder = Recorder(group=encoder.group, most_bytes=most_bytes(step))
        usual = usual_reduction(info.task, function=info.function, vocab_size=info.vocab_size, labels=len(info.labels))
        sizes = graph_sizes(tokens, length, ROWS[info.task])
        model = graphed = GraphedEncoder(encoder, inputs, usual, sizes, recorder)
        plan = plan.with_line("graphs", "on", str(graphed), graphs_bytes=recorder.bytes)
    elif info.device == "cuda":
        plan = plan.with_line("graphs", "off", "asked for")
    info = dataclasses.replace(info, max_length=length, plan=dataclasses.replace(plan, max_length=length))
    if ranks.link is not None:
        return EncodeFollower(info, encoder, model.outputs, inputs, ranks.link)
    return EncodeExecutor(
        model,
        info,
        bounds,
        max_queue=options.max_queue,
        inputs=inputs,
        reducing=graphed,
        best_shares=best_shares,
        followers=EncodeFollowers(ranks.leader, encoder, inputs) if ranks.leader is not None else None,
    )
