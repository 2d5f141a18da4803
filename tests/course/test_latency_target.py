"""The exercise of chapter 8: the made-up machine counts as it says, no budget keeps the targets, honest policies do.

That wrong answers are caught and the solution passes is tested with those of the other milestones, in `test_grade` and
`test_milestones`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.course.grading import latency
from folovllm.course.grading.checks import WrongAnswer
from folovllm.course.grading.latency import COST, LONG, MS, READERS, SHORT, Arrival, Cost, FixedBudget, Place, serve
from folovllm.course.grading.runner import find_milestones, run_checks
from tests.course.wrong_answers_latency import ALIASES_LATENCY, HONEST

MILESTONE = find_milestones()["m4-latency-target"]
Plan = Callable[[Sequence[Place], Sequence[Place]], list[tuple[str, int]]]


# --- the machine, beside a second one that has no engine in it ---------------------------------------------------


@dataclass
class Life:
    """A request on the second machine."""

    arrival: Arrival
    computed: int = 0
    times: list[int] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return self.arrival.prompt_len + len(self.times) - self.computed


def replay(arrivals: Sequence[Arrival], cost: Cost, plan: Plan) -> dict[str, list[int]]:
    """The moments of each request's tokens, in nanoseconds, counted without an engine."""
    lives = {a.request_id: Life(a) for a in arrivals}
    to_come = sorted(arrivals, key=lambda a: a.time)
    now, running, waiting = 0, [], []  # type: ignore[var-annotated]
    while to_come or running or waiting:
        if not running and not waiting:
            now = max(now, to_come[0].time)
        while to_come and to_come[0].time <= now:
            waiting.append(to_come.pop(0).request_id)
        seen = [[(i, lives[i].computed, lives[i].missing) for i in ids] for ids in (running, waiting)]
        step = plan(*seen)
        for name, count in step:
            for position in range(lives[name].computed, lives[name].computed + count):
                now += cost.per_token + cost.per_pair * (position + 1)
        now += cost.fixed
        for name, count in step:
            life = lives[name]
            if name in waiting:
                waiting.remove(name)
                running.append(name)
            life.computed += count
            if life.missing == 0:
                life.times.append(now)
                if len(life.times) == life.arrival.max_tokens:
                    running.remove(name)
    return {name: life.times for name, life in lives.items()}


some_arrivals = st.lists(
    st.tuples(st.integers(0, 400), st.integers(1, 60), st.integers(1, 6)), min_size=1, max_size=5
).map(lambda drawn: [Arrival(str(i), *fields) for i, fields in enumerate(drawn)])


@settings(max_examples=25, deadline=None)
@given(arrivals=some_arrivals, budget=st.integers(1, 40), piece=st.integers(0, 9), fixed=st.integers(1, 90))
def test_latencies_are_those_of_the_formula(arrivals: list[Arrival], budget: int, piece: int, fixed: int) -> None:
    cost, policy = Cost(fixed, 3, 2), FixedBudget(budget, piece)
    done, want = serve(arrivals, cost, policy), replay(arrivals, cost, policy.plan)
    for arrival in arrivals:
        metrics = done.outputs[arrival.request_id].metrics
        assert [round(t * latency.NANOSECONDS) for t in metrics.token_times] == want[arrival.request_id]
        assert round(metrics.arrival_time * latency.NANOSECONDS) == arrival.time
        assert done.outputs[arrival.request_id].outputs[0].token_ids == arrival.expected_tokens()
        gaps = [b - a for a, b in pairwise(want[arrival.request_id])]
        assert done.longest_itl(arrival.request_id) * MS == pytest.approx(max(gaps, default=0))


def test_the_engines_own_rule_is_a_fixed_budget() -> None:
    arrivals = [*READERS[:3], Arrival("long", 50 * MS, 300, 4), Arrival("late", 90 * MS, 40, 4)]
    own, policy = serve(arrivals, COST, budget=64), serve(arrivals, COST, FixedBudget(64))
    assert [step.duration for step in own.trace] == [step.duration for step in policy.trace]
    shares = [[[(r.request_id, r.num_scheduled) for r in s.requests] for s in run.trace] for run in (own, policy)]
    assert shares[0] == shares[1]


def test_the_parts_of_a_step_are_the_whole_step() -> None:
    done = serve([*READERS[:2], Arrival("long", 30 * MS, 300, 3)], COST, FixedBudget(64))
    for step in done.trace:
        fixed, tokens, pairs = latency.parts_of(step, COST)
        assert fixed + tokens + pairs == pytest.approx(1e3 * step.duration)
        assert fixed == 20 and tokens == pytest.approx(0.05 * step.num_scheduled_tokens) and pairs > 0


def test_prompts_differ_and_stay_the_same() -> None:
    assert LONG.prompt == LONG.prompt and len(LONG.prompt) == LONG.prompt_len
    assert READERS[0].prompt != READERS[1].prompt
    assert max(LONG.prompt) < latency.VOCAB_SIZE


class Answers:
    """A policy that returns what it is told."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def plan(self, running: Sequence[Place], waiting: Sequence[Place]) -> list[tuple[str, int]]:
        """Whatever it is."""
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "a list of pairs"),
        ([("a",)], "a list of pairs"),
        ([("b", 1)], "There is no request 'b'"),
        ([("a", 0)], "'a' has 5 tokens to compute; allowed: 1 to that many"),
        ([("a", 6)], "'a' has 5 tokens to compute"),
        ([("a", True)], "'a' has 5 tokens to compute"),
        ([("a", 2), ("a", 1)], "in a step only once"),
        ([], "never make progress"),
    ],
)
def test_a_plan_that_cannot_be_is_explained(answer: object, words: str) -> None:
    with pytest.raises(WrongAnswer) as caught:
        serve([Arrival("a", 0, 5, 2)], COST, Answers(answer))  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert str(caught.value).startswith("plan([], [('a', 0, 5)])\nreturned  ")


def test_who_starves_somebody_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MAX_STEPS", 20)
    with pytest.raises(WrongAnswer, match="After 20 steps these are not done: long. Do they starve"):
        serve([Arrival("long", 0, 4000, 2)], COST, FixedBudget(3))


# --- the targets --------------------------------------------------------------------------------------------------


def test_no_fixed_budget_keeps_both_targets() -> None:
    """Each one is tried, up to those whose very first chunk takes too long."""
    arrivals, in_time = [*READERS, LONG], []
    largest = 400
    first = latency.step_cost([(40, 1)] * len(READERS) + [(0, largest - len(READERS))], COST)
    assert first > latency.ITL_TARGET
    for budget in range(1, largest):
        moments = replay(arrivals, COST, FixedBudget(budget).plan)
        pause = max(b - a for times in moments.values() for a, b in pairwise(times))
        if pause <= latency.ITL_TARGET:
            in_time.append(budget)
            assert moments["long"][0] - LONG.time > latency.LONG_TTFT_TARGET
    assert 100 < max(in_time) < 120  # of those that keep the readers' pace, the fastest for the long prompt


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_policy_of_another_kind_passes(name: str, tmp_path: Path) -> None:
    code = (MILESTONE.folder / "solution.py").read_text(encoding="utf-8")
    code += "".join(f"\n{alias} = {right}\n" for alias, right in ALIASES_LATENCY.items())
    file = tmp_path / "my_file.py"
    file.write_text(code + textwrap.dedent(HONEST[name]), encoding="utf-8")
    report = run_checks(MILESTONE, file, ["LatencyPolicy"])
    assert [(e.name, e.status, e.first_failure) for e in report.exercises] == [("LatencyPolicy", "passed", None)]


def test_the_targets_leave_room_for_more_than_one_policy() -> None:
    """The time that all the work takes at least, in steps as long as they may be, is well below the target."""
    work = latency.step_cost([(0, LONG.prompt_len)], COST) - COST.fixed
    room = latency.ITL_TARGET - latency.step_cost([(128, 1)] * len(READERS), COST)
    least = -(-work // room) * latency.ITL_TARGET
    assert least < 0.92 * latency.LONG_TTFT_TARGET
    assert latency.SHORT_TTFT_TARGET > 2 * latency.ITL_TARGET
    assert all(short.prompt_len * COST.per_token < room for short in SHORT)
