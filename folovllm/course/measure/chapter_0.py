"""The measurement of chapter 0, `python -m folovllm.course.measure workloads`: prefill and decode, and the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel

from folovllm.course.bench import machine
from folovllm.course.bench.roofline import Row, pass_work
from folovllm.course.bench.rounds import in_turn
from folovllm.course.measure.measuring import CPU, DECODE_CONTEXT, feed, in_rounds, load, random_tokens, seconds

PREFILL_LEN, DECODE_STEPS, DECODE_BATCHES = 512, 8, (1, 8)


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
        took = in_turn(jobs, index)
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
    data = in_rounds(
        header,
        "workloads",
        measured,
        prefill_len=PREFILL_LEN,
        decode_context=DECODE_CONTEXT,
        work={name: {"flops": w.flops, "bytes": w.bytes, "intensity": w.flops / w.bytes} for name, w in work.items()},
    )
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
