"""The figures of the chapters: what is drawn under which name, from formulas, results files and the engine itself.

The drawing is done by `folovllm.course.viz`; here stands only what goes in. {drawn} shows a figure by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import matplotlib as mpl
import torch
from claims import chapter_0, chapter_1, chapter_2, chapter_3
from claims.ledger import RESULTS, ROOT, result
from claims.models import BYTES_16_BIT, bundled
from figures_blocks import FIGURES as OF_BLOCKS
from figures_m4 import FIGURES as OF_M4
from figures_ragged import FIGURES as OF_RAGGED
from figures_whole import FIGURES as OF_WHOLE
from matplotlib.figure import Figure
from traces import steps_of, traced_requests

from folovllm.course.viz import batching
from folovllm.course.viz.flow import shape_flow
from folovllm.course.viz.kv import cache_timing, kv_bytes_bars, kv_cells
from folovllm.course.viz.masks import attention_masks
from folovllm.course.viz.padding import (
    batch_rectangle,
    kv_cells_of_static,
    kv_cells_of_trace,
    padding_map,
    padding_over_steps,
)
from folovllm.course.viz.roofline import RooflinePoint, attention_share, roofline
from folovllm.course.viz.sampling import Release, filter_stages, text_release
from folovllm.course.viz.timeline import latency_timeline, phase_times, request_gantt
from folovllm.engine.detokenizer import Detokenizer
from folovllm.kv_cache.formulas import attention_kind, kv_bytes_per_token
from folovllm.models.loader import load_hf_model, resolve_model
from folovllm.sampling.logits import apply_min_p, apply_temperature, apply_top_k, apply_top_p

FILES = sorted((ROOT / "docs").glob("figures*.py"))
DEPENDS_ON = (*FILES, *sorted(RESULTS.glob("*.json")), *sorted((ROOT / "folovllm" / "viz").glob("*.py")))

# --- chapter 0 --------------------------------------------------------------------------------------------


def draw_latencies() -> Figure:
    """TTFT, ITL and end-to-end latency of three requests at M1."""
    return latency_timeline(*traced_requests())


def draw_roofline() -> Figure:
    """Prefill and decode under the ceilings of the machine that they were measured on."""
    data = result(chapter_0.WORKLOADS)
    summary = data["summary"]
    kinds = {
        "prefill": ("prefill of 512", "prefill"),
        "decode-1": ("1 text", "decode"),
        "decode-8": ("8 texts", "decode"),
    }
    points = [
        RooflinePoint(label, data["work"][key]["intensity"], summary["points"][key]["flops_per_s"]["median"], kind)
        for key, (label, kind) in kinds.items()
    ]
    return roofline(*chapter_0.machine_ceilings(), points)


def draw_attention_share() -> Figure:
    """Attention's share of Llama-2-7B's FLOPs, with and without the hidden half."""
    lengths = [round(100 * 10 ** (i / 20)) for i in range(71)]
    names = {"every pair computed": False, "hidden pairs skipped": True}
    return attention_share(
        lengths,
        {name: [chapter_0.attention_share(n, causal) for n in lengths] for name, causal in names.items()},
        {name: chapter_0.attention_crossing(causal) for name, causal in names.items()},
    )


# --- chapter 1 --------------------------------------------------------------------------------------------


def draw_masks() -> Figure:
    """The causal mask, its transpose, and the row of one decode step."""
    square = torch.ones(5, 5, dtype=torch.bool)
    masks = {
        "causal: lower triangle": square.tril().numpy(),
        "wrong: upper triangle": square.triu().numpy(),
        "decode: the last row": square.tril()[-1:].numpy(),
    }
    return attention_masks(masks)


def draw_kv_cells() -> Figure:
    """A prompt of 4 and 6 new tokens: what each step computes and what it finds."""
    prompt, n = 4, 6
    ends = [prompt + step for step in range(n)]
    return kv_cells(
        {
            "without a cache": [(0, end) for end in ends],
            "with a cache": [(0, prompt), *((end - 1, end) for end in ends[1:])],
        }
    )


def draw_shapes() -> Figure:
    """Shapes in Qwen3-0.6B for a prompt of 12 tokens and for the decode step after it."""
    config = bundled("qwen3-0.6b")
    heads, kv_heads, size, width = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_size,
    )

    def flow(fed: int, total: int) -> list[tuple[str, list[int]]]:
        return [
            ("input_ids", [1, fed]),
            ("position_ids", [1, fed]),
            ("embeddings", [1, fed, width]),
            ("queries", [1, heads, fed, size]),
            ("new keys", [1, kv_heads, fed, size]),
            ("keys in the cache", [1, kv_heads, total, size]),
            ("scores", [1, heads, fed, total]),
            ("layer output", [1, fed, width]),
            ("logits kept", [1, 1, config.vocab_size]),
        ]

    return shape_flow({"prefill of 12": flow(12, 12), "decode step": flow(1, 13)})


def draw_kv_bytes() -> Figure:
    """Bytes per token of the models in the table."""
    return kv_bytes_bars(
        [
            (name, attention_kind(config), kv_bytes_per_token(config, BYTES_16_BIT))
            for name, config in chapter_1.SIZES.items()
        ]
    )


def draw_cache_timing() -> Figure:
    """M0 on the bundled model with and without a cache."""
    data = result(chapter_1.TINY)
    lengths = data["new_tokens"]
    times = {
        loop: [1e3 * data["summary"][str(n)][f"{loop}_seconds_per_token"]["median"] for n in lengths]
        for loop in ("recompute", "cached")
    }
    ratios = [chapter_1.flop_ratio(chapter_1.TINY, n) for n in lengths]
    time_ratios = [data["summary"][str(n)]["time_ratio"]["median"] for n in lengths]
    return cache_timing(lengths, times["recompute"], times["cached"], ratios, time_ratio=time_ratios)


# --- chapter 2 --------------------------------------------------------------------------------------------

FILTER_PROMPT = "The cache"


def draw_gantt() -> Figure:
    """Three requests at M1: one at a time."""
    steps, outputs = traced_requests()
    endings = {o["request_id"]: o["finish_reason"] for o in result(chapter_2.TINY)["trace"]["outputs"]}
    return request_gantt(steps, [output.request_id for output in outputs], endings=endings)


def draw_phases() -> Figure:
    """Where the time of those steps went."""
    return phase_times(traced_requests()[0])


def draw_filters() -> Figure:
    """The bundled model's next token after a text it has not learned, through the filters in their order."""
    tokenizer = chapter_2.tokenizer()
    model = load_hf_model(resolve_model("folo-tiny"), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode(FILTER_PROMPT)])).logits[:, -1].float()  # [1, V]
        stages = {"softmax of the logits": logits}
        for name, apply, value in (
            ("temperature 1.5", apply_temperature, torch.tensor([[1.5]])),
            ("min_p 0.02", apply_min_p, torch.tensor([[0.02]])),
            ("top_k 12", apply_top_k, torch.tensor([[12]])),
            ("top_p 0.9", apply_top_p, torch.tensor([[0.9]])),
        ):
            stages[name] = apply(next(reversed(stages.values())), value)
    labels = [repr(tokenizer.decode([i])) for i in range(logits.shape[-1])]
    return filter_stages({name: x.softmax(dim=-1)[0].numpy() for name, x in stages.items()}, labels)


def draw_release() -> Figure:
    """A stream with an emoji that spans tokens and a stop string that does as well."""
    tokenizer = chapter_2.tokenizer()
    detokenizer = Detokenizer(tokenizer, [chapter_2.STOP])
    moments = []
    for token_id in tokenizer.encode(chapter_2.STREAMED):
        detokenizer.update([token_id])
        visible = detokenizer.visible
        moments.append(Release(token_text(tokenizer, token_id), visible, detokenizer.text[len(visible) :]))
        if detokenizer.stop_reason is not None:
            break
    return text_release(moments)


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token's text, or its bytes where it is a part of a character."""
    text = str(tokenizer.decode([token_id]))
    if "\ufffd" not in text:
        return repr(text)[1:-1].replace(" ", "\u2423")
    return f"token {token_id}"


# --- chapter 3 --------------------------------------------------------------------------------------------


def draw_batch_gantt() -> Figure:
    """The same requests arriving over time, in static, dynamic and continuous batches."""
    ways = result(chapter_3.TINY)["trace"]["poisson"]["lives"]
    return batching.batch_gantt({name: [batching.Life(**life) for life in lives] for name, lives in ways.items()})


def served() -> tuple[list[int], list[int]]:
    """Prompt and output lengths of the requests that were served on folo-tiny."""
    requests = result(chapter_3.TINY)["requests"]
    return [prompt for prompt, _ in requests], [output for _, output in requests]


def draw_padding_map() -> Figure:
    """The first four of these as a rectangle, and what becomes of it in a static batch."""
    prompts, outputs = (lengths[: chapter_3.SEATS] for lengths in served())
    return padding_map(
        {
            "prefill": batch_rectangle(prompts),
            "static batch, last step": batch_rectangle(prompts, outputs, max(outputs) - 1),
        }
    )


def draw_padding_over_steps() -> Figure:
    """K/V in the batch of each step, static and continuous."""
    trace = steps_of(result(chapter_3.TINY)["trace"]["continuous"])
    seats = chapter_3.SEATS
    return padding_over_steps(
        {
            f"static, batches of {seats}": kv_cells_of_static(*served(), seats),
            f"M2, {seats} seats": kv_cells_of_trace(trace),
        }
    )


def draw_ratios() -> Figure:
    """Every system of w2 over M1."""
    systems = result(chapter_3.W2)["summary"]["w2"]
    return batching.ratio_bars({name: numbers["ratio_to_base"] for name, numbers in systems.items() if name != "m1"})


def draw_throughput() -> Figure:
    """Tokens per second over the number of seats on folo-tiny."""
    arms = result(chapter_3.TINY)["summary"]["arms"]
    speeds = {arm: numbers["output_tokens_per_s"] for arm, numbers in arms.items()}
    names = {"M2 padded": "m2-padded-", "M2 loop": "m2-loop-", "static batches": "static-"}
    series = {
        name: {int(arm.removeprefix(start)): speeds[arm] for arm in speeds if arm.startswith(start)}
        for name, start in names.items()
    }
    return batching.throughput_by_batch(series, base=("M1", speeds["m1"]))


def draw_waits() -> Figure:
    """Steps that each request waited, under each policy."""
    policies = result(chapter_3.TINY)["policies"]
    urgent = policies["priorities"]
    labels = [f"{i}{', urgent' * (priority == 0)}" for i, priority in enumerate(urgent)]
    waits = {name: policies[name]["waited_steps"] for name in policies if name != "priorities"}
    return batching.waiting_times(waits, labels, "steps")


def draw_queue_depth() -> Figure:
    """Who waits and who runs in each step, under each policy."""
    policies = result(chapter_3.TINY)["policies"]
    return batching.queue_depth({name: policies[name]["waiting_running"] for name in policies if name != "priorities"})


def draw_starvation() -> Figure:
    """A long request while short ones keep coming."""
    data = dict(result(chapter_3.TINY)["starvation"])
    stream = data.pop("short_requests")
    return batching.starvation(stream, data)


FIGURES: dict[str, Callable[[], Figure]] = {
    "latency-timeline": draw_latencies,
    "roofline": draw_roofline,
    "attention-share": draw_attention_share,
    "causal-masks": draw_masks,
    "kv-cells": draw_kv_cells,
    "tensor-shapes": draw_shapes,
    "kv-bytes": draw_kv_bytes,
    "cache-timing": draw_cache_timing,
    "request-gantt": draw_gantt,
    "phase-times": draw_phases,
    "filter-stages": draw_filters,
    "text-release": draw_release,
    "batch-gantt": draw_batch_gantt,
    "padding-map": draw_padding_map,
    "padding-over-steps": draw_padding_over_steps,
    "ratio-bars": draw_ratios,
    "throughput-by-batch": draw_throughput,
    "waiting-times": draw_waits,
    "queue-depth": draw_queue_depth,
    "starvation": draw_starvation,
    **OF_BLOCKS,
    **OF_RAGGED,
    **OF_M4,
    **OF_WHOLE,
}


def svg(name: str) -> bytes:
    """A figure as SVG, the same bytes at every build."""
    data = BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        FIGURES[name]().savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()
