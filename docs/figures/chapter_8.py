"""The figures of chapter 8."""

from __future__ import annotations

from typing import Any

from claims import chapter_8
from claims.ledger import result
from matplotlib.figure import Figure

from folovllm.course.grading.latency import ITL_TARGET, MS
from folovllm.course.viz.whole import (
    Agreement,
    Box,
    Held,
    Layer,
    Rung,
    layer_map,
    memory_waterfall,
    same_token_matrix,
    speed_waterfall,
    step_costs,
)

W3_PANEL, TINY_PANEL = "w3, Qwen3-0.6B, bfloat16", "this chapter's workload, folo-tiny, float32"


def draw_speed_waterfall() -> Figure:
    """What each milestone added to the tokens per second, on two workloads."""
    w3 = result(chapter_8.WATERFALL)["summary"]["w3"]
    tiny = result(chapter_8.WHOLE)["summary"]["arms"]
    panels = {
        W3_PANEL: [
            Rung(name, w3[system]["output_tokens_per_s"], chapter_8.w3_over_before(system))
            for system, name in chapter_8.W3.items()
        ],
        TINY_PANEL: [
            Rung(
                name,
                tiny[arm]["output_tokens_per_s"],
                tiny[arm]["over_before"] if chapter_8.before(arm, chapter_8.ARMS) else None,
            )
            for arm, name in chapter_8.ARMS.items()
        ],
    }
    static = {f"{chapter_8.STATIC}": w3[chapter_8.STATIC]["output_tokens_per_s"]}
    return speed_waterfall(panels, {W3_PANEL: static})


def draw_memory_waterfall() -> Figure:
    """What each milestone sets aside for K/V, and what of it is used."""

    def held(numbers: dict[str, Any], names: dict[str, str]) -> list[Held]:
        return [
            Held(name, numbers[arm]["kv_reserved_bytes"]["median"], numbers[arm]["kv_used_bytes"]["median"])
            for arm, name in names.items()
        ]

    ways = {arm: name for arm, name in chapter_8.ARMS.items() if arm != "m0-recompute"}  # which keeps nothing
    return memory_waterfall(
        {
            W3_PANEL: held(result(chapter_8.WATERFALL)["summary"]["w3"], chapter_8.W3),
            TINY_PANEL: held(result(chapter_8.WHOLE)["summary"]["arms"], ways),
        }
    )


def draw_matrix() -> Figure:
    """Milestone by block size, chunk size, cache and pool: which answers have the tokens of `generate`."""
    return matrix_of(result(chapter_8.WHOLE)["matrix"])


def matrix_of(matrix: dict[str, Any]) -> Figure:
    """The figure of a matrix as `folovllm/course/measure/chapter_8.py` writes it."""
    cells = matrix["cells"]
    chunks = sorted({cell["chunk"] for cell in cells}, key=lambda size: (size > 0, -size))
    places = [(small, cache, chunk) for small in (False, True) for cache in (False, True) for chunk in chunks]
    rows: dict[str, list[Agreement | None]] = {}
    for cell in cells:
        row = rows.setdefault(row_name(cell), [None] * len(places))
        at = places.index((cell["small"], cell["cache"], cell["chunk"]))
        row[at] = Agreement(cell["same"], matrix["total"], cell["preemptions"])
    named = [str(size) if size else "whole" for size in chunks]
    headers = [
        [("room for everybody", 2 * len(chunks)), ("too few blocks", 2 * len(chunks))],
        [("no prefix cache", len(chunks)), ("prefix cache", len(chunks))] * 2,
        [(name, 1) for name in named * 4],
    ]
    return same_token_matrix(rows, headers)


def row_name(cell: dict[str, Any]) -> str:
    """A cell's milestone, and how it batches or cuts K/V."""
    names = {"recompute": "no cache"}
    if cell["batching"]:
        return f"{cell['milestone'].upper()}, {names.get(cell['batching'], cell['batching'])}"
    return cell["milestone"].upper() + (f", blocks of {cell['block_size']}" if cell["block_size"] else "")


def draw_layers() -> Figure:
    """The three layers, the modules in each, and the eight stops of a request."""
    interface = Layer(
        "Interface",
        "text in, text out",
        [
            [
                Box("LLM", "entrypoints/llm.py", (1,), 0),
                Box("LLMEngine", "engine/llm_engine.py", (2,), 1),
                Box("Detokenizer", "engine/detokenizer.py", (8,), 2),
                Box("RequestOutput", "outputs.py", (), 3),
            ]
        ],
        "a Request: token ids, parameters",
        "sampled ids",
    )
    runtime = Layer(
        "Runtime",
        "who runs, where K/V stands, what a step is",
        [
            [
                Box("EngineCore", "engine/core.py", (3,), 0),
                Box("Scheduler", "scheduler/scheduler.py", (4,), 1),
                Box("BlockManager", "kv_cache/block_manager.py", (4,), 2),
                Box("Trace", "engine/trace.py", (), 3),
            ],
            [
                Box("PagedRunner", "runner/paged_runner.py", (5,), 0),
                Box("KV storage", "runner/kv_storage.py", (), 1),
                Box("attention", "attention/", (6,), 2),
                Box("Sampler", "sampling/sampler.py", (7,), 3),
            ],
        ],
        "ids [T], positions [T], metadata",
        "q, k, v in each layer; logits",
    )
    model = Layer(
        "Model authoring",
        "what a model is, and nothing else",
        [
            [
                Box("Decoder", "models/decoder.py", (6,), 0),
                Box("layers", "models/layers.py", (), 1),
                Box("weights", "models/weights.py", (), 2),
                Box("any HF decoder", "contrib/transformers/", (), 3),
            ]
        ],
    )
    return layer_map([interface, runtime, model])


def draw_policy_steps() -> Figure:
    """What the steps of the exercise's long prompt cost under two budgets and under the solution's policy."""
    names = {"108": "a budget of 108 tokens", "256": "a budget of 256 tokens", "solution": "by cost, shortest first"}
    policies = result(chapter_8.LATENCY)["policies"]
    return step_costs({name: policies[policy]["long_steps"] for policy, name in names.items()}, ITL_TARGET / MS)


FIGURES = {
    "speed-waterfall": draw_speed_waterfall,
    "memory-waterfall": draw_memory_waterfall,
    "same-token-matrix": draw_matrix,
    "three-layers": draw_layers,
    "policy-steps": draw_policy_steps,
}
