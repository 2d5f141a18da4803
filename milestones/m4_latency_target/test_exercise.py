"""The checks behind `folovllm grade m4-latency-target`. Reading them is allowed: they say what, never how."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.course.grading.checks import Call, WrongAnswer
from folovllm.course.grading.latency import (
    COST,
    ITL_TARGET,
    LONG,
    LONG_TTFT_TARGET,
    MS,
    READERS,
    SHORT,
    SHORT_TTFT_TARGET,
    Arrival,
    Served,
    serve,
)

SMALL = (1000, 10, 1)
some_shares = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=4)
some_costs = st.tuples(st.integers(0, 50), st.integers(0, 20), st.integers(0, 3))


def pair_by_pair(shares: Sequence[tuple[int, int]], cost: tuple[int, int, int]) -> int:
    """The cost of a step, counted."""
    fixed, per_token, per_pair = cost
    positions = [start + i for start, count in shares for i in range(count)]
    return fixed + sum(per_token + sum(per_pair for key in range(position + 1)) for position in positions)


# --- what a step costs ------------------------------------------------------------------------------------


@pytest.mark.exercise("step_cost")
class TestStepCost:
    def test_the_examples(self, impl: ModuleType) -> None:
        """A prompt, a chunk of one, and a decode beside a prompt."""
        Call(impl.step_cost, [(0, 3)], SMALL).must_return(1036, "1000 + 3 x 10 + 1 + 2 + 3 pairs.")
        Call(impl.step_cost, [(100, 2)], SMALL).must_return(1223, "Its two tokens see 101 and 102 keys.")
        Call(impl.step_cost, [(7, 1), (0, 2)], SMALL).must_return(1041, "1000 + 3 x 10 + 8 pairs + 3 pairs.")

    def test_an_empty_step(self, impl: ModuleType) -> None:
        """A step without tokens reads the weights all the same."""
        Call(impl.step_cost, [], SMALL).must_return(1000)

    def test_a_prompt_in_chunks(self, impl: ModuleType) -> None:
        """Chunks of a prompt cost what the prompt costs, and `fixed` once more for each of them but one."""
        chunks = [(0, 5), (5, 5), (10, 2)]
        total = sum(Call(impl.step_cost, [chunk], SMALL).result() for chunk in chunks)
        Call(impl.step_cost, [(0, 12)], SMALL).must_return(total - 2000, f"{chunks} take {total} together.")

    @given(shares=some_shares, cost=some_costs)
    def test_pair_by_pair(self, impl: ModuleType, shares: list[tuple[int, int]], cost: tuple[int, int, int]) -> None:
        """Any step: against one whose pairs are counted one by one."""
        Call(impl.step_cost, shares, cost).must_return(pair_by_pair(shares, cost))

    def test_refusals(self, impl: ModuleType) -> None:
        """Positions below 0 and shares of nothing are refused."""
        Call(impl.step_cost, [(0, 2), (-1, 2)], SMALL).must_refuse("start < 0.")
        Call(impl.step_cost, [(3, 0)], SMALL).must_refuse("count < 1.")


# --- how much fits ----------------------------------------------------------------------------------------


@pytest.mark.exercise("tokens_within")
class TestTokensWithin:
    def test_the_examples(self, impl: ModuleType) -> None:
        """An early chunk, a late one, and one beside a decode."""
        Call(impl.tokens_within, [], 0, 5, 1033, SMALL).must_return(2, "2 tokens take 1023, 3 take 1036.")
        Call(impl.tokens_within, [], 100, 5, 1250, SMALL).must_return(2, "2 tokens take 1223, 3 take 1336.")
        Call(impl.tokens_within, [(7, 1)], 0, 5, 1033, SMALL).must_return(1, "With the decode it is 1018 before.")

    def test_all_of_it(self, impl: ModuleType) -> None:
        """A prompt has no more tokens than it lacks."""
        Call(impl.tokens_within, [], 0, 5, 5000, SMALL).must_return(5)

    def test_exactly_in_time(self, impl: ModuleType) -> None:
        """A step that takes just as long as it may is in time."""
        Call(impl.tokens_within, [], 0, 5, 1036, SMALL).must_return(3, "3 tokens take 1036.")
        Call(impl.tokens_within, [], 0, 5, 1035, SMALL).must_return(2, "3 tokens take 1036.")

    def test_too_late_without_it(self, impl: ModuleType) -> None:
        """Where the others take too long already, nothing fits."""
        Call(impl.tokens_within, [(0, 90)], 0, 5, 1033, SMALL).must_return(0)
        Call(impl.tokens_within, [], 0, 5, 900, SMALL).must_return(0, "An empty step takes 1000.")

    @given(
        shares=some_shares, start=st.integers(0, 40), missing=st.integers(1, 40), target=st.integers(0, 4000),
        cost=some_costs,
    )  # fmt: skip
    def test_one_by_one(
        self,
        impl: ModuleType,
        shares: list[tuple[int, int]],
        start: int,
        missing: int,
        target: int,
        cost: tuple[int, int, int],
    ) -> None:
        """Any step: against one to which tokens are added one by one while they fit."""
        want = 0
        while want < missing and pair_by_pair([*shares, (start, want + 1)], cost) <= target:
            want += 1
        Call(impl.tokens_within, shares, start, missing, target, cost).must_return(want)

    @pytest.mark.late
    def test_a_very_long_prompt(self, impl: ModuleType) -> None:
        """It is fast: a prompt of ten million tokens is no more work than one of ten."""
        for _ in range(50):
            Call(impl.tokens_within, [], 0, 10**7, 10**12, (0, 1, 0)).must_return(10**7)


# --- the policy: in the real engine -----------------------------------------------------------------------


def ask(impl: ModuleType, running: Sequence[tuple[str, int, int]], waiting: Sequence[tuple[str, int, int]]) -> Call:
    """A call of `plan` of a policy for the machine of the exercise."""
    return Call(impl.LatencyPolicy(ITL_TARGET, tuple(COST)).plan, list(running), list(waiting))


def served(impl: ModuleType, arrivals: Sequence[Arrival]) -> Served:
    """All requests in the engine under the learner's policy: served to the end, with the tokens they should have."""
    done = serve(arrivals, COST, impl.LatencyPolicy(ITL_TARGET, tuple(COST)))
    for arrival in arrivals:
        tokens, want = done.outputs[arrival.request_id].outputs[0].token_ids, arrival.expected_tokens()
        if tokens != want:
            raise WrongAnswer(f"{arrival.request_id} said {tokens[:8]} ..., and should have said {want[:8]} ...")
    return done


def must_keep_pace(done: Served) -> None:
    """Nobody waited too long for a next token."""
    slowest = max(done.outputs, key=done.longest_itl)
    gap = done.longest_itl(slowest)
    if gap > ITL_TARGET / MS + 1e-6:
        raise WrongAnswer(
            f"{slowest} waited {gap:.1f} ms for a token; the target is {ITL_TARGET / MS:g} ms.\n{costliest(done)}"
        )


def costliest(done: Served) -> str:
    """The step that took longest, in words."""
    step = max(done.trace, key=lambda s: s.duration)
    decodes = sum(r.num_scheduled == 1 and r.num_prompt == 0 for r in step.requests)
    prompts = [f"{r.num_prompt} of {r.request_id}" for r in step.requests if r.num_prompt]
    behind = [f", behind {r.num_computed - r.num_scheduled}" for r in step.requests if r.num_prompt][:1]
    with_prompts = f" and prompt tokens: {', '.join(prompts)}{''.join(behind)}" if prompts else ""
    return f"The longest step took {1e3 * step.duration:.1f} ms, with {decodes} decodes{with_prompts}."


def must_begin(done: Served, arrival: Arrival, target: int) -> None:
    """Its first token was in time."""
    ttft = done.ttft(arrival.request_id)
    if ttft > target / MS + 1e-6:
        steps = [s for s in done.trace for r in s.requests if r.request_id == arrival.request_id and r.num_prompt]
        first = 1e3 * steps[0].phases["schedule"][0] - arrival.time / MS
        raise WrongAnswer(
            f"{arrival.request_id} had its first token {ttft:.0f} ms after it came; the target is {target / MS:g} ms.\n"
            f"It was first in a step after {max(0.0, first):.0f} ms, and its {arrival.prompt_len} tokens took "
            f"{len(steps)} steps."
        )


@pytest.mark.exercise("LatencyPolicy")
class TestLatencyPolicy:
    def test_readers_alone(self, impl: ModuleType) -> None:
        """Decodes are in every step: somebody reads along."""
        running = [("a", 40, 1), ("b", 90, 1), ("c", 12, 1)]
        call = ask(impl, running, [])
        plan = call.result()
        if sorted(plan) != [("a", 1), ("b", 1), ("c", 1)]:
            call.fail(plan, why="All three decode, and there is time for all of them.")

    def test_a_prompt_alone(self, impl: ModuleType) -> None:
        """Where nobody decodes, a prompt gets something."""
        call = ask(impl, [], [("a", 0, 4096)])
        plan = call.result()
        if [name for name, _ in plan] != ["a"] or not 1 <= plan[0][1] <= 4096:
            call.fail(plan, why="Nobody else is there.")

    def test_the_readers_keep_their_pace(self, impl: ModuleType) -> None:
        """In the engine: nobody waits longer than the target for a next token while the long prompt is computed."""
        must_keep_pace(served(impl, [*READERS, LONG]))

    def test_the_long_prompt_is_in_time(self, impl: ModuleType) -> None:
        """In the engine: the long prompt has its first token in time, beside the readers."""
        done = served(impl, [*READERS, LONG])
        must_begin(done, LONG, LONG_TTFT_TARGET)
        must_keep_pace(done)

    def test_short_ones_behind_it(self, impl: ModuleType) -> None:
        """In the engine: short prompts that come behind the long one are in time, and it is, and the readers are."""
        done = served(impl, [*READERS, LONG, *SHORT])
        for arrival in SHORT:
            must_begin(done, arrival, SHORT_TTFT_TARGET)
        must_begin(done, LONG, LONG_TTFT_TARGET)
        must_keep_pace(done)

    def test_another_day(self, impl: ModuleType) -> None:
        """In the engine: other lengths and other times, and nothing but the targets to go by."""
        readers = [Arrival(f"other {i}", 7 * i * MS, 20 + 9 * i, 80) for i in range(5)]
        long = Arrival("late and long", 500 * MS, 3500, 5)
        short = [Arrival(f"quick {i}", (700 + 90 * i) * MS, 30 + 20 * i, 6) for i in range(4)]
        done = served(impl, [*readers, long, *short])
        for arrival in short:
            must_begin(done, arrival, SHORT_TTFT_TARGET)
        must_begin(done, long, LONG_TTFT_TARGET)
        must_keep_pace(done)
