"""The padded forward: how many there are, what they pad, what they copy, and that padding reaches nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.engine.trace import StepTrace
from folovllm.kv_cache.interface import KVPlan
from folovllm.messages import ScheduledRequest
from folovllm.runner.hf.hf_runner import HFRunner
from folovllm.runner.hf.padded_cache import layers
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

Checkpoint = Callable[[str], str]


def make_llm(path: str, batching: str = "padded", **kwargs: Any) -> LLM:
    return LLM(path, milestone="m2", batching=batching, dtype="float32", device="cpu", **kwargs)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


@dataclass
class Forward:
    """One call of the model, as the model sees it."""

    rows: int
    columns: int  # new ones
    hidden: int | None  # columns of K/V that the mask hides, over all rows; None without a mask
    cache: object


@contextmanager
def forwards_of(llm: LLM) -> Iterator[list[Forward]]:
    """Every call of the model while the context is open; each must leave finite K/V only."""
    seen: list[Forward] = []

    def before(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows, columns = kwargs["input_ids"].shape
        mask, cache = kwargs["attention_mask"], kwargs["past_key_values"]
        width = cache.get_seq_length() + columns
        stands = torch.ones(rows, width, dtype=torch.long) if mask is None else mask
        assert stands.shape == (rows, width)
        assert stands[:, -1].all() and (stands.diff(dim=1) >= 0).all()  # padding stands on the left of each row
        # Hugging Face's own positions of a left-padded batch; under the mask they mean nothing.
        expected = (stands.cumsum(dim=1) - 1)[:, -columns:]
        assert torch.equal(kwargs["position_ids"].where(expected >= 0, -1), expected)
        seen.append(Forward(rows, columns, None if mask is None else int((mask == 0).sum()), cache))

    def after(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        assert all(keys.isfinite().all() and values.isfinite().all() for keys, values in layers(output.past_key_values))
        assert output.logits.shape[:2] == (seen[-1].rows, 1)

    model = llm.engine.core.runner.model  # type: ignore[attr-defined]
    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def groups(step: StepTrace) -> list[list[tuple[int, int]]]:
    """The step's prefills and decodes: (tokens with K/V before it, new tokens) of each request in it."""
    shares = [(r.num_computed - r.num_scheduled, r.num_scheduled) for r in step.requests]
    return [g for g in ([s for s in shares if s[0] == 0], [s for s in shares if s[0] > 0]) if g]


LENGTHS = (1, 30, 4, 4, 17, 2, 9, 60)


@pytest.fixture(scope="module")
def mixed(checkpoint: Checkpoint) -> dict[str, tuple[LLM, list[Forward]]]:
    """Prompts of several lengths that run, end and come at different times, three at once, in both ways of batching."""
    runs = {}
    for batching in ("padded", "loop"):
        llm = make_llm(checkpoint("qwen3"), batching, max_num_seqs=3)
        with forwards_of(llm) as seen:
            params = [greedy(2 + i % 5) for i in range(len(LENGTHS))]
            llm.generate([random_prompt(n, seed=n) for n in LENGTHS], params, use_tqdm=False)
        runs[batching] = (llm, seen)
    return runs


# ---------------------------------------------------------------------- how many


def test_a_step_of_decodes_is_one_forward_and_a_mixed_step_is_two(mixed: dict[str, tuple[LLM, list[Forward]]]) -> None:
    llm, seen = mixed["padded"]
    trace = llm.engine.trace
    assert [step.forwards for step in trace] == [len(groups(step)) for step in trace]
    assert {step.forwards for step in trace} == {1, 2}
    assert llm.engine.stats.forwards == len(seen) and llm.engine.stats.max_running == 3
    shapes = [(len(group), max(new for _, new in group)) for step in trace for group in groups(step)]
    assert [(forward.rows, forward.columns) for forward in seen] == shapes


def test_the_loop_is_one_forward_per_request_and_step(mixed: dict[str, tuple[LLM, list[Forward]]]) -> None:
    llm, seen = mixed["loop"]
    stats = llm.engine.stats
    assert stats.forwards == len(seen) == sum(len(step.requests) for step in llm.engine.trace)
    assert all(forward.rows == 1 and forward.hidden is None for forward in seen)
    assert stats.padding_tokens == stats.padding_kv_tokens == 0 and stats.max_running == 3
    padded = mixed["padded"][0].engine.stats
    assert stats.steps == padded.steps and stats.forwards > padded.forwards


# ---------------------------------------------------------------------- what is padded


def test_padding_is_what_the_rectangle_holds_beyond_the_requests(mixed: dict[str, tuple[LLM, list[Forward]]]) -> None:
    llm, seen = mixed["padded"]
    forwards = iter(seen)
    for step in llm.engine.trace:
        tokens = kv_tokens = 0
        for group in groups(step):
            columns = max(new for _, new in group)
            width = max(past + new for past, new in group)
            tokens += len(group) * columns - sum(new for _, new in group)
            hidden = len(group) * width - sum(past + new for past, new in group)
            kv_tokens += hidden
            assert next(forwards).hidden == (hidden or None)  # without padding there is no mask
        assert (step.padding_tokens, step.padding_kv_tokens) == (tokens, kv_tokens)
    stats = llm.engine.stats
    assert stats.padding_tokens == sum(step.padding_tokens for step in llm.engine.trace) > 0
    assert stats.padding_kv_tokens == sum(step.padding_kv_tokens for step in llm.engine.trace) > stats.padding_tokens


def test_one_prompt_of_100_beside_seven_of_1_is_86_6_percent_padding(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint("qwen3"), max_num_seqs=8)
    with forwards_of(llm) as seen:
        llm.generate([random_prompt(n, seed=i) for i, n in enumerate([1, 1, 1, 100, 1, 1, 1, 1])], greedy(3), False)
    prefill, *decodes = llm.engine.trace
    assert (seen[0].rows, seen[0].columns) == (8, 100)
    useful, cells = prefill.num_scheduled_tokens, 8 * 100
    assert useful == 107 and prefill.padding_tokens == cells - useful == 693
    assert round(100 * prefill.padding_tokens / cells, 1) == 86.6
    # Decoding pads no token, yet the K/V of the seven stays as wide as that of the long one.
    assert [(step.padding_tokens, step.padding_kv_tokens) for step in decodes] == [(0, 7 * 99)] * 2


def test_prompts_of_one_length_need_no_padding_and_no_mask(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint("mistral"), max_num_seqs=4)
    with forwards_of(llm) as seen:
        llm.generate([random_prompt(12, seed=i) for i in range(4)], greedy(5), use_tqdm=False)
    assert [(f.rows, f.columns, f.hidden) for f in seen] == [(4, 12, None)] + [(4, 1, None)] * 4
    assert llm.engine.stats.padding_tokens == llm.engine.stats.padding_kv_tokens == 0


def test_when_the_long_one_has_left_the_others_are_padded_no_more(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint("qwen2"), max_num_seqs=3)
    prompts = [random_prompt(n, seed=n) for n in (3, 50, 3)]
    with forwards_of(llm) as seen:
        llm.generate(prompts, [greedy(6), greedy(3), greedy(6)], use_tqdm=False)
    assert [(f.rows, f.hidden) for f in seen] == [(3, 94)] * 3 + [(2, None)] * 3


# ---------------------------------------------------------------------- what is copied


def test_the_rectangle_is_the_same_object_until_somebody_joins_or_leaves(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint("qwen3"), max_num_seqs=3)
    engine = llm.engine
    with forwards_of(llm) as seen:
        engine.add_request("a", random_prompt(5, seed=1), greedy(9))
        engine.add_request("b", random_prompt(9, seed=2), greedy(5))
        for _ in range(3):
            engine.step()
        engine.add_request("c", random_prompt(2, seed=3), greedy(5))
        while engine.has_unfinished_requests():
            engine.step()
    names = [[r.request_id for r in step.requests] for step in engine.trace]
    assert names == [["a", "b"]] * 3 + [["a", "b", "c"]] * 2 + [["a", "c"]] * 3 + [["a"]]
    order: list[object] = []
    for forward in seen:
        if not any(forward.cache is cache for cache in order):
            order.append(forward.cache)
    used = [next(i for i, cache in enumerate(order) if cache is forward.cache) for forward in seen]
    # a and b, the prefill of c in a rectangle of its own, a and b once more beside it, all three, two, one.
    assert [forward.rows for forward in seen] == [2, 2, 2, 1, 2, 3, 2, 2, 2, 1]
    assert used == [0, 0, 0, 1, 0, 2, 3, 3, 3, 4]


def test_nothing_of_a_request_stays_in_the_runner(mixed: dict[str, tuple[LLM, list[Forward]]]) -> None:
    for llm, _ in mixed.values():
        runner = llm.engine.core.runner
        assert isinstance(runner, HFRunner)
        assert len(runner.caches) == 0 and len(runner.states) == 0


# ---------------------------------------------------------------------- padding reaches nobody


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_finite_and_changes_no_token(
    family: str, attention: str, checkpoint: Checkpoint, oracle_stats: OracleStats
) -> None:
    """Rows of padding see nothing, so a softmax over them has nothing to weigh: a NaN there would spread."""
    llm = make_llm(checkpoint(family), max_num_seqs=8)
    llm.engine.core.runner.model.set_attn_implementation(attention)  # type: ignore[attr-defined]
    prompts = [random_prompt(n, seed=50 + n) for n in (1, 40, 7, 9)]
    with forwards_of(llm) as seen:
        outputs = llm.generate(prompts, greedy(6), use_tqdm=False)
    assert [f.hidden for f in seen] == [160 - 57] * 6
    model = tiny_model(family, seed=3)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same_tokens(output.outputs[0].token_ids, hf_greedy(model, prompt, 6), model, prompt, oracle_stats)


# ---------------------------------------------------------------------- shapes that M2's own scheduler never asks for


def share(request_id: str, tokens: list[int], start: int, samples: bool) -> ScheduledRequest:
    return ScheduledRequest(request_id, tokens, start, samples, KVPlan(request_id, start, len(tokens)))


# ---------------------------------------------------------------------- when a forward fails


@pytest.mark.parametrize("batching", ["padded", "loop"])
def test_a_forward_that_fails_once_takes_nothing_along(
    batching: str, checkpoint: Checkpoint, oracle_stats: OracleStats
) -> None:
    """The step holds decodes and a prefill, and breaks between its forwards: half of its K/V is written."""
    llm = make_llm(checkpoint("qwen3"), batching, max_num_seqs=3)
    engine, model = llm.engine, tiny_model("qwen3", seed=3)
    prompts = {name: random_prompt(5 + i, seed=i) for i, name in enumerate(["a", "b", "c", "waits"])}
    engine.add_request("a", prompts["a"], greedy(8))
    engine.add_request("b", prompts["b"], greedy(8))
    engine.step()
    engine.add_request("c", prompts["c"], greedy(8))
    engine.add_request("waits", prompts["waits"], greedy(8))
    calls: list[int] = []

    def second_call_fails(module: torch.nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    hook = engine.core.runner.model.register_forward_pre_hook(second_call_fails)  # type: ignore[attr-defined]
    engine.step()
    hook.remove()
    done = {}
    while engine.has_unfinished_requests():
        done |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
    assert {o.finish_reason for o in done.values()} == {"length"} and len(done) == 4
    for name, completion in done.items():
        reference = hf_greedy(model, prompts[name], 8)
        assert_same_tokens(completion.token_ids, reference, model, prompts[name], oracle_stats)
    runner = engine.core.runner
    assert isinstance(runner, HFRunner) and len(runner.caches) == 0 and len(runner.states) == 0
