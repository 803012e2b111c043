"""Do the prompts of a benchmark fit the models, before anything is sent?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from miinb.bench_fields import most
from miinb.errors import InvalidValue

if TYPE_CHECKING:
    from miinb.bench.arms import Arm
    from miinb.bench.workload import Offsets
    from miinb.config import BenchConfig


def check(config: BenchConfig, arms: Sequence[Arm], offsets: Offsets | None, *, encodes: bool = False) -> None:
    """Refuse what a deployment's context cannot hold.

    Args:
        config: the benchmark.
        arms: its arms, whose plans tell the longest prompt and answer together (0: not known).
        encodes: of an encoder task, which writes nothing.
        offsets: the tokenizer; without it the length of given prompts is not known here, and the server refuses them.

    Raises:
        InvalidValue: the prompt is named (`prompts[3]`), or the lengths that were asked for.
    """
    tightest = min((arm for arm in arms if arm.plan.max_length > 0), key=lambda arm: arm.plan.max_length, default=None)
    if tightest is None:
        return
    limit, new = tightest.plan.max_length, 0 if encodes else most(config.new_tokens)
    and_new = f" and {new} new ones" if new else ""
    context = f"do not fit the context of {tightest.session.name} ({limit} tokens)"
    if config.prompts is None:
        if most(config.prompt_tokens) + new > limit:
            raise InvalidValue(
                f"prompt_tokens: prompts of {most(config.prompt_tokens)} tokens{and_new} {context}.",
                hint=_hint(limit, new),
            )
        return
    for place, prompt in enumerate(config.prompts if offsets else ()):
        if isinstance(prompt, Mapping):
            continue  # a question's context is read in windows
        tokens = len(offsets(prompt)) if offsets else 0
        if tokens + new > limit:
            raise InvalidValue(f"prompts[{place}]: {tokens} tokens{and_new} {context}.", hint=_hint(limit, new))


def _hint(limit: int, new: int) -> str:
    if new == 0:
        return f"At most {limit} tokens."
    if new >= limit:
        return f"Use new_tokens below {limit}."
    return f"With {new} new tokens a prompt may have {limit - new}; or use fewer new_tokens."
