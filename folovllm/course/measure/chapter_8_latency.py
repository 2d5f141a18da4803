"""The second measurement of chapter 8, a latency target.

`python -m folovllm.course.measure latency` writes `results/m4-latency-target.json`.

The latency exercise's hardest workload on its made-up machine, under fixed budgets and under the solution's policy. The
machine counts its own time, so the numbers are the same everywhere.

policies: a budget, or "solution" -> longest_itl_ms (of any request), long_ttft_ms (of the long prompt), short_ttft_ms
(the longest of a short prompt), and long_steps: of each step that computes a part of the long prompt, its fixed
milliseconds, those of its tokens and those of its pairs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from folovllm.course.bench.rounds import provenance
from folovllm.course.grading.latency import COST, ITL_TARGET, LONG, READERS, SHORT, FixedBudget, Policy, parts_of, serve
from folovllm.course.measure.measuring import CPU
from folovllm.course.paths import ROOT

BUDGETS = (64, 108, 160, 256, 4096)


def latency(_: Console, __: int, ___: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """What each policy makes of the hardest workload."""
    policies: dict[str, Policy] = {str(budget): FixedBudget(budget) for budget in BUDGETS}
    data = {
        **provenance(CPU),
        "command": "python -m folovllm.course.measure latency",
        "policies": {name: under(policy) for name, policy in (policies | {"solution": solution()}).items()},
    }
    return [("m4-latency-target", data)]


def solution() -> Policy:
    """The policy of the exercise's solution."""
    file = ROOT / "milestones" / "m4_latency_target" / "solution.py"
    spec = importlib.util.spec_from_file_location("m4_latency_target_solution", file)
    if spec is None or spec.loader is None:
        raise LookupError(f"{file.name} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    policy: Policy = module.LatencyPolicy(ITL_TARGET, COST)
    return policy


def under(policy: Policy) -> dict[str, Any]:
    """The latencies under one policy, and what the steps of the long prompt cost."""
    done = serve((*READERS, LONG, *SHORT), COST, policy)
    long_steps = [
        parts_of(step, COST)
        for step in done.trace
        if any(share.request_id == LONG.request_id and share.num_prompt for share in step.requests)
    ]
    return {
        "longest_itl_ms": done.longest_itl(),
        "long_ttft_ms": done.ttft(LONG.request_id),
        "short_ttft_ms": max(done.ttft(arrival.request_id) for arrival in SHORT),
        "long_steps": long_steps,
    }
