"""What chunks and the prefix cache are configured with: defaults, refusals by name, salts, and emptying the cache."""

from __future__ import annotations

import re
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm import LLM, CacheConfig, EngineConfig, LLMEngine, ModelConfig, SamplingParams, SchedulerConfig
from folovllm.config import MILESTONES, NEWEST_MILESTONE
from folovllm.entrypoints.cli import app
from tests.m3.helpers import check_all_free, manager_of
from tests.oracle import random_prompt, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Qwen3, at most 4,096 tokens: more than the budget is if nobody says anything."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("qwen3", seed=3, max_position_embeddings=4096).save_pretrained(path)
    return str(path)


def make(folder: str, **kwargs: Any) -> LLM:
    return LLM(folder, **{"dtype": "float32", "device": "cpu", "num_kv_blocks": 300, **kwargs})


# ---------------------------------------------------------------------- defaults


def test_m4_is_what_runs_if_nobody_says_anything() -> None:
    assert NEWEST_MILESTONE == EngineConfig().milestone == "m4"
    assert MILESTONES["m4"].chunked_prefill and MILESTONES["m4"].prefix_caching


@pytest.mark.parametrize("milestone", list(MILESTONES))
def test_both_are_on_at_m4_and_off_before(milestone: str) -> None:
    config = EngineConfig(milestone=milestone)
    assert config.chunked_prefill == config.prefix_caching == (milestone == "m4")


@pytest.mark.parametrize(("asked", "given"), [(None, True), (True, True), (False, False)])
def test_each_can_be_turned_off(asked: bool | None, given: bool, folder: str) -> None:
    engine = make(folder, enable_chunked_prefill=asked).engine
    assert engine.core.scheduler.chunked_prefill is given and manager_of(engine).cache is not None
    engine = make(folder, enable_prefix_caching=asked).engine
    assert engine.core.scheduler.chunked_prefill and (manager_of(engine).cache is not None) == given


@pytest.mark.parametrize("milestone", ["m1", "m2", "m3"])
def test_to_ask_for_neither_is_allowed_everywhere(milestone: str) -> None:
    for value in (None, False):
        config = EngineConfig.from_kwargs(
            milestone=milestone,
            enable_chunked_prefill=value,
            enable_prefix_caching=value,
            long_prefill_token_threshold=0,
        )
        assert not config.chunked_prefill and not config.prefix_caching


def test_the_cache_has_the_blocks_size_and_a_secret_of_its_own(folder: str) -> None:
    first, second = (manager_of(make(folder, block_size=8).engine).cache for _ in range(2))
    assert first is not None and second is not None
    assert first.block_size == second.block_size == 8 and first.secret != second.secret


def test_a_step_has_2048_tokens_or_a_whole_prompt_where_prompts_are_not_split(folder: str) -> None:
    budgets = {
        (chunked, length): make(
            folder, enable_chunked_prefill=chunked, max_model_len=length
        ).engine.core.scheduler.max_num_batched_tokens
        for chunked in (True, False)
        for length in (100, 4096)
    }
    assert budgets == {(True, 100): 2048, (True, 4096): 2048, (False, 100): 2048, (False, 4096): 4096}


def test_a_threshold_arrives_where_it_counts(folder: str) -> None:
    assert make(folder, long_prefill_token_threshold=7).engine.core.scheduler.long_prefill_token_threshold == 7
    assert make(folder).engine.core.scheduler.long_prefill_token_threshold == 0


def test_an_engine_from_configurations_is_the_same_engine(folder: str) -> None:
    engine = LLMEngine(
        ModelConfig(folder, dtype="float32", device="cpu"),
        SchedulerConfig(max_num_batched_tokens=64, enable_chunked_prefill=True, long_prefill_token_threshold=9),
        CacheConfig(num_kv_blocks=20, enable_prefix_caching=False),
    )
    scheduler = engine.core.scheduler
    assert (scheduler.max_num_batched_tokens, scheduler.chunked_prefill, scheduler.long_prefill_token_threshold) == (
        64,
        True,
        9,
    )
    assert manager_of(engine).cache is None


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("milestone", ["m1", "m2", "m3"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"enable_chunked_prefill": True},
            "enable_chunked_prefill=True is not valid; allowed: False or None with milestone {}",
        ),
        (
            {"enable_prefix_caching": True},
            "enable_prefix_caching=True is not valid; allowed: False or None with milestone {}",
        ),
        (
            {"long_prefill_token_threshold": 16},
            "long_prefill_token_threshold=16 is not valid; allowed: 0 without chunked prefill",
        ),
    ],
)
def test_what_is_new_is_refused_before_m4(milestone: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LLM("folo-tiny", milestone=milestone, **kwargs)
    assert message.format(milestone) in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"enable_chunked_prefill": "yes"}, "enable_chunked_prefill='yes' is not valid; allowed: True, False or None"),
        ({"enable_chunked_prefill": 1}, "enable_chunked_prefill=1 is not valid; allowed: True, False or None"),
        ({"enable_prefix_caching": 0}, "enable_prefix_caching=0 is not valid; allowed: True, False or None"),
        (
            {"long_prefill_token_threshold": -1},
            "long_prefill_token_threshold=-1 is not valid; allowed: an integer >= 0",
        ),
        ({"long_prefill_token_threshold": 1.5}, "long_prefill_token_threshold=1.5 is not valid"),
        ({"long_prefill_token_threshold": None}, "long_prefill_token_threshold=None is not valid"),
        (
            {"long_prefill_token_threshold": 4, "enable_chunked_prefill": False},
            "long_prefill_token_threshold=4 is not valid; allowed: 0 without chunked prefill",
        ),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0 is not valid; allowed: an integer >= 1"),
        (
            {"enable_prefix_cache": True},
            "LLM has no field 'enable_prefix_cache' (did you mean 'enable_prefix_caching'?)",
        ),
        ({"batching": "padded"}, "batching='padded' is not valid; allowed: None with milestone m4"),
    ],
)
def test_bad_values_are_refused_with_field_value_and_what_is_allowed(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LLM("folo-tiny", **kwargs)
    assert message in str(caught.value)


def test_a_prompt_longer_than_a_step_needs_chunks(folder: str) -> None:
    prompt = random_prompt(100)
    params = SamplingParams(temperature=0, max_tokens=2)
    (output,) = make(folder, max_num_batched_tokens=32).generate([prompt], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2
    llm = make(folder, max_num_batched_tokens=32, enable_chunked_prefill=False)
    with pytest.raises(ValueError, match=r"the prompt has 100 tokens and a step computes at most 32; allowed: .* or "
        r"enable_chunked_prefill"):  # fmt: skip
        llm.generate([[1, 2], prompt], params, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()  # the good one was not queued either
    with pytest.raises(ValueError, match="the prompt has 4096 tokens, which leaves none for output"):
        make(folder).generate([[1] * 4096], params, use_tqdm=False)


# ---------------------------------------------------------------------- salts


@pytest.mark.parametrize("salt", [None, 7, b"x", ["x"]])
def test_a_salt_that_is_no_string_is_refused(salt: Any, folder: str) -> None:
    llm = make(folder)
    with pytest.raises(ValueError) as caught:
        llm.generate([[1, 2], {"prompt_token_ids": [1, 2], "cache_salt": salt}], use_tqdm=False)
    assert f"cache_salt={salt!r} is not valid; allowed: a string" in str(caught.value)
    assert not llm.engine.has_unfinished_requests()


def test_a_salt_that_is_no_text_is_refused_before_it_can_stop_a_step(folder: str) -> None:
    """Half of a surrogate pair is a string and has no bytes."""
    llm = make(folder)
    with pytest.raises(ValueError, match=r"cache_salt='\\ud800' is not valid; allowed: .*without lone surrogates"):
        llm.engine.add_request("r", {"prompt_token_ids": [1, 2] * 20, "cache_salt": "\ud800"})
    assert not llm.engine.has_unfinished_requests()


@pytest.mark.parametrize(
    "prompt",
    [
        {"cache_salt": "x"},
        {"prompt": "a", "prompt_token_ids": [1], "cache_salt": "x"},
        {"prompt_token_ids": [1], "salt": "x"},
    ],
)
def test_a_salt_does_not_make_a_prompt_of_anything(prompt: Any, folder: str) -> None:
    with pytest.raises(ValueError, match=r"allowed: a dict with one key of .* and optionally 'cache_salt'"):
        make(folder).generate([prompt], use_tqdm=False)


def test_a_salt_may_stand_beside_text_and_beside_token_ids_at_any_milestone() -> None:
    params = SamplingParams(temperature=0, max_tokens=2)
    for milestone in MILESTONES:
        llm = LLM("folo-tiny", milestone=milestone, dtype="float32", device="cpu", num_kv_blocks=99)
        text: Any = {"prompt": "A block", "cache_salt": "x"}
        tokens: Any = {"prompt_token_ids": [5, 6, 7], "cache_salt": "x"}
        outputs = llm.generate([text, tokens], params, use_tqdm=False)
        assert [o.prompt for o in outputs] == ["A block", None] and outputs[1].prompt_token_ids == [5, 6, 7]


# ---------------------------------------------------------------------- emptying the cache


def test_reset_prefix_cache(folder: str) -> None:
    llm, prompt = make(folder), random_prompt(40)
    params = SamplingParams(temperature=0, max_tokens=2)
    cached = []
    for reset in (False, False, True, False):
        if reset:
            llm.reset_prefix_cache()
        cached += [o.num_cached_tokens for o in llm.generate([prompt], params, use_tqdm=False)]
    assert cached == [0, 32, 0, 32]
    check_all_free(llm.engine)


@pytest.mark.parametrize("milestone", ["m1", "m2", "m3"])
def test_where_there_is_no_cache_there_is_nothing_to_empty(milestone: str) -> None:
    llm = LLM("folo-tiny", milestone=milestone, dtype="float32", device="cpu", num_kv_blocks=99)
    llm.reset_prefix_cache()
    (output,) = llm.generate(["A block is"], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert output.num_cached_tokens == 0


# ---------------------------------------------------------------------- the command line


def test_the_command_runs_m4_where_a_question_asked_twice_is_computed_once() -> None:
    question, llm = "Why is decoding memory-bound?", LLM("folo-tiny", dtype="float32", device="cpu", num_kv_blocks=9)
    (prompt,) = llm.chat_prompts([[{"role": "user", "content": question}]])
    length = len(prompt["prompt_token_ids"])  # type: ignore[call-overload]
    options = ["--max-tokens", "3", "--dtype", "float32", "--device", "cpu"]
    result = CliRunner().invoke(app, ["generate", question, question, "--num-kv-blocks", "99", *options])
    assert result.exit_code == 0, result.output
    computed = re.search(r"tokens computed\s+(\d+)", result.output)
    assert computed and int(computed[1]) == length + length - (length - 1) // 16 * 16 < 2 * length


def test_the_command_takes_a_budget_smaller_than_a_prompt_at_m4_only() -> None:
    options = "--max-tokens 2 --device cpu --num-kv-blocks 99 --max-num-batched-tokens 4"
    arguments = ["generate", "What is a block?", *options.split()]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    result = CliRunner().invoke(app, [*arguments, "--milestone", "m3"])
    assert result.exit_code == 2 and "a step computes at most 4" in " ".join(result.output.split())
