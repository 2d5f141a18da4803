"""The figures of chapter 6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claims import chapter_6
from claims.ledger import result
from matplotlib.figure import Figure

from folovllm.course.viz import chunks


def draw_chunked_mask() -> Figure:
    """A prompt of ten tokens in one pass, and in chunks of at most four."""
    return chunks.chunked_mask([4, 4, 2])


def compositions(fills: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, chunks.Composition]:
    """Runs of a results file, under other names."""
    return {name: chunks.Composition(**fills[key]) for key, name in names.items()}


def draw_chunk_steps() -> Figure:
    """What fills the steps of eight streams and a long prompt, in one chunk and in chunks."""
    names = {"m3": "M3, in one chunk", "256": "M4, a budget of 256", "64": "M4, a budget of 64"}
    return chunks.step_composition(compositions(result(chapter_6.CHUNKS)["fills"], names))


def draw_chunk_latency() -> Figure:
    """ITL of the streams and TTFT of the long prompt over the budget."""
    arms = result(chapter_6.CHUNKS)["summary"]["arms"]
    budgets = sorted(int(arm) for arm in arms if arm.isdigit())

    def over(key: str) -> list[dict[str, float]]:
        return [arms[str(budget)][key] for budget in budgets]

    panels = {
        "ITL of the streams": {
            "p50, while the prompt is computed": over("itl_p50_s"),
            "p95, while the prompt is computed": over("itl_p95_s"),
            "p95, whole run": over("run_itl_p95_s"),
        },
        "TTFT of the long prompt": {"p50": over("ttft_p50_s"), "p95": over("ttft_p95_s")},
    }
    return chunks.latency_by_chunk(budgets, panels, labels={budgets[-1]: "all"})


FIGURES = {"chunked-mask": draw_chunked_mask, "chunk-steps": draw_chunk_steps, "chunk-latency": draw_chunk_latency}
