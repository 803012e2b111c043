"""What every optimized executor's start has: what goes on beside the loading, kernels, the parity check's verdict."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from miinb.config import DeploymentConfig
from miinb.engine.compile_job import CompileJob, log_late_compilation
from miinb.engine.parity import ParityReport
from miinb.engine.ranks import Ranks
from miinb.errors import RankFailed, UnsupportedModel
from miinb.kernels.dequantize import scratch
from miinb.messages import Phase, Plan

Report = Callable[[Phase], None]


@dataclass(frozen=True, slots=True)
class Aside:
    """What goes on while the weights are read."""

    ranks: Future[Ranks]
    kernels: CompileJob | None


def compiled(kernels: CompileJob, report: Report) -> tuple[str, str]:
    """Wait for the kernels; how many there are, and how long the wait was."""
    report(Phase("compile"))
    outcome = kernels.wait(report)
    log_late_compilation()
    when = f"beside the loading, {outcome.waited_s:.1f} s longer than it"
    return f"{outcome.done} of {outcome.total}", f"compiled {'by an earlier start' if outcome.before else when}"


def with_rounding(plan: Plan, dtype: str, rounding: float, activations: torch.dtype, device: torch.device) -> Plan:
    """The plan with how far quantized weights are from the checkpoint's; as it is where none are quantized.

    A GPU's memory for widening them is taken now, as what is then free is shared out.
    """
    if not rounding:
        return plan
    if device.type == "cuda":
        scratch(device, activations)
    return plan.with_line(dtype, f"{rounding:.2%}", "change of the weights by rounding (root mean square)")


def verified(plan: Plan, check: Callable[[], ParityReport], config: DeploymentConfig, ranks: Ranks) -> Plan:
    """The plan with a line on the parity check.

    Raises:
        UnsupportedModel: it failed (the caller falls back).
        RankFailed: it failed, and falling back was not wanted.
    """
    if config.options.parity == "off":
        return plan.with_line("parity", "off", "asked for")
    result = check()
    if ranks.agree(result.passed, torch.device(plan.device)):
        return plan.with_line("parity", "passed", str(result))
    where = " on another rank" if result.passed else ""
    message = f"The fused layers differ from their reference{where}: {result}."
    if config.options.parity == "raise":
        raise RankFailed(message, hint="options={'parity': 'fallback'} serves with plain transformers instead.")
    raise UnsupportedModel(message)
