"""The measurements of chapters 6 and 7, all of the bundled model.

`python -m folovllm.course.measure chunks` writes `results/m4-chunks-folo-tiny.json`:

    streams, long      tokens in and out of each of the requests that decode, and of the one that comes in later
    start_after        output tokens that the former have by then
    same_tokens        whether all arms gave the same tokens
    summary, rounds    arms -> "m3" (the prompt in one piece), "64", "128", ... (tokens of a step, at most) ->
                       itl_p50_s, itl_p95_s, itl_max_s: of the streams, between the arrival of the long prompt and its
                       first token; run_itl_p50_s, run_itl_p95_s: of the streams in the whole run; ttft_p50_s,
                       ttft_p95_s: of the long prompt, in `repeats` runs a round; chunks: passes that compute it;
                       max_itl_below_m3, ttft_over_m3: against "m3" in the same round
    fills              arm -> `folovllm.course.viz.chunks.Composition` as plain data
    logit_differences  the largest difference of any logit of a prompt's last chunk from those of one pass: of right
                       ways (chunks_of_N, token_by_token) and of mistakes (the others)

`python -m folovllm.course.measure prefixes` writes `results/m4-prefixes-folo-tiny.json`:

    requests           number, prefix_len (tokens that all prompts begin with), own_len, max_tokens
    same_tokens        whether all arms gave the same tokens
    summary, rounds    arms -> m3, no_cache, together (all requests at once, an empty cache), again (the same once more)
                       -> seconds, over_no_cache, mean_ttft_s, prompt_tokens_computed, cached_tokens, steps
    fills              rule -> `folovllm.course.viz.chunks.Composition` as plain data, of the budget FILL_BUDGET
    rules              prompt tokens computed, by budget and longest piece ("2048/0") and by rule: none (no cache),
                       written (only what is written is found), forward (and what this very forward writes), follow
                       (and whoever begins like a running request waits for it)
    hit_rate           prompt_len, number of requests, shared (lengths), and rates: block size -> one per length
    preemption         16 requests in few blocks: no_cache, cache -> preemptions, tokens_scheduled, steps; same_tokens
    trace              steps and outputs of requests that come one after the other, with the state of all blocks
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise, takewhile
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.course.bench.record import percentile
from folovllm.course.bench.workloads import draw, get_workload
from folovllm.course.measure.measuring import as_text, feed, load, plain, random_tokens, summarize, turned
from folovllm.course.viz.chunks import composition
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.interface import Awaited
from folovllm.kv_cache.prefix_cache import CachedBlock, PrefixCache
from folovllm.outputs import RequestOutput
from folovllm.request import Request

MODEL, VOCAB = "folo-tiny", 2048
STREAMS, STREAM_PROMPT, STREAM_OUTPUT, START_AFTER = 8, 32, 64, 16
LONG_PROMPT, LONG_OUTPUT = 2048, 4
BUDGETS = (64, 128, 256, 512, 1024, 4096)  # the last holds the prompt and all streams
REPEATS = 3
EXACT_LEN, EXACT_CHUNK = 48, 16

SHARERS, PREFIX, OWN, ANSWER = 20, 400, 24, 8
RULE_BUDGETS = ((512, 0), (512, 128), (2048, 0), (16_384, 0))  # tokens of a step, and of a request in it (0: as many)
FILL_BUDGET = 2048
HIT_PROMPT, HIT_BLOCKS = 128, (4, 16, 64)
HIT_LENGTHS = (0, 8, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 56, 63, 64, 65, 80, 96, 112, 127, 128)
TIGHT_BLOCKS = 64
TRACE_BLOCKS, TRACE_BLOCK_SIZE, TRACE_OUTPUT = 12, 4, 3


# ------------------------------------------------------------------ chapter 6


def chunks(console: Console, rounds: int, _: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Eight requests that decode, and a long prompt that comes in among them."""
    model, header = load(MODEL, "float32")
    arms = {"m3": engine("m3", max(BUDGETS), LONG_PROMPT)}
    arms |= {str(budget): engine("m4", budget, LONG_PROMPT, enable_prefix_caching=False) for budget in BUDGETS}
    tokens = {arm: among_streams(llm)[1] for arm, llm in arms.items()}  # warm-up
    fills = {arm: asdict(composition(llm.engine.trace)) for arm, llm in arms.items()}
    measured = []
    for index in range(rounds):
        runs = {arm: [among_streams(arms[arm])[0] for _ in range(REPEATS)] for arm in turned(list(arms), index)}
        measured.append({"arms": {arm: latencies(runs[arm]) for arm in arms}})
        whole = measured[-1]["arms"]["m3"]
        for numbers in measured[-1]["arms"].values():
            numbers["max_itl_below_m3"] = whole["itl_max_s"] / numbers["itl_max_s"]
            numbers["ttft_over_m3"] = numbers["ttft_p50_s"] / whole["ttft_p50_s"]
        console.print(f"round {index + 1}: {as_text(measured[-1])}", highlight=False)
    data = {
        **header,
        "command": "python -m folovllm.course.measure chunks",
        "streams": {"number": STREAMS, "prompt_len": STREAM_PROMPT, "max_tokens": STREAM_OUTPUT},
        "long": {"prompt_len": LONG_PROMPT, "max_tokens": LONG_OUTPUT},
        "start_after": START_AFTER,
        "repeats": REPEATS,
        "same_tokens": all(ids == tokens["m3"] for ids in tokens.values()),
        "summary": summarize(measured),
        "rounds": measured,
        "fills": fills,
        "logit_differences": logit_differences(model),
    }
    return [("m4-chunks-folo-tiny", data)]


def among_streams(llm: LLM) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Streams that decode, and the long prompt among them: latencies, and each request's tokens."""
    engine, ids = llm.engine, random.Random(0)
    engine.trace.clear()
    names = [f"stream {i}" for i in range(STREAMS)]
    for name in names:
        engine.add_request(name, [ids.randrange(VOCAB) for _ in range(STREAM_PROMPT)], exactly(STREAM_OUTPUT))
    done: dict[str, RequestOutput] = {}

    def step() -> None:
        done.update({output.request_id: output for output in engine.step() if output.finished})

    while len(engine.trace) == 0 or min(r.num_output for r in engine.trace[-1].requests) < START_AFTER:
        step()
    engine.add_request("long", [ids.randrange(VOCAB) for _ in range(LONG_PROMPT)], exactly(LONG_OUTPUT))
    while engine.has_unfinished_requests():
        step()
    long = done["long"].metrics
    arrival, first = long.arrival_time, long.first_token_time or 0.0
    times = [done[name].metrics.token_times for name in names]
    gaps = [(a, b) for known in times for a, b in pairwise(known)]
    return {
        "ttft": long.ttft,
        "itls": [b - a for a, b in gaps],
        "itls_beside": [b - a for a, b in gaps if a < first and b > arrival],
        "chunks": sum(r.request_id == "long" and r.num_prompt > 0 for s in engine.trace for r in s.requests),
    }, {name: output.outputs[0].token_ids for name, output in done.items()}


def latencies(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """One round of one arm in numbers."""
    beside, everywhere, ttfts = [], [], []
    for run in runs:
        beside += run["itls_beside"]
        everywhere += run["itls"]
        ttfts.append(run["ttft"])
    return {
        "itl_p50_s": percentile(beside, 50),
        "itl_p95_s": percentile(beside, 95),
        "itl_max_s": max(beside),
        "run_itl_p50_s": percentile(everywhere, 50),
        "run_itl_p95_s": percentile(everywhere, 95),
        "ttft_p50_s": percentile(ttfts, 50),
        "ttft_p95_s": percentile(ttfts, 95),
        "chunks": runs[0]["chunks"],
    }


def logit_differences(model: PreTrainedModel) -> dict[str, float]:
    """How far the logits of a prompt's last chunk are from those of one pass, done right and done wrong."""
    ids = torch.tensor([random_tokens(EXACT_LEN, model.config.vocab_size)])  # [1, T]
    whole = model(input_ids=ids, use_cache=False).logits  # [1, T, V]

    def in_chunks(size: int, **of_last: torch.Tensor) -> float:
        cache = DynamicCache()
        *first, last = ids.split(size, dim=1)
        for chunk in first:
            feed(model, chunk[0].tolist(), cache)
        logits = model(input_ids=last, past_key_values=cache, use_cache=True, **of_last).logits  # [1, C, V]
        return float((logits - whole[:, -last.shape[1] :]).abs().max())

    size, start = EXACT_CHUNK, EXACT_LEN - EXACT_CHUNK
    rows, columns = torch.arange(start, EXACT_LEN)[:, None], torch.arange(EXACT_LEN)[None]
    causal = (columns <= rows)[None, None]  # [1, 1, C, T]
    alone = model(input_ids=ids[:, start:], position_ids=rows.T, use_cache=False).logits
    return {
        **{f"chunks_of_{n}": in_chunks(n) for n in (size, EXACT_LEN // 4)},
        "token_by_token": in_chunks(1),
        "rectangle_of_the_mask": in_chunks(size, attention_mask=causal),
        "sees_its_own_chunk_only": float((alone - whole[:, start:]).abs().max()),
        "whole_rectangle": in_chunks(size, attention_mask=torch.ones_like(causal)),
        "positions_begin_again": in_chunks(size, position_ids=rows.T - start),
        "logits_standard_deviation": float(whole.std()),
    }


# ------------------------------------------------------------------ chapter 7


class WrittenOnly(PrefixCache):
    """The control arm: a cache that finds a block only when the forward that writes it is over."""

    def find(self, request: Request, num_blocks: int) -> list[CachedBlock]:
        """See `PrefixCache.find`."""
        return list(takewhile(lambda entry: entry.writer is None, super().find(request, num_blocks)))


class NoFollowing(BlockManager):
    """The other one: finds what this very forward writes, and waits for nobody."""

    def awaited(self, request: Request) -> Awaited | None:
        """Nobody."""
        return None


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
    data = {
        **header,
        "command": "python -m folovllm.course.measure prefixes",
        "requests": {"number": SHARERS, "prefix_len": PREFIX, "own_len": OWN, "max_tokens": ANSWER},
        "same_tokens": all(ids == tokens[0] for ids in tokens),
        "summary": summarize(measured),
        "rounds": measured,
        "rules": computed,
        "fills": fills,
        "hit_rate": hit_rates(),
        "preemption": preemption(),
        "trace": one_after_the_other(),
    }
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
        "prompt_tokens_computed": stats.prompt_tokens_computed,
        "cached_tokens": stats.cached_tokens,
        "steps": stats.steps,
        "tokens": [output.outputs[0].token_ids for output in outputs],
    }


def by_rule(prompts: Sequence[Sequence[int]]) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    """Prompt tokens computed under each rule, by budget; and what filled the steps of one of the budgets."""
    computed: dict[str, dict[str, int]] = {}
    fills: dict[str, Any] = {}
    for budget, piece in RULE_BUDGETS:
        row: dict[str, int] = {}
        for rule in ("none", "written", "forward", "follow"):
            caching = {"enable_prefix_caching": rule != "none", "long_prefill_token_threshold": piece}
            llm = engine("m4", budget, **caching)
            scheduler = llm.engine.core.scheduler
            books = scheduler.kv
            if rule in ("written", "forward") and isinstance(books, BlockManager):
                cache = WrittenOnly(books.block_size) if rule == "written" else PrefixCache(books.block_size)
                scheduler.kv = NoFollowing(books.pool.num_blocks, books.block_size, cache=cache)
            row[rule] = serve(llm, prompts)["prompt_tokens_computed"]
            if budget == FILL_BUDGET:
                fills[rule] = asdict(composition(llm.engine.trace))
        computed[f"{budget}/{piece}"] = row
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
        wishes = [exactly(request.max_tokens) for request in requests]
        outputs = llm.generate([request.prompt_token_ids for request in requests], wishes, use_tqdm=False)
        tokens.append([output.outputs[0].token_ids for output in outputs])
        found[arm] = {
            "preemptions": llm.engine.stats.preemptions,
            "tokens_scheduled": sum(step.num_scheduled_tokens for step in llm.engine.trace),
            "steps": llm.engine.stats.steps,
        }
    return {"num_kv_blocks": TIGHT_BLOCKS, "same_tokens": tokens[0] == tokens[1], **found}


def one_after_the_other() -> dict[str, Any]:
    """Five requests in a small pool, each alone: a, b, one that begins as a does, and two that need the room."""
    llm = engine("m4", 64, num_kv_blocks=TRACE_BLOCKS, block_size=TRACE_BLOCK_SIZE, max_len=48, trace_blocks=True)
    ids = random.Random(0)
    a, b, c, d, other = ([ids.randrange(VOCAB) for _ in range(count)] for count in (13, 13, 14, 9, 5))
    prompts = [a, b, a[: 2 * TRACE_BLOCK_SIZE] + other, c, d]
    outputs = [llm.generate([prompt], exactly(TRACE_OUTPUT), use_tqdm=False)[0] for prompt in prompts]
    return plain(llm.engine.trace, outputs)


# ------------------------------------------------------------------ both


def engine(milestone: str, budget: int, longest: int = PREFIX + OWN, max_len: int = 0, **kwargs: Any) -> LLM:
    """An engine with room for everybody, unless told otherwise."""
    room = {"num_kv_blocks": 1024, "block_size": 16} | kwargs
    return LLM(
        MODEL,
        milestone=milestone,
        dtype="float32",
        max_model_len=max_len or max(1024, longest + 64),
        max_num_seqs=32,
        max_num_batched_tokens=budget,
        **room,
    )


def sharers(prefix_len: int = PREFIX, own_len: int = OWN) -> list[list[int]]:
    """Prompts that begin alike and end differently."""
    ids = random.Random(0)
    prefix = [ids.randrange(VOCAB) for _ in range(prefix_len)]
    # The first token after the common part is another one in each, so that it does not get longer by chance.
    return [
        prefix + [number, *(ids.randrange(VOCAB) for _ in range(own_len - 1))][:own_len] for number in range(SHARERS)
    ]


def exactly(max_tokens: int) -> SamplingParams:
    """Greedy, and so many tokens."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
