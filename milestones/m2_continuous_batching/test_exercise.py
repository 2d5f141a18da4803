"""The checks behind `folovllm grade m2`. Reading them is allowed: they say what, never how."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from folovllm import LLM, EngineConfig, LLMEngine, ModelConfig, SamplingParams, SchedulerConfig
from folovllm.course.glossary import default_prompts
from folovllm.course.grading.checks import Call, WrongAnswer
from folovllm.kv_cache.interface import KVCacheManager
from folovllm.messages import SchedulerOutput
from folovllm.scheduler.scheduler import Scheduler

# --- what a batch wastes ----------------------------------------------------------------------------------

some_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@pytest.mark.exercise("padding_share")
class TestPaddingShare:
    def test_the_example(self, impl: ModuleType) -> None:
        """Prompts of 12, 300 and 40 tokens: most of the rectangle is padding."""
        call = Call(impl.padding_share, [12, 300, 40])
        call.must_return(1 - 352 / 900, "12 + 300 + 40 = 352 tokens in 3 * 300 = 900 cells.")

    def test_rows_of_nearly_one_length(self, impl: ModuleType) -> None:
        """Rows of 36, 37 and 36 tokens waste next to nothing."""
        Call(impl.padding_share, [36, 37, 36]).must_return(2 / 111, "109 tokens in 111 cells.")

    def test_a_prompt_among_decodes(self, impl: ModuleType) -> None:
        """A prompt of 100 tokens in one rectangle with 7 decodes: 693 of 800 cells are padding."""
        why = "Each of the 7 rows of one token is padded by 99."
        Call(impl.padding_share, [100] + [1] * 7).must_return(693 / 800, why)

    def test_rows_of_one_length(self, impl: ModuleType) -> None:
        """Rows of one length need no padding, and neither does a single row."""
        Call(impl.padding_share, [7, 7, 7]).must_return(0.0)
        Call(impl.padding_share, [7]).must_return(0.0)

    @given(lengths=some_lengths)
    def test_against_a_real_rectangle(self, impl: ModuleType, lengths: list[int]) -> None:
        """The share of zeros that PyTorch's pad_sequence adds to rows of ones."""
        cells = pad_sequence([torch.ones(n) for n in lengths], batch_first=True)
        zeros = int((cells == 0).sum())
        why = f"pad_sequence makes {cells.numel()} cells of these, and {zeros} of them are padding."
        Call(impl.padding_share, lengths).must_return(zeros / cells.numel(), why)

    def test_refusals(self, impl: ModuleType) -> None:
        """No rows, and rows without tokens, are refused."""
        Call(impl.padding_share, []).must_refuse("There is no row.")
        Call(impl.padding_share, [3, 0]).must_refuse("The second row has no tokens.")


def rows(*lines: list[int]) -> torch.Tensor:
    return torch.tensor(lines)


VALUES = "Value 1 is input_ids, 2 attention_mask, 3 position_ids."
some_rows = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 5)), min_size=1, max_size=4
)


@pytest.mark.exercise("padded_inputs")
class TestPaddedInputs:
    def test_a_prefill(self, impl: ModuleType) -> None:
        """Two prompts of 3 and 1 tokens, and nothing in the cache."""
        want = (rows([5, 6, 7], [0, 0, 8]), rows([1, 1, 1], [0, 0, 1]), rows([0, 1, 2], [0, 0, 0]))
        call = Call(impl.padded_inputs, [[5, 6, 7], [8]], [0, 0])
        call.must_return(want, f"{VALUES} The padding stands on the left.")

    def test_a_decode_step(self, impl: ModuleType) -> None:
        """One new token each, behind 3 and 1 tokens of K/V."""
        want = (rows([9], [4]), rows([1, 1, 1, 1], [0, 0, 1, 1]), rows([3], [1]))
        why = f"{VALUES} A row's position is the number of tokens before it, not of columns."
        Call(impl.padded_inputs, [[9], [4]], [3, 1]).must_return(want, why)

    def test_rows_of_one_length(self, impl: ModuleType) -> None:
        """Where all rows are equally long, nothing is masked."""
        want = (rows([9], [4]), rows([1, 1, 1], [1, 1, 1]), rows([2], [2]))
        Call(impl.padded_inputs, [[9], [4]], [2, 2]).must_return(want, VALUES)

    def test_a_token_that_is_zero(self, impl: ModuleType) -> None:
        """A token 0 is a token, though padding is written as 0 as well."""
        want = (rows([0, 3], [0, 0]), rows([1, 1], [0, 1]), rows([0, 1], [0, 0]))
        why = f"{VALUES} The prompts are [0 3] and [0]: only the one zero that was added is masked."
        Call(impl.padded_inputs, [[0, 3], [0]], [0, 0]).must_return(want, why)

    def test_a_prompt_beside_a_decode(self, impl: ModuleType) -> None:
        """A new prompt of 3 tokens beside a decode behind 2 of K/V: padding stands in both parts of the row."""
        want = (rows([5, 6, 7], [0, 0, 9]), rows([0, 0, 1, 1, 1], [1, 1, 0, 0, 1]), rows([0, 1, 2], [0, 0, 2]))
        why = f"{VALUES} 2 columns of cache, then 3 new ones; the second row's new token stands in the last."
        Call(impl.padded_inputs, [[5, 6, 7], [9]], [0, 2]).must_return(want, why)

    @given(batch=some_rows)
    def test_any_rows(self, impl: ModuleType, batch: list[tuple[list[int], int]]) -> None:
        """Any new tokens behind any K/V: cell by cell."""
        new, cached = [tokens for tokens, _ in batch], [start for _, start in batch]
        width, columns = max(cached), max(map(len, new))
        ids = torch.zeros(len(batch), columns, dtype=torch.long)
        mask = torch.zeros(len(batch), width + columns, dtype=torch.long)
        positions = torch.zeros_like(ids)
        for row, (tokens, start) in enumerate(batch):
            for i, token in enumerate(tokens):
                column = columns - len(tokens) + i
                ids[row, column], positions[row, column], mask[row, width + column] = token, start + i, 1
            for i in range(start):
                mask[row, width - start + i] = 1
        Call(impl.padded_inputs, new, cached).must_return((ids, mask, positions), VALUES)

    def test_a_model_does_not_see_the_padding(self, impl: ModuleType) -> None:
        """In a real model, each request's logits in the batch are those that it has alone."""
        model, texts, new = small_model(), [[5, 6, 7, 8, 9, 20], [11, 12], [13, 14, 15, 16]], [1, 2, 3]
        cached = [len(text) - n for text, n in zip(texts, new, strict=True)]
        call = Call(impl.padded_inputs, [t[-n:] for t, n in zip(texts, new, strict=True)], cached)
        width = max(cached)
        batch = call.must_be_tensors([[3, 3], [3, width + 3], [3, 3]], torch.int64)
        cache = DynamicCache()
        alone = [DynamicCache() for _ in texts]
        for text, start, own in zip(texts, cached, alone, strict=True):
            if start:
                forward(model, rows(text[:start]), cache=own)
        for layer in range(model.config.num_hidden_layers):
            # Padding of ones: what is not masked shows.
            pair = [torch.ones(3, 2, width, 8) for _ in range(2)]
            for row, (start, own) in enumerate(zip(cached, alone, strict=True)):
                if start:
                    pair[0][row, :, width - start :] = own.layers[layer].keys[0]
                    pair[1][row, :, width - start :] = own.layers[layer].values[0]
            cache.update(*pair, layer)
        logits = forward(model, *batch, cache)[:, -1]  # [B, V]
        for i, text in enumerate(texts):
            want = forward(model, rows(text))[0, -1]
            if not torch.allclose(logits[i], want, atol=1e-4):
                gap = (logits[i] - want).abs().max()
                call.fail(tuple(batch), why=f"Fed to a small Llama, the logits of request {i} are off by {gap:.3g}.")

    def test_refusals(self, impl: ModuleType) -> None:
        """No requests, requests without new tokens, and lengths that do not match them are refused."""
        Call(impl.padded_inputs, [], []).must_refuse("There is no request.")
        Call(impl.padded_inputs, [[1], []], [0, 0]).must_refuse("The second request has no new tokens.")
        Call(impl.padded_inputs, [[1]], [-1]).must_refuse("cached is less than 0.")
        Call(impl.padded_inputs, [[1], [2]], [0]).must_refuse("There are two requests and one length.")


@functools.cache
def small_model() -> PreTrainedModel:
    """A Llama with random weights, large enough for neighbouring positions to matter."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def forward(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cache: DynamicCache | None = None,
) -> torch.Tensor:
    """Logits [B, L, V]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits
    return logits


# --- static and continuous --------------------------------------------------------------------------------

outputs = st.lists(st.integers(1, 9), max_size=9)
seats = st.integers(1, 5)


@pytest.mark.exercise("static_batch_steps")
class TestStaticBatchSteps:
    def test_the_example(self, impl: ModuleType) -> None:
        """Every batch takes as long as its longest output."""
        call = Call(impl.static_batch_steps, [2, 5, 1, 1, 1], 2)
        call.must_return(7, "The batches are [2 5], [1 1] and [1]: 5 + 1 + 1.")

    def test_one_batch(self, impl: ModuleType) -> None:
        """Four answers of 10, 20, 30 and 100 tokens in one batch: 100 steps."""
        Call(impl.static_batch_steps, [10, 20, 30, 100], 4).must_return(100, "Three rows run on for nobody.")
        Call(impl.static_batch_steps, [3, 4], 8).must_return(4, "Seats may stay empty.")

    def test_one_seat(self, impl: ModuleType) -> None:
        """With one seat the requests follow each other."""
        Call(impl.static_batch_steps, [2, 5, 3], 1).must_return(10)

    def test_nobody(self, impl: ModuleType) -> None:
        """No requests, no steps."""
        Call(impl.static_batch_steps, [], 2).must_return(0)

    @given(output_lens=outputs, batch_size=seats)
    def test_step_by_step(self, impl: ModuleType, output_lens: list[int], batch_size: int) -> None:
        """Against a batch that is stepped until all of it is done."""
        left, steps = list(output_lens), 0
        while left:
            batch, left = left[:batch_size], left[batch_size:]
            while any(n > 0 for n in batch):
                batch, steps = [n - 1 for n in batch], steps + 1
        Call(impl.static_batch_steps, output_lens, batch_size).must_return(steps)

    def test_refusals(self, impl: ModuleType) -> None:
        """No seats, and a request that produces nothing, are refused."""
        Call(impl.static_batch_steps, [1], 0).must_refuse("batch_size < 1.")
        Call(impl.static_batch_steps, [1, 0], 2).must_refuse("The second request produces no tokens.")


@pytest.mark.exercise("continuous_steps")
class TestContinuousSteps:
    def test_the_example(self, impl: ModuleType) -> None:
        """Whoever is done leaves, and the next one takes the seat in the very next step."""
        why = "Seat 1 runs 2 + 1 + 1 + 1 steps for four requests, seat 2 runs 5 steps for one."
        Call(impl.continuous_steps, [2, 5, 1, 1, 1], 2).must_return(5, why)

    def test_no_gain_where_all_are_equal(self, impl: ModuleType) -> None:
        """Outputs of one length that arrive together take as many steps as in static batches."""
        Call(impl.continuous_steps, [4] * 6, 2).must_return(12, "Three batches of 4 steps, static or not.")

    def test_no_gain_in_steps_where_nobody_waits(self, impl: ModuleType) -> None:
        """With a seat for everyone, the longest output decides: nobody is there to take a seat that comes free."""
        Call(impl.continuous_steps, [10, 20, 30, 100], 4).must_return(100)

    def test_the_long_one_last(self, impl: ModuleType) -> None:
        """A long output that starts last runs alone at the end."""
        why = "Seats 1 and 2 serve two short ones each until step 2; then the long one runs alone."
        Call(impl.continuous_steps, [1, 1, 1, 1, 8], 2).must_return(10, why)

    def test_nobody(self, impl: ModuleType) -> None:
        """No requests, no steps."""
        Call(impl.continuous_steps, [], 2).must_return(0)

    @given(output_lens=outputs, batch_size=seats)
    def test_seat_by_seat(self, impl: ModuleType, output_lens: list[int], batch_size: int) -> None:
        """Against seats with a time at which each comes free: the next request takes the earliest."""
        free = [0] * batch_size
        for n in output_lens:
            heapq.heapreplace(free, free[0] + n)
        Call(impl.continuous_steps, output_lens, batch_size).must_return(max(free))

    def test_refusals(self, impl: ModuleType) -> None:
        """No seats, and a request that produces nothing, are refused."""
        Call(impl.continuous_steps, [1], 0).must_refuse("batch_size < 1.")
        Call(impl.continuous_steps, [1, 0], 2).must_refuse("The second request produces no tokens.")


# --- who is next ------------------------------------------------------------------------------------------

Operation = tuple[Any, ...]


def in_line(line: list[tuple[str, int]]) -> list[str]:
    """Brute force: ids in the order of (priority, joining). Python's sort keeps the order of equals."""
    return [request_id for request_id, _ in sorted(line, key=lambda place: place[1])]


def expected(line: list[tuple[str, int]], operation: Operation) -> Any:
    """What the operation must give, an exception's class included; carries it out on `line`."""
    name, *arguments = operation
    waits = [request_id for request_id, _ in line]
    if name == "add":
        if arguments[0] in waits:
            return ValueError
        line.append((arguments[0], arguments[1]))
        return None
    if name == "remove" and arguments[0] not in waits:
        return KeyError
    if name in ("peek", "pop") and not line:
        return IndexError
    if name == "peek":
        return in_line(line)[0]
    leaves = in_line(line)[0] if name == "pop" else arguments[0]
    line[:] = [place for place in line if place[0] != leaves]
    return leaves if name == "pop" else None


def attempt(queue: Any, operation: Operation) -> Any:
    """What the operation gives, an exception's class included if it is one that the task names."""
    name, *arguments = operation
    try:
        return getattr(queue, f"{name}_request")(*arguments)
    except (ValueError, IndexError, KeyError) as error:
        return type(error)


def told(value: Any, verb: str) -> str:
    """ "it returned 'a'", "it should raise KeyError"."""
    is_error = isinstance(value, type)
    word = {"it": ("returned", "raised"), "it should": ("return", "raise")}[verb][is_error]
    return f"{verb} {word} {value.__name__ if is_error else repr(value)}"


def check_line(impl: ModuleType, operations: Sequence[Operation], why: str = "") -> None:
    """Carry out the operations on the learner's queue and on a plain list, side by side."""
    queue, line, steps = impl.PriorityQueue(), list[tuple[str, int]](), ["queue = PriorityQueue()"]
    for operation in operations:
        name, *arguments = operation
        steps.append(f"queue.{name}_request({', '.join(map(repr, arguments))})")
        want, got = expected(line, operation), attempt(queue, operation)
        says = ""
        if got != want and name in ("add", "remove") and not isinstance(want, type) and not isinstance(got, type):
            got = want  # nobody looks at what they return
        if got != want:
            says = f"{told(got, 'it')}; {told(want, 'it should')}"
        elif len(queue) != len(line):
            says = f"len(queue) is {len(queue)}; it should be {len(line)}"
        if says:
            raise WrongAnswer("\n".join([*steps[-9:], *([says, why] if why else [says])]))


an_id = st.sampled_from(["a", "b", "c", "d"])
an_operation = st.one_of(
    st.tuples(st.just("add"), an_id, st.integers(-1, 1)),
    st.tuples(st.just("remove"), an_id),
    st.just(("pop",)),
    st.just(("peek",)),
)


@pytest.mark.exercise("PriorityQueue")
class TestPriorityQueue:
    def test_the_lowest_value_first(self, impl: ModuleType) -> None:
        """The lowest priority value is next, whenever it joined."""
        line = [("add", "a", 5), ("add", "b", 1), ("add", "c", 3), ("pop",), ("pop",), ("pop",)]
        check_line(impl, line, "The priorities are 5, 1 and 3: b, c, a.")

    def test_equals_in_the_order_of_joining(self, impl: ModuleType) -> None:
        """Among equals, who joined first comes first, whatever the ids are."""
        line = [("add", "r9", 0), ("add", "r10", 0), ("add", "r1", 0), ("pop",), ("pop",), ("pop",)]
        check_line(impl, line, "All have priority 0: r9, r10, r1.")

    def test_peek_takes_nothing(self, impl: ModuleType) -> None:
        """peek_request leaves the queue as it is."""
        check_line(impl, [("add", "a", 0), ("peek",), ("peek",), ("pop",), ("pop",)])

    def test_leaving_from_the_middle(self, impl: ModuleType) -> None:
        """Who leaves from the middle is gone, and the others keep their order."""
        joined = [
            ("add", request_id, priority) for request_id, priority in zip("abcdef", [3, 1, 2, 1, 0, 2], strict=True)
        ]
        check_line(impl, [*joined, ("remove", "e"), ("remove", "b"), *[("pop",)] * 4], "d, c, f, a are left.")

    def test_joining_again(self, impl: ModuleType) -> None:
        """Who has left may join again, with another priority and behind its new equals."""
        line = [("add", "a", 0), ("remove", "a"), ("add", "b", 1), ("add", "a", 1), ("pop",), ("pop",), ("pop",)]
        check_line(impl, line, "The first place of a is gone; it stands behind b now.")

    def test_what_is_refused(self, impl: ModuleType) -> None:
        """An id that waits already, one that does not, and an empty line: each has its exception."""
        check_line(impl, [("pop",), ("peek",), ("remove", "a"), ("add", "a", 0), ("add", "a", 1), ("pop",), ("pop",)])

    @given(operations=st.lists(an_operation, max_size=24))
    def test_any_operations(self, impl: ModuleType, operations: list[Operation]) -> None:
        """Any operations in any order, against a list that is sorted each time."""
        check_line(impl, operations)


# --- who runs ---------------------------------------------------------------------------------------------


def limits(max_num_seqs: int, budget: int, skipped: bool = False) -> dict[str, Any]:
    return {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget, "decodes_skipped": skipped}


@dataclass
class Step:
    """One decision of the learner's, in a run: what was there, what came back, and who computed what."""

    call: Call
    answer: list[tuple[str, int]]
    waiting: list[tuple[str, int]]
    running: list[str]
    skipped: bool  # the step before had no decodes
    joined: list[str] = field(default_factory=list)  # waiting ones in the answer
    decoded: list[str] = field(default_factory=list)  # running ones in the answer

    @property
    def tokens(self) -> int:
        return sum(n for _, n in self.answer)

    def fail(self, why: str) -> None:
        self.call.fail(self.answer, why=why)


Job = tuple[int, int, int]  # steps after the one before it arrives, tokens of its prompt, tokens of its output


def run(impl: ModuleType, jobs: Sequence[Job], max_num_seqs: int, budget: int) -> list[Step]:
    """An engine without a model: `schedule` decides, requests get their tokens and leave. All steps, to the end.

    Raises WrongAnswer for a step that no engine could carry out.
    """
    arrivals: list[tuple[int, str, int]] = []
    left: dict[str, int] = {}
    for i, (gap, prompt, output) in enumerate(jobs):
        arrivals.append(((arrivals[-1][0] if arrivals else 0) + gap, f"r{i}", min(prompt, budget)))
        left[f"r{i}"] = output
    waiting: list[tuple[str, int]] = []
    running: list[str] = []
    steps: list[Step] = []
    now, skipped = 0, False
    while arrivals or waiting or running:
        waiting += [(request_id, n) for when, request_id, n in arrivals if when <= now]
        arrivals = [a for a in arrivals if a[0] > now]
        now += 1
        call = Call(impl.schedule, list(waiting), list(running), **limits(max_num_seqs, budget, skipped))
        answer = must_be_a_step(call, waiting, running)
        step = Step(call, answer, list(waiting), list(running), skipped)
        prompts = dict(waiting)
        for request_id, _ in answer:
            (step.joined if request_id in prompts else step.decoded).append(request_id)
        if (waiting or running) and not answer:
            step.fail("Somebody is there, and nobody runs: this engine would never end.")
        steps.append(step)
        for request_id, _ in answer:
            left[request_id] -= 1
        waiting = [place for place in waiting if place[0] not in step.joined]
        running = [r for r in [*running, *step.joined] if left[r] > 0]
        skipped = bool(step.running) and not step.decoded
    return steps


def must_be_a_step(call: Call, waiting: list[tuple[str, int]], running: list[str]) -> list[tuple[str, int]]:
    """The answer as a list of pairs, if each names somebody who is there, once, with the tokens that it needs."""
    answer = call.result()
    if not isinstance(answer, list) or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in answer):
        call.fail(answer, why="A list of (request id, tokens) was expected.")
    needs = dict(waiting) | dict.fromkeys(running, 1)
    seen: set[str] = set()
    for request_id, tokens in answer:
        if request_id not in needs:
            call.fail(answer, why=f"{request_id!r} neither waits nor runs.")
        if request_id in seen:
            call.fail(answer, why=f"{request_id!r} is in the step twice.")
        if tokens != needs[request_id]:
            call.fail(answer, why=f"{request_id!r} needs {needs[request_id]} tokens, not {tokens}.")
        seen.add(request_id)
    return [(request_id, tokens) for request_id, tokens in answer]


@st.composite
def any_work(draw: st.DrawFn) -> tuple[list[Job], int, int]:
    """Requests over time, many of them together, short and long prompts; seats, and a budget of at least as much."""
    long_or_short = st.integers(1, 2) | st.integers(4, 12)
    job = st.tuples(st.sampled_from([0, 0, 0, 1, 2]), long_or_short, st.integers(1, 5))
    max_num_seqs = draw(st.integers(1, 4))
    return draw(st.lists(job, min_size=1, max_size=8)), max_num_seqs, draw(st.integers(max_num_seqs, 12))


FOUR_SEATS = limits(4, 10)
more_cases = settings(max_examples=120)  # the cases that matter take several requests of the right sizes


@pytest.mark.exercise("schedule")
class TestSchedule:
    def test_the_first_step(self, impl: ModuleType) -> None:
        """Where nobody runs yet, those that wait join in their order, each with its whole prompt."""
        call = Call(impl.schedule, [("a", 4), ("b", 1), ("c", 2)], [], **FOUR_SEATS)
        call.must_return([("a", 4), ("b", 1), ("c", 2)], "7 tokens in a budget of 10, 3 requests on 4 seats.")

    def test_decodes_come_first(self, impl: ModuleType) -> None:
        """Everyone who runs gets 1 token, before anybody who waits."""
        call = Call(impl.schedule, [("c", 3)], ["b", "a"], **FOUR_SEATS)
        call.must_return([("b", 1), ("a", 1), ("c", 3)], "In the order of `running`, then the waiting one.")

    def test_the_budget(self, impl: ModuleType) -> None:
        """The decodes take their part of the budget, and nobody overtakes the first that does not fit in the rest."""
        call = Call(impl.schedule, [("c", 3), ("d", 6), ("e", 1)], ["a", "b"], **FOUR_SEATS)
        call.must_return([("a", 1), ("b", 1), ("c", 3)], "5 of 10 are taken, d needs 6. e would fit, but d was first.")
        call = Call(impl.schedule, [("c", 8)], ["a", "b"], **FOUR_SEATS)
        call.must_return([("a", 1), ("b", 1), ("c", 8)], "1 + 1 + 8 is exactly the budget.")

    def test_the_seats(self, impl: ModuleType) -> None:
        """Those that run hold seats too."""
        call = Call(impl.schedule, [("d", 1), ("e", 1)], ["a", "b", "c"], **FOUR_SEATS)
        call.must_return([("a", 1), ("b", 1), ("c", 1), ("d", 1)], "One of 4 seats was free.")

    def test_a_step_of_its_own(self, impl: ModuleType) -> None:
        """A prompt that does not fit beside the decodes gets a step without them; others may share it."""
        call = Call(impl.schedule, [("c", 9), ("d", 1), ("e", 1)], ["a", "b"], **FOUR_SEATS)
        call.must_return([("c", 9), ("d", 1)], "2 + 9 > 10. Alone c leaves 1 token of the budget, which is d's.")

    def test_decodes_wait_for_one_step_at_most(self, impl: ModuleType) -> None:
        """After a step without decodes comes one with them."""
        call = Call(impl.schedule, [("c", 9), ("d", 1)], ["a", "b"], **limits(4, 10, skipped=True))
        call.must_return([("a", 1), ("b", 1)], "c does not fit beside them and has to wait; d must not overtake it.")
        call = Call(impl.schedule, [("c", 8)], ["a", "b"], **limits(4, 10, skipped=True))
        call.must_return([("a", 1), ("b", 1), ("c", 8)], "Whoever fits beside the decodes may still join.")

    def test_no_seat_no_step_of_its_own(self, impl: ModuleType) -> None:
        """Where no seat is free, nobody who waits can run: the decodes must not stand aside."""
        call = Call(impl.schedule, [("c", 9)], ["a", "b"], **limits(2, 10))
        call.must_return([("a", 1), ("b", 1)], "Both seats are taken.")

    def test_nobody_there(self, impl: ModuleType) -> None:
        """With nobody there, the step is empty."""
        Call(impl.schedule, [], [], **FOUR_SEATS).must_return([])

    def test_a_prompt_that_never_fits(self, impl: ModuleType) -> None:
        """A prompt longer than the budget is refused, wherever it stands: it would block the line for ever."""
        Call(impl.schedule, [("a", 11)], [], **FOUR_SEATS).must_refuse("11 tokens never fit a budget of 10.")
        call = Call(impl.schedule, [("b", 10), ("c", 11)], ["a"], **FOUR_SEATS)
        call.must_refuse("c needs 11 tokens, and a step has 10.")

    @more_cases
    @given(work=any_work())
    def test_budget_and_seats_are_kept(self, impl: ModuleType, work: tuple[list[Job], int, int]) -> None:
        """In a whole run, no step exceeds the budget or the seats."""
        jobs, max_num_seqs, budget = work
        for step in run(impl, jobs, max_num_seqs, budget):
            if step.tokens > budget:
                step.fail(f"The step computes {step.tokens} tokens; the budget is {budget}.")
            if len(step.running) + len(step.joined) > max_num_seqs:
                step.fail(f"{len(step.running)} run and {len(step.joined)} join; there are {max_num_seqs} seats.")

    @more_cases
    @given(work=any_work())
    def test_nobody_overtakes(self, impl: ModuleType, work: tuple[list[Job], int, int]) -> None:
        """In a whole run, requests start in the order in which they came, and decodes stand before them."""
        for step in run(impl, *work):
            first = [request_id for request_id, _ in step.waiting[: len(step.joined)]]
            if step.joined != first:
                step.fail(f"{step.joined} join, and first in line were {first}.")
            if step.decoded + step.joined != [request_id for request_id, _ in step.answer]:
                step.fail("Decodes come first.")
            if step.decoded not in ([], step.running):
                step.fail(f"Of {step.running} all run or none.")

    @more_cases
    @given(work=any_work())
    def test_nobody_starves(self, impl: ModuleType, work: tuple[list[Job], int, int]) -> None:
        """In a whole run, a decode misses one step at most, and so does a first in line with a seat to go to."""
        jobs, max_num_seqs, budget = work
        head_waited = ""
        for step in run(impl, jobs, max_num_seqs, budget):
            if step.running and not step.decoded and step.skipped:
                step.fail("The step before this one had no decodes either.")
            if step.running and not step.decoded and not step.joined:
                step.fail("The decodes stand aside, and nobody joins.")
            head = step.waiting[0][0] if step.waiting and len(step.running) < max_num_seqs else ""
            if head and head not in step.joined and head == head_waited:
                step.fail(f"{head!r} was first in line and had a seat in the step before as well.")
            head_waited = "" if head in step.joined else head

    @more_cases
    @given(work=any_work())
    def test_no_room_is_left_to_those_who_fit(self, impl: ModuleType, work: tuple[list[Job], int, int]) -> None:
        """In a whole run, nobody waits who would have had a seat and a place in the budget."""
        jobs, max_num_seqs, budget = work
        for step in run(impl, jobs, max_num_seqs, budget):
            seat = len(step.running) + len(step.joined) < max_num_seqs
            left = [(request_id, n) for request_id, n in step.waiting if request_id not in step.joined]
            if left and seat and step.tokens + left[0][1] <= budget:
                step.fail(f"{left[0][0]!r} is next, has a seat, and {step.tokens} + {left[0][1]} <= {budget}.")
            if step.running and not step.decoded and len(step.running) + sum(n for _, n in step.waiting[:1]) <= budget:
                step.fail("The first in line fits beside the decodes, which were left out.")

    def test_in_the_real_engine(self, impl: ModuleType) -> None:
        """Your schedule() drives the engine and the bundled model: every answer is what it is without neighbours."""
        engine = engine_driven_by(impl.schedule, max_num_seqs=3, budget=40)
        prompts, params = questions()
        outputs = engine.generate_batch(prompts, params)
        got = [output.outputs[0].token_ids for output in outputs.values()]
        want = answers_one_by_one()
        wrong = [prompt for prompt, a, b in zip(prompts, got, want, strict=True) if a != b]
        if wrong:
            raise WrongAnswer(f"Another answer than without neighbours, to: {wrong[0]!r}")
        if engine.stats.max_running != 3:
            raise WrongAnswer(f"At most {engine.stats.max_running} requests ran at once; 3 seats were there.")
        alone = sum(map(len, want))
        if engine.stats.steps >= alone / 2:
            raise WrongAnswer(f"{engine.stats.steps} steps for {alone} tokens: hardly anything was batched.")


@functools.cache
def questions() -> tuple[list[str], list[SamplingParams]]:
    """Seven questions, and answers of different lengths."""
    lengths = [12, 3, 9, 5, 12, 2, 7]
    return default_prompts(7), [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]


@functools.cache
def answers_one_by_one() -> list[list[int]]:
    """The bundled model's, from an engine that runs one request at a time."""
    prompts, params = questions()
    outputs = LLM("folo-tiny", milestone="m1", dtype="float32").generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


class YourScheduler(Scheduler):
    """The engine's scheduler with the learner's `schedule` in it: that decides, and the books are kept here."""

    def __init__(self, decide: Callable[..., Any], kv: KVCacheManager, max_num_seqs: int, budget: int) -> None:
        super().__init__(kv, max_num_seqs, budget)
        self.decide = decide
        self.skipped = False

    def schedule(self) -> SchedulerOutput:
        """Ask, and carry it out."""
        waiting = [(r.request_id, r.num_tokens) for r in self.requests.values() if r in self.waiting]
        running = [r.request_id for r in self.running]
        call = Call(
            self.decide,
            waiting,
            running,
            **limits(self.max_num_running_reqs, self.max_num_batched_tokens, self.skipped),
        )
        answer = must_be_a_step(call, waiting, running)
        if not answer and (waiting or running):
            call.fail(answer, why="Somebody is there, and nobody runs: this engine would never end.")
        step = SchedulerOutput()
        for request_id, num_tokens in answer:
            request = self.requests[request_id]
            if request in self.running:
                plan = self.kv.allocate_slots(request, num_tokens)
                if plan is None:
                    raise RuntimeError(f"{request_id} holds a reservation and was refused room in it")
                self._schedule(request, plan, step)
            elif len(self.running) == self.max_num_running_reqs:
                call.fail(answer, why=f"No seat is left for {request_id!r}.")
            elif self.waiting.peek_request() is not request or not self._admit(request, step):
                call.fail(answer, why=f"{request_id!r} is not first in line.")
        self.skipped = bool(running) and not any(request_id in running for request_id, _ in answer)
        step.finished_req_ids, self._finished_req_ids = self._finished_req_ids, []
        return step


def engine_driven_by(decide: Callable[..., Any], max_num_seqs: int, budget: int) -> LLMEngine:
    """An M2 engine on the bundled model whose scheduler asks `decide`."""
    config = EngineConfig(
        model=ModelConfig("folo-tiny", dtype="float32"),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget),
        milestone="m2",
    )
    engine = LLMEngine(engine_config=config)
    engine.core.scheduler = YourScheduler(decide, engine.core.scheduler.kv, max_num_seqs, budget)
    return engine


# --- optional: the shortest job first ---------------------------------------------------------------------


def served_at(impl: ModuleType, ageing: float, rounds: int = 200) -> int | None:
    """When a job of 50 tokens is picked, if a job of 2 tokens arrives and one is picked in every second."""
    jobs: list[tuple[float, int]] = [(0, 50)]
    for now in range(rounds):
        jobs.append((now, 2))
        call = Call(impl.pick_job, list(jobs), now, ageing)
        index = call.result()
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(jobs):
            call.fail(index, why=f"An index from 0 to {len(jobs) - 1} was expected.")
        if jobs.pop(index)[1] == 50:
            return now
    return None


@pytest.mark.exercise("pick_job", optional=True)
class TestPickJob:
    def test_the_examples(self, impl: ModuleType) -> None:
        """Without ageing the shortest job is next; with it, waiting counts."""
        jobs = [(0, 100), (9, 20)]
        Call(impl.pick_job, jobs, 10, 0).must_return(1, "20 tokens are fewer than 100.")
        Call(impl.pick_job, jobs, 10, 10).must_return(0, "100 - 10 * 10 = 0 is less than 20 - 10 * 1 = 10.")

    def test_equals(self, impl: ModuleType) -> None:
        """Among equals the one that arrived first is next, then the one that stands first."""
        Call(impl.pick_job, [(3, 5), (1, 5), (2, 5)], 4, 0).must_return(1, "All need 5; the second arrived at 1.")
        Call(impl.pick_job, [(1, 7), (1, 5), (1, 5)], 4, 0).must_return(1, "The last two are alike in everything.")

    def test_without_ageing_a_long_job_starves(self, impl: ModuleType) -> None:
        """While a shorter job arrives in every second, a long one is never picked: it has to starve here."""
        when = served_at(impl, 0)
        if when is not None:
            raise WrongAnswer(f"A job of 50 tokens was picked in second {when}, before one of 2 tokens that waited.")

    def test_with_ageing_it_does_not(self, impl: ModuleType) -> None:
        """At a token per second of waiting, the job of 50 tokens is picked in second 48."""
        when = served_at(impl, 1)
        if when != 48:
            raise WrongAnswer(
                f"It was picked in second {when}. In second 48 it counts 50 - 48 = 2, as much as the job of 2 that has "
                "just arrived, and it was there first."
            )

    @given(
        jobs=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), min_size=1, max_size=6),
        ageing=st.sampled_from([0, 1, 2, 5]) | st.sampled_from([0.25, 0.5, 1.5]),
    )
    def test_against_exact_arithmetic(self, impl: ModuleType, jobs: list[tuple[int, int]], ageing: float) -> None:
        """Any jobs: the smallest rank in exact fractions."""
        ranks = [(tokens - Fraction(ageing) * (20 - arrival), arrival, i) for i, (arrival, tokens) in enumerate(jobs)]
        Call(impl.pick_job, jobs, 20, ageing).must_return(min(ranks)[2])

    @given(jobs=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), min_size=1, max_size=6))
    def test_much_ageing_is_first_come_first_served(self, impl: ModuleType, jobs: list[tuple[int, int]]) -> None:
        """With 100 tokens per second, the first to arrive is next; only those of one second compare tokens."""
        want = min(range(len(jobs)), key=lambda i: (jobs[i], i))
        Call(impl.pick_job, jobs, 20, 100).must_return(want)

    def test_refusals(self, impl: ModuleType) -> None:
        """No jobs, ageing backwards, and a job from the future are refused."""
        Call(impl.pick_job, [], 0, 1).must_refuse("There is no job.")
        Call(impl.pick_job, [(0, 1)], 0, -1).must_refuse("ageing < 0.")
        Call(impl.pick_job, [(5, 1)], 4, 1).must_refuse("The job arrives at 5, and it is 4.")
