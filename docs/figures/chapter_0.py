"""The figures of chapter 0."""

from __future__ import annotations

from claims import chapter_0
from claims.ledger import result
from matplotlib.figure import Figure
from traces import traced_requests

from folovllm.course.viz.roofline import RooflinePoint, attention_share, roofline
from folovllm.course.viz.timeline import latency_timeline


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


FIGURES = {"latency-timeline": draw_latencies, "roofline": draw_roofline, "attention-share": draw_attention_share}
