"""The measurements of chapter 4: `python -m folovllm.course.measure blocks` writes `results/m3-blocks-folo-tiny.json`.

simulator          replays of `folovllm.course.lessons.fragmentation`: no model, and the same on every machine
  requests         number, rate per step, seed, mean_prompt_len, mean_output_len, longest_kv (tokens with K/V)
  capacity         slots; max_model_len: of `max`; block_size: of `paged`
  policies         max, pow2, oracle, paged -> shares (used, reserved, internal, external, free; they sum to 1),
                   mean_running, max_running, steps (until all are done), busy_steps, preemptions
  block_sizes      per size: block_size, empty_slots (per running request, mean), formula ((B - 1) / 2), empty_share
                   (of the slots that requests hold), used_share, steps, preemptions
capacity           the 16 requests of w2 in kv_tokens slots with max_model_len: requests ([prompt, output] tokens),
                   same_tokens, and m2, m3 -> max_running, steps, forwards, most_reserved, most_used (slots),
                   preemptions, and by step: running, reserved, used (slots)
preemption         the same 16 in num_kv_blocks blocks of block_size, which do not hold them, and in roomy_blocks,
                   which do: same_tokens (of all arms). In summary and rounds: roomy, recompute, swap -> seconds,
                   over_roomy (times the seconds of `roomy` in that round), preemptions, steps, forwards,
                   prompt_tokens_computed, swapped_out_blocks, swapped_in_blocks
sharing            of the K/V of prompt_lens, in blocks of each size: beam_search -> width -> kv_saved per prompt,
                   and parallel_sampling -> n -> the largest share of blocks that sharing saved in any step
trace              recompute, swap -> steps and outputs of four requests in a pool that is too small for them, as in
                   `m1-engine-*.json`, with the state of all blocks after each step: `blocks`, which is a
                   `folovllm.kv_cache.interface.BlockSnapshot` as plain data
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from folovllm import LLM, BeamSearchParams, SamplingParams
from folovllm.config import PREEMPTION_MODES
from folovllm.course.bench.rounds import turned
from folovllm.course.bench.workloads import BenchRequest, draw, get_workload
from folovllm.course.glossary import default_prompts
from folovllm.course.lessons.fragmentation import POLICIES, Replay, draw_requests, mean_empty_slots, replay
from folovllm.course.measure.measuring import counts, exactly, in_rounds, load, plain
from folovllm.engine.input_processor import Prompt
from folovllm.engine.trace import Trace
from folovllm.outputs import RequestOutput

MODEL = "folo-tiny"
NUM_REQUESTS, RATE, SEED = 200, 0.25, 0  # of the replays
CAPACITY, MAX_MODEL_LEN, BLOCK_SIZE = 16_384, 2048, 16
BLOCK_SIZES = (1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)

KV_BLOCKS, W2_MODEL_LEN = 256, 1024  # of M2 and M3 side by side
TIGHT_BLOCKS, SWAP_GIB = 64, 0.05
COUNTS = ("preemptions", "steps", "forwards", "prompt_tokens_computed", "swapped_out_blocks", "swapped_in_blocks")
BEAM_WIDTHS, SHARED_BLOCK_SIZES, SHARED_TOKENS = (2, 4, 8), (4, 16), 32
TRACE_BLOCKS, TRACE_BLOCK_SIZE, TRACE_TOKENS = 12, 8, 20


def blocks(console: Console, rounds: int, _: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Where KV memory goes, what preemption costs, and what sharing saves."""
    header = load(MODEL, "float32")[1]
    facts, measured = preemption_rounds(console, rounds)
    data = in_rounds(
        header,
        "blocks",
        measured,
        simulator=simulator(),
        capacity=capacity(),
        sharing=sharing(),
        preemption=facts,
        trace={mode: plain(trace, outputs) for mode, (trace, outputs) in traced().items()},
    )
    return [(f"m3-blocks-{MODEL}", data)]


def simulator() -> dict[str, Any]:
    """Replays under each policy, and of blocks of each size."""
    requests = draw_requests(NUM_REQUESTS, RATE, seed=SEED)
    policies = {p: replay(requests, p, CAPACITY, MAX_MODEL_LEN, BLOCK_SIZE) for p in POLICIES}
    sizes = {size: replay(requests, "paged", CAPACITY, block_size=size) for size in BLOCK_SIZES}
    return {
        "requests": {
            "number": NUM_REQUESTS,
            "rate": RATE,
            "seed": SEED,
            "mean_prompt_len": fmean(r.prompt_len for r in requests),
            "mean_output_len": fmean(r.output_len for r in requests),
            "longest_kv": max(r.kv_len for r in requests),
        },
        "capacity": CAPACITY,
        "max_model_len": MAX_MODEL_LEN,
        "block_size": BLOCK_SIZE,
        "policies": {
            policy: {
                "shares": run.shares,
                "mean_running": run.mean_running,
                "max_running": max(step.running for step in run.steps),
                "steps": len(run.steps),
                "busy_steps": len(run.busy),
                "preemptions": run.preemptions,
            }
            for policy, run in policies.items()
        },
        "block_sizes": [
            {
                "block_size": size,
                "empty_slots": run.empty_per_request,
                "formula": mean_empty_slots(size),
                "empty_share": empty_share(run),
                "used_share": run.shares["used"],
                "steps": len(run.steps),
                "preemptions": run.preemptions,
            }
            for size, run in sizes.items()
        ],
    }


def empty_share(run: Replay) -> float:
    """Of all slots that requests held, in all steps, those that were empty."""
    empty = sum(step.reserved + step.internal for step in run.steps)
    return empty / (empty + sum(step.used for step in run.steps))


def capacity() -> dict[str, Any]:
    """The same memory cut into regions (M2) and into blocks (M3)."""
    requests, found, tokens = w2(), {}, []
    for milestone in ("m2", "m3"):
        llm = engine(milestone, KV_BLOCKS)
        tokens.append(serve(llm, requests)[0])
        stats, usage = llm.engine.stats, [step.kv for step in llm.engine.trace]
        found[milestone] = {
            **counts(stats, "max_running", "steps", "forwards", "preemptions"),
            "most_reserved": max(kv.reserved for kv in usage),
            "most_used": max(kv.used for kv in usage),
            "running": [len(step.requests) for step in llm.engine.trace],
            "reserved": [kv.reserved for kv in usage],
            "used": [kv.used for kv in usage],
        }
    return {
        "requests": [[r.num_prompt_tokens, r.max_tokens] for r in requests],
        "max_model_len": W2_MODEL_LEN,
        "num_kv_blocks": KV_BLOCKS,
        "block_size": BLOCK_SIZE,
        "kv_tokens": KV_BLOCKS * BLOCK_SIZE,
        "same_tokens": tokens[0] == tokens[1],
        **found,
    }


def preemption_rounds(console: Console, rounds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """16 requests in a pool that does not hold them, in both modes, and in one that does: facts, numbers by round."""
    requests = w2()
    arms = {"roomy": engine("m3", KV_BLOCKS)} | {
        mode: engine("m3", TIGHT_BLOCKS, preemption_mode=mode, swap_space=SWAP_GIB) for mode in PREEMPTION_MODES
    }
    tokens = {arm: serve(llm, requests)[0] for arm, llm in arms.items()}  # warm-up
    measured = []
    for index in range(rounds):
        numbers: dict[str, Any] = {}
        for arm in turned(list(arms), index):
            stats = arms[arm].engine.stats
            stats.reset()
            took = serve(arms[arm], requests)[1]
            numbers[arm] = {"seconds": took, **counts(stats, *COUNTS)}
        for arm in arms:
            numbers[arm]["over_roomy"] = numbers[arm]["seconds"] / numbers["roomy"]["seconds"]
        measured.append({arm: numbers[arm] for arm in arms})
        console.print(
            f"round {index + 1}: { ({a: round(n['seconds'], 2) for a, n in numbers.items()}) }", highlight=False
        )
    facts = {
        "num_kv_blocks": TIGHT_BLOCKS,
        "block_size": BLOCK_SIZE,
        "roomy_blocks": KV_BLOCKS,
        "same_tokens": all(ids == tokens["roomy"] for ids in tokens.values()),
    }
    return facts, measured


def sharing() -> dict[str, Any]:
    """What forks save: beams, and samples of one prompt, on four questions."""
    found: dict[str, Any] = {"beam_search": {}, "parallel_sampling": {}}
    lengths: list[int] = []
    for size in SHARED_BLOCK_SIZES:
        llm = engine("m3", 1024, block_size=size)
        prompts = questions(llm)
        lengths = [len(output.prompt_token_ids) for output in llm.generate(prompts, exactly(1), False)]
        found["beam_search"][str(size)] = {
            str(width): [
                llm.beam_search([prompt], BeamSearchParams(width, SHARED_TOKENS, ignore_eos=True))[0].kv_saved
                for prompt in prompts
            ]
            for width in BEAM_WIDTHS
        }
        samples = {}
        for n in BEAM_WIDTHS:
            llm.engine.trace.clear()
            llm.generate(prompts[0], SamplingParams(n=n, seed=0, max_tokens=SHARED_TOKENS, ignore_eos=True), False)
            samples[str(n)] = max(step.kv.sharing_saves for step in llm.engine.trace)
        found["parallel_sampling"][str(size)] = samples
    return {"prompt_lens": lengths, "max_tokens": SHARED_TOKENS, **found}


def traced() -> dict[str, tuple[Trace, list[RequestOutput]]]:
    """Four questions in a pool that is too small for all of them: the trace in each mode, with snapshots."""
    traces = {}
    for mode in PREEMPTION_MODES:
        llm = engine(
            "m3",
            TRACE_BLOCKS,
            block_size=TRACE_BLOCK_SIZE,
            preemption_mode=mode,
            swap_space=SWAP_GIB,
            trace_blocks=True,
        )
        ids = [str(i) for i, _ in enumerate(questions(llm))]
        for request_id, prompt in zip(ids, questions(llm), strict=True):
            llm.engine.add_request(request_id, prompt, exactly(TRACE_TOKENS))
        outputs = llm.engine.run_to_completion(ids)
        traces[mode] = (llm.engine.trace, [outputs[request_id] for request_id in ids])
    return traces


def engine(milestone: str, num_kv_blocks: int, block_size: int = BLOCK_SIZE, **kwargs: Any) -> LLM:
    """An engine with so much K/V."""
    return LLM(
        MODEL,
        milestone=milestone,
        dtype="float32",
        max_model_len=W2_MODEL_LEN,
        num_kv_blocks=num_kv_blocks,
        block_size=block_size,
        **kwargs,
    )


def w2() -> list[BenchRequest]:
    """16 requests, 32 to 256 tokens in, 16 to 128 out, as `folovllm bench` has them."""
    return draw(get_workload("w2"), vocab_size=2048)


def questions(llm: LLM) -> list[Prompt]:
    """Four of the bundled model's questions, in its chat format."""
    return llm.chat_prompts([[{"role": "user", "content": text}] for text in default_prompts(5)[1:]])


def serve(llm: LLM, requests: Sequence[BenchRequest]) -> tuple[list[list[int]], float]:
    """Each request's tokens, and how long it took."""
    llm.engine.trace.clear()
    start = time.perf_counter()
    outputs = llm.generate([r.prompt_token_ids for r in requests], [exactly(r.max_tokens) for r in requests], False)
    return [output.outputs[0].token_ids for output in outputs], time.perf_counter() - start
