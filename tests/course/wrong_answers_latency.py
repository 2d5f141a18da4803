"""Wrong answers to the exercises of the latency target, as in `wrong_answers.py`; and honest ones that have to pass."""

from __future__ import annotations

LATENCY = {
    "step_cost": {
        "a token does not see itself": """
            def step_cost(shares, cost):
                right_cost(shares, cost)
                pairs = sum(start + i for start, count in shares for i in range(count))
                return cost[0] + cost[1] * sum(count for _, count in shares) + cost[2] * pairs
        """,
        "every token sees the whole chunk": """
            def step_cost(shares, cost):
                right_cost(shares, cost)
                pairs = sum(count * (start + count) for start, count in shares)
                return cost[0] + cost[1] * sum(count for _, count in shares) + cost[2] * pairs
        """,
        "everybody sees everybody": """
            def step_cost(shares, cost):
                right_cost(shares, cost)
                tokens = sum(count for _, count in shares)
                keys = sum(start + count for start, count in shares)
                return cost[0] + cost[1] * tokens + cost[2] * tokens * keys
        """,
        "the weights once for each request": """
            def step_cost(shares, cost):
                return right_cost(shares, cost) + cost[0] * (len(shares) - 1)
        """,
        "an empty step is free": """
            def step_cost(shares, cost):
                return right_cost(shares, cost) if shares else 0
        """,
        "nothing is refused": """
            def step_cost(shares, cost):
                pairs = sum(count * start + count * (count + 1) // 2 for start, count in shares)
                return cost[0] + cost[1] * sum(count for _, count in shares) + cost[2] * pairs
        """,
    },
    "tokens_within": {
        "one too many": """
            def tokens_within(shares, start, missing, target, cost):
                return min(missing, right_within(shares, start, missing, target, cost) + 1)
        """,
        "in time means earlier": """
            def tokens_within(shares, start, missing, target, cost):
                return right_within(shares, start, missing, target - 1, cost)
        """,
        "the others are forgotten": """
            def tokens_within(shares, start, missing, target, cost):
                return right_within([], start, missing, target, cost)
        """,
        "late tokens cost what early ones do": """
            def tokens_within(shares, start, missing, target, cost):
                return right_within(shares, 0, missing, target, cost)
        """,
        "more than there are": """
            def tokens_within(shares, start, missing, target, cost):
                return right_within(shares, start, 10 * missing, target, cost)
        """,
        "at least one": """
            def tokens_within(shares, start, missing, target, cost):
                return max(1, right_within(shares, start, missing, target, cost))
        """,
    },
    "LatencyPolicy": {
        "a budget that is small enough for the last chunk": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    return FixedBudget(108).plan(running, waiting)
        """,
        "a budget that is large enough for the long prompt": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    return FixedBudget(160).plan(running, waiting)
        """,
        "the whole prompt at once": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    return [(name, missing) for name, _, missing in [*running, *waiting]]
        """,
        "the long prompt is never served": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    long = {name for name, _, missing in waiting if missing > 3000}
                    step = RightPolicy.plan(self, running, waiting)
                    return [(name, count) for name, count in step if name not in long]
        """,
        "the long prompt waits until nobody else is there": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    others = [place for place in waiting if place[2] < 1000]
                    return RightPolicy.plan(self, running, others or ([] if running else waiting))
        """,
        "one token of it in each step": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    return [(name, 1) for name, _, _ in [*running, *waiting]]
        """,
        "readers stand still while prompts are computed": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    prompts = [place for place in running if place[2] > 1]
                    if prompts or waiting:
                        return RightPolicy.plan(self, prompts, waiting)
                    return RightPolicy.plan(self, running, waiting)
        """,
        "first come, first served": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    step = [(name, 1) for name, _, missing in running if missing == 1]
                    shares = [(start, 1) for _, start, missing in running if missing == 1]
                    for name, start, missing in [*(p for p in running if p[2] > 1), *waiting]:
                        count = tokens_within(shares, start, missing, self.target, self.cost)
                        step += [(name, count)] * bool(count)
                        shares += [(start, count)] * bool(count)
                    return step
        """,
        "somebody who is not there": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    step = RightPolicy.plan(self, running, waiting)
                    return step if len(step) == 3 else [*step, ("nobody", 1)]
        """,
        "more than it lacks": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    step = RightPolicy.plan(self, running, waiting)
                    return step if len(step) < 8 else [(name, count + 1) for name, count in step]
        """,
        "two shares of one request": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    step = RightPolicy.plan(self, running, waiting)
                    return step if len(step) < 8 else [*step, step[0]]
        """,
        "nobody at all": """
            class LatencyPolicy(RightPolicy):
                def plan(self, running, waiting):
                    step = RightPolicy.plan(self, running, waiting)
                    return step if len(step) < 8 else []
        """,
    },
}

# Honest answers of other kinds than the solution: each has to pass all checks.
HONEST = {
    "equal parts of the time that is left": """
        class LatencyPolicy(RightPolicy):
            def plan(self, running, waiting):
                step = [(name, 1) for name, _, missing in running if missing == 1]
                shares = [(start, 1) for _, start, missing in running if missing == 1]
                behind = [*(p for p in running if p[2] > 1), *waiting]
                for i, (name, start, missing) in enumerate(behind):
                    spent = step_cost(shares, self.cost)
                    until = spent + (self.target - spent) // (len(behind) - i)
                    count = tokens_within(shares, start, missing, until, self.cost)
                    if count:
                        step.append((name, count))
                        shares.append((start, count))
                return step or [(behind[0][0], 1)]
    """,
    "a quadratic equation, and the newest first": """
        class LatencyPolicy(RightPolicy):
            def plan(self, running, waiting):
                fixed, per_token, per_pair = self.cost
                step, spent = [], fixed
                for name, start, missing in running:
                    if missing == 1:
                        step.append((name, 1))
                        spent += per_token + per_pair * (start + 1)
                for name, start, missing in reversed([*(p for p in running if p[2] > 1), *waiting]):
                    # per_pair / 2 n^2 + (per_token + per_pair (start + 1/2)) n = what is left
                    half, linear = per_pair / 2, per_token + per_pair * (start + 0.5)
                    left = max(0, self.target - spent)
                    count = min(missing, int(((linear**2 + 4 * half * left) ** 0.5 - linear) / (2 * half)))
                    if count > 0:
                        step.append((name, count))
                        spent = step_cost([(start, count)], self.cost) - fixed + spent
                return step or [((waiting or running)[0][0], 1)]
    """,
    "a table of budgets, and short ones between": """
        class LatencyPolicy(RightPolicy):
            def plan(self, running, waiting):
                decodes = [place for place in running if place[2] == 1]
                prompts = [*(p for p in running if p[2] > 1), *waiting]
                prompts.sort(key=lambda p: (p[1] + p[2] > 1000, p[1]))
                begun = max((start for _, start, _ in prompts), default=0)
                budget = next(n for end, n in TABLE if begun < end)
                step = [(name, 1) for name, _, _ in decodes]
                for name, _, missing in prompts:
                    count = min(missing, budget)
                    if count > 0:
                        step.append((name, count))
                    budget -= max(0, count)
                return step

        TABLE = [(256, 323), (512, 283), (1024, 225), (1536, 187), (2048, 159), (2560, 138), (3072, 122), (3584, 110)]
        TABLE.append((9999, 96))
    """,
}

ALIASES_LATENCY = {
    "right_cost": "step_cost",
    "right_within": "tokens_within",
    "RightPolicy": "LatencyPolicy",
    "FixedBudget": '__import__("folovllm.course.grading.latency", fromlist=["FixedBudget"]).FixedBudget',
}
