"""1,000 requests through a small pool: every block is free in the end, and memory does not grow with them."""

from __future__ import annotations

import gc
import random
import tracemalloc

from folovllm import LLMEngine
from tests.m4.helpers import cached_engine, check_nothing_is_left, expected, greedy, runner_of

MAX_MODEL_LEN = 48
NUM_REQUESTS = 1000


def serve(engine: LLMEngine, numbers: range, rng: random.Random) -> None:
    """Requests come in bursts, begin alike, and some are aborted. Each says what it has to say."""
    texts = [[rng.randrange(64) for _ in range(MAX_MODEL_LEN)] for _ in range(4)]
    left, wanted = list(numbers), {}
    while left or engine.has_unfinished_requests():
        while left and engine.core.scheduler.num_waiting < 12:
            name = str(left.pop(0))
            cut = rng.randint(0, 24)
            prompt = [*rng.choice(texts)[:cut], *(rng.randrange(64) for _ in range(rng.randint(1, 4)))]
            params = greedy(rng.randint(1, 12), n=rng.choice([1, 1, 1, 2]), seed=1)
            salt = rng.choice(["", "", "", name])  # one of its own: nothing of it may stay behind either
            engine.add_request(name, {"prompt_token_ids": prompt, "cache_salt": salt}, params)
            wanted[name] = expected(prompt, params, MAX_MODEL_LEN)
        if rng.random() < 0.05:
            name = rng.choice(list(wanted))
            engine.abort_request(name)
            del wanted[name]
        for output in engine.step():
            if output.finished:
                assert [c.token_ids for c in output.outputs] == wanted.pop(output.request_id)
    assert not wanted
    check_nothing_is_left(engine)
    engine.trace.clear()
    runner_of(engine).steps.clear()


def test_a_thousand_requests_leave_every_block_free_and_memory_flat() -> None:
    engine = cached_engine(
        30,
        4,
        20,
        max_num_seqs=8,
        budget=24,
        max_model_len=MAX_MODEL_LEN,
        preemption_mode="swap",
        long_prefill_token_threshold=16,
    )
    rng = random.Random(0)
    serve(engine, range(NUM_REQUESTS // 10), rng)  # tables and caches of the interpreter fill
    gc.collect()
    tracemalloc.start()
    try:
        sizes = []
        for half in (1, 2):
            start = NUM_REQUESTS // 10 + (half - 1) * NUM_REQUESTS * 9 // 20
            serve(engine, range(start, start + NUM_REQUESTS * 9 // 20), rng)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 10_000, sizes  # 450 requests: not even 23 bytes of each
    stats = engine.stats
    # It all really happened, if less often than before: who is preempted comes back to its own blocks.
    assert stats.preemptions >= 10
    assert min(stats.swapped_in_blocks, stats.copied_blocks, stats.cached_tokens) > 50
