"""The measurement of chapter 7, of the bundled model.

`python -m folovllm.course.measure prefixes` writes `results/m4-prefixes-folo-tiny.json`:

    requests           number, prefix_len (tokens that all prompts begin with), own_len, max_tokens
    same_tokens        whether all arms gave the same tokens
    summary, rounds    arms -> m3, no_cache, together (all requests at once, an empty cache), again (the same once more)
                       -> seconds, over_no_cache, mean_ttft_s, prompt_tokens_computed, cached_tokens, steps
    fills              rule -> `folovllm.course.viz.chunks.Composition` as plain data, of the budget FILL_BUDGET
    rules              prompt tokens computed, by budget and longest chunk ("2048/0") and by rule: none (no cache),
                       written (only what is written is found), forward (M4: and what this very forward writes)
    hit_rate           prompt_len, number of requests, shared (lengths), and rates: block size -> one per length
    preemption         16 requests in few blocks: no_cache, cache -> preemptions, tokens_scheduled, steps; same_tokens
    trace              steps and outputs of requests that come one after the other, with the state of all blocks
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from statistics import fmean
from typing import Any

from rich.console import Console

from folovllm import LLM
from folovllm.course.bench.rounds import turned
from folovllm.course.bench.workloads import draw, get_workload
from folovllm.course.measure.chapter_6 import MODEL, VOCAB, engine
from folovllm.course.measure.measuring import as_text, counts, exactly, in_rounds, load, plain
from folovllm.course.viz.chunks import composition
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.prefix_cache import CachedBlock, PrefixCache
from folovllm.request import Request

SHARERS, PREFIX, OWN, ANSWER = 20, 400, 24, 8
RULE_BUDGETS = ((512, 0), (512, 128), (2048, 0), (16_384, 0))  # tokens of a step, and of a request in it (0: as many)
FILL_BUDGET = 2048
HIT_PROMPT, HIT_BLOCKS = 128, (4, 16, 64)
HIT_LENGTHS = (0, 8, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 56, 63, 64, 65, 80, 96, 112, 127, 128)
TIGHT_BLOCKS = 64
TRACE_BLOCKS, TRACE_BLOCK_SIZE, TRACE_OUTPUT = 12, 4, 3


class WrittenOnly(PrefixCache):
    """The control arm: a cache that finds a block only when the forward that writes it is over."""

    def find(self, request: Request, num_blocks: int) -> list[CachedBlock]:
        """See `PrefixCache.find`."""
        pending = {id(entry) for entries in self._pending.values() for entry in entries}
        return list(takewhile(lambda entry: id(entry) not in pending, super().find(request, num_blocks)))


def prefixes(console: Console, rounds: int, _: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Twenty requests with one system prompt."""
    header = load(MODEL, "float32")[1]
    prompts = sharers()
    arms = {"m3": engine("m3", FILL_BUDGET), "no_cache": engine("m4", FILL_BUDGET, enable_prefix_caching=False)}
    arms |= {"together": engine("m4", FILL_BUDGET)}
    tokens = [serve(llm, prompts)["tokens"] for llm in arms.values()]  # warm-up
    measured = []
    for index in range(rounds):
        numbers: dict[str, dict[str, Any]] = {}
        for arm in turned(list(arms), index):
            arms[arm].reset_prefix_cache()
            numbers[arm] = serve(arms[arm], prompts)
            if arm == "together":
                numbers["again"] = serve(arms[arm], prompts)
        tokens += [run.pop("tokens") for run in numbers.values()]
        for run in numbers.values():
            run["over_no_cache"] = run["seconds"] / numbers["no_cache"]["seconds"]
        measured.append({"arms": {arm: numbers[arm] for arm in (*arms, "again")}})
        console.print(f"round {index + 1}: {as_text(measured[-1])}", highlight=False)
    computed, fills = by_rule(prompts)
    data = in_rounds(
        header,
        "prefixes",
        measured,
        requests={"number": SHARERS, "prefix_len": PREFIX, "own_len": OWN, "max_tokens": ANSWER},
        same_tokens=all(ids == tokens[0] for ids in tokens),
        rules=computed,
        fills=fills,
        hit_rate=hit_rates(),
        preemption=preemption(),
        trace=one_after_the_other(),
    )
    return [("m4-prefixes-folo-tiny", data)]


def serve(llm: LLM, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """All prompts at once: their tokens, and what it took."""
    llm.engine.stats.reset()
    llm.engine.trace.clear()
    start = time.perf_counter()
    outputs = llm.generate([list(prompt) for prompt in prompts], exactly(ANSWER), use_tqdm=False)
    took, stats = time.perf_counter() - start, llm.engine.stats
    return {
        "seconds": took,
        "mean_ttft_s": fmean(output.metrics.ttft or 0.0 for output in outputs),
        **counts(stats, "prompt_tokens_computed", "cached_tokens", "steps"),
        "tokens": [output.outputs[0].token_ids for output in outputs],
    }


def by_rule(prompts: Sequence[Sequence[int]]) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    """Prompt tokens computed under each rule, by budget; and what filled the steps of one of the budgets."""
    computed: dict[str, dict[str, int]] = {}
    fills: dict[str, Any] = {}
    for budget, longest in RULE_BUDGETS:
        row = computed[f"{budget}/{longest}"] = {}
        for rule in ("none", "written", "forward"):
            llm = engine("m4", budget, enable_prefix_caching=rule != "none", long_prefill_token_threshold=longest)
            scheduler = llm.engine.core.scheduler
            if rule == "written" and isinstance(scheduler.kv, BlockManager):
                blocks, size = scheduler.kv.pool.num_blocks, scheduler.kv.block_size
                scheduler.kv = BlockManager(blocks, size, cache=WrittenOnly(size))
            row[rule] = serve(llm, prompts)["prompt_tokens_computed"]
            if budget == FILL_BUDGET:
                fills[rule] = asdict(composition(llm.engine.trace))
    return computed, fills


def hit_rates() -> dict[str, Any]:
    """The share of prompt tokens found, by block size and by the length of what prompts have in common."""
    rates: dict[str, list[float]] = {}
    for size in HIT_BLOCKS:
        llm = engine("m4", FILL_BUDGET, block_size=size)
        rates[str(size)] = []
        for shared in HIT_LENGTHS:
            llm.reset_prefix_cache()
            prompts = sharers(shared, HIT_PROMPT - shared)
            outputs = llm.generate(prompts, exactly(1), use_tqdm=False)
            rates[str(size)].append(sum(o.num_cached_tokens for o in outputs) / (SHARERS * HIT_PROMPT))
    return {"prompt_len": HIT_PROMPT, "number": SHARERS, "shared": list(HIT_LENGTHS), "rates": rates}


def preemption() -> dict[str, Any]:
    """w2 in too few blocks: what has to be computed, with and without a cache to come back to."""
    requests = draw(get_workload("w2"), vocab_size=VOCAB)
    found: dict[str, Any] = {}
    tokens = []
    for arm in ("no_cache", "cache"):
        llm = engine("m4", FILL_BUDGET, num_kv_blocks=TIGHT_BLOCKS, enable_prefix_caching=arm == "cache")
        params = [exactly(request.max_tokens) for request in requests]
        outputs = llm.generate([request.prompt_token_ids for request in requests], params, use_tqdm=False)
        tokens.append([output.outputs[0].token_ids for output in outputs])
        found[arm] = {
            **counts(llm.engine.stats, "preemptions", "steps"),
            "tokens_scheduled": sum(step.num_scheduled_tokens for step in llm.engine.trace),
        }
    return {"num_kv_blocks": TIGHT_BLOCKS, "same_tokens": tokens[0] == tokens[1], **found}


def one_after_the_other() -> dict[str, Any]:
    """Five requests in a small pool, each alone: a, b, one that begins as a does, and two that need their blocks."""
    llm = engine("m4", 64, num_kv_blocks=TRACE_BLOCKS, block_size=TRACE_BLOCK_SIZE, max_model_len=48, trace_blocks=True)
    ids = random.Random(0)
    a, b, c, d, other = ([ids.randrange(VOCAB) for _ in range(count)] for count in (13, 13, 14, 9, 5))
    prompts = [a, b, a[: 2 * TRACE_BLOCK_SIZE] + other, c, d]
    outputs = [llm.generate([prompt], exactly(TRACE_OUTPUT), use_tqdm=False)[0] for prompt in prompts]
    return plain(llm.engine.trace, outputs)


def sharers(prefix_len: int = PREFIX, own_len: int = OWN) -> list[list[int]]:
    """Prompts that begin alike and end differently."""
    ids = random.Random(0)
    prefix = [ids.randrange(VOCAB) for _ in range(prefix_len)]
    # The first token after the common part is another one in each, so that it does not get longer by chance.
    return [
        prefix + [number, *(ids.randrange(VOCAB) for _ in range(own_len - 1))][:own_len] for number in range(SHARERS)
    ]
