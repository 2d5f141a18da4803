"""Who comes when: Poisson arrivals, batches formed of them, and servers on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from folovllm.course.bench import peers
from folovllm.course.bench.arrivals import Arrivals, Batch, by_arrival, dynamic_batch, static_batch
from folovllm.course.bench.engines import EngineServer
from folovllm.course.bench.peers import TokenClock, run_dynamic, run_sequential, run_static
from folovllm.course.bench.record import Measured
from folovllm.course.bench.workloads import WORKLOADS, BenchRequest, draw
from folovllm.messages import SchedulerOutput
from folovllm.sampling_params import SamplingParams
from tests.mock import mock_engine, mock_tokens

VOCAB = 1000


# ------------------------------------------------------------------ arrivals of a workload


def gaps(name: str, **kwargs: Any) -> list[float]:
    arrivals = [r.arrival for r in draw(WORKLOADS[name], VOCAB, **kwargs)]
    assert arrivals[0] == 0
    return [b - a for a, b in pairwise(arrivals)]


def test_gaps_between_arrivals_are_exponential():
    # The Kolmogorov-Smirnov distance of 255 gaps from the distribution with mean 1 / rate.
    assert kstest(gaps("paper", arrival_rate=4.0), "expon", args=(0, 1 / 4.0)).pvalue > 0.01
    assert kstest(gaps("paper", arrival_rate=4.0), "expon", args=(0, 1 / 5.0)).pvalue < 0.01  # it can tell


def test_a_rate_changes_when_requests_come_and_nothing_else():
    plain, slow, fast = (draw(WORKLOADS["w2"], VOCAB, arrival_rate=rate) for rate in (None, 1.0, 10.0))
    for a, b, c in zip(plain, slow, fast, strict=True):
        assert (a.prompt_token_ids, a.max_tokens) == (b.prompt_token_ids, b.max_tokens)
        assert a.arrival == 0 and b.arrival == pytest.approx(10 * c.arrival)
    # Drawn once: two machines must see the same arrivals.
    assert [round(r.arrival, 3) for r in slow[:5]] == [0.0, 0.777, 1.719, 1.763, 1.86]
    assert gaps("w2", arrival_rate=1.0) != gaps("w2", arrival_rate=1.0, seed=1)
    assert {r.arrival for r in draw(WORKLOADS["w2"], VOCAB, arrival_rate=1.0, warm_up=True)} == {0}


def test_the_late_request_of_mixed_still_comes_by_progress():
    *others, late = draw(WORKLOADS["mixed"], VOCAB, arrival_rate=2.0)
    assert (late.arrival, late.start_after) == (0, 16)
    assert [r.arrival for r in others] == sorted({r.arrival for r in others})


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
def test_bad_rates_are_refused(rate: float):
    with pytest.raises(ValueError, match=r"arrival_rate=.* is not valid; allowed: a number > 0"):
        draw(WORKLOADS["w2"], VOCAB, arrival_rate=rate)


def request(arrival: float, max_tokens: int = 2, prompt_len: int = 1, start_after: int = 0) -> BenchRequest:
    return BenchRequest([1 + round(arrival * 8) % 60] * prompt_len, max_tokens, start_after, arrival)


def test_requests_are_due_once_and_in_order_of_arrival():
    arrivals = Arrivals([request(2.0), request(0.5), request(0.5), request(3.0)])
    assert arrivals.due(0.25) == [] and arrivals.wait(0.25) == 0.25
    assert arrivals.due(2.0) == [1, 2, 0]
    assert arrivals.due(2.0) == [] and arrivals.wait(2.0) == 1.0
    assert arrivals.due(9.0) == [3]
    assert arrivals.wait(9.0) == float("inf")
    assert arrivals.note == {}


def test_a_late_request_waits_for_those_that_come_by_the_clock():
    arrivals = Arrivals([request(0.0), request(5.0), request(0.0, start_after=1)])
    assert arrivals.due(0.0) == [0]
    arrivals.progress[0] = 2
    assert arrivals.due(4.0) == []  # request 1 has not come, and so has no token
    assert arrivals.due(5.0) == [1]
    arrivals.progress[1] = 1
    assert arrivals.due(6.0) == [2]


# ------------------------------------------------------------------ which batches


def test_batches_by_hand():
    arrivals = [0.0, 1.0, 2.0, 2.0, 7.0]
    assert static_batch(arrivals, 0.0, 4) == Batch(4, 2.0)
    assert static_batch(arrivals, 5.0, 4) == Batch(4, 5.0)  # the machine is busy until 5
    assert static_batch(arrivals[4:], 5.0, 4) == Batch(1, 7.0)  # no more come
    assert dynamic_batch(arrivals, 0.0, 4, 9.0) == Batch(4, 2.0)
    assert dynamic_batch(arrivals, 0.0, 4, 1.5) == Batch(2, 1.5)
    assert dynamic_batch(arrivals, 0.0, 4, 0.0) == Batch(1, 0.0)
    assert dynamic_batch(arrivals, 1.75, 4, 1.5) == Batch(2, 1.75)
    assert dynamic_batch(arrivals, 3.0, 4, 1.5) == Batch(4, 3.0)
    assert dynamic_batch(arrivals, 9.0, 4, 1.5) == Batch(4, 9.0)  # five wait, four fit
    assert dynamic_batch(arrivals[4:], 5.0, 4, 1.5) == Batch(1, 8.5)  # it cannot know that no more come


TIMES = st.lists(st.integers(0, 20), min_size=1, max_size=9).map(sorted)


@settings(max_examples=300, deadline=None)
@given(TIMES, st.integers(0, 30), st.integers(1, 5), st.integers(0, 8))
def test_a_server_that_looks_every_second_starts_the_same_batches(arrivals, free, batch_size, window):
    def watch(starts: Any) -> Batch:
        """Look at the line each second, and begin at the first one at which there is a reason to."""
        for second in range(free, 100):
            line = [a for a in arrivals if a <= second]
            if line and starts(second, line):
                return Batch(min(batch_size, len(line)), second)
        raise AssertionError("never started")

    assert static_batch(arrivals, free, batch_size) == watch(
        lambda second, line: len(line) >= batch_size or line == arrivals
    )
    assert dynamic_batch(arrivals, free, batch_size, window) == watch(
        lambda second, line: len(line) >= batch_size or second >= line[0] + window
    )


# ------------------------------------------------------------------ servers on a clock of our own


class FakeTime:
    """Seconds that pass only where somebody sleeps or works."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """Time for peers whose `generate` takes a second per token."""
    clock = FakeTime()

    def generate(model: object, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> TokenClock:
        steps = TokenClock()
        for step in range(max_new_tokens):
            clock.now += 1
            steps.times.append(clock.now)
            steps.steps.append([1000 * prompt[0] + step for prompt in prompts])  # whose token, and which
        return steps

    monkeypatch.setattr(peers, "time", clock)
    monkeypatch.setattr(peers, "generate", generate)
    return clock


MODEL: Any = None  # the fake `generate` needs none

# (arrival, output tokens), not in order of arrival: 3, 0, 2, 1 come in this order.
REQUESTS = [request(1.0, 2), request(4.0, 1), request(2.5, 5), request(0.0, 3)]


def timeline(measured: Measured) -> list[tuple[list[int], float, float]]:
    """Batches, from the start of the run on."""
    return [(b["requests"], b["start"] - 100, b["end"] - 100) for b in measured.extra["batches"]]


def check_fake(measured: Measured, requests: Sequence[BenchRequest] = REQUESTS) -> None:
    """Each request got its own row's tokens, its arrival, and a time for each of its tokens but no more."""
    for i, r in enumerate(requests):
        assert measured.token_ids[i] == [1000 * r.prompt_token_ids[0] + step for step in range(r.max_tokens)]
        (start,) = (begin for members, begin, _ in timeline(measured) if i in members)
        assert measured.token_times[i] == [100 + start + 1 + step for step in range(r.max_tokens)]
        assert measured.arrivals[i] == 100 + r.arrival


def test_static_waits_for_all_and_for_the_longest(clock: FakeTime):
    measured = run_static(MODEL, REQUESTS)
    assert timeline(measured) == [([3, 0, 2, 1], 4.0, 9.0)]
    check_fake(measured)
    assert measured.ttfts == [4.0, 1.0, 2.5, 5.0]  # all see a token at 5, and count from their arrival
    assert (measured.idle_seconds, measured.wall_seconds) == (4.0, 9.0)


def test_static_in_batches_by_hand(clock: FakeTime):
    measured = run_static(MODEL, REQUESTS, batch_size=2)
    # 3 and 0 wait for each other until 1.0 and run 3 steps; at 4.0 both others have come.
    assert timeline(measured) == [([3, 0], 1.0, 4.0), ([2, 1], 4.0, 9.0)]
    check_fake(measured)
    assert clock.slept == [1.0]
    measured = run_static(MODEL, REQUESTS[:3], batch_size=2)  # the last batch is not full: no more come
    assert [members for members, *_ in timeline(measured)] == [[0, 2], [1]]


def test_sequential_waits_for_arrivals(clock: FakeTime):
    requests = [request(0.0, 1), request(0.5, 2), request(6.0, 1)]
    measured = run_sequential(MODEL, requests)
    assert timeline(measured) == [([0], 0.0, 1.0), ([1], 1.0, 3.0), ([2], 6.0, 7.0)]
    check_fake(measured, requests)
    assert measured.ttfts == [1.0, 1.5, 1.0]
    assert measured.idle_seconds == 3.0


def test_dynamic_batches_by_hand(clock: FakeTime):
    measured = run_dynamic(MODEL, REQUESTS, batch_size=2, window=0.5)
    # 3 gives up waiting for a partner at 0.5, and runs until 3.5. By then 0 and 2 wait; they run until 8.5, then 1.
    assert timeline(measured) == [([3], 0.5, 3.5), ([0, 2], 3.5, 8.5), ([1], 8.5, 9.5)]
    check_fake(measured)
    clock.now = 100.0
    measured = run_dynamic(MODEL, REQUESTS, batch_size=3, window=3.0)
    # Three are there at 2.5, before the window of the first ends at 3.0; the last one waits no window, as 7.5 > 4 + 3.
    assert timeline(measured) == [([3, 0, 2], 2.5, 7.5), ([1], 7.5, 8.5)]
    check_fake(measured)


def test_padding_of_several_batches_by_hand(clock: FakeTime):
    requests = [request(0.0, 2, prompt_len=3), request(0.0, 1, prompt_len=1), request(0.0, 3, prompt_len=2)]
    measured = run_static(MODEL, requests, batch_size=2)
    # Rows through the model: first batch 2 x (3 + 1), second 1 x (2 + 2); needed 4 + 1, and 4.
    assert measured.padding_share == pytest.approx(1 - 9 / 12)
    # Columns of K/V: first batch 2 x (3 + 4), second 2 + 3 + 4. Needed: 3 + 4 of the first, 1 of the second, 9.
    assert measured.kv_padding_share == pytest.approx(1 - (7 + 1 + 9) / (14 + 9))
    assert (measured.kv_reserved_tokens, measured.kv_used_tokens) == (8, 5)


def test_batches_of_nobody_are_refused(clock: FakeTime):
    with pytest.raises(ValueError, match="batch_size=0"):
        run_static(MODEL, REQUESTS, 0)
    with pytest.raises(ValueError, match="batch_size=-1"):
        run_dynamic(MODEL, REQUESTS, -1, 1.0)
    for window in (-0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"window=.* allowed: a number >= 0, in seconds"):
            run_dynamic(MODEL, REQUESTS, 2, window)
    with pytest.raises(ValueError, match=r"requests\[1\].start_after=1"):
        run_static(MODEL, [request(0.0), request(0.0, start_after=1)])


def test_batches_in_the_file_count_from_the_first_arrival(clock: FakeTime):
    measured = run_static(MODEL, REQUESTS, batch_size=2)
    assert measured.to_json(1)["batches"] == [
        {"requests": [3, 0], "start": 1.0, "end": 4.0},
        {"requests": [2, 1], "start": 4.0, "end": 9.0},
    ]
    assert measured.extra["batches"][0]["start"] == 101.0  # on the clock of the token times


def engine_run(requests: Sequence[BenchRequest], clock: FakeTime) -> Measured:
    """A server around the mock model, whose every step takes a second."""
    engine = mock_engine(max_num_seqs=4, capacity=256)
    runner: Any = engine.core.runner
    execute = runner.execute_model

    def slowly(step: SchedulerOutput) -> Any:
        clock.now += bool(step.scheduled)
        return execute(step)

    runner.execute_model = slowly
    engine.core.clock = clock.perf_counter
    llm: Any = SimpleNamespace(engine=engine)
    return EngineServer(llm, "cpu", clock.sleep).run(requests)


def test_an_engine_takes_requests_at_the_next_step():
    clock = FakeTime()
    requests = [request(10.0, 2), request(1.5, 3), request(0.0, 4), request(10.25, 1)]
    measured = engine_run(requests, clock)
    # Request 2 runs from 0 to 4; 1 comes in its second step and joins the third; 0 is waited for, 3 comes in its first.
    assert [[t - 100 for t in times] for times in measured.token_times] == [[11, 12], [3, 4, 5], [1, 2, 3, 4], [12]]
    assert [a - 100 for a in measured.arrivals] == [10.0, 1.5, 0.0, 10.25]
    assert measured.ttfts == [1.0, 1.5, 1.0, 1.75]
    assert clock.slept == [5.0]
    assert measured.idle_seconds == 5.0
    for r, ids in zip(requests, measured.token_ids, strict=True):
        assert ids == mock_tokens(r.prompt_token_ids, SamplingParams(max_tokens=r.max_tokens, ignore_eos=True))[0]


def test_overhead_is_a_share_of_the_time_that_was_not_waited():
    measured = Measured([0.0], 10.0, [[1]], [[10.0]], forward_seconds=3.0, idle_seconds=4.0)
    assert measured.to_json(1)["overhead_share"] == pytest.approx(0.5)
    assert measured.to_json(1)["idle_s"] == 4.0


def test_order_of_arrival_keeps_the_order_of_equals():
    assert by_arrival([request(1.0), request(0.0), request(1.0), request(0.0)]) == [1, 3, 0, 2]
