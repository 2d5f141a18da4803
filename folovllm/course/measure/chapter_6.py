"""The measurement of chapter 6, of the bundled model.

`python -m folovllm.course.measure chunks` writes `results/m4-chunks-folo-tiny.json`:

    streams, long      tokens in and out of each of the requests that decode, and of the one that comes in later
    start_after        output tokens that the former have by then
    same_tokens        whether all arms gave the same tokens
    summary, rounds    arms -> "m3" (the prompt in one chunk), "64", "128", ... (tokens of a step, at most) ->
                       itl_p50_s, itl_p95_s, itl_max_s: of the streams, between the arrival of the long prompt and its
                       first token; run_itl_p50_s, run_itl_p95_s: of the streams in the whole run; ttft_p50_s,
                       ttft_p95_s: of the long prompt, in `repeats` runs a round; chunks: passes that compute it;
                       max_itl_below_m3, ttft_over_m3: against "m3" in the same round
    fills              arm -> `folovllm.course.viz.chunks.Composition` as plain data
    logit_differences  the largest difference of any logit of a prompt's last chunk from those of one pass: of right
                       ways (chunks_of_N, token_by_token) and of mistakes (the others)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel

from folovllm import LLM
from folovllm.course.bench.record import percentile
from folovllm.course.bench.rounds import turned
from folovllm.course.measure.measuring import as_text, exactly, feed, in_rounds, load, random_tokens
from folovllm.course.viz.chunks import composition
from folovllm.outputs import RequestOutput

MODEL, VOCAB = "folo-tiny", 2048
STREAMS, STREAM_PROMPT, STREAM_OUTPUT, START_AFTER = 8, 32, 64, 16
LONG_PROMPT, LONG_OUTPUT = 2048, 4
BUDGETS = (64, 128, 256, 512, 1024, 4096)  # the last holds the prompt and all streams
REPEATS = 3
EXACT_LEN, EXACT_CHUNK = 48, 16


def chunks(console: Console, rounds: int, _: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Eight requests that decode, and a long prompt that comes in among them."""
    model, header = load(MODEL, "float32")
    length = LONG_PROMPT + 64
    arms = {"m3": engine("m3", max(BUDGETS), max_model_len=length)}
    arms |= {str(budget): engine("m4", budget, max_model_len=length, enable_prefix_caching=False) for budget in BUDGETS}
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
    data = in_rounds(
        header,
        "chunks",
        measured,
        streams={"number": STREAMS, "prompt_len": STREAM_PROMPT, "max_tokens": STREAM_OUTPUT},
        long={"prompt_len": LONG_PROMPT, "max_tokens": LONG_OUTPUT},
        start_after=START_AFTER,
        repeats=REPEATS,
        same_tokens=all(ids == tokens["m3"] for ids in tokens.values()),
        fills=fills,
        logit_differences=logit_differences(model),
    )
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


def engine(milestone: str, budget: int, **kwargs: Any) -> LLM:
    """An engine with blocks for all requests, unless told otherwise."""
    usual = {"max_model_len": 1024, "num_kv_blocks": 1024, "block_size": 16, "max_num_seqs": 32}
    return LLM(MODEL, milestone=milestone, dtype="float32", max_num_batched_tokens=budget, **(usual | kwargs))
