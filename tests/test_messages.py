"""Messages: a plan that goes on from an earlier one."""

from __future__ import annotations

from miinb.messages import Plan, PlanLine


def test_a_plan_goes_on_from_what_was_chosen_before() -> None:
    before = Plan("optimized", "cpu", "bf16", warnings=("no policy", "fp16 is slow here"))
    before = before.with_line("engine", "baseline", "no policy").with_line("dtype", "bf16", "fp16 is slow here")
    rank = Plan("baseline", "cpu", "bf16", max_batch=4, warnings=("told by the rank",))
    rank = rank.with_line("engine", "transformers", "eager")
    assert rank.following(before) == Plan(
        "baseline",
        "cpu",
        "bf16",
        max_batch=4,
        lines=(PlanLine("dtype", "bf16", "fp16 is slow here"), PlanLine("engine", "transformers", "eager")),
        warnings=("fp16 is slow here", "told by the rank"),
    )
