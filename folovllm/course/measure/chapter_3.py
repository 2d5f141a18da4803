"""The measurements of chapter 3: `python -m folovllm.course.measure batching`.

Of the bundled model, `results/m2-batching-folo-tiny.json`:

    requests           [prompt tokens, output tokens] of the 16, in order; seats: requests at once in what follows
    same_tokens        whether all arms gave M1's tokens
    summary, rounds    arms -> "m1", "m2-loop-N" and "m2-padded-N" (N requests at once), "static-N" (batches of N) ->
                       output_tokens_per_s, ratio_to_m1, mean_ttft_s, mean_e2e_s, forwards, padding_share (of rows) and
                       kv_padding_share (of K/V columns), as in `folovllm.course.bench.record.Measured`;
                       policies -> fcfs, priority, sjf -> mean and longest wait for a seat, in seconds and in steps
    policies           of the last round: priorities of the requests (0 is urgent), and per policy waited_s and
                       waited_steps per request, and [waiting, running] after and in each step
    starvation         steps that a long request waits, under fcfs and sjf, by the number of short_requests
    trace.continuous   steps and outputs of one run of m2-padded-4, as in `m1-engine-*.json`
    trace.static       lives of static-4: `course.viz.batching.Life` as plain data, seconds after the first arrival
    trace.poisson      lives of static, dynamic and continuous batching, requests arriving at requests_per_s

Of every other model, `results/m2-batching-MODEL.json`:

    decode_step        in summary and rounds, by the number of rows: seconds of a step in one forward and in a loop
    prefill            the same of one step that takes in prompts of prefill_lens; prefill_cells: of them, and padded
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel

from folovllm import LLM
from folovllm.config import BATCHINGS, SCHEDULING_POLICIES
from folovllm.course.bench.engines import EngineServer
from folovllm.course.bench.peers import run_dynamic, run_static
from folovllm.course.bench.record import Measured
from folovllm.course.bench.rounds import in_turn
from folovllm.course.bench.workloads import BenchRequest
from folovllm.course.measure.measuring import (
    DECODE_CONTEXT,
    exactly,
    feed,
    in_rounds,
    load,
    load_format,
    plain,
    random_tokens,
    seconds,
)
from folovllm.course.viz.batching import depth_of_trace, lives_from_batches, lives_from_trace
from folovllm.engine.trace import Trace
from folovllm.runner.hf.hf_runner import HFRunner

SEED = 3  # of the 16 requests
BATCH_SIZES, STATIC_SIZES = (1, 2, 4, 8, 16), (4, 16)
SEATS = 4  # requests at once, where one picture is drawn
ARRIVAL_RATE, WINDOW = 12.0, 0.05  # requests per second; seconds that a dynamic batch waits for more requests
SHORT_STREAMS = (0, 4, 8, 16, 32)  # requests that come, one per step, while a long one waits
PREFILL_LENS = (128, 64, 32, 16)
STEP_REPEATS = 3


def batching(console: Console, rounds: int, models: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """16 requests served in every way on the bundled model; single forwards of several rows on the others."""
    parts = {name: serving_of if name == "folo-tiny" else forwards_of for name in models}
    return [(f"m2-batching-{name}", measure(console, name, rounds)) for name, measure in parts.items()]


def serving_of(console: Console, name: str, rounds: int) -> dict[str, Any]:
    """One model's file: throughput and latency of each arm in rounds, lives for the Gantt chart, waits by policy."""
    model, header = load(name, "float32")

    def server(milestone: str, **kwargs: Any) -> EngineServer:
        return EngineServer(LLM(name, milestone=milestone, dtype="float32", max_model_len=256, **kwargs), "cpu")

    requests = skewed_requests(model.config.vocab_size)
    servers = {"m1": server("m1")} | {
        f"m2-{way}-{n}": server("m2", batching=way, max_num_seqs=n) for way in BATCHINGS for n in BATCH_SIZES
    }
    jobs: dict[str, Callable[[], Measured]] = {arm: partial(s.run, requests) for arm, s in servers.items()}
    jobs |= {f"static-{n}": partial(run_static, model, requests, n) for n in STATIC_SIZES}
    queues = {policy: server("m2", max_num_seqs=SEATS, scheduling_policy=policy).llm for policy in SCHEDULING_POLICIES}
    tokens = {arm: job().token_ids for arm, job in jobs.items()}  # warm-up
    measured, waits = [], {}
    for index in range(rounds):
        runs = in_turn(jobs, index)
        waits = in_turn({p: partial(waits_under, llm, p, requests) for p, llm in queues.items()}, index)
        base = runs["m1"].output_tokens / runs["m1"].wall_seconds
        measured.append(
            {
                "arms": {arm: serving_numbers(runs[arm], base) for arm in jobs},
                "policies": {policy: waits[policy].pop("summary") for policy in SCHEDULING_POLICIES},
            }
        )
        speeds = {arm: round(numbers["ratio_to_m1"], 2) for arm, numbers in measured[-1]["arms"].items()}
        console.print(f"{name}, round {index + 1}: {speeds}", highlight=False)
    streams = {
        policy: [steps_until_the_long_one(queues[policy], n) for n in SHORT_STREAMS] for policy in ("fcfs", "sjf")
    }
    return in_rounds(
        header,
        "batching",
        measured,
        requests=[[r.num_prompt_tokens, r.max_tokens] for r in requests],
        seats=SEATS,
        same_tokens=all(ids == tokens["m1"] for ids in tokens.values()),
        policies={"priorities": priorities(requests), **{policy: waits[policy] for policy in SCHEDULING_POLICIES}},
        starvation={"short_requests": list(SHORT_STREAMS), **streams},
        trace=traced_batches(servers[f"m2-padded-{SEATS}"], model, requests),
    )


def skewed_requests(vocab_size: int) -> list[BenchRequest]:
    """16 requests, 4 to 24 tokens in, 4 to 48 out: most outputs are short and a few are long."""
    draw = random.Random(SEED)
    return [
        BenchRequest(
            [draw.randrange(vocab_size) for _ in range(draw.randint(4, 24))], min(48, 4 + int(draw.expovariate(1 / 12)))
        )
        for _ in range(16)
    ]


def serving_numbers(run: Measured, base: float) -> dict[str, float]:
    """One arm in one round. base: output tokens per second of M1 in that round."""
    speed = run.output_tokens / run.wall_seconds
    ends = [times[-1] for times in run.token_times or []]
    lengths = [len(ids) for ids in run.token_ids]
    batches = run.extra.get("batches", [])
    return {
        "output_tokens_per_s": speed,
        "ratio_to_m1": speed / base,
        "mean_ttft_s": fmean(run.ttfts or []),
        "mean_e2e_s": fmean(end - arrival for end, arrival in zip(ends, run.arrivals, strict=True)),
        "forwards": run.extra["engine"]["stats"]["forwards"]
        if "engine" in run.extra
        else sum(max(lengths[i] for i in batch["requests"]) for batch in batches),
        "padding_share": run.padding_share or 0.0,
        "kv_padding_share": run.kv_padding_share or 0.0,
    }


def priorities(requests: Sequence[BenchRequest]) -> list[int]:
    """Every fourth request is urgent (0), the others are not (1)."""
    return [0 if i % 4 == 3 else 1 for i in range(len(requests))]


def waits_under(llm: LLM, policy: str, requests: Sequence[BenchRequest]) -> dict[str, Any]:
    """How long each request waits for a seat under a policy, in seconds and in steps, and the queue in each step."""
    engine, urgency = llm.engine, priorities(requests)
    engine.trace.clear()
    for i, request in enumerate(requests):
        priority = urgency[i] if policy == "priority" else 0
        engine.add_request(str(i), request.prompt_token_ids, exactly(request.max_tokens), priority)
    ids = [str(i) for i in range(len(requests))]
    outputs = engine.run_to_completion(ids)
    waited_s = [outputs[i].metrics.queue_time or 0.0 for i in ids]
    waited_steps = [steps_before(engine.trace, i) for i in ids]
    return {
        "waited_s": waited_s,
        "waited_steps": waited_steps,
        "waiting_running": depth_of_trace(engine.trace).tolist(),
        "summary": {
            "mean_wait_s": fmean(waited_s),
            "longest_wait_s": max(waited_s),
            "mean_wait_steps": fmean(waited_steps),
            "longest_wait_steps": max(waited_steps),
        },
    }


def steps_until_the_long_one(llm: LLM, count: int) -> int:
    """Steps that a long request waits behind short ones that fill all seats, while `count` more come, one per step.

    A short one needs as many steps as there are seats, so that together they finish one per step, as fast as they
    come.
    """
    engine, prompt = llm.engine, random_tokens(4, 256)
    engine.trace.clear()
    short, long = exactly(SEATS), exactly(8 * SEATS)
    for i in range(SEATS):
        engine.add_request(f"short {i}", prompt, short)
    engine.add_request("long", prompt, long)
    for i in range(count):
        engine.step()
        engine.add_request(f"late {i}", prompt, short)
    while engine.has_unfinished_requests():
        engine.step()
    return steps_before(engine.trace, "long")


def steps_before(trace: Trace, request_id: str) -> int:
    """Steps of the trace before the first that ran a request."""
    return next(i for i, step in enumerate(trace) if any(r.request_id == request_id for r in step.requests))


def traced_batches(server: EngineServer, model: PreTrainedModel, requests: Sequence[BenchRequest]) -> dict[str, Any]:
    """What the pictures show: all at once, continuous and static; and one after the other, in three ways."""
    engine, ids = server.llm.engine, [str(i) for i in range(len(requests))]
    engine.trace.clear()
    for i, request in zip(ids, requests, strict=True):
        engine.add_request(i, request.prompt_token_ids, exactly(request.max_tokens))
    continuous = plain(engine.trace, list(engine.run_to_completion(ids).values()))
    static = lives_of(run_static(model, requests, SEATS))
    gaps = random.Random(SEED)
    come = accumulate([0.0, *(gaps.expovariate(ARRIVAL_RATE) for _ in requests[1:])])
    late = [replace(request, arrival=arrival) for request, arrival in zip(requests, come, strict=True)]
    ways = {
        "static": lives_of(run_static(model, late, SEATS)),
        "dynamic": lives_of(run_dynamic(model, late, SEATS, WINDOW)),
        "continuous": lives_of(server.run(late), engine.trace),
    }
    poisson = {"requests_per_s": ARRIVAL_RATE, "window_s": WINDOW, "lives": ways}
    return {"continuous": continuous, "static": {"lives": static}, "poisson": poisson}


def lives_of(run: Measured, trace: Trace | None = None) -> list[dict[str, Any]]:
    """A run as `Life`s in plain data, from an engine's trace or from its batches; seconds after the first arrival."""
    if trace is None:
        lives = lives_from_batches(run.extra["batches"], run.arrivals, run.token_times or [])
    else:
        lives = lives_from_trace(trace, {str(i): arrival for i, arrival in enumerate(run.arrivals)})
    return [asdict(life.shifted(-min(run.arrivals))) for life in lives]


def forwards_of(console: Console, name: str, rounds: int) -> dict[str, Any]:
    """One model's file: a decode step of several texts and a prefill of four prompts, as one forward and as a loop."""
    _, header = load(name, "auto")
    llm = LLM(name, milestone="m2", dtype="auto", load_format=load_format(name), max_model_len=512)
    runner = llm.engine.core.runner
    if not isinstance(runner, HFRunner):
        raise TypeError(f"M2 has a {type(runner).__name__}; this measures the ways of an HFRunner")
    text = random_tokens(max(DECODE_CONTEXT, *PREFILL_LENS), runner.model.config.vocab_size)
    past = DynamicCache()
    feed(runner.model, text[:DECODE_CONTEXT], past)
    measured = []
    for index in range(rounds):
        steps: dict[str, dict[str, float]] = {}
        for n in BATCH_SIZES:
            took = in_turn({way: partial(decode_step_of, runner.model, past, n, way) for way in BATCHINGS}, index)
            steps[str(n)] = compared(took) | {"padded_tokens_per_s": n / took["padded"]}
        for numbers in steps.values():
            numbers["padded_over_one_row"] = numbers["padded_seconds"] / steps["1"]["padded_seconds"]
        took = in_turn({way: partial(prefill_of, llm, runner, text, way) for way in BATCHINGS}, index)
        measured.append({"decode_step": steps, "prefill": compared(took)})
        console.print(f"{name}, round {index + 1}: {measured[-1]}", highlight=False)
    return in_rounds(
        header,
        "batching",
        measured,
        decode_context=DECODE_CONTEXT,
        prefill_lens=list(PREFILL_LENS),
        prefill_cells={"needed": sum(PREFILL_LENS), "padded": len(PREFILL_LENS) * max(PREFILL_LENS)},
    )


def compared(took: dict[str, float]) -> dict[str, float]:
    """Seconds of both ways, and their ratio."""
    return {f"{way}_seconds": took[way] for way in BATCHINGS} | {"loop_over_padded": took["loop"] / took["padded"]}


def decode_step_of(model: PreTrainedModel, past: DynamicCache, count: int, way: str) -> float:
    """The median time of a step that feeds one token to each of `count` texts: in one forward, or in one for each."""
    rows = [copy.deepcopy(past) for _ in range(1 if way == "padded" else count)]
    if way == "padded":
        rows[0].batch_repeat_interleave(count)
    token = torch.zeros(count // len(rows), 1, dtype=torch.long)  # [B, 1], or [1, 1] for each of B
    only = torch.tensor([0])  # the one new position, by its index: see `lm_head_seconds` in chapter_1

    def step() -> None:
        for cache in rows:
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=only)

    step()  # warm-up
    return median(seconds(step) for _ in range(STEP_REPEATS))


def prefill_of(llm: LLM, runner: HFRunner, text: Sequence[int], way: str) -> float:
    """The forward of the step that takes in prompts of `PREFILL_LENS`, in seconds."""
    runner.batching = way
    llm.engine.trace.clear()
    llm.generate([list(text[:n]) for n in PREFILL_LENS], exactly(1), use_tqdm=False)
    (step,) = llm.engine.trace
    return step.phases["forward"][1] - step.phases["forward"][0]
