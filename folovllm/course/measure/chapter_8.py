"""The measurement of chapter 8: one workload on every milestone, and the same tokens, all of the bundled model.

`python -m folovllm.course.measure whole` writes `results/m4-whole-folo-tiny.json`:

    requests           [prompt tokens, output tokens, late] each, in order; late ones come when LATE_AFTER tokens were
                       generated, the document among them
    shared_prefix      tokens that the prompts under the system prompt have in common
    max_model_len      of all engines: what M1 and M2 reserve for a request
    same_tokens        whether all arms gave Hugging Face's tokens in every round
    summary, rounds    arms -> m0-recompute, m0, m1, m2-loop, m2-padded, m3, m4 ->
                       seconds, output_tokens_per_s, over_before (times the arm before, same round), mean_ttft_s,
                       max_itl_s, forwards, prompt_tokens_computed (each time it was computed counts), cached_tokens,
                       kv_reserved_bytes, kv_used_bytes (the most after any step), padding_share;
                       layers -> shares of M4's time: interface (tokens to text, and all outside of steps), runtime
                       (schedule, prepare, sample, update), forward (the model, with the runtime's attention in it)
    fills              arm -> `folovllm.course.viz.chunks.Composition` as plain data
    matrix             settings, each with milestone, batching, block_size, chunk (tokens of a step; 0: whole prompts),
                       cache, small (the pool does not hold them all), same (requests with the tokens of `generate`),
                       preemptions, chunks (passes that computed prompt tokens), cached_tokens; total: of how many;
                       pool_tokens: of a small pool
    trace              steps and outputs of three requests on M4, with the state of all blocks
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from statistics import fmean
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from folovllm import LLM
from folovllm.baseline import BaselineResult, generate_cached, generate_recompute
from folovllm.course.bench.engines import from_trace
from folovllm.course.bench.peers import generate
from folovllm.course.bench.rounds import turned
from folovllm.course.glossary import default_prompts, load_prose
from folovllm.course.measure.measuring import as_text, counts, exactly, in_rounds, load, plain
from folovllm.course.viz.chunks import composition
from folovllm.engine.input_processor import read_prompt
from folovllm.engine.trace import PHASES
from folovllm.kv_cache.formulas import kv_bytes_per_token
from folovllm.models.loader import load_config, resolve_model
from folovllm.outputs import RequestOutput

MODEL = "folo-tiny"
MAX_MODEL_LEN = 2048
SYSTEM_PARAGRAPHS, DOCUMENT_PARAGRAPHS = 4, 16
SHARERS = 7
OUTPUTS = (30, 18, 24, 12, 30, 18, 24, 12, 10, 18, 30)
LATE = (6, 8, 9, 10)  # the ninth is the document
LATE_AFTER = 64
BUDGET = 256  # of M4
POOL_BLOCKS = 512  # of 16 slots
ARMS = ("m0-recompute", "m0", "m1", "m2-loop", "m2-padded", "m3", "m4")
LOOPS = {"m0-recompute": generate_recompute, "m0": generate_cached}
MATRIX_BLOCKS, MATRIX_CHUNKS = (4, 16, 64), (0, 256, 64)
SMALL_POOL = 1408  # tokens: little more than the document
TRACE_BUDGET, TRACE_OUTPUT = 64, 6


@dataclass(frozen=True)
class Ask:
    """A request."""

    prompt: list[int]
    max_tokens: int
    late: bool  # it comes while others are being answered


@dataclass
class Run:
    """One arm's run: tokens and times of each request, in order, and what else it counted."""

    tokens: list[list[int]]
    arrivals: list[float]
    times: list[list[float]]
    seconds: float
    counts: dict[str, float]


def whole(console: Console, rounds: int, _: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """One workload, all milestones."""
    model, header = load(MODEL, "float32")
    engines = {arm: engine(arm) for arm in ARMS if arm not in LOOPS}
    asks = make_asks(engines["m4"])
    reference = [by_generate(model, ask) for ask in asks]
    for llm in engines.values():
        serve(llm, asks)  # warm-up
    fills = {arm: asdict(composition(engines[arm].engine.trace)) for arm in ("m3", "m4")}
    same, measured = True, []
    for index in range(rounds):
        runs: dict[str, Run] = {}
        layers: dict[str, float] = {}
        for arm in turned(list(ARMS), index):
            runs[arm] = serve_m0(model, arm, asks) if arm in LOOPS else serve(engines[arm], asks)
            if arm == "m4":
                layers = layer_shares(engines[arm], runs[arm])
        same = same and all(run.tokens == reference for run in runs.values())
        measured.append({"arms": {arm: numbers_of(runs, arm) for arm in ARMS}, "layers": layers})
        console.print(f"round {index + 1}: {as_text(measured[-1])}", highlight=False)
    data = in_rounds(
        header,
        "whole",
        measured,
        requests=[[len(ask.prompt), ask.max_tokens, ask.late] for ask in asks],
        shared_prefix=common_prefix([ask.prompt for ask in asks[:SHARERS]]),
        late_after=LATE_AFTER,
        max_model_len=MAX_MODEL_LEN,
        token_budget=BUDGET,
        same_tokens=same,
        fills=fills,
        matrix=matrix(console, model, asks, reference),
        trace=traced(),
    )
    return [("m4-whole-folo-tiny", data)]


# ------------------------------------------------------------------ the workload


def make_asks(llm: LLM) -> list[Ask]:
    """Questions under a system prompt, short ones without it, and a document that begins as the system prompt does."""
    paragraphs = [part.strip() for text in load_prose().values() for part in text.split("\n\n")]
    system, document = ("\n\n".join(paragraphs[:count]) for count in (SYSTEM_PARAGRAPHS, DOCUMENT_PARAGRAPHS))
    systems: list[str | None] = [*([system] * SHARERS), None, document, None, None]
    questions = default_prompts(len(systems))
    chats = [
        [*([{"role": "system", "content": above}] if above else []), {"role": "user", "content": question}]
        for above, question in zip(systems, questions, strict=True)
    ]
    tokenizer, vocab_size = llm.engine.tokenizer, llm.engine.vocab_size
    prompts = [read_prompt(prompt, tokenizer, vocab_size).token_ids for prompt in llm.chat_prompts(chats)]
    return [Ask(prompt, count, i in LATE) for i, (prompt, count) in enumerate(zip(prompts, OUTPUTS, strict=True))]


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with."""
    columns = zip(*prompts, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, prompts)))


# ------------------------------------------------------------------ serving it


def engine(arm: str, **settings: Any) -> LLM:
    """An engine as an arm has it, with blocks for all requests unless told otherwise."""
    milestone, _, batching = arm.partition("-")
    kwargs: dict[str, Any] = {"milestone": milestone, "max_model_len": MAX_MODEL_LEN, "dtype": "float32"}
    if batching:
        kwargs["batching"] = batching
    if milestone != "m1":
        kwargs["max_num_seqs"] = 16
    if milestone in ("m3", "m4"):
        kwargs |= {"block_size": 16, "num_kv_blocks": POOL_BLOCKS}
    if milestone == "m4":
        kwargs["max_num_batched_tokens"] = BUDGET
    return LLM(MODEL, **(kwargs | settings))


def serve(llm: LLM, asks: Sequence[Ask]) -> Run:
    """All requests through an engine, from an empty cache and with a clean record."""
    core = llm.engine
    llm.reset_prefix_cache()
    core.stats.reset()
    core.trace.clear()
    late = [i for i, ask in enumerate(asks) if ask.late]
    done: dict[str, RequestOutput] = {}
    start = time.perf_counter()
    for i, ask in enumerate(asks):
        if not ask.late:
            core.add_request(str(i), ask.prompt, exactly(ask.max_tokens))
    while late or core.has_unfinished_requests():
        if late and (core.stats.generated_tokens >= LATE_AFTER or not core.has_unfinished_requests()):
            for i in late:
                core.add_request(str(i), asks[i].prompt, exactly(asks[i].max_tokens))
            late = []
        done |= {output.request_id: output for output in core.step() if output.finished}
    seconds = time.perf_counter() - start
    outputs = [done[str(i)] for i in range(len(asks))]
    kept, stats = from_trace(core.trace, "cpu"), core.stats
    return Run(
        [output.outputs[0].token_ids for output in outputs],
        [output.metrics.arrival_time for output in outputs],
        [output.metrics.token_times for output in outputs],
        seconds,
        {
            **counts(stats, "forwards", "prompt_tokens_computed", "cached_tokens"),
            "kv_reserved_bytes": kept["kv_reserved_tokens"] * bytes_per_token(),
            "kv_used_bytes": kept["kv_used_tokens"] * bytes_per_token(),
            "padding_share": kept["padding_share"],
        },
    )


def serve_m0(model: PreTrainedModel, arm: str, asks: Sequence[Ask]) -> Run:
    """One request after the other, each as M0 does it. Late ones come when LATE_AFTER tokens are there, as above."""
    begun = time.perf_counter()
    times: list[list[float]] = [[] for _ in asks]
    results: dict[int, BaselineResult] = {}
    for i in sorted(range(len(asks)), key=lambda i: asks[i].late):

        def note(_: int, known: list[float] = times[i]) -> None:
            known.append(time.perf_counter())

        results[i] = LOOPS[arm](model, asks[i].prompt, asks[i].max_tokens, on_token=note)
    seconds = time.perf_counter() - begun
    moments = sorted(moment for known in times for moment in known)
    passes = [len(ask.prompt) * (ask.max_tokens if arm == "m0-recompute" else 1) for ask in asks]
    kv_bytes = max(result.kv_bytes for result in results.values())
    return Run(
        [results[i].token_ids for i in range(len(asks))],
        [moments[LATE_AFTER - 1] if ask.late else begun for ask in asks],
        times,
        seconds,
        {
            "forwards": len(moments),
            "prompt_tokens_computed": sum(passes),
            "cached_tokens": 0,
            "kv_reserved_bytes": kv_bytes,
            "kv_used_bytes": kv_bytes,
            "padding_share": 0.0,
        },
    )


def bytes_per_token() -> int:
    """K/V of a token of the bundled model in float32."""
    return int(kv_bytes_per_token(load_config(resolve_model(MODEL)), 4))


def numbers_of(runs: dict[str, Run], arm: str) -> dict[str, float]:
    """One arm of a round in numbers."""
    run = runs[arm]
    before = runs[ARMS[max(0, ARMS.index(arm) - 1)]]
    return {
        "seconds": run.seconds,
        "output_tokens_per_s": sum(map(len, run.tokens)) / run.seconds,
        "over_before": before.seconds / run.seconds,
        "mean_ttft_s": fmean(times[0] - came for times, came in zip(run.times, run.arrivals, strict=True)),
        "max_itl_s": max(b - a for times in run.times for a, b in pairwise(times)),
        **run.counts,
    }


def layer_shares(llm: LLM, run: Run) -> dict[str, float]:
    """Where the time of a run went, by layer."""
    spent = {name: sum(s.phases[name][1] - s.phases[name][0] for s in llm.engine.trace) for name in PHASES}
    within = sum(step.duration for step in llm.engine.trace)
    return {
        "interface": 1 - within / run.seconds,
        "runtime": (within - spent["forward"]) / run.seconds,
        "forward": spent["forward"] / run.seconds,
    }


# ------------------------------------------------------------------ the same tokens


def by_generate(model: PreTrainedModel, ask: Ask) -> list[int]:
    """What Hugging Face's `generate` says to a request alone."""
    return [row[0] for row in generate(model, [ask.prompt], ask.max_tokens).steps]


def settings_of_matrix() -> Iterator[dict[str, Any]]:
    """Every cell: M0 to M2 once each, M3 over blocks and pools, M4 over all."""
    plain_cell = {"batching": "", "block_size": 0, "chunk": 0, "cache": False, "small": False}
    for arm in ("m0-recompute", "m0", "m1", "m2-loop", "m2-padded"):
        milestone, _, batching = arm.partition("-")
        yield {"milestone": milestone, **plain_cell, "batching": batching}
    for size, small in product(MATRIX_BLOCKS, (False, True)):
        yield {"milestone": "m3", **plain_cell, "block_size": size, "small": small}
    for size, small, cache, chunk in product(MATRIX_BLOCKS, (False, True), (False, True), MATRIX_CHUNKS):
        yield {**plain_cell, "milestone": "m4", "block_size": size, "chunk": chunk, "cache": cache, "small": small}


def matrix(
    console: Console, model: PreTrainedModel, asks: Sequence[Ask], reference: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """How many requests have the tokens of `generate`, setting by setting."""
    cells = []
    for setting in settings_of_matrix():
        arm = setting["milestone"] + ("-" + setting["batching"] if setting["batching"] else "")
        if arm in LOOPS:
            run, also = serve_m0(model, arm, asks), {"preemptions": 0, "chunks": len(asks), "cached_tokens": 0}
        else:
            llm = engine(arm, **engine_settings(setting))
            run, stats = serve(llm, asks), llm.engine.stats
            also = {**counts(stats, "preemptions", "cached_tokens"), "chunks": stats.prefill_chunks}
        same = sum(got == want for got, want in zip(run.tokens, reference, strict=True))
        cells.append({**setting, "same": same, **also})
        console.print(as_text(cells[-1]), highlight=False)
    return {"total": len(asks), "pool_tokens": SMALL_POOL, "cells": cells}


def engine_settings(setting: dict[str, Any]) -> dict[str, Any]:
    """A cell's setting in the keywords of `LLM`."""
    if not setting["block_size"]:
        return {}
    tokens = SMALL_POOL if setting["small"] else 16 * POOL_BLOCKS
    kwargs = {"block_size": setting["block_size"], "num_kv_blocks": tokens // setting["block_size"]}
    if setting["milestone"] == "m4":
        kwargs |= {"enable_prefix_caching": setting["cache"], "enable_chunked_prefill": setting["chunk"] > 0}
        kwargs["max_num_batched_tokens"] = setting["chunk"] or MAX_MODEL_LEN
    return kwargs


# ------------------------------------------------------------------ one request through the layers


def traced() -> dict[str, Any]:
    """Three requests at once, two of them under the same system prompt, with a small budget and a record of blocks."""
    llm = engine("m4", max_num_batched_tokens=TRACE_BUDGET, num_kv_blocks=64, trace_blocks=True)
    asks = make_asks(llm)
    chosen = [asks[0], asks[1], asks[SHARERS]]
    outputs = llm.generate([ask.prompt for ask in chosen], exactly(TRACE_OUTPUT), use_tqdm=False)
    return plain(llm.engine.trace, outputs)
