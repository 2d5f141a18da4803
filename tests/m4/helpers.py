"""What the tests of M4 share: a mock model that cannot be given K/V of another prefix, and a look at the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, LLMEngine, SamplingParams
from folovllm.kv_cache.interface import BlockCopy, KVOp, SwapIn, SwapOut
from folovllm.kv_cache.prefix_cache import HashBlock, PrefixCache, hash_block
from folovllm.messages import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from tests.m3.helpers import check_all_free, check_progress, manager_of
from tests.mock import PagedMockRunner, mock_tokens, paged_mock_engine

COMMON = [(11 * i + 5) % 64 for i in range(40)]  # what prompts begin with; `other` ones have nothing of it


class PrefixRunner(PagedMockRunner):
    """K/V of a token depends on all tokens before it: each slot remembers which these were.

    Two prompts may hold the same tokens in a block after different ones. Token ids alone would not show it if one of
    them got the other's. Raises RuntimeError if a request reads a slot that was not computed after its own tokens.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks)
        self.past = [[0] * block_size for _ in range(num_blocks + 1)]
        self.host_past = [[0] * block_size for _ in range(num_host_blocks + 1)]

    def apply(self, op: KVOp) -> None:
        """What is moved takes its past along."""
        super().apply(op)
        if isinstance(op, BlockCopy):
            self.past[op.dst] = list(self.past[op.src])
        elif isinstance(op, SwapOut):
            self.host_past[op.host_block] = list(self.past[op.block])
        elif isinstance(op, SwapIn):
            self.past[op.block] = list(self.host_past[op.host_block])

    def execute_model(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """In the order given: who reads what another writes in the same step comes after it."""
        result = super().execute_model(step)
        for share in step.scheduled:
            past = 0
            for position in range(share.start + share.num_tokens):
                block, slot = share.plan.block_table[position // self.block_size], position % self.block_size
                past = hash((past, self.device[block][slot]))
                if position >= share.start:
                    self.past[block][slot] = past
                elif self.past[block][slot] != past:
                    raise RuntimeError(f"{share.request_id} reads K/V of another prefix at position {position}")
        return result


def colliding(parent: bytes, tokens: Any, cache_salt: str) -> bytes:
    """A hash function that is as bad as can be without being constant: five keys in all."""
    return bytes([(sum(tokens) + parent[0]) % 5])


def cached_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    num_host_blocks: int = 0,
    caching: bool = True,
    hash_function: HashBlock = hash_block,
    chunked_prefill: bool = True,
    **kwargs: Any,
) -> LLMEngine:
    """An engine as M4 has it around the mock model; other keywords are those of `paged_mock_engine`."""
    cache = PrefixCache(block_size, b"secret", hash_function) if caching else None
    engine = paged_mock_engine(
        num_blocks=num_blocks,
        block_size=block_size,
        num_host_blocks=num_host_blocks,
        cache=cache,
        chunked_prefill=chunked_prefill,
        **kwargs,
    )
    engine.core.runner = PrefixRunner(num_blocks, block_size, num_host_blocks)
    return engine


def kept_llms(folder: Path, modes: dict[str, dict[str, Any]], **common: Any) -> Callable[[str], LLM]:
    """An engine for each name of `modes`, with those arguments: made once, and with an empty cache for each test."""
    made: dict[str, LLM] = {}

    def get(name: str) -> LLM:
        if name not in made:
            kwargs = {"swap_space": 0.001, **common, **modes[name]}
            made[name] = LLM(str(folder), dtype="float32", device="cpu", **kwargs)
        made[name].reset_prefix_cache()
        made[name].engine.stats.reset()
        return made[name]

    return get


def runner_of(engine: LLMEngine) -> PrefixRunner:
    """The engine's mock model."""
    runner = engine.core.runner
    assert isinstance(runner, PrefixRunner)
    return runner


def cache_of(engine: LLMEngine) -> PrefixCache:
    """The engine's index of blocks."""
    cache = manager_of(engine).cache
    assert cache is not None
    return cache


def cached_tokens(engine: LLMEngine) -> dict[int, list[int]]:
    """Blocks that can be found -> all tokens of the prefix that each is the end of."""
    cache = cache_of(engine)
    found: dict[int, list[int]] = {}
    for block, entry in cache._by_block.items():
        chain = [entry]
        while (parent := chain[-1].parent) is not None and cache._entries.get(parent.key) is parent:
            chain.append(parent)
        if parent is None:
            found[block] = [token for e in reversed(chain) for token in e.tokens]
    return found


def check_cache(engine: LLMEngine) -> None:
    """Between two steps: every block that stands in the cache is written, with the tokens it stands there for."""
    if manager_of(engine).cache is None:
        return
    cache, runner = cache_of(engine), runner_of(engine)
    for block, entry in cache._by_block.items():
        assert runner.device[block] == list(entry.tokens)
    for block, tokens in cached_tokens(engine).items():
        past = 0
        for token in tokens:
            past = hash((past, token))
        assert runner.past[block][-1] == past
    assert cache._pending == {}


def check_nothing_is_left(engine: LLMEngine) -> None:
    """Every block is free, and neither the books nor the cache remember any request. Cached blocks stay."""
    check_all_free(engine)
    check_cache(engine)
    cache = manager_of(engine).cache
    if cache is not None:
        assert (cache._pending, cache._keys) == ({}, {})


def greedy(max_tokens: int | None, **kwargs: Any) -> SamplingParams:
    """Parameters of a request that ends by its length."""
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **kwargs)


def expected(prompt: list[int], params: SamplingParams, max_model_len: int = 64) -> list[list[int]]:
    """What every sample of a prompt has to say."""
    return [mock_tokens(prompt, params.child(k) if params.n > 1 else params, max_model_len)[0] for k in range(params.n)]


def finish(engine: LLMEngine, wanted: dict[str, tuple[list[int], SamplingParams]], max_model_len: int = 64) -> None:
    """Run to the end, looking at books and cache after each step: all say what they must, and nothing is left."""
    done: dict[str, list[list[int]]] = {}
    while engine.has_unfinished_requests():
        done |= {o.request_id: [c.token_ids for c in o.outputs] for o in engine.step() if o.finished}
        check_progress(engine)
        manager_of(engine).check()
        check_cache(engine)
    for request_id, (prompt, params) in wanted.items():
        assert done[request_id] == expected(prompt, params, max_model_len), request_id
    check_nothing_is_left(engine)


# ---------------------------------------------------------------------- driving a mock engine


def other(length: int, first: int = 1) -> list[int]:
    return [(first + 2 * i) % 64 for i in range(length)]


def add(
    engine: LLMEngine, name: str, prompt: list[int], max_tokens: int, priority: int = 0, salt: str = "", **kwargs: Any
) -> tuple[list[int], SamplingParams]:
    """Queue a request; what `finish` wants to know of it."""
    params = greedy(max_tokens, **kwargs)
    engine.add_request(name, {"prompt_token_ids": prompt, "cache_salt": salt}, params, priority)
    return prompt, params


def shares(engine: LLMEngine) -> list[dict[str, int]]:
    """Per step: request id -> tokens computed, in the order of the step."""
    return [{r.request_id: r.num_scheduled for r in record.requests} for record in engine.trace]


def pieces(engine: LLMEngine, name: str) -> list[tuple[int, int]]:
    """Start and number of tokens of each share of a request."""
    return [(s.start, s.num_tokens) for s in all_shares(engine, name)]


def all_shares(engine: LLMEngine, name: str) -> list[ScheduledRequest]:
    return [s for given in runner_of(engine).steps for s in given.scheduled if s.request_id == name]


def run(engine: LLMEngine, name: str, prompt: list[int], max_tokens: int = 1, **kwargs: Any) -> int:
    """One request, alone, from start to end; its number of cached tokens."""
    params = greedy(max_tokens)
    engine.add_request(name, {"prompt_token_ids": prompt, **kwargs}, params)
    cached = -1
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id != name:
                continue
            cached = output.num_cached_tokens
            if output.finished:
                assert [c.token_ids for c in output.outputs] == expected(prompt, params)
        check_progress(engine)
        check_cache(engine)
    return cached


def step(engine: LLMEngine, count: int = 1) -> None:
    """Run steps. What they finish is handed over later, to `finish`."""
    for _ in range(count):
        engine.step_for((), final_only=True)


def give_way(engine: LLMEngine, name: str) -> None:
    """As for want of room, between two steps; its K/V is to be computed again."""
    engine.core.scheduler._preempt(engine.core.scheduler.requests[name], SchedulerOutput())


def fail_once(engine: LLMEngine, after: bool = False) -> None:
    """One step that is interrupted, with the slots it was to write scrubbed, or all done."""
    runner, execute = runner_of(engine), runner_of(engine).execute_model

    def failing(given: SchedulerOutput) -> Any:
        if after:
            execute(given)
        else:
            for share in given.scheduled:
                for p in range(share.start, share.start + share.num_tokens):
                    runner.device[share.plan.block_table[p // runner.block_size]][p % runner.block_size] = None  # type: ignore[attr-defined]
        raise KeyboardInterrupt("the runner")

    runner.execute_model = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="the runner"):
        step(engine)
    runner.execute_model = execute  # type: ignore[method-assign]
