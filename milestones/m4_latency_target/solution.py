"""Answers to the exercises of M4's third part. There are others; the checks take any policy that keeps the targets.

What the engine does in their place is in folovllm/scheduler/scheduler.py: `schedule` takes decodes first, then whatever
still catches up, within a budget that does not change from step to step. How the machine of the exercise counts time is
in folovllm/course/grading/latency.py: `step_cost` is the same formula as here.
"""

from __future__ import annotations

from collections.abc import Sequence


def step_cost(shares: Sequence[tuple[int, int]], cost: tuple[int, int, int]) -> int:
    """The tokens of a share see start + 1, start + 2, ..., start + count keys: the sum has a formula.

    folovllm/course/grading/latency.py: `step_cost`.
    """
    if any(start < 0 or count < 1 for start, count in shares):
        raise ValueError(f"shares={list(shares)}: start >= 0 and count >= 1")
    fixed, per_token, per_pair = cost
    tokens = sum(count for _, count in shares)
    pairs = sum(count * start + count * (count + 1) // 2 for start, count in shares)
    return fixed + per_token * tokens + per_pair * pairs


def tokens_within(
    shares: Sequence[tuple[int, int]], start: int, missing: int, target: int, cost: tuple[int, int, int]
) -> int:
    """More tokens never cost less, so halving finds the last count that fits.

    The engine's own rule is `_num_new_tokens` in folovllm/scheduler/scheduler.py: what the budget leaves, at any cost.
    """
    low, high = 0, missing
    while low < high:
        middle = (low + high + 1) // 2
        if step_cost([*shares, (start, middle)], cost) <= target:
            low = middle
        else:
            high = middle - 1
    return low


class LatencyPolicy:
    """Decodes first; then prompts, the shortest rest first, each with as much as the time of the step allows.

    So a chunk shrinks while its prompt grows, and every step takes nearly as long as it may. Shortest first is the
    order that folovllm/scheduler/request_queue.py: `sjf_rank` gives those who wait; here it holds for those whose
    prompt has begun, too, so that a short one passes a long one in the middle. A stream of short prompts that fills
    every step would starve a long one: then a part of each step would have to be kept for the oldest.
    """

    def __init__(self, target: int, cost: tuple[int, int, int]) -> None:
        self.target = target
        self.cost = cost

    def plan(
        self, running: Sequence[tuple[str, int, int]], waiting: Sequence[tuple[str, int, int]]
    ) -> list[tuple[str, int]]:
        """Fill the step."""
        decodes = [place for place in running if place[2] == 1]
        behind = sorted([*(place for place in running if place[2] > 1), *waiting], key=lambda place: place[2])
        step = [(name, 1) for name, _, _ in decodes]
        shares = [(start, 1) for _, start, _ in decodes]
        for name, start, missing in behind:
            count = tokens_within(shares, start, missing, self.target, self.cost)
            if count:
                step.append((name, count))
                shares.append((start, count))
        if not step:  # one token takes too long: late is better than never
            step = [(behind[0][0], 1)]
        return step
