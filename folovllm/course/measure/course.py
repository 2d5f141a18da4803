"""Measure what chapters 0 to 8 say about time and memory, and write it to `results/`.

    python -m folovllm.course.measure workloads    # chapter 0: what the machine can do, and prefill and decode on it
    python -m folovllm.course.measure cache        # chapter 1: with and without a KV cache, and what breaks one
    python -m folovllm.course.measure engine       # chapter 2: a trace of M1, and the engine beside the bare loop
    python -m folovllm.course.measure batching     # chapter 3: M2's two ways, M1, static batches, and who waits
    python -m folovllm.course.measure blocks       # chapter 4: where KV memory goes, preemption, sharing
    python -m folovllm.course.measure attention    # chapter 4: ways to attend over blocks, at the shape of Qwen3-0.6B
    python -m folovllm.course.measure ragged       # chapter 5: padded and ragged, and what packing does to HF's logits
    python -m folovllm.course.measure chunks       # chapter 6: decodes beside a long prompt (bundled model)
    python -m folovllm.course.measure prefixes     # chapter 7: requests with one system prompt (bundled model)
    python -m folovllm.course.measure whole        # chapter 8: one workload on every milestone, and who says the same

Each part runs the models it is about, in rounds: what is compared stands side by side within a round, in an order that
turns from round to round, ratios are taken inside a round, and the file keeps the median with the least and the
greatest. Run it while nothing else does. The chapters show these files; `docs/claims` says which number goes where.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: on a busy machine, spinning threads cost 2x

import torch
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.baseline import BaselineResult, generate_cached, generate_recompute
from folovllm.course.bench import machine
from folovllm.course.bench.roofline import Row, pass_work
from folovllm.course.glossary import default_prompts
from folovllm.course.measure import blocks as measure_blocks
from folovllm.course.measure.attention import attention
from folovllm.course.measure.batching import batching
from folovllm.course.measure.chunks import chunks, prefixes
from folovllm.course.measure.measuring import (
    CPU,
    DECODE_CONTEXT,
    as_text,
    feed,
    load,
    load_format,
    plain,
    random_tokens,
    seconds,
    summarize,
    turned,
)
from folovllm.course.measure.ragged import ragged
from folovllm.course.measure.whole import whole
from folovllm.course.paths import RESULTS

ROUNDS = 5
PROMPT_LEN = 16  # of the loops in `cache` and `engine`

PREFILL_LEN, DECODE_STEPS, DECODE_BATCHES = 512, 8, (1, 8)
CACHE_LENGTHS = {"folo-tiny": (16, 32, 64, 128, 256), "qwen3-0.6b": (16, 32, 64)}
ENGINE_TOKENS = {"folo-tiny": 64, "qwen3-0.6b": 6}
EXACT_LEN = 32  # tokens of the text on which logits are compared


def main() -> None:
    """Run the parts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often each measurement is made ({ROUNDS})")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1: one core gives the steadiest times)")
    parser.add_argument("--models", nargs="+", default=["folo-tiny", "qwen3-0.6b"], help="of all parts but `workloads`")
    args = parser.parse_args()
    console = Console()
    if machine.git_state()["commit"] is None:
        console.print(machine.NO_COMMIT, style="yellow")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    for part in args.parts:
        for name, data in PARTS[part](console, args.rounds, args.models):
            path = RESULTS / f"{name}.json"
            path.write_text(as_text(data) + "\n", encoding="utf-8")
            console.print(f"wrote {path.relative_to(RESULTS.parent)}", highlight=False)


# ------------------------------------------------------------------ chapter 0


def workloads(console: Console, rounds: int, _: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """A prefill and two sizes of decode on the shape of Qwen3-0.6B, and the machine's ceilings beside them."""
    model, header = load("qwen3-0.6b", "auto")
    dtype = model.dtype
    prompt = random_tokens(PREFILL_LEN, model.config.vocab_size)
    context = prompt[:DECODE_CONTEXT]
    rows = {"prefill": [Row(0, PREFILL_LEN, 0)]}
    rows |= {f"decode-{b}": [Row(DECODE_CONTEXT, 1, DECODE_CONTEXT)] * b for b in DECODE_BATCHES}
    tokens = {"prefill": PREFILL_LEN} | {f"decode-{b}": b for b in DECODE_BATCHES}
    work = {name: pass_work(model.config, r, dtype.itemsize) for name, r in rows.items()}

    feed(model, prompt, DynamicCache())  # warm-up
    measured: list[dict[str, Any]] = []
    for index in range(rounds):
        ceilings = machine.probe(CPU, dtype)
        jobs: dict[str, Callable[[], float]] = {"prefill": lambda: seconds(lambda: feed(model, prompt, DynamicCache()))}
        jobs |= {f"decode-{b}": partial(decode_seconds, model, context, b) for b in DECODE_BATCHES}
        took = {name: jobs[name]() for name in turned(list(jobs), index)}
        peak = max(ceilings["gemm_flops_per_s"].values())
        points = {
            name: {
                "seconds": took[name],
                "seconds_per_token": took[name] / tokens[name],
                "flops_per_s": work[name].flops / took[name],
                "bytes_per_s": work[name].bytes / took[name],
                "share_of_peak_flops": work[name].flops / took[name] / peak,
                "share_of_read_bandwidth": work[name].bytes / took[name] / ceilings["read_bytes_per_s"],
            }
            for name in jobs
        }
        per_token = {name: point["seconds_per_token"] for name, point in points.items()}
        ratios = {f"{name}_over_prefill": per_token[name] / per_token["prefill"] for name in jobs if name != "prefill"}
        ratios["step_8_over_step_1"] = took["decode-8"] / took["decode-1"]
        ratios["ridge_flops_per_byte"] = peak / ceilings["read_bytes_per_s"]
        measured.append({"machine": ceilings, "points": points, "ratios": ratios})
        console.print(f"round {index + 1}: {took}", highlight=False)
    data = {
        **header,
        "command": "python -m folovllm.course.measure workloads",
        "prefill_len": PREFILL_LEN,
        "decode_context": DECODE_CONTEXT,
        "work": {
            name: {"flops": w.flops, "bytes": w.bytes, "intensity": w.flops / w.bytes} for name, w in work.items()
        },
        "summary": summarize(measured),
        "rounds": measured,
    }
    return [("two-workloads-qwen3-0.6b", data)]


def decode_seconds(model: PreTrainedModel, context: Sequence[int], batch: int) -> float:
    """The median time of a step that feeds one token to each of `batch` texts, after `context`."""
    cache = DynamicCache()
    feed(model, context, cache)
    cache.batch_repeat_interleave(batch)
    token = torch.full((batch, 1), context[0])  # [B, 1]

    def step() -> object:
        return model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    return sorted(seconds(step) for _ in range(DECODE_STEPS))[DECODE_STEPS // 2]


# ------------------------------------------------------------------ chapter 1


def cache(console: Console, rounds: int, models: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Both loops of M0 from the same prompt; the times of n tokens for growing n, out of one run to the largest."""
    return [(f"m0-cache-{name}", cache_of(console, name, rounds)) for name in models]


def cache_of(console: Console, name: str, rounds: int) -> dict[str, Any]:
    """One model's file."""
    model, header = load(name, "float32" if name == "folo-tiny" else "auto")
    prompt = random_tokens(PROMPT_LEN, model.config.vocab_size)
    lengths = CACHE_LENGTHS[name]
    loops: dict[str, Callable[..., BaselineResult]] = {"recompute": generate_recompute, "cached": generate_cached}
    for loop in loops.values():
        loop(model, prompt, 4)  # warm-up
    measured: list[dict[str, Any]] = []
    same = True
    kv_bytes = 0
    for index in range(rounds):
        runs = {key: loops[key](model, prompt, lengths[-1]) for key in turned(list(loops), index)}
        same = same and runs["recompute"].token_ids == runs["cached"].token_ids
        kv_bytes = runs["cached"].kv_bytes
        sums = {key: list(accumulate(run.token_times)) for key, run in runs.items()}
        measured.append(
            {
                str(n): {
                    "recompute_seconds_per_token": sums["recompute"][n - 1] / n,
                    "cached_seconds_per_token": sums["cached"][n - 1] / n,
                    "time_ratio": sums["recompute"][n - 1] / sums["cached"][n - 1],
                }
                for n in lengths
            }
        )
        measured[-1]["lm_head"] = lm_head_seconds(model)
        console.print(f"{name}, round {index + 1}: {sums['recompute'][-1]:.2f} s, {sums['cached'][-1]:.2f} s")
    data: dict[str, Any] = {
        **header,
        "command": "python -m folovllm.course.measure cache",
        "prompt_len": PROMPT_LEN,
        "new_tokens": list(lengths),
        "same_tokens": same,
        "kv_bytes": kv_bytes,
        "summary": summarize(measured),
        "rounds": measured,
    }
    if name == "folo-tiny":
        data["logit_differences"] = logit_differences(model)
    return data


def lm_head_seconds(model: PreTrainedModel) -> dict[str, float]:
    """The LM head on the last position of a prompt, as a slice of the hidden states and as a copy by index."""
    hidden = torch.zeros(1, 4 * PROMPT_LEN, model.config.hidden_size, dtype=model.dtype)  # [1, L, D]
    head = model.get_output_embeddings()
    rows = {"slice": hidden[:, -1:], "index": hidden[:, torch.tensor([hidden.shape[1] - 1])]}  # each [1, 1, D]
    with torch.inference_mode():
        took = {f"{key}_seconds": min(seconds(partial(head, row)) for _ in range(3)) for key, row in rows.items()}
    return {**took, "slice_over_index": took["slice_seconds"] / took["index_seconds"]}


def logit_differences(model: PreTrainedModel) -> dict[str, float]:
    """The largest difference of any logit from one plain forward, for ways that should and should not agree with it.

    Only `upper_triangular`, `decode_sees_itself_only` and `decode_one_position_late` are mistakes.
    """
    tokens = random_tokens(EXACT_LEN, model.config.vocab_size)
    ids = torch.tensor([tokens])  # [1, T]
    plain = model(input_ids=ids, use_cache=False).logits  # [1, T, V]
    triangle = torch.ones(1, 1, EXACT_LEN, EXACT_LEN, dtype=torch.bool).tril()  # [1, 1, T, T]

    def from_plain(logits: torch.Tensor) -> float:
        return float((logits - plain[:, -logits.shape[1] :]).abs().max())

    one_by_one = DynamicCache()
    stepwise = torch.cat([feed(model, [token], one_by_one) for token in tokens], dim=1)  # [1, T, V]

    def decode(**inputs: torch.Tensor) -> torch.Tensor:
        before = DynamicCache()
        feed(model, tokens[:-1], before)
        logits: torch.Tensor = model(input_ids=ids[:, -1:], past_key_values=before, use_cache=True, **inputs).logits
        return logits

    only_itself = torch.zeros(1, 1, 1, EXACT_LEN, dtype=torch.bool)  # [1, 1, 1, T]
    only_itself[..., -1] = True
    late = torch.tensor([[EXACT_LEN]])  # [1, 1]; right would be EXACT_LEN - 1
    return {
        "token_by_token_with_cache": from_plain(stepwise),
        "lower_triangular": from_plain(model(input_ids=ids, attention_mask=triangle, use_cache=False).logits),
        "upper_triangular": from_plain(
            model(input_ids=ids, attention_mask=triangle.transpose(2, 3), use_cache=False).logits
        ),
        "decode_sees_all": from_plain(decode(attention_mask=torch.ones_like(only_itself))),
        "decode_sees_itself_only": from_plain(decode(attention_mask=only_itself)),
        "decode_one_position_late": from_plain(decode(position_ids=late)),
        "logits_standard_deviation": float(plain.std()),
    }


# ------------------------------------------------------------------ chapter 2


def engine(console: Console, rounds: int, models: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """M1 beside the bare loop, on the same tokens; and, of the bundled model, the trace of three questions."""
    return [(f"m1-engine-{name}", engine_of(console, name, rounds)) for name in models]


def engine_of(console: Console, name: str, rounds: int) -> dict[str, Any]:
    """One model's file."""
    dtype = "float32" if name == "folo-tiny" else "auto"
    model, header = load(name, dtype)
    llm = LLM(name, milestone="m1", dtype=dtype, load_format=load_format(name), max_model_len=1024)
    prompt, n = random_tokens(PROMPT_LEN, model.config.vocab_size), ENGINE_TOKENS[name]
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)

    def loop() -> tuple[list[int], float]:
        run = generate_cached(model, prompt, n)
        return run.token_ids, sum(run.token_times[1:]) / (n - 1)

    def through_engine() -> tuple[list[int], float]:
        llm.engine.trace.clear()
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        return output.outputs[0].token_ids, output.metrics.tpot or 0.0

    jobs = {"loop": loop, "engine": through_engine}
    for job in jobs.values():
        job()  # warm-up
    measured, same = [], True
    for index in range(rounds):
        done = {key: jobs[key]() for key in turned(list(jobs), index)}
        same = same and done["loop"][0] == done["engine"][0]
        decodes = [step for step in llm.engine.trace if not step.num_prefills]
        forward = sum(step.phases["forward"][1] - step.phases["forward"][0] for step in decodes)
        measured.append(
            {
                "loop_seconds_per_token": done["loop"][1],
                "engine_seconds_per_token": done["engine"][1],
                "engine_over_loop": done["engine"][1] / done["loop"][1],
                "decode_share_outside_forward": 1 - forward / sum(step.duration for step in decodes),
            }
        )
        console.print(f"{name}, round {index + 1}: {measured[-1]}", highlight=False)
    data: dict[str, Any] = {
        **header,
        "command": "python -m folovllm.course.measure engine",
        "prompt_len": PROMPT_LEN,
        "new_tokens": n,
        "same_tokens": same,
        "summary": summarize(measured),
        "rounds": measured,
    }
    if name == "folo-tiny":
        data["trace"] = traced_questions(llm)
    return data


def traced_questions(llm: LLM) -> dict[str, Any]:
    """Three questions that arrive together, at most 24 tokens each: what every step did, and each request's times."""
    questions = default_prompts(3)
    prompts = llm.chat_prompts([[{"role": "user", "content": text}] for text in questions])
    params = SamplingParams(temperature=0, max_tokens=24)
    llm.generate(prompts, params, use_tqdm=False)  # warm-up
    llm.engine.trace.clear()
    ids = llm.enqueue(prompts, params)
    outputs = list(llm.engine.run_to_completion(ids).values())
    return {"questions": questions, **plain(llm.engine.trace, outputs)}


# ------------------------------------------------------------------ chapter 4


def blocks(console: Console, rounds: int, _: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Where KV memory goes, what it costs to give way, and what sharing saves. The keys: see `measure_blocks`."""
    header = load("folo-tiny", "float32")[1]
    facts, measured = measure_blocks.preemption_rounds(console, rounds)
    data = {
        **header,
        "command": "python -m folovllm.course.measure blocks",
        **measure_blocks.counted(),
        "preemption": facts,
        "summary": summarize(measured),
        "rounds": measured,
        "trace": {mode: plain(trace, outputs) for mode, (trace, outputs) in measure_blocks.traced().items()},
    }
    return [("m3-blocks-folo-tiny", data)]


PARTS: dict[str, Callable[[Console, int, Sequence[str]], list[tuple[str, dict[str, Any]]]]] = {
    "workloads": workloads,
    "cache": cache,
    "engine": engine,
    "batching": batching,
    "blocks": blocks,
    "attention": attention,
    "ragged": ragged,
    "chunks": chunks,
    "prefixes": prefixes,
    "whole": whole,
}

if __name__ == "__main__":
    main()
