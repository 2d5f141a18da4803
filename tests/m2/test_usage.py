"""How M2 is used, and one clear error for everything it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import folovllm.engine.factory as factory
from folovllm import LLM, CacheConfig, EngineConfig, LLMEngine, ModelConfig, SamplingParams, SchedulerConfig
from tests.mock import check_empty, drain, mock_engine, mock_tokens


def test_the_usage_example(capsys: pytest.CaptureFixture[str]) -> None:
    from folovllm import LLMEngine, ModelConfig, SamplingParams, SchedulerConfig

    model_config = ModelConfig(model="folo-tiny", dtype="auto")
    scheduler_config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512)

    engine = LLMEngine(model_config, scheduler_config)

    prompts = [
        "What is the capital of France?",
        "Explain quantum computing.",
        "Write a haiku about AI.",
    ]
    sampling_params = SamplingParams(max_tokens=64)

    outputs = engine.generate_batch(prompts, sampling_params)

    for req_id, output in outputs.items():  # noqa: B007
        print(f"{output.prompt} -> {output.outputs[0].text}")

    assert list(outputs) == ["0", "1", "2"]
    assert [output.prompt for output in outputs.values()] == prompts
    printed = capsys.readouterr().out
    assert all(f"{prompt} -> " in printed for prompt in prompts)
    for output in outputs.values():
        completion = output.outputs[0]
        assert output.finished and 0 < len(completion.token_ids) <= 64
        assert completion.finish_reason in ("stop", "length")
        assert engine.tokenizer is not None
        assert completion.text == engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert engine.stats.max_running == 3
    assert all(step.num_scheduled_tokens <= 512 == step.token_budget for step in engine.trace)
    assert not engine.has_unfinished_requests()


# ---------------------------------------------------------------------- batches

GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(
        "folo-tiny",
        milestone="m2",
        dtype="float32",
        device="cpu",
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        block_size=16,
        num_kv_blocks=13,
        scheduling_policy="priority",
    )


@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
def test_outputs_come_in_the_order_of_the_prompts_whoever_is_done_first(policy: str) -> None:
    engine = mock_engine(max_num_seqs=2, capacity=128, policy=policy)
    wishes = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 1, 5, 2)]
    prompts = [[i + 1] * 3 for i in range(4)]
    outputs = engine.generate_batch(prompts, wishes)
    assert list(outputs) == ["0", "1", "2", "3"] == [o.request_id for o in outputs.values()]
    expected = [mock_tokens(prompt, params)[0] for prompt, params in zip(prompts, wishes, strict=True)]
    assert [o.outputs[0].token_ids for o in outputs.values()] == expected
    finished = [i for step in engine.trace for i in step.finished]
    assert finished[0] == "1" and sorted(finished) == list(outputs) != finished
    assert engine.generate_batch([], wishes[:0]) == {}
    assert list(engine.generate_batch([[1]], wishes[0])) == ["4"]  # an id is never given twice
    check_empty(engine)


def test_the_defaults_of_m2() -> None:
    config = EngineConfig(milestone="m2")
    assert (config.max_num_seqs, config.scheduler.scheduling_policy) == (16, "fcfs")
    assert config.max_num_batched_tokens(512) == 2048 and config.max_num_batched_tokens(4096) == 4096
    engine = LLMEngine(engine_config=EngineConfig(ModelConfig(dtype="float32", device="cpu"), milestone="m2"))
    runner, scheduler = engine.core.runner, engine.core.scheduler
    assert runner.batching == "padded"  # type: ignore[attr-defined]
    assert (scheduler.max_num_running_reqs, scheduler.max_num_batched_tokens) == (16, 4096)
    assert scheduler.kv.usage().capacity == 16 * 4096  # a region for each running request


def test_the_kv_budget_of_a_pool_limits_how_many_run(llm: LLM) -> None:
    """13 blocks of 16 tokens are three regions of 64 and a rest that is nobody's."""
    llm.engine.stats.reset()
    llm.generate([[i + 1] * 5 for i in range(7)], GREEDY, use_tqdm=False)
    assert llm.engine.stats.max_running == 3
    assert {step.kv.capacity for step in llm.engine.trace} == {13 * 16}
    assert max(step.kv.reserved for step in llm.engine.trace) == 3 * 64


def test_priorities_of_a_call(llm: LLM) -> None:
    llm.engine.trace.clear()
    outputs = llm.generate([[i + 1] * 5 for i in range(7)], GREEDY, use_tqdm=False, priority=[3, 0, 2, 1, 0, 9, 1])
    assert len(outputs) == 7 and all(output.finished for output in outputs)
    order = list(dict.fromkeys(r.request_id for step in llm.engine.trace for r in step.requests))
    by_priority = [1, 4, 3, 6, 2, 0, 5]
    assert order == [outputs[i].request_id for i in by_priority]


# ---------------------------------------------------------------------- what is refused

CONFIG_ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: LLM(milestone="m1", batching="padded"), "batching='padded' is not valid; allowed: None with milestone m1"),
    (lambda: LLM(milestone="m1", batching="loop"), "batching='loop' is not valid; allowed: None with milestone m1"),
    (lambda: LLM(batching="static"), "batching='static' is not valid; allowed: 'padded', 'loop'"),
    (lambda: LLM(batching=True), "batching=True is not valid; allowed: 'padded', 'loop'"),
    (
        lambda: LLM(scheduling_policy="lifo"),
        "scheduling_policy='lifo' is not valid; allowed: 'fcfs', 'priority', 'sjf'",
    ),
    (lambda: LLM(scheduling_policy=None), "scheduling_policy=None is not valid; allowed: 'fcfs'"),
    (
        lambda: LLM(milestone="m1", scheduling_policy="priority"),
        "scheduling_policy='priority' is not valid; allowed: 'fcfs' with milestone m1",
    ),
    (
        lambda: LLM(milestone="m1", scheduling_policy="sjf"),
        "scheduling_policy='sjf' is not valid; allowed: 'fcfs' with milestone m1",
    ),
    (lambda: SchedulerConfig(max_num_seqs=0), "max_num_seqs=0 is not valid; allowed: an integer >= 1"),
    (lambda: SchedulerConfig(max_num_seqs=2.0), "max_num_seqs=2.0 is not valid; allowed: an integer >= 1"),
    (lambda: SchedulerConfig(max_num_seqs="8"), "max_num_seqs='8' is not valid; allowed: an integer >= 1"),
    (
        lambda: SchedulerConfig(max_num_batched_tokens=0),
        "max_num_batched_tokens=0 is not valid; allowed: an integer >= 1",
    ),
    (lambda: LLM(milestone="m1", max_num_seqs=8), "max_num_seqs=8 is not valid; allowed: 1 with milestone m1"),
    (
        lambda: LLM(milestone="m2", enable_chunked_prefill=True),
        "enable_chunked_prefill=True is not valid; allowed: False or None with milestone m2",
    ),
    (
        lambda: LLM(milestone="m2", enable_prefix_caching=True),
        "enable_prefix_caching=True is not valid; allowed: False or None with milestone m2",
    ),
    (
        lambda: LLM(milestone="m2", preemption_mode="swap"),
        "preemption_mode='swap' is not valid; allowed: 'recompute' with milestone m2",
    ),
    (
        lambda: LLMEngine("folo-tiny", SchedulerConfig()),  # type: ignore[arg-type]
        "model='folo-tiny' is not valid; allowed: a ModelConfig",
    ),
    (
        lambda: LLMEngine(ModelConfig(), CacheConfig()),  # type: ignore[arg-type]
        r"scheduler=CacheConfig\(.*\) is not valid; allowed: a SchedulerConfig",
    ),
    (
        lambda: LLMEngine(ModelConfig(), engine_config=EngineConfig()),
        "engine_config was given with other configurations; allowed: one or the other",
    ),
]


@pytest.mark.parametrize(("make", "message"), CONFIG_ERRORS)
def test_a_configuration_that_cannot_work_is_refused_before_a_weight_is_read(
    make: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "load_hf_model", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        make()


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"prompts": [[1, 2], [1] * 33]}, "the prompt has 33 tokens and a step computes at most 32"),
    ({"prompts": [[1, 2], [1] * 64]}, "the prompt has 64 tokens, which leaves none for output"),
    ({"prompts": [[1, 2], []]}, r"prompt=\[\] has no tokens; allowed: at least 1"),
    ({"prompts": [[1, 2], [2**20]]}, r"prompt_token_ids\[0\]=1048576 is not valid"),
    ({"prompts": [[1, 2], None]}, "prompt=None is not valid"),
    ({"prompts": [[1, 2], [3]], "sampling_params": [GREEDY]}, "allowed: one SamplingParams or a list of 2"),
    ({"prompts": [[1, 2], [3]], "sampling_params": [GREEDY, 7]}, "sampling_params=7 is not valid"),
    ({"prompts": [[1, 2], [3]], "priority": [1]}, r"priority=\[1\] is not valid; allowed: one integer or a list of 2"),
    ({"prompts": [[1, 2], [3]], "priority": [0, 1.5]}, "priority=1.5 is not valid; allowed: an integer"),
    ({"prompts": [[1, 2], [3]], "priority": [0, True]}, "priority=True is not valid; allowed: an integer"),
    ({"prompts": [[1, 2], [3]], "priority": "high"}, "priority='high' is not valid; allowed: an integer"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD_CALLS)
def test_one_bad_prompt_queues_nothing_of_the_call(llm: LLM, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(**kwargs, use_tqdm=False)
    if "priority" not in kwargs:
        with pytest.raises(ValueError, match=message):
            llm.engine.generate_batch(**kwargs)
    assert not llm.engine.has_unfinished_requests()
    assert llm.engine.core.scheduler.num_waiting == 0


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
@pytest.mark.parametrize("priority", [1, -1])
def test_a_priority_that_would_be_ignored_is_refused(policy: str, priority: int) -> None:
    engine = mock_engine(policy=policy)
    message = f"priority={priority} is not valid; allowed: 0, because scheduling_policy is '{policy}'"
    with pytest.raises(ValueError, match=message):
        engine.add_request("a", [1], priority=priority)
    llm = LLM.__new__(LLM)
    llm.engine = engine
    with pytest.raises(ValueError, match=message):
        llm.generate([[1], [2]], priority=[0, priority], use_tqdm=False)
    engine.add_request("a", [1], priority=0)
    assert list(drain(engine)) == ["a"]
    check_empty(engine)
